"""The pictures of a report for papers, with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmssl.evaluation.report.curves import Panel
from mmssl.evaluation.report.embeddings import Embedded, groups_of, histograms
from mmssl.evaluation.report.html import PALETTE, color_of

STYLES = {"solid": "-", "dash": "--", "dot": ":"}


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(panels: Sequence[Panel], path: Path) -> None:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.0 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        for curve in panel.curves:
            known = np.isfinite(curve.values)
            marker = "o" if known.sum() == 1 else ""
            style: dict[str, Any] = {"color": curve.color, "marker": marker, "markersize": 3, "linewidth": 1.2}
            axis.plot(curve.steps, curve.values, STYLES[curve.dash], label=plain(curve.name), **style)
        axis.set_title(plain(panel.title), loc="left", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if len(panel.curves) > 1:
            axis.legend(fontsize=6, frameon=False)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    figure.supxlabel("step", fontsize=9)
    figure.savefig(path, dpi=160)


def plain(text: str) -> str:
    """Text that matplotlib takes as it is: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def draw_map(embedded: Embedded, maps: dict[str, np.ndarray], path: Path) -> None:
    figure = new_figure(4.2 * len(maps), 4.2)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    groups = groups_of(embedded)
    for axis, (title, places) in zip(axes, maps.items(), strict=True):
        for number, (name, _, rows) in enumerate(groups):
            labels = embedded.labels
            quantities = labels is not None and labels.dtype.kind == "f"
            shade = {"c": labels, "cmap": "viridis"} if quantities else {"color": color_of(number, len(groups))}
            drawn = axis.scatter(*places[rows].T, s=6, alpha=0.8, linewidths=0, label=plain(name) or None, **shade)
            if quantities and axis is axes[-1]:
                figure.colorbar(drawn, ax=axis)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    if 1 < len(groups) <= 20:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=10, fontsize=7, frameon=False, markerscale=2)
    figure.savefig(path, dpi=160)


def draw_similarities(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
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
    figure.savefig(path, dpi=160)
