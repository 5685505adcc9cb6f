"""How alike the layers of encoders are: linear centred kernel alignment (Kornblith et al., 2019).

Of features X (n, F) and Y (n, G) of the same n samples, centred, it is |Xᵀ Y|² / (|Xᵀ X| |Yᵀ Y|), with Frobenius norms:
1 where one is a rotation of the other, stretched alike in all directions, and 0 where nothing of one follows from the
other. Written with Gram matrices K = X Xᵀ and L = Y Yᵀ, the same is <K, L> / (|K| |L|). Of few samples of many features
it is too high, by chance alone: compare encoders on as many samples.
"""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.evaluation.features import Pooling, extract, layers
from mmssl.evaluation.models import fresh, load_model, pick_modality
from mmssl.evaluation.splits import readable

UNTRAINED = "untrained"
STILL = 1e-6  # share of a layer's size below which what varies is rounding: single precision has seven digits


def layer_cka(
    checkpoint: str | Path,
    other: str | Path | None,
    data: DataArguments,
    modality: str | None = None,
    pooling: Pooling = "mean",
    max_samples: int = 1000,
) -> np.ndarray:
    """Linear CKA of each layer of one encoder with each layer of another one, on the same samples.

    Args:
        checkpoint: folder or Hub name of a model.
        other: another one of the same modality, of any shape; "untrained": the first one's architecture with start
            values of seed 0; None: the first one itself.
        data: samples, with or without labels.
        modality: which modality of a model that has several.
        pooling: from tokens to samples.
        max_samples: of more samples so many are read, evenly spaced.

    Returns:
        (layers + 1, layers + 1 of the other): the input of the first block and the output of each one; the last one is
        that of the encoder. NaN for a layer that is the same for all samples, such as a class token before any block.

    Raises:
        ValueError: models without a modality in common, or fewer than two samples.
    """
    if max_samples < 2:
        raise ValueError(f"max_samples: found {max_samples}; expected at least 2")
    model = load_model(checkpoint)
    name = pick_modality(model, modality)
    models = [model]
    if other is not None:
        models.append(fresh(model, 0) if other == UNTRAINED else load_model(other))
    if name not in models[-1].adapters:
        raise ValueError(f"{other} reads {', '.join(models[-1].adapters)}; expected {name}, as {checkpoint} does")

    samples = load_samples(data, model.adapters[name])
    kept = np.linspace(0, len(samples) - 1, min(len(samples), max_samples)).round().astype(int)
    samples = readable(samples.select(kept), data, model.adapters[name])
    if len(samples) < 2:
        raise ValueError(f"data: found {len(samples)} sample of {data.source}; CKA compares samples, and needs many")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for each in models:
        torch.nn.Module.to(each, device)
        found += extract(PreparedSamples(samples, each.adapters[name]), [layers(each, pooling)], device)
    return linear_cka(found[0], found[-1])


def linear_cka(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(L, M) CKA of features (n, L, F) and (n, M, G), in whichever form has the smaller matrices."""
    x, y = centred(first), centred(second)
    if max(x.shape[2], y.shape[2]) <= len(first):
        shared = np.array([[np.square(a.T @ b).sum() for b in y] for a in x])
        own = [np.array([np.linalg.norm(a.T @ a) for a in each]) for each in (x, y)]
    else:
        grams = [np.array([(a @ a.T).ravel() for a in each]) for each in (x, y)]
        shared = grams[0] @ grams[1].T
        own = [np.linalg.norm(gram, axis=1) for gram in grams]
    with np.errstate(invalid="ignore"):
        return shared / np.outer(*own)


def centred(features: np.ndarray) -> np.ndarray:
    """(n, L, F) to (L, n, F) without the mean of the samples; zeros for a layer that is the same for all of them."""
    values = features.astype(np.float64).swapaxes(0, 1)
    around = values - values.mean(axis=1, keepdims=True)
    varies = np.linalg.norm(around, axis=(1, 2)) > STILL * np.linalg.norm(values, axis=(1, 2))
    return around * varies[:, None, None]


def print_cka(found: np.ndarray, rows: str, columns: str) -> None:
    """A table of what ``layer_cka`` returns: the layers of one encoder down, those of the other one across.

    Args:
        found: (L, M) CKA.
        rows: name of the one encoder.
        columns: name of the other one.
    """
    table = Table(
        title=f"linear CKA, layers of {rows} (down)\nand of {columns} (across)",
        box=None,
        padding=(0, 1, 0, 0),
        min_width=60,
    )
    table.add_column("layer")
    for name in layer_names(found.shape[1]):
        table.add_column(name, justify="right")
    for name, row in zip(layer_names(len(found)), found, strict=True):
        table.add_row(name, *("-" if np.isnan(value) else f"{value:.2f}" for value in row))
    Console().print(table)


def layer_names(count: int) -> list[str]:
    return ["in", *map(str, range(1, count))]


def write_cka(found: np.ndarray, rows: str, columns: str, path: str | Path) -> None:
    """As a heat map, or as JSON.

    Args:
        found: (L, M) CKA.
        rows: name of the one encoder.
        columns: name of the other one.
        path: a file that ends in .png, .pdf, .svg or .json.
    """
    path = checked(path)
    if path.suffix == ".json":
        values = [[None if np.isnan(value) else value for value in row] for row in found.tolist()]
        path.write_text(json.dumps({"rows": rows, "columns": columns, "cka": values}, indent=2) + "\n")
        return
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(found, vmin=0, vmax=1, cmap="magma", origin="lower")
    for side, count, title in ((axis.yaxis, len(found), rows), (axis.xaxis, found.shape[1], columns)):
        shown = range(0, count, 1 + count // 14)
        side.set_ticks(shown, [layer_names(count)[number] for number in shown])
        side.set_label_text(f"layer of {title}")
    figure.colorbar(image, label="linear CKA")
    figure.savefig(path, dpi=150, bbox_inches="tight")  # with all of long names


def checked(path: str | Path) -> Path:
    """The file to write, before anything is measured for it.

    Raises:
        ValueError: another ending, or no such folder.
    """
    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg", ".json"):
        raise ValueError(f"output: found {path}; expected a file that ends in .png, .pdf, .svg or .json")
    if not path.parent.is_dir():
        raise ValueError(f"output: there is no folder {path.parent}; make it first")
    return path
