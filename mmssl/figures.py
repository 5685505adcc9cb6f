"""Figures of a run, with matplotlib: samples, maps of embeddings, and how alike they are."""

from collections.abc import Sequence
from colorsys import hls_to_rgb

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmssl.modalities.base import Modality
from mmssl.tokens import Tokens

# Told apart by most colour-blind people, and seen on light and on dark ground.
PALETTE = ("#3f8fd0", "#e38b29", "#2fa37c", "#d0506a", "#8f78d2", "#9a7355", "#d77fb8", "#8b929c", "#b0a32e", "#35b2c2")
BINS = 60
Group = tuple[str, str, np.ndarray]  # name, colour and rows of a class; the name "" where there are no classes


def color_of(number: int, count: int) -> str:
    """Colours of so many kinds; of more than the palette has, hues around the circle in two shades."""
    if count <= len(PALETTE):
        return PALETTE[number]
    return "#" + "".join(
        f"{round(255 * part):02x}" for part in hls_to_rgb(number / count, 0.45 + 0.15 * (number % 2), 0.6)
    )


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Text that matplotlib takes as it is: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def pixels_of(figure: Figure) -> np.ndarray:
    """(height, width, 3) bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_samples(modality: Modality, columns: dict[str, Tokens]) -> Figure:
    """Samples side by side; what is shown of them, one below the other, as ``Objective.shown`` returns it."""
    count = len(next(iter(columns.values())).content)
    figure = new_figure(1.6 * count, 1.6 * len(columns) + 0.2)
    axes = figure.subplots(len(columns), count, squeeze=False)
    for row, (title, tokens) in zip(axes, columns.items(), strict=True):
        row[0].set_ylabel(title)
        for axis, picture in zip(row, modality.picture(tokens).cpu(), strict=True):
            axis.imshow(picture.nan_to_num(0.75), aspect="auto", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def draw_map(maps: dict[str, np.ndarray], groups: Sequence[Group], quantities: np.ndarray | None = None) -> Figure:
    """Places (n, 2) of embeddings by each method, in the colours of their groups, or of a quantity (n,) of each."""
    figure = new_figure(4.2 * len(maps), 4.2)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (title, places) in zip(axes, maps.items(), strict=True):
        for name, color, rows in groups:
            shade = {"color": color} if quantities is None else {"c": quantities, "cmap": "viridis"}
            drawn = axis.scatter(*places[rows].T, s=6, alpha=0.8, linewidths=0, label=plain(name) or None, **shade)
            if quantities is not None and axis is axes[-1]:
                figure.colorbar(drawn, ax=axis)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    if 1 < len(groups) <= 20:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=10, fontsize=7, frameon=False, markerscale=2)
    return figure


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, so that dot products are cosines."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def cosine_pairs(
    vectors: np.ndarray, labels: np.ndarray | None, views: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, dict[str, np.ndarray]]:
    """Cosines of pairs by what is compared, and of which pairs: of views, and of classes, as far as there are such.

    Args:
        vectors: (n, D) embeddings.
        labels: (n,) int, -1 where there is none; or float, which are no classes.
        views: (m, D) of one view and of another one of some samples.
    """
    found = {}
    if views is not None and len(views[0]) > 1:
        one, other = (unit(view) for view in views)
        cosines = one @ other.T
        different = ~np.eye(len(cosines), dtype=bool)
        found["views"] = {
            "two views of one sample": np.diagonal(cosines),
            "views of two samples": cosines[different],
        }
    if labels is not None and labels.dtype.kind != "f":
        rows = unit(vectors)
        first, second = np.triu_indices(len(rows), 1)
        known = (labels[first] >= 0) & (labels[second] >= 0)
        first, second = first[known], second[known]
        cosines, same = (rows @ rows.T)[first, second], labels[first] == labels[second]
        if same.any() and not same.all():
            found["classes"] = {"of one class": cosines[same], "of two classes": cosines[~same]}
    return found


def histograms(pairs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges of the bins (BINS + 1,), and for each kind of pairs the share (BINS,) that lies in each of them."""
    everything = np.concatenate(list(pairs.values()))
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    return edges, {name: np.histogram(each.clip(low, high), edges)[0] / len(each) for name, each in pairs.items()}


def draw_similarities(found: dict[str, dict[str, np.ndarray]]) -> Figure:
    """A histogram of each comparison that ``cosine_pairs`` found."""
    figure = new_figure(4.4 * len(found), 3.0)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (title, pairs) in zip(axes, found.items(), strict=True):
        edges, shares = histograms(pairs)
        for number, (name, share) in enumerate(shares.items()):
            axis.stairs(share, edges, fill=True, alpha=0.55, color=PALETTE[number], label=name)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("cosine", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, frameon=False)
    return figure
