"""Finds modalities and objectives by their files: a new one is one file, with nothing to register."""

import importlib
import inspect
import pkgutil
from typing import Any


def names(package: str) -> list[str]:
    """Names of the modules in ``mmssl.<package>`` that define something to choose: all but ``base``."""
    path = importlib.import_module(f"mmssl.{package}").__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.name != "base")


def find(package: str, name: str, base: type) -> type:
    """The subclass of ``base`` that the file ``<package>/<name>.py`` defines.

    Raises:
        ValueError: no such file; the message lists those there are.
    """
    if name not in names(package):
        raise ValueError(f"unknown name {name!r} in mmssl.{package}; available: {', '.join(names(package))}")
    module = importlib.import_module(f"mmssl.{package}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{module.__file__}: found {len(found)} subclasses of {base.__name__}; expected one")
    return found[0]


def find_all(package: str, base: type) -> dict[str, type]:
    """All of them, by the names of their classes."""
    classes = [find(package, name, base) for name in names(package)]
    return {cls.__name__: cls for cls in classes}


def option_names(cls: type) -> list[str]:
    """The arguments of a modality's or an objective's ``__init__``, the model left out."""
    return [name for name in inspect.signature(cls).parameters if name != "model"]


def options_of(instance: Any) -> dict[str, Any]:
    """The options that an instance was made with: it keeps each as an attribute of the same name."""
    return {name: getattr(instance, name) for name in option_names(type(instance))}
