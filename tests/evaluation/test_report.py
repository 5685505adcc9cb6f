"""The numbers, words and reasons of a report, against slow loops; that a browser shows them is tested beside this."""

import base64
import io
import json
import math
import re
import sys
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmssl.data import DataArguments, Samples
from mmssl.data.builtin import BUILTIN
from mmssl.drawings import Cells, Frames, Lines, Network, Points, Spectrogram
from mmssl.evaluation.report import write_report
from mmssl.evaluation.report.attention import attention_to_tokens, over_drawing, stretched
from mmssl.evaluation.report.curves import panels_of, read_metrics
from mmssl.evaluation.report.embeddings import nearest
from mmssl.evaluation.report.forms import FORMS, side_by_side
from mmssl.evaluation.report.html import audio, png
from mmssl.figures import cosine_pairs, histograms
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.training import load_objective
from tests.matrix.cases import MODALITIES, make_batch
from tests.training.tiny import run


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# Embeddings


def test_neighbours_are_those_of_a_slow_loop() -> None:
    vectors = normal(23, 5)
    vectors[7] = 3 * vectors[4] + 1e-3  # a neighbour of cosine nearly 1 that is not the row itself
    index, cosines = nearest(vectors, 4)
    for row, one in enumerate(vectors):
        others = [
            (-float(one @ other) / (math.sqrt(one @ one) * math.sqrt(other @ other)), number)
            for number, other in enumerate(vectors)
            if number != row
        ]
        expected = sorted(others)[:4]
        assert index[row].tolist() == [number for _, number in expected]
        np.testing.assert_allclose(cosines[row], [-value for value, _ in expected], atol=1e-12)
    assert index[7, 0] == 4 and index[4, 0] == 7


def test_fewer_rows_than_neighbours() -> None:
    index, _ = nearest(normal(3, 2), 8)
    assert index.shape == (3, 2) and all(row not in others for row, others in enumerate(index))


def test_pairs_of_views_and_of_classes_are_those_of_a_slow_loop() -> None:
    vectors, one, two = normal(9, 4), normal(5, 4, seed=1), normal(5, 4, seed=2)
    labels = np.array([0, 1, 0, 2, 1, -1, 0, 2, 2])  # -1: in no class, so in no pair
    found = cosine_pairs(vectors, labels, (one, two))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    expected: dict[str, list[float]] = {"same": [], "other": [], "one": [], "two": []}
    for i in range(9):
        for j in range(i):
            if min(labels[i], labels[j]) >= 0:
                expected["one" if labels[i] == labels[j] else "two"].append(cosine(vectors[i], vectors[j]))
    for i in range(5):
        for j in range(5):
            expected["same" if i == j else "other"].append(cosine(one[i], two[j]))
    kinds = [*found["views"].values(), *found["classes"].values()]
    for pairs, wanted in zip(kinds, expected.values(), strict=True):
        np.testing.assert_allclose(sorted(pairs), sorted(wanted), atol=1e-12)


def test_histograms_are_shares_of_all_pairs() -> None:
    pairs = {"a": np.array([0.1, 0.2, 0.2, 1.0]), "b": np.array([0.1, -0.5])}
    edges, shares = histograms(pairs)
    assert edges[0] == -0.5 and edges[-1] == 1.0
    for name, values in pairs.items():
        for low, high, share in zip(edges, edges[1:], shares[name], strict=False):
            inside = [low <= value < high or value == high == edges[-1] for value in values]
            assert share == pytest.approx(sum(inside) / len(values))
    _, shares = histograms({"a": np.ones(4), "b": np.ones(2)})  # features that have collapsed
    assert shares["a"].sum() == shares["b"].sum() == 1.0


# Attention


def tiny_model(name: str, **config: Any) -> MMSSLModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **config}
    return MMSSLModel(MMSSLConfig(modalities={name: MODALITIES[name][0]}, **sizes)).eval()


