"""The page: what each section shows, and the template that holds them together."""

import json
import re
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.drawings import Drawing
from mmssl.evaluation.report import curves, embeddings
from mmssl.evaluation.report.attention import asks_class_token, attention_to_tokens, over_drawing, stretched
from mmssl.evaluation.report.forms import FORMS, side_by_side
from mmssl.evaluation.report.html import audio, table
from mmssl.evaluation.splits import readable
from mmssl.figures import cosine_pairs, draw_map, draw_samples, draw_similarities
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective

SHOWN, ATTENDED = 6, 3  # samples that are drawn, and of which attention is drawn
DPI = 160
MOST_ATTENDED = 2048  # tokens of a sample: weights are tokens x tokens
VERDICTS = {"healthy": "good", "collapsing": "bad", "too early": "unsure"}
MEASURES = {
    "std": "spread of features", "rank": "effective rank", "view_similarity": "cosine of two views",
    "other_similarity": "cosine of two samples", "knn": "knn probe", "linear": "linear probe",
    "guess": "guessing", "loss_over_trivial": "loss as a share of the mean's",
}  # fmt: skip


@dataclass
class Section:
    """A part of the page: what it shows, or why it shows nothing.

    Attributes:
        title: its heading.
        content: HTML.
        about: what one sees, in a sentence or two.
        level: of the heading; 2 is a modality of a joint run, or what belongs to the whole run.
    """

    title: str
    content: str = ""
    about: str = ""
    level: int = 2


@dataclass
class Looked:
    """A modality of the run and the data to look at.

    Attributes:
        missing: why the samples cannot be read; "" where they can.
    """

    name: str
    modality: Modality
    dataset: PreparedSamples | None
    missing: str = ""

    def batch(self, numbers: np.ndarray, device: torch.device) -> Batch:
        assert self.dataset is not None
        inputs = self.dataset.collate([self.dataset[int(number)] for number in numbers])["inputs"]
        return {name: value.to(device) for name, value in inputs.items()}


def write_report(
    run: str | Path,
    objective: Objective,
    data: DataArguments | None = None,
    max_samples: int = 1000,
    output: str | Path | None = None,
) -> Path:
    """Write a page of a finished run that needs nothing but a browser, and its pictures as PNG beside it.

    Args:
        run: folder of the run.
        objective: what it trained, as ``load_objective`` returns it.
        data: samples to look at, of the run's first modality. None: those that it was trained on, as far as they are
            still there.
        max_samples: how many of them the map shows, evenly spaced.
        output: file to write; its pictures go to a folder of the same name without the ending. None: report.html in
            the folder of the run.

    Returns:
        The file.

    Raises:
        ImportError: plotly is not installed.
        ValueError: no place to write to, or metrics.jsonl is not as a run writes it.
    """
    run = Path(run)
    output = run / "report.html" if output is None else Path(output)
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no folder {output.parent}; make it first")
    if output.suffix != ".html":
        raise ValueError(f"output: found {output}; expected a file that ends in .html")
    if max_samples < 1:
        raise ValueError(f"max_samples: found {max_samples}; expected at least 1")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('the plots of a report are plotly\'s: pip install "mmssl[report]"') from error
    record = json.loads((run / "run.json").read_text())
    lines = curves.read_metrics(run)
    pictures = output.with_suffix("")
    pictures.mkdir(exist_ok=True)

    model = objective.trained
    objective.eval()
    torch.nn.Module.to(objective, "cuda" if torch.cuda.is_available() else "cpu")
    first, *others = sources_of(record)
    sections = [head(run, record, model), curve_section(lines, list(record["modality"]), pictures)]
    for name in (first, *others):
        looked = look_at(name, record, model.adapters[name], data if name == first else None, max_samples)
        if others:
            sections.append(Section(name.replace("_", " ")))
        end = f"_{name}" if others and name != first else ""
        for section in modality_sections(objective, looked, max_samples, pictures, end):
            section.level = 3 if others else 2
            sections.append(section)
    output.write_text(filled(run, sections, get_plotlyjs()), encoding="utf-8")
    return output


