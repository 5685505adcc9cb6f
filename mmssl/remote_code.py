"""A model with its code beside the weights, for transformers' ``trust_remote_code``."""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from mmssl import discovery
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.task_models import TaskModel
from mmssl.version import __version__

MODEL_CLASSES = {
    "AutoConfig": "modeling.MMSSLConfig",
    "AutoModel": "modeling.MMSSLModel",
    **dict.fromkeys(
        [
            "AutoModelForSequenceClassification",
            "AutoModelForImageClassification",
            "AutoModelForAudioClassification",
            "AutoModelForVideoClassification",
        ],
        "task_models.MMSSLForSequenceClassification",
    ),
    "AutoModelForTokenClassification": "task_models.MMSSLForTokenClassification",
    "AutoModelForSemanticSegmentation": "task_models.MMSSLForSemanticSegmentation",
    "AutoModelForTimeSeriesPrediction": "task_models.MMSSLForForecasting",
}
PROCESSOR_CLASSES = {
    "AutoProcessor": "processing.MMSSLProcessor",
    "AutoFeatureExtractor": "processing.MMSSLFeatureExtractor",
}
OWN_IMPORT = re.compile(r"^(\s*)from (mmssl(?:\.\w+)*)\.(\w+) import", flags=re.MULTILINE)


def self_contained(model: MMSSLModel | TaskModel, folder: str | Path) -> None:
    """Save a model, with a head or without, its processor, and the code of both."""
    model.save_pretrained(folder)
    MMSSLProcessor(MMSSLFeatureExtractor(model.config.modalities)).save_pretrained(folder)
    add_code(Path(folder))


def add_code(folder: Path) -> None:
    """Write the code of a model and its processor beside their configurations, and into these where it is.

    ``AutoModel`` and ``AutoProcessor`` load them with ``trust_remote_code=True`` where mmssl is not installed, and
    take mmssl's own code where it is imported.
    """
    options = MMSSLConfig.from_pretrained(folder).modalities or {}
    for name, text in code_of(make_modality(*each) for each in options.items()).items():
        (folder / f"{name}.py").write_text(text)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "auto_map": MODEL_CLASSES}, indent=2))
    about = json.loads((folder / "processor_config.json").read_text())
    about |= {"auto_map": PROCESSOR_CLASSES}
    about["feature_extractor"] |= {"auto_map": PROCESSOR_CLASSES}
    (folder / "processor_config.json").write_text(json.dumps(about, indent=2))


def code_of(modalities: Iterable[Modality]) -> dict[str, str]:
    """The modules that models of these modalities need, by the names of their files.

    They lie in one folder, which is all that ``trust_remote_code`` reads, and import each other from there.
    """
    chosen = {each.name: type(each) for each in modalities}
    todo, found = ["mmssl.modeling", "mmssl.processing", "mmssl.task_models"], dict[str, str]()
    todo += [each.__module__ for each in chosen.values()]
    origins: dict[str, str] = {}
    while todo:
        module = todo.pop()
        name = module.rpartition(".")[2]
        if origins.setdefault(name, module) != module:
            raise ValueError(f"{module} and {origins[name]} cannot lie in one folder; rename one of them")
        if name in found:
            continue
        if module == "mmssl.discovery":
            text = finder(chosen)
        else:
            spec = find_spec(module)
            assert spec is not None and spec.origin is not None
            text = without_demands(Path(spec.origin).read_text())
        todo += [f"{package}.{name}" for _, package, name in OWN_IMPORT.findall(text)]
        found[name] = f"# Written by mmssl {__version__}, licence Apache-2.0.\n" + OWN_IMPORT.sub(
            r"\1from .\3 import", text
        )
    return found


def finder(modalities: dict[str, type]) -> str:
    """In place of ``mmssl.discovery``, which looks into folders: these modalities alone."""
    branch = "    if name == {0!r}:\n        from {1} import {2}\n\n        return {2}\n"
    branches = "".join(branch.format(name, cls.__module__, cls.__name__) for name, cls in modalities.items())
    message = f'f"found modality {{name!r}}; this checkpoint has: {", ".join(modalities)}"'
    kept = "\n\n".join(inspect.getsource(each) for each in (discovery.option_names, discovery.options_of))
    return (
        '"""Finds the modalities of this checkpoint."""\n\nimport inspect\nfrom typing import Any\n\n\n'
        f"def find(package: str, name: str, base: type) -> type:\n{branches}    raise ValueError({message})\n\n\n{kept}"
    )


def without_demands(source: str) -> str:
    """Imports inside of functions are wrapped in ``try``: transformers demands all others before it loads a file."""
    lines = source.splitlines(keepends=True)
    for node in reversed(late_imports(ast.parse(source))):
        indent = " " * node.col_offset
        body = [f"    {line}" for line in lines[node.lineno - 1 : node.end_lineno]]
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}try:\n", *body, f"{indent}finally:\n{indent}    pass\n"]
    return "".join(lines)


def late_imports(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Imports of other libraries below the top of a module, in the order of their lines, those in ``try`` left out."""
    found: list[ast.Import | ast.ImportFrom] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom) and child.col_offset:
            names = [child.module or ""] if isinstance(child, ast.ImportFrom) else [each.name for each in child.names]
            if not {name.partition(".")[0] for name in names} <= {"mmssl", *sys.stdlib_module_names}:
                found.append(child)
        elif not isinstance(child, ast.Try):
            found += late_imports(child)
    return found