@torch.no_grad()
@pytest.mark.parametrize("prefix", [{"class_token": True, "num_register_tokens": 1}, {}, {"causal_attention": True}])
def test_attention_is_that_of_a_slow_softmax(prefix: dict[str, Any]) -> None:
    """From the class token, or without one the mean of what valid tokens read; with padding."""
    pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    model = tiny_model("speech", **prefix)
    batch = make_batch(model.adapters["speech"], 3)
    found = attention_to_tokens(model, batch)
    assert model.config._attn_implementation == "sdpa"
    tokens = model.adapters["speech"].tokenize(batch)
    first, length = model.encoder.num_prefix_tokens, tokens.valid.shape[1]
    assert found.shape == (2, 3, length) and not tokens.valid.all()
    before = model(**batch, output_hidden_states=True).hidden_states[-2]
    block: Any = model.encoder.layers[-1]
    query, key, _ = block.attention.qkv(block.norm1(before)).unflatten(-1, (3, 2, 8)).unbind(2)
    for row in range(3):
        count = int(tokens.valid[row].sum())
        for head in range(2):
            reads = []
            for i in range(first + count):
                last = i + 1 if prefix.get("causal_attention") else first + count
                scores = [float(query[row, i, head] @ key[row, j, head]) / math.sqrt(8) for j in range(last)]
                powers = [math.exp(score) for score in scores]
                reads.append([power / sum(powers) for power in powers] + [0.0] * (first + count - last))
            chosen = [reads[0]] if first else reads
            expected = np.array(chosen).mean(axis=0)
            assert sum(expected) == pytest.approx(1)
            np.testing.assert_allclose(found[head, row, :count], expected[first:], atol=1e-5)
            assert not found[head, row, count:].any()
            assert float(found[head, row].sum() + expected[:first].sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", list(MODALITIES))
def test_weights_lie_where_their_tokens_are_drawn(name: str) -> None:
    """Each part of a drawing has the mean weight of the tokens without which it would be blank."""
    options = dict(MODALITIES[name][0])
    if name == "time_series":
        options |= {"patch_length": 8, "stride": 4}  # tokens overlap, and samples have two rows
    if name == "speech":
        pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    modality = make_modality(name, options)
    tokens = modality.tokenize(make_batch(modality, 1))
    weights = torch.rand(2, *tokens.valid.shape, generator=torch.Generator().manual_seed(0))
    (drawing,) = modality.drawings(tokens)
    blank = FORMS[type(drawing)].blank
    found = over_drawing(modality, tokens, weights, blank)

    total, count = np.zeros(found.shape), np.zeros(found.shape)
    for row, place in tokens.valid.nonzero().tolist():
        content = torch.full_like(tokens.content, torch.nan)
        content[row, place] = tokens.content[row, place]
        alone = modality.drawings(type(tokens)(**{**vars(tokens), "content": content}))[0]
        shown = ~blank(alone)
        total += shown * weights[:, row, place].numpy().reshape(2, *[1] * shown.ndim)
        count += shown
    assert count.max() == (2 if name == "time_series" else 1)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, total / count, rtol=1e-5)
    if isinstance(drawing, Points):
        np.testing.assert_allclose(found, weights[:, 0][:, drawing.groups], rtol=1e-6)


def test_weights_are_stretched_head_by_head() -> None:
    weights = np.array([[[1.0, 3.0], [np.nan, 2.0]], [[5.0, 5.0], [5.0, 5.0]]])
    np.testing.assert_allclose(stretched(weights), np.array([[[0, 1], [np.nan, 0.5]], [[0, 0], [0, 0]]]))


# Curves


