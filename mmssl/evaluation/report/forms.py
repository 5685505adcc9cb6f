"""How each form of drawing is shown on a page: the one place that knows them.

``side_by_side`` shows drawings of one sample, that lie on the same axes, under their titles; ``attended`` shows what
heads of attention read of it; ``blank`` says which parts of a drawing are blank.
"""

from collections.abc import Mapping
from html import escape
from typing import Any, Protocol

import numpy as np

from mmssl.drawings import Cells, Drawing, Frames, Lines, Network, Points, Spectrogram
from mmssl.evaluation.report.html import (
    AXIS,
    COLORS,
    as_json,
    captioned,
    layout,
    plot,
    png,
)
from mmssl.figures import PALETTE, color_of

SIDE = 160  # pixels of a picture, at least
MOST_CHANNELS = 6
MOST_NODES = 150
NO_AXIS = {"visible": False, "showgrid": False}
SHADES = np.array(  # from nothing to all of it, on dark ground: matplotlib's inferno at five points
    [[0.0, 0.0, 0.02], [0.34, 0.06, 0.43], [0.73, 0.21, 0.33], [0.98, 0.55, 0.04], [0.99, 1.0, 0.64]]
)


class Form(Protocol):
    def blank(self, drawing: Any) -> np.ndarray:
        """Which parts are blank, bool: pixels (frames, height, width), nodes, cells, ..."""

    def side_by_side(self, drawings: Any) -> str: ...

    def attended(self, drawing: Any, weights: np.ndarray, heads: list[str]) -> str:
        """``weights`` (heads, *parts) from 0 to 1, NaN where no token lies, and a title for each head."""


def side_by_side(drawings: Mapping[str, Drawing]) -> str:
    """HTML of one sample's drawings, all of one form, under their titles."""
    return FORMS[type(next(iter(drawings.values())))].side_by_side(drawings)


def columns(figures: dict[str, str], kind: str = "") -> str:
    return f'<div class="columns {kind}">' + "".join(captioned(*each) for each in figures.items()) + "</div>"


class FramesForm:
    def blank(self, drawing: Frames) -> np.ndarray:
        return np.isnan(drawing.pixels).any(axis=-1)

    def side_by_side(self, drawings: dict[str, Frames]) -> str:
        return columns({title: self.show(drawing.pixels, drawing.rate) for title, drawing in drawings.items()}, "small")

    def show(self, pixels: np.ndarray, rate: float) -> str:
        """A picture; of several, with what the page needs to play them."""
        frames = [png(frame, SIDE) for frame in pixels]
        if len(frames) == 1:
            return f'<img src="{frames[0]}" alt="">'
        return (
            f'<img src="{frames[0]}" alt="" class="frames" data-rate="{rate:g}">'
            f'<script type="application/json">{as_json(frames)}</script>'
        )

    def attended(self, drawing: Frames, weights: np.ndarray, heads: list[str]) -> str:
        shown = {"sample": self.show(drawing.pixels, drawing.rate)}
        for head, weight in zip(heads, weights, strict=True):
            share = np.nan_to_num(weight)[..., None]
            grey = np.nan_to_num(drawing.pixels, nan=0.75).mean(axis=-1, keepdims=True)
            shown[head] = self.show(0.35 * grey + 0.65 * shade(share[..., 0]), drawing.rate)
        return columns(shown, "small")