def sources_of(record: dict[str, Any]) -> list[str]:
    """The modalities of a run, the one whose data are named first first."""
    also = list(record.get("also", {}))
    return [*(name for name in record["modality"] if name not in also), *also]


def look_at(name: str, record: dict[str, Any], modality: Modality, data: DataArguments | None, most: int) -> Looked:
    """Samples of a modality, evenly spaced; where those of the run are gone, why."""
    if data is not None:  # what was asked for must be there
        return Looked(name, modality, evenly(load_samples(data, modality), data, modality, most))
    stored = record.get("also", {}).get(name, record)["data"]
    try:
        data = DataArguments(**stored)
        return Looked(name, modality, evenly(load_samples(data, modality), data, modality, most))
    except (ValueError, OSError, ImportError, TypeError) as error:
        return Looked(name, modality, None, f"The data of the run cannot be read: {error}")


def evenly(samples: Any, data: DataArguments, modality: Modality, most: int) -> PreparedSamples:
    if len(samples) > most:
        samples = samples.select(np.linspace(0, len(samples) - 1, most).round().astype(int))
    return PreparedSamples(readable(samples, data, modality), modality)


def head(run: Path, record: dict[str, Any], model: MMSSLModel) -> Section:
    """What was trained, and how its health was."""
    ((objective, options),) = record["objective"].items()
    train, data, shape, minutes = record["train"], record["data"], record["encoder"], record.get("minutes", 0.0)
    batch = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * record["processes"]
    where = [f"{data['source']} ({data['split']}), {record['samples']:,} samples"] + [
        f"{name.replace('_', ' ')}: {source['data']['source']}, {source['samples']:,} samples"
        for name, source in record.get("also", {}).items()
    ]
    facts = {
        "objective": objective,
        "modality": ", ".join(name.replace("_", " ") for name in sources_of(record)),
        "data": "; ".join(where),
        "steps": f"{record.get('steps', 0):,} of {batch:,} samples",
        "parameters": f"{model.num_parameters():,}, {shape['num_hidden_layers']} blocks, width {shape['hidden_size']}",
        "device": f"{record['processes']} x {record.get('device', '?')}, precision {record['mixed_precision']}",
        "time": f"{minutes:.1f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds",
        "version": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    cards = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    chosen = {"objective": {objective: options}, "modality": record["modality"], "encoder": shape, "train": train}
    details = escape(json.dumps(chosen, indent=2))
    verdicts = "".join(
        verdict(name, found, len(record["modality"]) > 1) for name, found in record.get("health", {}).items()
    )
    if not verdicts:
        verdicts = '<p class="note">No verdict: the run did not measure its health (train.health_steps was null).</p>'
    return Section(
        "The run",
        f'{verdicts}<dl class="cards">{cards}</dl>'
        f"<details><summary>All settings</summary><pre>{details}</pre></details>",
    )


def verdict(name: str, found: dict[str, Any], joint: bool) -> str:
    """How the run's health was at its end, with the numbers that say so."""
    start, end, word = found.get("start", {}), found.get("end", {}), str(found["verdict"])
    which = f"{escape(name.replace('_', ' '))}: " if joint else ""
    rows = [
        [text, number(start.get(key)), number(end.get(key)), number(end.get(f"{key}_raw"))]
        for key, text in MEASURES.items()
        if key in end
    ]
    return (
        f'<div class="verdict {VERDICTS.get(word, "unsure")}"><strong>{which}{escape(word)}</strong>'
        f"<p>{escape(str(found.get('why', '')))}</p>{table(['', 'start', 'end', 'raw features'], rows)}</div>"
    )


def number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def curve_section(lines: list[dict[str, Any]], modalities: list[str], pictures: Path) -> Section:
    panels = curves.panels_of(lines, modalities)
    if not panels:
        return Section("Curves", about="Left out: metrics.jsonl has no line yet.")
    curves.draw(panels).savefig(pictures / "curves.png", dpi=DPI)
    known, own = ([panel for panel in panels if panel.own == kind] for kind in (False, True))
    content = curves.show(known)
    if own:
        content += "<h3>Numbers of the objective</h3>" + curves.show(own)
    return Section("Curves", content, "Zoom into one and all follow; a double click shows everything again.")


def modality_sections(objective: Objective, looked: Looked, most: int, pictures: Path, end: str) -> list[Section]:
    """Samples, map, similarities and attention of one modality; each says why where it cannot be."""
    model = objective.trained
    if looked.dataset is None:
        return [Section(title, about=f"Left out: {looked.missing}") for title in TITLES]
    found = embeddings.embed_rows(model, looked.modality, looked.dataset, most)
    return [
        sample_section(objective, looked, pictures / f"reconstructions{end}.png"),
        map_section(found, pictures / f"map{end}.png"),
        similarity_section(found, looked.modality, pictures / f"similarities{end}.png"),
        attention_section(model, looked),
    ]


TITLES = ("Samples", "Map of embeddings", "Similarities", "Attention")


def some(dataset: PreparedSamples, most: int) -> np.ndarray:
    """A few samples in an order without meaning, of as many classes as there are."""
    order = np.random.RandomState(0).permutation(len(dataset.samples))
    labels = dataset.samples.labels
    if labels is not None and labels.dtype.kind != "f":
        first = np.sort(np.unique(labels[order], return_index=True)[1])
        order = order[[*first, *np.setdiff1d(np.arange(len(order)), first)]]
    return order[:most]


def titled(dataset: PreparedSamples, number: int) -> str:
    """Name and label of a sample."""
    samples = dataset.samples
    text = escape(samples.name(number))
    if samples.labels is not None:
        label = samples.labels[number]
        shown = samples.classes[label] if len(samples.classes) and label >= 0 else f"{label:.4g}"
        text += f' <span class="label">{escape(str(shown))}</span>'
    return text


@torch.inference_mode()
def sample_section(objective: Objective, looked: Looked, picture: Path) -> Section:
    """Original, what the encoder saw, reconstruction; or original and two views."""
    modality, dataset = looked.modality, looked.dataset
    assert dataset is not None
    if not modality.offers("drawings"):
        return Section("Samples", about=f"Left out: {looked.name} has no drawings.")
    numbers, device = some(dataset, SHOWN), objective.trained.device
    batch = looked.batch(numbers, device)
    own = objective.model.adapters[looked.name]  # that of the student, whose head reconstructs
    columns = objective.eval().shown(own, own.tokenize(batch), torch.Generator(device).manual_seed(0))
    if len(columns) > 1:
        about = (
            "Each sample as it is, as the encoder sees it, and as it is reconstructed; what was not hidden or altered "
            "is the original's."
        )
        draw_samples(own, columns).savefig(picture, dpi=DPI)
    elif modality.offers("view"):
        generator = torch.Generator(device).manual_seed(0)
        for title in ("a view", "another view"):
            columns[title] = modality.tokenize(modality.view(batch, generator).batch)
        about = "Each sample and two random views of it, as the run draws them. Its objective reconstructs nothing."
    else:
        about = f"Samples as they are: {looked.name} has no views, and the objective reconstructs nothing."
    drawings: dict[str, list[Drawing]] = {title: modality.drawings(tokens) for title, tokens in columns.items()}
    sounds = modality.sounds(batch)
    cards = []
    for row, position in enumerate(numbers):
        shown = side_by_side({title: drawn[row] for title, drawn in drawings.items()})
        listen = audio(sounds[row]) if sounds is not None else ""
        cards.append(f'<article class="sample"><h4>{titled(dataset, int(position))}</h4>{shown}{listen}</article>')
    return Section("Samples", f'<div class="samples">{"".join(cards)}</div>', about)


def map_section(found: embeddings.Embedded, picture: Path) -> Section:
    count = len(found.vectors)
    if count < 5:
        return Section("Map of embeddings", about=f"Left out: found {count} rows to embed; a map needs five.")
    if not np.isfinite(found.vectors).all():
        return Section("Map of embeddings", about="Left out: some embeddings are not finite.")
    maps = embeddings.projections(found.vectors)
    quantities = found.labels if found.labels is not None and found.labels.dtype.kind == "f" else None
    draw_map(maps, embeddings.groups_of(found), quantities).savefig(picture, dpi=DPI)
    what = (
        "tokens of few large samples, the encoder's output for each"
        if found.of_tokens
        else ("samples, the mean of the encoder's output over the tokens of each")
    )
    about = (
        f"{count:,} {what}, scaled to length 1. Distances within a map are not to be taken literally; neighbours are "
        "of the embeddings themselves, by cosine."
    )
    return Section("Map of embeddings", embeddings.show_map(found, maps), about)


def similarity_section(found: embeddings.Embedded, modality: Modality, picture: Path) -> Section:
    finite = np.isfinite(found.vectors).all()
    pairs = cosine_pairs(found.vectors, found.labels, found.views) if finite else {}
    if not pairs:
        views = "the rows are tokens" if found.of_tokens else f"{modality.name} has no views"
        return Section("Similarities", about=f"Left out: {views}, and there are no labels of two classes.")
    draw_similarities(pairs).savefig(picture, dpi=DPI)
    about = (
        "Cosines of pairs of embeddings. Where features are good, the two kinds lie apart; where all are 1, they have "
        "collapsed."
    )
    return Section("Similarities", embeddings.show_similarities(pairs), about)


@torch.inference_mode()
def attention_section(model: MMSSLModel, looked: Looked) -> Section:
    """Heads of the last block over a few samples."""
    modality, dataset = looked.modality, looked.dataset
    assert dataset is not None
    if not modality.offers("drawings"):
        return Section("Attention", about=f"Left out: {looked.name} has no drawings.")
    cards = []
    for position in some(dataset, ATTENDED):
        batch = looked.batch(np.array([position]), model.device)
        tokens = modality.tokenize(batch)
        if tokens.valid.shape[1] > MOST_ATTENDED:
            return Section(
                "Attention",
                about=f"Left out: a sample has {tokens.valid.shape[1]:,} tokens; the weights of more than "
                f"{MOST_ATTENDED:,} take too much memory.",
            )
        (drawing,) = modality.drawings(tokens)
        form = FORMS[type(drawing)]
        weights = attention_to_tokens(model, batch)
        even = weights.sum(dim=(1, 2)) / tokens.valid.sum()  # what each token would get if all got as much
        most = (weights.amax(dim=(1, 2)) / even.clamp(min=1e-12)).tolist()
        heads = [f"head {head}: {times:.1f} x" for head, times in enumerate(most, 1)]
        shown = form.attended(drawing, stretched(over_drawing(modality, tokens, weights, form.blank)), heads)
        cards.append(f'<article class="sample"><h4>{titled(dataset, int(position))}</h4>{shown}</article>')
    asks = "the class token reads" if asks_class_token(model) else "tokens read, on average,"
    about = (
        f"What {asks} in each head of the last block, from the least (dark) to the greatest weight (bright). Beside "
        "the head: its greatest weight in multiples of an even one. Near 1 it reads everything alike."
    )
    return Section("Attention", f'<div class="attended">{"".join(cards)}</div>', about)


def filled(run: Path, sections: list[Section], plotly: str) -> str:
    """The template with a heading, a link and a place for each section."""
    parts, links = [], []
    for place, section in enumerate(sections):
        name, tag = f"section-{place}", f"h{section.level}"
        links.append(f'<a class="level{section.level}" href="#{name}">{escape(section.title)}</a>')
        about = f'<p class="about">{escape(section.about)}</p>' if section.about else ""
        parts.append(f'<section id="{name}"><{tag}>{escape(section.title)}</{tag}>{about}{section.content}</section>')
    template = (files("mmssl.evaluation.report") / "page.html").read_text(encoding="utf-8")
    own = {"title": escape(run.resolve().name), "links": "".join(links), "sections": "".join(parts), "plotly": plotly}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: own[match[1]], template)  # once: what is put in is not read again