def test_curves_are_grouped_by_what_they_are() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "epoch": 0, "loss": 4.0, "loss/image": 3.0, "trivial": 2.0, "one/accuracy": 0.1, "accuracy": 0.2},
        {"step": 2, "epoch": 0, "loss": None, "health/knn/image": 0.5, "health/knn_start/image": 0.3},
        {"step": 3, "epoch": 1, "loss": 2.0, "health/knn/image": 0.6, "health/verdict": "healthy", "flag": True},
    ]
    panels = {panel.title: panel for panel in panels_of(lines, ["image", "speech"])}
    assert list(panels) == ["loss", "probes", "accuracy"]
    loss, image, trivial = panels["loss"].curves
    assert [curve.name for curve in panels["loss"].curves] == ["loss", "loss, image", "predicting the mean"]
    assert loss.steps.tolist() == [1, 2, 3] and loss.dash == "solid" and trivial.dash == "dot"
    np.testing.assert_array_equal(loss.values, [4.0, np.nan, 2.0])  # a skipped step is a gap
    knn, start = panels["probes"].curves
    assert knn.steps.tolist() == [2, 3] and knn.values.tolist() == [0.5, 0.6]
    assert (start.dash, start.color) == ("dash", knn.color) and image.color != loss.color
    assert panels["accuracy"].own and not panels["probes"].own and len(panels["accuracy"].curves) == 2


def test_long_curves_keep_their_ends() -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": float(step)} for step in range(1, 50_001)]
    (panel,) = panels_of(lines, [])
    (curve,) = panel.curves
    assert len(curve.steps) == 2000 and curve.steps[[0, -1]].tolist() == [1, 50_000]
    np.testing.assert_array_equal(curve.steps, curve.values)


