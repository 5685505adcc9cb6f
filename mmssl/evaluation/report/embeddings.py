"""Embeddings of samples: a map of them, their neighbours, and how alike they are."""

from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from mmssl.data import PreparedSamples
from mmssl.evaluation.report.html import COLORS, as_json, layout, plot, thumbnail
from mmssl.figures import PALETTE, Group, color_of, histograms, unit
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLModel

FEWEST = 32  # with fewer samples rows are tokens: a scene or a graph is one sample
NEIGHBORS = 8
MOST_VIEWED = 256  # samples of which two views are compared
BATCH = 32


@dataclass
class Embedded:
    """Rows of a map.

    Attributes:
        vectors: (n, D) of samples, or of the tokens of few large ones.
        names: how an error names each.
        labels: (n,) int, or float, quantities; None where there are none.
        classes: names of the classes.
        thumbnails: small pictures as URIs; none of tokens.
        views: (m, D) of one view and of another one of the first samples; None where there are no views.
    """

    vectors: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    thumbnails: list[str] = field(default_factory=list)
    views: tuple[np.ndarray, np.ndarray] | None = None
    of_tokens: bool = False

    def label(self, number: int) -> str:
        """In words, "" where there is none."""
        if self.labels is None:
            return ""
        label = self.labels[number]
        if self.labels.dtype.kind == "f":
            return f"{label:.4g}"
        if label < 0:
            return "no class"
        return str(self.classes[label]) if len(self.classes) else str(label)


@torch.inference_mode()
def embed_rows(model: MMSSLModel, modality: Modality, dataset: PreparedSamples, most: int) -> Embedded:
    """Embeddings of all samples; or where they are few, of at most so many of their tokens."""
    model.eval()
    samples, by_token = dataset.samples, len(dataset.samples) < FEWEST
    first = model.encoder.num_prefix_tokens
    vectors: list[Tensor] = []
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    names: list[str] = []
    pictures: list[str] = []
    sources: list[int] = []
    generator = torch.Generator(model.device).manual_seed(0)
    for start in range(0, len(samples), BATCH):
        numbers = range(start, min(start + BATCH, len(samples)))
        batch = dataset.collate([dataset[number] for number in numbers])["inputs"]
        batch = {name: value.to(model.device) for name, value in batch.items()}
        out = model(**batch)
        if by_token:
            tokens = modality.tokenize(batch)
            row = torch.arange(len(tokens.valid), device=model.device) if tokens.sample is None else tokens.sample
            vectors.append(out.last_hidden_state[:, first:][tokens.valid].float().cpu())
            sources += (row[:, None].expand_as(tokens.valid)[tokens.valid] + start).tolist()
            continue
        vectors.append(out.pooler_output.float().cpu())
        names += [samples.name(number) for number in numbers]
        shown = modality.picture(modality.tokenize(batch)).float().cpu().numpy()
        if len(shown) == len(numbers):
            pictures += [thumbnail(each) for each in shown]
        if modality.offers("view") and start < MOST_VIEWED:
            for side in views:
                side.append(model(**modality.view(batch, generator).batch).pooler_output.float().cpu())
    rows = torch.cat(vectors).numpy()
    labels, classes = samples.labels, list(samples.classes)
    if by_token:
        source = np.array(sources)
        labels = None if labels is None else labels[source]
        if samples.token_labels is not None:
            joined = np.concatenate(list(samples.token_labels))
            labels = joined if len(joined) == len(rows) else None  # a part of a sample has lost its labels
        within = np.arange(len(rows)) - np.searchsorted(source, source)
        kept = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
        names = [f"{samples.name(int(source[i]))}, token {within[i]}" for i in kept]
        rows, labels = rows[kept], None if labels is None else labels[kept]
    both = (torch.cat(views[0]).numpy(), torch.cat(views[1]).numpy()) if views[0] else None
    return Embedded(rows, names, labels, classes, pictures, both, by_token)


def nearest(vectors: np.ndarray, count: int = NEIGHBORS) -> tuple[np.ndarray, np.ndarray]:
    """The rows of greatest cosine with each row of (n, D), itself left out: (n, k) long, and their cosines."""
    cosines = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(cosines, -np.inf)
    index = np.argsort(-cosines, axis=1, kind="stable")[:, : min(count, len(vectors) - 1)]
    return index, np.take_along_axis(cosines, index, axis=1)


def projections(vectors: np.ndarray) -> dict[str, np.ndarray]:
    """(n, 2) by each method there is, of rows of length 1: nearness means that directions agree."""
    rows = unit(vectors)
    found = PCA(2, random_state=0).fit_transform(rows)
    start = found / max(float(found[:, 0].std()), 1e-12) * 1e-4  # as scikit-learn would begin, but never 0 / 0
    perplexity = min(30.0, (len(rows) - 1) / 3)
    maps = {
        "PCA": found,
        "t-SNE": TSNE(2, init=start, perplexity=perplexity, random_state=0).fit_transform(rows),
    }
    try:
        from umap import UMAP
    except ImportError:
        return maps
    return maps | {"UMAP": UMAP(n_neighbors=min(15, len(rows) - 1), random_state=0).fit_transform(rows)}


