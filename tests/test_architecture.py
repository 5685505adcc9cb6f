"""Who may import whom, read from the sources: the rules of the design, held without importing anything.

tokens <- encoder, positions <- modalities <- modeling <- objectives <- training, evaluation <- cli, examples
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BOTTOM = {
    "discovery",
    "version",
    "randomness",
    "samples",
    "teacher",
    "monitors",
    "collectives",
    "graph_files",
    "point_files",
    "series_files",
    "table_columns",
}
ENCODING = {
    *BOTTOM,
    "pixels",
    "scattering",
    "video_files",
    "tokens",
    "edges",
    "encoder",
    "positions",
    "geometry",
    "signals",
    "motifs",
    "drawings",
}
MODEL = {*ENCODING, "modalities", "modeling", "heads", "feature_queue"}
USERS = {*MODEL, "processing", "task_models", "objectives", "data", "probes"}
EVERYTHING = {*USERS, "figures", "remote_code", "export", "model_card", "hub", "training", "evaluation", "cli", "mmssl"}
MAY_IMPORT = {
    "discovery": set(),
    "version": set(),
    "randomness": set(),
    "samples": set(),
    "teacher": set(),
    "monitors": set(),
    "probes": set(),
    "collectives": set(),
    "heads": {"collectives"},
    "feature_queue": {"collectives"},
    "graph_files": {"samples"},
    "point_files": {"samples"},
    "pixels": {"samples"},
    "scattering": {"pixels"},
    "video_files": {"samples", "pixels"},
    "series_files": {"samples"},
    "table_columns": {"samples"},
    "tokens": set(),
    "dropout": set(),
    "edges": {"dropout"},
    "geometry": set(),
    "signals": {"tokens"},
    "motifs": set(),
    "drawings": set(),
    "encoder": {*BOTTOM, "tokens", "dropout", "edges"},
    "positions": {*BOTTOM, "tokens"},
    "modalities": ENCODING,
    "modeling": MODEL,
    "processing": MODEL,
    "task_models": MODEL,
    "figures": {"modalities", "tokens"},
    "remote_code": {*MODEL, "processing", "task_models"},
    "export": {*USERS, "remote_code", "training"},
    "objectives": MODEL,
    "data": {*ENCODING, "modalities"},
    "model_card": {*USERS, "evaluation"},
    "hub": {*USERS, "evaluation", "model_card", "remote_code"},
    "training": {*USERS, "figures", "hub"},
    "evaluation": {*USERS, "figures"},
    # mmssl/__init__.py: what `import mmssl` brings; training when first used, the test of a light import sees to that
    "mmssl": {"modeling", "processing", "task_models", "training", "version"},
    "cli": EVERYTHING,
    "__main__": {"cli"},
    "examples": EVERYTHING,
    "benchmarks": EVERYTHING,
}


# PyTorch's names for the graph of derivatives, which no modality is meant by.
NO_NAMES = {"create_graph", "retain_graph"}


def modules() -> Iterator[tuple[str, Path]]:
    """Each source file and its module name; what is linked into the package is read where it really stands."""
    for folder in ("mmssl", "modalities", "objectives", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in {("mmssl", "modalities"), ("mmssl", "objectives")}:
                continue
            prefix = ("mmssl",) if folder in ("modalities", "objectives") else ()
            yield ".".join([*prefix, *parts]).removesuffix(".__init__"), path


def room(module: str) -> str:
    """The file or folder a module belongs to: ``training`` for ``mmssl.training.loop``, ``mmssl`` for ``mmssl``."""
    first, *rest = module.split(".")
    return rest[0] if first == "mmssl" and rest else first


def imported_room(name: str) -> str:
    """The room that an import reaches; what is no room is defined in ``mmssl/__init__.py``."""
    return room(name) if room(name) in MAY_IMPORT else "mmssl"


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of each import: at the top, in functions, relative, and by import_module("...")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of the project that the design does not allow in this module."""
    own = room(module)
    found = []
    for line, name in imports(source, module, is_package):
        first = name.split(".")[0]
        if first in ("modalities", "objectives"):
            found.append(f"{module}:{line}: {name} is a second copy of mmssl.{name}; import that")
        elif first == "mmssl" and imported_room(name) not in {own, *MAY_IMPORT[own]}:
            found.append(f"{module}:{line}: {own} must not import {name}; it may import {sorted(MAY_IMPORT[own])}")
        elif own == "objectives" and re.match(r"mmssl\.modalities\.(?!base\b)\w", name):
            found.append(f"{module}:{line}: an objective must not know {name}; only mmssl.modalities.base")
    return found


