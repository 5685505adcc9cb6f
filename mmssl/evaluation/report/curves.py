"""The curves of a run: what metrics.jsonl holds, in groups that have one unit each."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmssl.evaluation.report.html import AXIS, layout, plot
from mmssl.figures import PALETTE, new_figure, plain

METRICS = "metrics.jsonl"
MOST = 2000  # points of a curve that are drawn

PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "trivial"),
    "loss as a share of the mean's": ("loss_over_trivial",),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "probes": ("health/knn", "health/linear", "health/guess"),
    "effective rank": ("health/rank",),
    "spread": ("health/std",),
    "cosine similarity": ("health/view_similarity", "health/other_similarity"),
    "samples per second": ("samples_per_second",),
    "tokens per second": ("tokens_per_second",),
    "share of time waiting for data": ("data_wait",),
    "model FLOPs utilisation": ("mfu",),
    "memory, GiB": ("memory_gib",),
}
UNSHOWN = ("step", "epoch", "health/seconds")
NAMES = {
    "trivial": "predicting the mean", "health/knn": "knn", "health/linear": "linear", "health/guess": "guessing",
    "health/rank": "rank", "health/std": "std", "health/view_similarity": "two views of a sample",
    "health/other_similarity": "views of two samples",
}  # fmt: skip
STYLES = {"solid": "-", "dash": "--", "dot": ":"}  # of matplotlib
DASHES = {"_start": ("dash", ", start"), "_raw": ("dot", ", raw")}


@dataclass
class Curve:
    name: str
    steps: np.ndarray
    values: np.ndarray
    color: str
    dash: str = "solid"


@dataclass
class Panel:
    """Curves of one unit."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    own: bool = False  # whether these are numbers of the objective


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        ValueError: there is no such file, or a line of it is no JSON object with a step.
    """
    path = run / METRICS
    if not path.is_file():
        raise ValueError(f"{path}: found no such file; expected the curves that a run writes beside its model")
    lines = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or not is_number(line.get("step")):
            raise ValueError(
                f"{path}, line {number}: found {text[:60]!r}; expected one JSON object with a step: the file was cut "
                "or changed; take that line out"
            )
        lines.append(line)
    return lines


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_or_nan(value: Any) -> float:
    return value if is_number(value) else np.nan


def panels_of(lines: Sequence[dict[str, Any]], modalities: Sequence[str]) -> list[Panel]:
    """Panels in their order, without those that have no number; what is unknown goes by its last word."""
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in UNSHOWN]
    names = [name for name in names if any(is_number(line.get(name)) for line in lines)]
    panels = {title: Panel(title) for title in PANELS}
    for name in names:
        place = place_of(name, modalities)
        title, base, dash, end = place or (re.split("[/_]", name)[-1], name, "solid", "")
        panel = panels.setdefault(title if place else f"own {title}", Panel(title, own=True))
        known = [(line["step"], number_or_nan(line[name])) for line in lines if name in line]
        kept = np.linspace(0, len(known) - 1, min(len(known), MOST)).round().astype(int)
        steps, values = np.array(known, dtype=np.float64)[kept].T
        same = [curve for curve in panel.curves if curve.dash == "solid"]
        color = PALETTE[len(same) % len(PALETTE)]
        shown = NAMES.get(base, base.replace("_", " ")) + end
        panel.curves.append(Curve(shown, steps, values, color, dash))
    for panel in panels.values():  # what a curve is measured against has its colour
        colors = {curve.name: curve.color for curve in panel.curves}
        for curve in panel.curves:
            curve.color = colors.get(re.sub(", (start|raw)", "", curve.name), curve.color)
    return [panel for panel in panels.values() if panel.curves]


def place_of(name: str, modalities: Sequence[str]) -> tuple[str, str, str, str] | None:
    """Of a known number its panel, the known name, its dash, and what its name ends in. None: it is not known."""
    head, _, modality = name.rpartition("/")
    base, which = (head, f", {modality.replace('_', ' ')}") if modality in modalities and head else (name, "")
    dash, tail = "solid", ""
    for end, (kind, text) in DASHES.items():
        if base.startswith("health/") and base.endswith(end):
            base, dash, tail = base.removesuffix(end), kind, text
    for title, bases in PANELS.items():
        if base in bases:
            return title, base, "dot" if base in ("trivial", "health/guess") else dash, tail + which
    return None


def show(panels: Sequence[Panel]) -> str:
    """A small plot of each panel; the page zooms them together."""
    plots = []
    for panel in panels:
        data = [
            {
                "type": "scatter",
                "mode": "lines" if np.isfinite(curve.values).sum() > 1 else "markers",
                "x": curve.steps.astype(np.float32),
                "y": curve.values,
                "name": escape(curve.name),
                "line": {"color": curve.color, "dash": curve.dash, "width": 1.8},
                "hovertemplate": "%{y:.4g}",
            }
            for curve in panel.curves
        ]
        own = {
            "title": {"text": escape(panel.title), "x": 0, "xanchor": "left", "xref": "paper", "font": {"size": 13}},
            "hovermode": "x unified",
            "showlegend": len(data) > 1,
            "xaxis": AXIS | {"title": {"text": "step", "standoff": 4, "font": {"size": 11}}},
            "yaxis": AXIS | {"rangemode": "normal", "exponentformat": "power", "minexponent": 6},
        }
        plots.append(plot(data, layout(250 + 18 * ((len(data) - 1) // 2 if len(data) > 1 else 0), **own), "curve"))
    return f'<div class="curves">{"".join(plots)}</div>'


def draw(panels: Sequence[Panel]) -> Figure:
    """The same for papers."""
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
    return figure