def shade(share: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of shares from 0 to 1."""
    return np.stack([np.interp(share, np.linspace(0, 1, len(SHADES)), channel) for channel in SHADES.T], axis=-1)


class SpectrogramForm:
    def blank(self, drawing: Spectrogram) -> np.ndarray:
        return np.isnan(drawing.values)

    def axes(self, drawing: Spectrogram) -> tuple[np.ndarray, np.ndarray, str]:
        time = np.arange(drawing.values.shape[1]) * drawing.hop
        if drawing.frequencies is None:
            return time, np.arange(drawing.values.shape[0]), "band"
        return time, drawing.frequencies, "Hz"

    def heat(self, drawing: Spectrogram, low: float, high: float) -> dict[str, Any]:
        time, pitch, unit = self.axes(drawing)
        hover = f"%{{x:.2f}} s, %{{y:.0f}} {unit}<br>%{{z:.2f}}<extra></extra>"
        return {
            "type": "heatmap", "z": drawing.values.astype(np.float32), "x": time, "y": pitch, "zmin": low, "zmax": high,
            "colorscale": "Magma", "showscale": False, "hovertemplate": hover,
        }  # fmt: skip

    def side_by_side(self, drawings: dict[str, Spectrogram]) -> str:
        known = np.concatenate([drawing.values.ravel() for drawing in drawings.values()])
        low, high = np.nanpercentile(known, [1, 99]) if np.isfinite(known).any() else (0.0, 1.0)
        shown = {}
        for title, drawing in drawings.items():
            unit = self.axes(drawing)[2]
            axes = {"xaxis": AXIS | {"title": {"text": "s"}}, "yaxis": AXIS | {"title": {"text": unit}}}
            shown[title] = plot([self.heat(drawing, low, high)], layout(230, **axes) | tight(left=58, bottom=40))
        return columns(shown)

    def attended(self, drawing: Spectrogram, weights: np.ndarray, heads: list[str]) -> str:
        low, high = np.nanpercentile(drawing.values, [1, 99])
        time, _, unit = self.axes(drawing)
        return over_time([self.heat(drawing, low, high)], time, known_mean(weights, 1), heads, "s", unit)


def known_mean(weights: np.ndarray, axis: int) -> np.ndarray:
    """Mean over an axis of what is known, NaN where nothing is."""
    count = (~np.isnan(weights)).sum(axis=axis)
    return np.where(count, np.nansum(weights, axis=axis) / np.maximum(count, 1), np.nan)


def tight(left: int = 44, bottom: int = 30) -> dict[str, Any]:
    return {"margin": {"l": left, "r": 8, "t": 8, "b": bottom}}


def over_time(
    data: list[dict[str, Any]], time: np.ndarray, weights: np.ndarray, heads: list[str], unit: str, name: str
) -> str:
    """What is drawn over time, and below it the weights of each head (heads, steps)."""
    heat = {
        "type": "heatmap", "z": weights.astype(np.float32), "x": time, "y": heads, "yaxis": "y2", "zmin": 0, "zmax": 1,
        "colorscale": "Inferno", "showscale": False, "hovertemplate": "%{y}, %{x:.3g}<br>%{z:.2f}<extra></extra>",
    }  # fmt: skip
    share = min(0.6, 0.12 + 0.06 * len(heads))
    axes = {
        "xaxis": AXIS | {"title": {"text": unit}, "anchor": "y2"},
        "yaxis": AXIS | {"domain": [share + 0.06, 1], "title": {"text": name}},
        "yaxis2": AXIS | {"domain": [0, share], "autorange": "reversed"},
    }
    return plot([*data, heat], layout(260 + 18 * len(heads), **axes) | tight(left=62, bottom=40))


class PointsForm:
    def blank(self, drawing: Points) -> np.ndarray:
        return np.isnan(drawing.places).any(axis=-1)

    def scene(self, places: np.ndarray) -> dict[str, Any]:
        """Axes of one length that hold all points, so that nothing is stretched."""
        low, high = np.nanmin(places, axis=0), np.nanmax(places, axis=0)
        half = max(float((high - low).max()) / 2, 1e-6) * 1.05
        axes = {
            f"{axis}axis": NO_AXIS | {"range": [float(middle - half), float(middle + half)]}
            for axis, middle in zip("xyz", (low + high) / 2, strict=True)
        }
        return {**axes, "aspectmode": "cube", "camera": {"eye": {"x": 1.0, "y": 1.0, "z": 0.7}}, "dragmode": "orbit"}

    def cloud(self, drawing: Points, marker: dict[str, Any]) -> dict[str, Any]:
        x, y, z = drawing.places.astype(np.float32).T
        return {
            "type": "scatter3d", "mode": "markers", "x": x, "y": y, "z": z, "marker": {"size": 2.2, **marker},
            "customdata": drawing.groups, "hovertemplate": "token %{customdata}<extra></extra>",
        }  # fmt: skip

    def side_by_side(self, drawings: dict[str, Points]) -> str:
        scene = self.scene(np.concatenate([drawing.places for drawing in drawings.values()]))
        shown = {}
        for title, drawing in drawings.items():
            # Neighbouring numbers get colours far from each other, so that tokens are seen as pieces.
            marker = {
                "color": (drawing.groups * 0.618 % 1).astype(np.float32),
                "colorscale": "HSV",
                "cmin": 0,
                "cmax": 1,
            }
            shown[title] = plot([self.cloud(drawing, marker)], layout(260, scene=scene) | NO_MARGIN, "space")
        return columns(shown)

    def attended(self, drawing: Points, weights: np.ndarray, heads: list[str]) -> str:
        scene, shown = self.scene(drawing.places), {}
        for head, weight in zip(heads, weights, strict=True):
            marker = {"color": weight.astype(np.float32), "colorscale": COLORS, "cmin": 0, "cmax": 1}
            shown[head] = plot([self.cloud(drawing, marker)], layout(220, scene=scene) | NO_MARGIN, "space")
        return columns(shown, "narrow")


NO_MARGIN: dict[str, Any] = {"margin": {"l": 0, "r": 0, "t": 0, "b": 0}, "showlegend": False}


class NetworkForm:
    def blank(self, drawing: Network) -> np.ndarray:
        return np.isnan(drawing.values).any(axis=-1)

    def part(self, drawing: Network) -> np.ndarray:
        """Which nodes are drawn: of many, those that lie nearest to the one with most edges."""
        import networkx

        count = len(drawing.values)
        if count <= MOST_NODES:
            return np.arange(count)
        graph = self.graph(drawing)
        start = max(graph.degree, key=lambda pair: pair[1])[0]
        order = [start, *(node for _, node in networkx.bfs_edges(graph, start))]
        return np.sort(np.array(order[:MOST_NODES]))

    def graph(self, drawing: Network) -> Any:
        import networkx

        graph = networkx.Graph()
        graph.add_nodes_from(range(len(drawing.values)))
        graph.add_edges_from(drawing.edges.T.tolist())
        return graph

    def places(self, drawing: Network, part: np.ndarray) -> np.ndarray:
        """(nodes, 2) by springs along the edges, always the same."""
        import networkx

        own = self.graph(drawing).subgraph(part.tolist())
        start = networkx.circular_layout(own) if len(own) > 2 else None
        found = networkx.spring_layout(own, pos=start, seed=0, iterations=80, k=1.6 / max(len(part), 1) ** 0.5)
        return np.array([found[node] for node in part.tolist()])

    def lines(self, drawing: Network, part: np.ndarray, places: np.ndarray) -> dict[str, Any]:
        where = np.full(len(drawing.values), -1)
        where[part] = np.arange(len(part))
        ends = where[drawing.edges]
        ends = ends[:, (ends >= 0).all(axis=0)]
        gap = np.full((1, ends.shape[1]), np.nan)
        x, y = (np.concatenate([axis[ends], gap]).T.ravel().astype(np.float32) for axis in places.T)
        line = {"color": "rgba(128,128,128,0.45)", "width": 1}
        return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "hoverinfo": "skip"}

    def nodes(self, places: np.ndarray, texts: list[str], marker: dict[str, Any]) -> dict[str, Any]:
        x, y = places.astype(np.float32).T
        marker = {"size": 9, "line": {"width": 1, "color": "rgba(128,128,128,0.8)"}, **marker}
        return {
            "type": "scatter", "mode": "markers", "x": x, "y": y, "marker": marker, "text": texts,
            "hovertemplate": "%{text}<extra></extra>",
        }  # fmt: skip

    def values(self, number: int, row: np.ndarray) -> str:
        shown = ", ".join(f"{value:.3g}" for value in row[:8]) + (", ..." if len(row) > 8 else "")
        return f"node {number}: {'hidden' if np.isnan(row).any() else shown}"

    def side_by_side(self, drawings: dict[str, Network]) -> str:
        first = next(iter(drawings.values()))
        part = self.part(first)
        places = self.places(first, part)
        # One colour for each node: how far it lies along the direction in which nodes of the sample differ most.
        centre = np.nan_to_num(first.values).mean(axis=0)
        direction = np.linalg.svd(np.nan_to_num(first.values) - centre, full_matrices=False)[2][0]
        shades = {title: (drawing.values - centre) @ direction for title, drawing in drawings.items()}
        low, high = np.nanpercentile(shades[next(iter(drawings))], [2, 98])
        shown = {}
        for title, drawing in drawings.items():
            if len(drawing.values) != len(first.values):
                part, places = self.part(drawing), self.places(drawing, self.part(drawing))
            color = shades[title][part].astype(np.float32)
            known = ~np.isnan(color)
            texts = [self.values(int(number), drawing.values[number]) for number in part]
            marker = {"color": color[known], "colorscale": COLORS, "cmin": float(low), "cmax": float(high)}
            data = [
                self.lines(drawing, part, places),
                self.nodes(places[~known], [t for t, k in zip(texts, known, strict=True) if not k], HOLLOW),
                self.nodes(places[known], [t for t, k in zip(texts, known, strict=True) if k], marker),
            ]
            shown[title] = plot(data, layout(280, xaxis=NO_AXIS, yaxis=NO_AXIS) | NO_MARGIN)
        return columns(shown) + self.note(first)

    def note(self, drawing: Network) -> str:
        count = len(drawing.values)
        if count <= MOST_NODES:
            return ""
        return f'<p class="note">{MOST_NODES} of {count:,} nodes are drawn, those nearest to one with many edges.</p>'

    def attended(self, drawing: Network, weights: np.ndarray, heads: list[str]) -> str:
        part = self.part(drawing)
        places = self.places(drawing, part)
        edges = self.lines(drawing, part, places)
        shown = {}
        for head, weight in zip(heads, weights, strict=True):
            texts = [f"node {node}: {share:.2f}" for node, share in zip(part, weight[part], strict=True)]
            marker = {"color": weight[part].astype(np.float32), "colorscale": COLORS, "cmin": 0, "cmax": 1}
            data = [edges, self.nodes(places, texts, marker)]
            shown[head] = plot(data, layout(220, xaxis=NO_AXIS, yaxis=NO_AXIS) | NO_MARGIN)
        return columns(shown, "narrow") + self.note(drawing)


HOLLOW = {"color": "rgba(0,0,0,0)", "line": {"width": 1.5, "color": PALETTE[3]}}


class CellsForm:
    def blank(self, drawing: Cells) -> np.ndarray:
        return np.array([value == "" for value in drawing.values])

    def side_by_side(self, drawings: dict[str, Cells]) -> str:
        first, *others = drawings.values()
        head = "".join(f"<th>{escape(title)}</th>" for title in ("column", *drawings))
        rows = []
        for number, name in enumerate(first.names):
            own = first.values[number]
            cells = [f"<td>{escape(own) or HIDDEN}</td>"]
            for other in others:
                value = other.values[number]
                kind = "hidden" if not value else "changed" if value != own else ""
                cells.append(f'<td class="{kind}">{escape(value) or HIDDEN}</td>')
            rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
        body = "".join(rows)
        return f'<div class="scroll cells"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def attended(self, drawing: Cells, weights: np.ndarray, heads: list[str]) -> str:
        titles = ["column", "value", *heads]
        head = "".join(f"<th>{escape(title)}</th>" for title in titles)
        rows = []
        for name, value, shares in zip(drawing.names, drawing.values, np.nan_to_num(weights).T, strict=True):
            bars = "".join(
                f'<td><div class="share" style="--share:{share:.0%}" title="{share:.2f}"></div></td>'
                for share in shares
            )
            rows.append(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td>{bars}</tr>")
        body = "".join(rows)
        return f'<div class="scroll cells"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


HIDDEN = '<span class="hidden">hidden</span>'


class LinesForm:
    def blank(self, drawing: Lines) -> np.ndarray:
        return np.isnan(drawing.values)

    def lines(self, drawing: Lines, **own: Any) -> list[dict[str, Any]]:
        names = drawing.names[:MOST_CHANNELS]
        return [
            {
                "type": "scatter", "mode": "lines", "y": values.astype(np.float32), "name": escape(name),
                "line": {"color": color_of(number, len(names)), "width": 1.6}, **own,
            }
            for number, (name, values) in enumerate(zip(names, drawing.values, strict=False))
        ]  # fmt: skip

    def side_by_side(self, drawings: dict[str, Lines]) -> str:
        first = next(iter(drawings.values()))
        known = np.concatenate([drawing.values[:MOST_CHANNELS].ravel() for drawing in drawings.values()])
        low, high = (np.nanmin(known), np.nanmax(known)) if np.isfinite(known).any() else (0.0, 1.0)
        edge = 0.05 * max(float(high - low), 1e-6)
        axes = {"xaxis": AXIS, "yaxis": AXIS | {"range": [float(low) - edge, float(high) + edge]}, "showlegend": False}
        shown = {}
        for title, drawing in drawings.items():
            # The original lies faintly behind the others where they share their time.
            behind = drawing is not first and drawing.values.shape == first.values.shape
            data = self.lines(first, opacity=0.25, hoverinfo="skip") if behind else []
            shown[title] = plot([*data, *self.lines(drawing)], layout(220, **axes) | tight())
        return columns(shown) + self.note(first)

    def note(self, drawing: Lines) -> str:
        count = len(drawing.values)
        return f'<p class="note">The first {MOST_CHANNELS} of {count} channels.</p>' if count > MOST_CHANNELS else ""

    def attended(self, drawing: Lines, weights: np.ndarray, heads: list[str]) -> str:
        time = np.arange(drawing.values.shape[1])
        lines = self.lines(drawing, showlegend=False)
        return over_time(lines, time, known_mean(weights, 1), heads, "step", "value") + self.note(drawing)


FORMS: dict[type, Form] = {
    Frames: FramesForm(),
    Spectrogram: SpectrogramForm(),
    Points: PointsForm(),
    Network: NetworkForm(),
    Cells: CellsForm(),
    Lines: LinesForm(),
}