@pytest.mark.parametrize("bad", ['{"step": 2, "lo', "[1, 2]", '{"loss": 1.0}', '{"step": "x"}', ""])
def test_a_bad_line_is_named(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: found '.*expected one JSON object with a step"):
        read_metrics(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: found no such file"):
        read_metrics(tmp_path)


# Forms


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


def test_what_is_nan_is_clear() -> None:
    pixels = np.linspace(0, 1, 12).reshape(2, 2, 3)
    pixels[0, 1] = np.nan
    image = np.asarray(PILImage.open(io.BytesIO(decoded(png(pixels)))))
    assert image[..., 3].tolist() == [[255, 0], [255, 255]]
    np.testing.assert_array_equal(image[1, 0, :3], np.round(pixels[1, 0] * 255))
    enlarged = PILImage.open(io.BytesIO(decoded(png(pixels[1:], 5))))
    assert enlarged.size == (6, 3) and enlarged.mode == "RGB"


def test_sounds_are_written_as_they_are() -> None:
    sound = np.array([0.0, 0.5, -1.0, 1.0], dtype=np.float32)
    found = re.search(r'src="([^"]+)"', audio((sound, 8000)))
    assert found
    with wave.open(io.BytesIO(decoded(found[1]))) as reader:
        assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (8000, 1, 2)
        samples = np.frombuffer(reader.readframes(4), "<i2")
    np.testing.assert_allclose(samples / 32767, sound, atol=1 / 32767)


class Rows(HTMLParser):
    """Cells of the rows of a table: class and text."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append((dict(attrs).get("class") or "", ""))
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            kind, text = self.rows[-1][-1]
            self.rows[-1][-1] = kind, text + data


def test_cells_that_changed_are_marked() -> None:
    names = ["size", "<b>&", "age"]
    drawings = {
        "original": Cells(names, ["1", "<i>", "3"]),
        "seen": Cells(names, ["1", "", "3"]),
        "reconstructed": Cells(names, ["1", "<u>", "3"]),
    }
    rows = Rows(side_by_side(drawings)).rows
    assert [text for _, text in rows[0]] == ["column", *drawings]
    assert rows[1] == [("", "size"), ("", "1"), ("", "1"), ("", "1")]
    assert rows[2] == [("", "<b>&"), ("", "<i>"), ("hidden", "hidden"), ("changed", "<u>")]


def data_of(html: str) -> list[dict[str, Any]]:
    """Traces of all plots; arrays are decoded."""
    found = []
    for text in re.findall(r'<script type="application/json">(\{"data".*?)</script>', html):
        found += json.loads(text)["data"]
    return found


def array(value: Any) -> np.ndarray:
    if isinstance(value, dict):
        flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        return flat.reshape([int(side) for side in value["shape"].split(",")]) if "shape" in value else flat
    return np.array(value)


def test_each_form_draws_its_values_and_leaves_nan_blank() -> None:
    spoken = normal(4, 6).astype(np.float32)
    spoken[:, 2] = np.nan
    (heat,) = data_of(side_by_side({"a": Spectrogram(spoken, 0.1, np.arange(4) * 100.0)}))
    np.testing.assert_array_equal(array(heat["z"]), spoken)
    np.testing.assert_allclose(array(heat["x"]), np.arange(6) * 0.1)
    places = normal(5, 3).astype(np.float32)
    (cloud,) = data_of(side_by_side({"a": Points(places, np.arange(5))}))
    np.testing.assert_array_equal(np.stack([array(cloud[axis]) for axis in "xyz"], axis=1), places)
    values = normal(2, 7).astype(np.float32)
    values[1, 3] = np.nan
    lines = data_of(side_by_side({"a": Lines(values, ["one", "<two>"])}))
    np.testing.assert_array_equal(np.stack([array(line["y"]) for line in lines]), values)
    assert lines[1]["name"] == "&lt;two&gt;"  # which plotly shows as <two>
    nodes = normal(4, 2)
    nodes[2] = np.nan
    network = Network(np.array([[0, 1, 0], [2, 3, 1]]), nodes)
    edges, hidden, known = data_of(side_by_side({"a": network}))
    assert len(array(hidden["x"])) == 1 and hidden["text"] == ["node 2: hidden"]
    at = {text.split(":")[0]: place for trace in (hidden, known) for text, place in zip(
        trace["text"], zip(array(trace["x"]), array(trace["y"]), strict=True), strict=True)}  # fmt: skip
    x, y = array(edges["x"]).reshape(-1, 3), array(edges["y"]).reshape(-1, 3)
    for number, (one, other) in enumerate([(0, 2), (1, 3), (0, 1)]):
        assert (x[number, 0], y[number, 0]) == at[f"node {one}"] and (x[number, 1], y[number, 1]) == at[f"node {other}"]
    clip = side_by_side({"a": Frames(np.random.default_rng(0).random((3, 2, 2, 3)), 4.0)})
    assert 'data-rate="4"' in clip and len(re.findall(r'"data:image/png[^"]+"', clip)) == 4  # all frames, and the first


# The page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny<b>&"
    folder.parent.mkdir(exist_ok=True)
    run(folder, max_train_steps=4, health_steps=2)
    return folder


def section_of(text: str, title: str) -> str:
    body = text[text.index("<main>") :]
    found = re.search(rf"<section[^>]*><h\d>{title}</h\d>(.*?)</section>", body, re.DOTALL)
    assert found, title
    return found[1]


@pytest.mark.slow
def test_the_page_and_its_pictures(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    path = write_report(finished, load_objective(finished), max_samples=40, output=tmp_path / "page.html")
    names = {"curves.png", "map.png", "similarities.png", "reconstructions.png"}
    assert path == tmp_path / "page.html" and {file.name for file in (tmp_path / "page").iterdir()} == names
    for name in names:
        with PILImage.open(tmp_path / "page" / name) as image:
            assert image.format == "PNG" and len(np.unique(np.asarray(image))) > 10
    text = path.read_text()
    page = text[: text.index("<script>")] + text[text.index("</head>") :]  # without plotly.js
    assert "<title>tiny&lt;b&gt;&amp;</title>" in page and "{{" not in page and "tiny<b>" not in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", page)
    head = section_of(page, "The run")
    assert "MaskedReconstruction" in head and "digits (train), 60 samples" in head and "4 of 8 samples" in head
    parameters = sum(value.numel() for value in load_objective(finished).trained.parameters())
    assert f"{parameters:,}" in head and "effective rank" in head
    assert len(re.findall(r'class="plot curve"', section_of(page, "Curves"))) > 5
    samples = section_of(page, "Samples")
    assert samples.count("<article") == 6
    assert samples.count("reconstructed</figcaption>") == samples.count("seen</figcaption>") == 6
    found = re.search(r'class="facts">(.*?)</script>', section_of(page, "Map of embeddings"))
    assert found
    facts = json.loads(found[1])
    assert len(facts["names"]) == len(facts["pictures"]) == len(facts["neighbors"]) == 40
    assert {"PCA", "t-SNE"} <= set(facts["maps"])
    assert "two views of one sample" in section_of(page, "Similarities")
    assert section_of(page, "Attention").count("<article") == 3


@pytest.mark.slow
def test_sections_that_cannot_be_say_why(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    objective = load_objective(finished)
    record = json.loads((finished / "run.json").read_text())
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "metrics.jsonl").write_text("")
    gone = {**record, "data": {**record["data"], "source": str(tmp_path / "gone")}, "health": {}}
    (copy / "run.json").write_text(json.dumps(gone))
    page = write_report(copy, objective).read_text()
    assert "No verdict" in section_of(page, "The run") and "no line yet" in section_of(page, "Curves")
    for title in ("Samples", "Map of embeddings", "Similarities", "Attention"):
        assert re.search(r"Left out: .*cannot be read: .*found nothing at .*gone", section_of(page, title))
    with pytest.raises(ValueError, match="found nothing at"):  # what was asked for must be there
        write_report(copy, objective, DataArguments(str(tmp_path / "gone")))

    few = Samples([np.zeros((8, 8), dtype=np.float32)] * 2, "zeros {}".format)
    monkeypatch.setitem(BUILTIN, "few", lambda split: few)
    monkeypatch.setattr("mmssl.evaluation.report.page.MOST_ATTENDED", 8)
    page = write_report(copy, objective, DataArguments("few"), max_samples=20).read_text()
    assert "20 tokens of few large samples" in section_of(page, "Map of embeddings")  # 2 samples of 16 tokens
    assert "rows are tokens, and there are no labels" in section_of(page, "Similarities")
    assert "16 tokens" in section_of(page, "Attention")


@pytest.mark.slow
def test_a_joint_run_has_sections_for_each_modality(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    from tests.training.joint import run_joint

    run_joint(tmp_path / "run", max_train_steps=4, health_steps=2)
    path = write_report(tmp_path / "run", load_objective(tmp_path / "run"), max_samples=40)
    page = path.read_text()
    page = page[page.index("<main>") :]
    titles = re.findall(r"<section[^>]*><(h\d)>(.*?)</h", page)
    inner = [("h3", title) for title in ("Samples", "Map of embeddings", "Similarities", "Attention")]
    assert titles == [("h2", "The run"), ("h2", "Curves"), ("h2", "image"), *inner, ("h2", "speech"), *inner]
    assert "image: " in section_of(page, "The run") and "speech: " in section_of(page, "The run")
    assert page.count("<audio") == 6 and page.index("<audio") > page.index("<h2>speech</h2>")
    names = {f"{name}{end}.png" for name in ("map", "similarities", "reconstructions") for end in ("", "_speech")}
    # Sounds have no labels, and 20 of them are so few that their map is of tokens, of which no views are compared.
    assert {file.name for file in (tmp_path / "run" / "report").iterdir()} == {"curves.png", *names} - {
        "similarities_speech.png"
    }


def test_wrong_places_are_refused(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    objective = load_objective(finished)
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        write_report(finished, objective, output=tmp_path / "missing" / "page.html")
    with pytest.raises(ValueError, match=r"ends in \.html"):
        write_report(finished, objective, output=tmp_path / "page.pdf")
    with pytest.raises(ValueError, match="max_samples: found 0"):
        write_report(finished, objective, max_samples=0)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"mmssl\[report\]"):
        write_report(finished, objective)


def test_the_command_refuses_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmssl.cli import main

    monkeypatch.setattr(sys, "argv", ["mmssl", "report", str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished run"):
        main()
