"""Imports everything from the installed wheel, and makes sure that it is the wheel and not the checkout."""

import importlib
import pkgutil
import sys
from pathlib import Path

import mmssl

site = Path(sys.argv[1]).resolve()
assert Path(mmssl.__file__).resolve().is_relative_to(site), f"imported {mmssl.__file__}, not the wheel in {site}"
modules = [module.name for module in pkgutil.walk_packages(mmssl.__path__, "mmssl.")]
for module in modules:
    importlib.import_module(module)
for needed in ("mmssl.modalities.image", "mmssl.objectives.masked_reconstruction", "mmssl.training.loop"):
    assert needed in modules, f"{needed} is missing from the wheel"
print(f"The wheel holds {len(modules)} modules, and all of them import.")