def words(text: str) -> list[str]:
    """``PointCloud``, ``point_cloud_size`` or "a point cloud" as lower-case words, plurals without their s."""
    return [word.lower().removesuffix("s") for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+|\d+", text)]


def named(source: str, choices: list[str]) -> list[str]:
    """Where identifiers or strings contain one of these names; comments, docstrings and ``references`` may."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings: never a value
    for node in ast.walk(tree):  # titles of papers are as they are
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "references":
            bare |= {id(inner) for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) in bare:
            continue
        texts: list[str] = []
        for _, value in ast.iter_fields(
            node
        ):  # identifiers are fields too: Name.id, Attribute.attr, arg.arg, alias.name
            texts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        for text in set(texts) - NO_NAMES:
            has = words(text)
            for choice in choices:
                wanted = words(choice)
                if any(has[start : start + len(wanted)] == wanted for start in range(len(has))):
                    found.append(f"line {getattr(node, 'lineno', '?')}: {text!r} names {choice!r}")
    return found


def file_names(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.stem not in ("__init__", "base"))


MODULES = [pytest.param(module, path, id=module) for module, path in modules()]


@pytest.mark.parametrize(("module", "path"), MODULES)
def test_imports_follow_the_arrows_of_the_design(module: str, path: Path) -> None:
    assert room(module) in MAY_IMPORT, f"{path} stands in no known room: give it a line in MAY_IMPORT"
    assert not forbidden_imports(path.read_text(), module, path.name == "__init__.py")


def test_every_room_is_read() -> None:
    """The check above looks at the files that there are."""
    rooms = {room(module) for module, _ in modules()}
    assert {"mmssl", *USERS, "training", "evaluation", "cli", "examples"} <= rooms
    assert len(file_names("modalities")) >= 2
    assert len(file_names("objectives")) >= 1


@pytest.mark.parametrize("folder", ["objectives", "modalities"])
def test_objectives_and_modalities_do_not_name_each_other(folder: str) -> None:
    others = file_names("modalities" if folder == "objectives" else "objectives")
    found = {path.name: named(path.read_text(), others) for path in (ROOT / folder).glob("*.py")}
    assert found
    assert not {name: places for name, places in found.items() if places}


def test_tokens_imports_nothing_of_the_project() -> None:
    names = [name for _, name in imports((ROOT / "mmssl" / "tokens.py").read_text(), "mmssl.tokens")]
    assert names
    assert not [name for name in names if name.startswith("mmssl")]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmssl.tokens", "from mmssl.version import __version__"),
        ("mmssl.tokens", "from . import discovery"),
        ("mmssl.encoder", "import mmssl.positions"),
        ("mmssl.positions", "from mmssl.encoder import Encoder"),
        ("mmssl.modalities.image", "def late():\n    from mmssl.modeling import MMSSLModel"),
        ("mmssl.modalities.image", "from mmssl import MMSSLModel"),
        ("mmssl.modalities.image", "from ..objectives import base"),
        ("mmssl.modeling", "from mmssl import processing"),
        ("mmssl.modeling", "if TYPE_CHECKING:\n    from .objectives.base import Objective"),
        ("mmssl.processing", "import os, mmssl.training.loop as loop"),
        ("mmssl.objectives.base", "from mmssl.training.schedule import learning_rate"),
        ("mmssl.objectives.base", "from mmssl.modalities.image import Image"),
        ("mmssl.objectives.base", "from mmssl.modalities import image"),
        ("mmssl.objectives.base", "from modalities.base import Modality"),
        ("mmssl.data.sources", "from mmssl.modeling import MMSSLModel"),
        ("mmssl.data.sources", 'importlib.import_module("mmssl.objectives.base")'),
        ("mmssl.training.loop", "from mmssl.cli import main"),
        ("mmssl.evaluation.evaluate", "from ..training import pretrain"),
        ("mmssl.evaluation.evaluate", "from mmssl import cli"),
        ("mmssl.discovery", "from mmssl.modalities.base import Modality"),
    ],
)
def test_the_checker_finds_a_forbidden_import(module: str, source: str) -> None:
    assert len(forbidden_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmssl.encoder", "import torch\nfrom mmssl.tokens import Tokens\nfrom .discovery import find"),
        (
            "mmssl.modalities.video",
            "from mmssl.modalities.image import pair\nfrom mmssl.positions import SinCosPositions",
        ),
        ("mmssl.modeling", "from mmssl.modalities.base import Batch\nfrom transformers import modeling_utils"),
        ("mmssl.objectives.other", "from mmssl.modalities.base import Batch\nfrom mmssl.objectives import base"),
        ("mmssl.data.sources", "from mmssl.modalities.base import Modality\nfrom mmssl.data.prepared import x"),
        ("mmssl.training.loop", "from mmssl.data import load_samples\nfrom .checkpoint import RECORD"),
        ("mmssl.cli", "import mmssl\nfrom mmssl import __version__\nfrom mmssl.training import pretrain"),
        ("examples.pretrain_image", "from mmssl.cli import parse_pretrain\nimport mmssl"),
    ],
)
def test_the_checker_lets_what_is_allowed_pass(module: str, source: str) -> None:
    assert forbidden_imports(source, module) == []


def test_the_checker_resolves_the_imports_of_a_package() -> None:
    assert not forbidden_imports("from .modeling import MMSSLModel", "mmssl", is_package=True)
    assert len(forbidden_imports("from .evaluation import evaluate", "mmssl", is_package=True)) == 1
    assert not forbidden_imports("from .loop import pretrain", "mmssl.training", is_package=True)
    assert len(forbidden_imports("from ..cli import main", "mmssl.training", is_package=True)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "if modality.name == 'image': pass",
        "isinstance(modality, Image)",
        "size = modality.image_size",
        "def f(images): pass",
        "f(point_cloud=1)",
        "class PointCloudDecoder: pass",
        "raise ValueError(f'{x}: not for point clouds')",
        "from x import image as y",
        "def f():\n    'docstring'\n    return 'image'",
    ],
)
def test_the_checker_finds_a_name(source: str) -> None:
    assert len(named(source, ["image", "point_cloud"])) == 1


@pytest.mark.parametrize(
    "source",
    [
        "'''Reads images and point clouds.'''",
        "class A:\n    '''An image.'''\n    def f(self):\n        '''A PointCloud.'''",
        "x = 1  # of an image",
        "class A:\n    references: ClassVar = ('Predicting image rotations', 'Point cloud video')",
        "loss.backward(retain_graph=True)",
        "imagenet = imaginary = cloud_point = point = 'pointless clouds, imagery'",
    ],
)
def test_the_checker_lets_other_words_pass(source: str) -> None:
    assert named(source, ["image", "point_cloud", "graph"]) == []


@pytest.mark.slow
def test_importing_mmssl_and_naming_its_modalities_is_light() -> None:
    """torchaudio and soundfile are not on the list: transformers itself imports them where they are installed."""
    heavy = {"kornia", "torch_geometric", "sklearn", "datasets", "matplotlib", "jsonargparse"}
    empty: dict[str, dict] = {name: {} for name in file_names("modalities")}
    code = f"""
import sys, mmssl
print(sorted({heavy!r} & sys.modules.keys()))
mmssl.MMSSLConfig(modalities={empty!r})
print(sorted({heavy!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == ["[]", "[]"], done.stdout + done.stderr[-2000:]