def groups_of(embedded: Embedded) -> list[Group]:
    """Name, colour and rows of each class; one group without a name where there are no classes."""
    everything = np.arange(len(embedded.vectors))
    if embedded.labels is None or embedded.labels.dtype.kind == "f":
        return [("", PALETTE[0], everything)]
    found = np.unique(embedded.labels)
    groups = []
    for number, label in enumerate(found):
        rows = np.flatnonzero(embedded.labels == label)
        groups.append((embedded.label(int(rows[0])), color_of(number, len(found)), rows))
    return groups


def show_map(embedded: Embedded, maps: dict[str, np.ndarray]) -> str:
    """The map with its buttons, and the place where neighbours appear."""
    index, cosines = nearest(embedded.vectors)
    places = next(iter(maps.values())).round(4)  # lists, which the page's script reads, unlike plotly's packed arrays
    hover = [escape(name) + (f"<br>{escape(embedded.label(i))}" if embedded.label(i) else "")
             for i, name in enumerate(embedded.names)]  # fmt: skip
    groups, quantities = groups_of(embedded), embedded.labels is not None and embedded.labels.dtype.kind == "f"
    data: list[dict[str, Any]] = []
    for name, color, rows in groups:
        marker: dict[str, Any] = {"size": 6, "color": color, "opacity": 0.8}
        if quantities and embedded.labels is not None:
            marker |= {"color": embedded.labels, "colorscale": COLORS, "colorbar": {"thickness": 12, "title": "label"}}
        data.append(
            {
                "type": "scatter", "mode": "markers", "x": places[rows, 0].tolist(), "y": places[rows, 1].tolist(),
                "name": escape(name), "marker": marker, "customdata": rows.tolist(), "text": [hover[i] for i in rows],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    for size, color in ((13, PALETTE[3]), (17, PALETTE[1])):  # rings around neighbours, and around what was chosen
        marker = {"size": size, "color": "rgba(0,0,0,0)", "line": {"width": 2.5, "color": color}}
        ring = {"type": "scatter", "mode": "markers", "x": [], "y": [], "marker": marker}
        data.append(ring | {"hoverinfo": "skip", "showlegend": False})
    plain = {"showticklabels": False, "ticks": "", "zeroline": False, "gridcolor": "rgba(128,128,128,0.12)"}
    legend = {"orientation": "h", "y": -0.03, "yanchor": "top", "itemsizing": "constant"}
    own = {
        "xaxis": plain,
        "yaxis": plain,
        "showlegend": 1 < len(groups) <= 40,
        "legend": legend,
        "hovermode": "closest",
    }
    facts = {
        "maps": {name: np.round(each, 4).T.tolist() for name, each in maps.items()},
        "neighbors": index.tolist(),
        "cosines": np.round(cosines, 4).tolist(),
        "names": embedded.names,
        "labels": [embedded.label(i) for i in range(len(embedded.names))],
        "pictures": embedded.thumbnails,
    }
    buttons = "".join(
        f'<button type="button" data-map="{name}" aria-pressed="{str(not number).lower()}">{name}</button>'
        for number, name in enumerate(maps)
    )
    margin = {"l": 8, "r": 8, "t": 8, "b": 8}
    return (
        f'<div class="map"><div class="buttons">{buttons}</div>'
        f'<script type="application/json" class="facts">{as_json(facts)}</script>'
        f'<div class="beside">{plot(data, layout(520, **own, margin=margin))}'
        '<div class="neighbors"><p class="note">Click on a point to see its nearest neighbours.</p></div></div></div>'
    )


def show_similarities(found: dict[str, dict[str, np.ndarray]]) -> str:
    """A histogram of each comparison."""
    plots = []
    for title, pairs in found.items():
        edges, shares = histograms(pairs)
        middles, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
        data = [
            {
                "type": "bar", "x": middles.astype(np.float32), "y": share, "width": width, "opacity": 0.6,
                "name": f"{name} (mean {pairs[name].mean():.3f})", "marker": {"color": PALETTE[number]},
                "hovertemplate": "cosine %{x:.3f}: %{y:.2%}",
            }
            for number, (name, share) in enumerate(shares.items())
        ]  # fmt: skip
        own = {"title": {"text": title, "x": 0, "xref": "paper", "font": {"size": 13}}, "barmode": "overlay"}
        plots.append(plot(data, layout(300, **own, bargap=0, hovermode="x unified")))
    return f'<div class="curves wide">{"".join(plots)}</div>'
