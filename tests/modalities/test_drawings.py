"""Drawings and sounds of samples: against the raw samples, blank where content is NaN, without padding."""

import calendar
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.discovery import names
from mmssl.drawings import Cells, Drawing, Frames, Lines, Network, Points, Spectrogram
from mmssl.modalities.base import Modality
from mmssl.modeling import make_modality
from mmssl.samples import Samples
from mmssl.tokens import Tokens
from tests.matrix.cases import MODALITIES, TABLE

HELD = {Frames: "pixels", Spectrogram: "values", Points: "places", Network: "values", Cells: "values", Lines: "values"}
CASES = {name: (name, MODALITIES.get(name, ({},))[0]) for name in names("modalities")} | {
    "series, channels together": ("time_series", {"patch_length": 8, "channel_independent": False}),
    "series, overlapping": ("time_series", {"patch_length": 8, "stride": 4}),
    "series, as they are": ("time_series", {"patch_length": 8, "instance_norm": False}),
    "table with an offset": ("tabular", {"schema": TABLE, "official_offset": True}),
    "graph without encodings": ("graph", {"num_features": 12, "undirected": False}),
}
each = pytest.mark.parametrize("name, options", CASES.values(), ids=CASES)


def made(name: str, options: dict[str, Any]) -> Modality:
    if name == "speech":
        pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    if name == "graph" and options.get("random_walk_steps"):
        pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
    return make_modality(name, options)


def batch_of(modality: Modality, samples: list[Any]) -> dict[str, Tensor]:
    return modality.collate([modality.excerpt(modality.prepare(sample), None) for sample in samples])


def tokens_of(modality: Modality, samples: list[Any]) -> Tokens:
    return modality.tokenize(batch_of(modality, samples))


def hide(tokens: Tokens, hidden: Tensor) -> Tokens:
    """Tokens whose content is NaN where ``hidden`` (B, N)."""
    hidden = hidden.reshape(hidden.shape + (1,) * (tokens.content.dim() - 2))
    return replace(tokens, content=tokens.content.masked_fill(hidden, torch.nan))


def drawings(modality: Modality, tokens: Tokens) -> list[Any]:
    """Of whichever form the modality's are."""
    return list(modality.drawings(tokens))


def held(drawing: Drawing) -> np.ndarray:
    """What is drawn, as an array with NaN where it is blank; text as the number of its hash."""
    values = getattr(drawing, HELD[type(drawing)])
    if isinstance(drawing, Cells):
        values = np.array([np.nan if cell == "" else hash(cell) for cell in values])
    return values


def axes(drawing: Drawing) -> dict[str, Any]:
    """What it is drawn on: everything else, and the size."""
    others = {field.name: getattr(drawing, field.name) for field in fields(drawing)}
    del others[HELD[type(drawing)]]
    return others | {"shape": held(drawing).shape}


# ---- All modalities --------------------------------------------------------------------------------------------------


@each
def test_each_sample_is_drawn_in_one_of_the_forms(name: str, options: dict[str, Any]) -> None:
    """In forms as drawings.py says: of the right number of axes, as NumPy arrays, in the right range."""
    modality = made(name, options)
    drawn = drawings(modality, tokens_of(modality, MODALITIES[name][1](4)))
    assert len(drawn) == 4 and len({type(drawing) for drawing in drawn}) == 1
    for drawing in drawn:
        assert isinstance(drawing, get_args(Drawing))
        values = held(drawing)
        assert (
            isinstance(values, np.ndarray)
            and values.size
            and values.ndim == (4 if type(drawing) is Frames else 2) - (type(drawing) is Cells)
        )
        match drawing:
            case Frames():
                assert values.shape[3] == 3 and values.min() >= 0 and values.max() <= 1 and drawing.rate > 0
            case Spectrogram():
                assert drawing.hop > 0 and drawing.frequencies is not None and len(drawing.frequencies) == len(values)
            case Points():
                assert values.shape == (len(drawing.groups), 3) and drawing.groups.dtype.kind == "i"
            case Network():
                assert len(drawing.edges) == 2 and drawing.edges.dtype.kind == "i"
            case Cells():
                assert len(drawing.names) == len(values) and all(type(cell) is str for cell in drawing.values)
            case Lines():
                assert len(drawing.names) == len(values)


@each
def test_a_drawing_does_not_depend_on_the_rest_of_the_batch(name: str, options: dict[str, Any]) -> None:
    """So the padding of shorter samples is left out."""
    modality = made(name, options)
    samples = MODALITIES[name][1](3)
    together = drawings(modality, tokens_of(modality, samples))
    for sample, drawing in zip(samples, together, strict=True):
        (alone,) = drawings(modality, tokens_of(modality, [sample]))
        np.testing.assert_equal(axes(alone), axes(drawing))
        np.testing.assert_allclose(held(alone), held(drawing), rtol=1e-4, atol=1e-4)


@each
def test_hidden_tokens_are_blank_on_the_same_axes(name: str, options: dict[str, Any]) -> None:
    """What is not hidden stays as it is; nothing is left where all is hidden; the tokens themselves are not changed."""
    modality = made(name, options)
    tokens = tokens_of(modality, MODALITIES[name][1](3))
    tokens.content.requires_grad_()  # as reconstructions may
    before = tokens.content.detach().clone()
    hidden = modality.mask(tokens, 0.5, torch.Generator().manual_seed(0)).hidden
    original, part = drawings(modality, tokens), drawings(modality, hide(tokens, hidden))
    nothing = drawings(modality, hide(tokens, torch.ones_like(hidden)))
    for whole, some, none in zip(original, part, nothing, strict=True):
        np.testing.assert_equal(axes(some), axes(whole))
        np.testing.assert_equal(axes(none), axes(whole))
        assert np.isnan(held(none)).all() and not np.isnan(held(whole)).all()
        blank = np.isnan(held(some))
        share = blank.mean() - np.isnan(held(whole)).mean()
        assert 0.05 < share < 0.95
        if "stride" not in options:  # else a step is the mean of fewer patches, the same but for rounding
            np.testing.assert_array_equal(held(some)[~blank], held(whole)[~blank])
        np.testing.assert_allclose(held(some)[~blank], held(whole)[~blank], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.content.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", names("modalities"))
def test_sounds_are_waveforms_or_none(name: str) -> None:
    modality = made(name, MODALITIES[name][0])
    sounds = modality.sounds(batch_of(modality, MODALITIES[name][1](3)))
    assert (sounds is None) == (name != "speech")
    for wave, rate in sounds or ():
        assert wave.ndim == 1 and len(wave) and np.abs(wave).max() <= 1 and type(rate) is int


# ---- Images and videos -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_those_of_the_image(channels: int) -> None:
    image = make_modality("image", {"image_size": (4, 6), "patch_size": 2, "num_channels": channels, "image_std": 0.3})
    samples = list(np.random.default_rng(0).random((2, 4, 6, channels), dtype=np.float32))
    tokens = tokens_of(image, samples)
    for sample, drawing in zip(samples, drawings(image, tokens), strict=True):
        shown = sample[..., :3] if channels > 1 else np.repeat(sample, 3, axis=-1)
        np.testing.assert_allclose(drawing.pixels, shown[None], atol=1e-6)
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[1, 4] = True  # second row, second column
    first, second = drawings(image, hide(tokens, hidden))
    blank = np.zeros((1, 4, 6, 3), dtype=bool)
    blank[:, 2:4, 2:4] = True
    np.testing.assert_array_equal(np.isnan(second.pixels), blank)
    assert not np.isnan(first.pixels).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_are_those_of_the_video(channels: int) -> None:
    options = {"num_frames": 4, "frame_stride": 2, "image_size": (4, 6), "patch_size": 2, "num_channels": channels}
    video = make_modality("video", options)
    sample = np.random.default_rng(0).integers(256, size=(7, 4, 6, channels), dtype=np.uint8)
    tokens = tokens_of(video, [sample])
    (drawing,) = drawings(video, tokens)
    assert drawing.pixels.shape == (4, 4, 6, 3)
    np.testing.assert_allclose(drawing.pixels, np.broadcast_to(sample[::2] / 255, (4, 4, 6, 3)), atol=1e-6)
    hidden = torch.zeros(1, 12, dtype=torch.bool)
    hidden[0, 6 + 2] = True  # second tubelet, first row, third column
    (seen,) = drawings(video, hide(tokens, hidden))
    blank = np.zeros((4, 4, 6, 3), dtype=bool)
    blank[2:4, 0:2, 4:6] = True
    np.testing.assert_array_equal(np.isnan(seen.pixels), blank)


@pytest.mark.parametrize("options, rate", [({"frame_rate": 12.5}, 12.5), ({"frame_stride": 2}, 8.0), ({}, 8.0)])
def test_clips_run_at_their_own_rate_where_it_is_known(options: dict[str, Any], rate: float) -> None:
    video = make_modality("video", {"num_frames": 2, "image_size": 4, "patch_size": 2, **options})
    (drawing,) = drawings(video, video.tokenize({"pixel_values_videos": torch.zeros(1, 3, 2, 4, 4)}))
    assert drawing.rate == rate


# ---- Speech ----------------------------------------------------------------------------------------------------------


def test_a_spectrogram_is_that_of_the_clip() -> None:
    """Against torchaudio's own, each channel standardised; one frame each ``hop`` seconds, to the clip's end."""
    transforms = pytest.importorskip("torchaudio.transforms", reason="torchaudio is not installed")
    speech = make_modality("speech", MODALITIES["speech"][0] | {"rms_level": None})
    clips = MODALITIES["speech"][1](3)
    reference = transforms.MelSpectrogram(8000, n_fft=200, win_length=200, hop_length=80, n_mels=20, mel_scale="htk")
    for clip, drawing in zip(clips, drawings(speech, tokens_of(speech, clips)), strict=True):
        mel = (reference(torch.from_numpy(clip)) + 1e-10).log()  # low frequencies first
        expected = (mel - mel.mean(dim=1, keepdim=True)) / mel.std(dim=1, keepdim=True)
        np.testing.assert_allclose(drawing.values, expected.numpy(), atol=2e-3)
        assert drawing.hop == 0.01 and drawing.values.shape == (20, 1 + len(clip) // 80)


def test_frequencies_are_where_the_filters_are_highest() -> None:
    functional = pytest.importorskip("torchaudio.functional", reason="torchaudio is not installed")
    speech = make_modality("speech", MODALITIES["speech"][0])
    (drawing,) = drawings(speech, tokens_of(speech, MODALITIES["speech"][1](1)))
    filters = functional.melscale_fbanks(4001, 0.0, 4000.0, 20, 8000, mel_scale="htk")  # a bin for each Hz
    np.testing.assert_allclose(drawing.frequencies, filters.argmax(dim=0).numpy(), atol=1.0)


def test_sounds_are_the_clips() -> None:
    """In their own lengths; what ``rms_level`` made too loud is quieter again, all of it."""
    pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    clips = [0.1 * clip for clip in MODALITIES["speech"][1](3)]
    clips[1] = clips[1] * 1e-4
    clips[1][700] = 1.0  # a click: nearly all of the energy
    options = MODALITIES["speech"][0]
    plain = make_modality("speech", options | {"rms_level": None})
    for clip, (wave, rate) in zip(clips, plain.sounds(batch_of(plain, clips)) or (), strict=True):
        np.testing.assert_allclose(wave, clip, atol=1e-7)
        assert rate == 8000
    loud = make_modality("speech", options | {"rms_level": -25.0})
    rms = 10 ** (-25 / 20)
    for number, (clip, (wave, _)) in enumerate(zip(clips, loud.sounds(batch_of(loud, clips)) or (), strict=True)):
        scaled = clip * rms / np.sqrt(np.mean(clip.astype(np.float64) ** 2))
        assert (np.abs(scaled).max() > 1) == (number == 1)
        np.testing.assert_allclose(wave, scaled / max(1, np.abs(scaled).max()), atol=1e-5)


# ---- Point clouds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_points_are_those_of_the_cloud(normalize: bool) -> None:
    """Each drawn point is one of the sample's; a group has as many as it should, near each other."""
    options = {"num_points": 64, "num_groups": 6, "group_size": 8, "normalize": normalize, "num_channels": 1}
    clouds = make_modality("point_cloud", options)
    samples = [np.random.default_rng(size).normal(3.0, 2.0, size=(size, 4)) for size in (40, 60)]
    tokens = tokens_of(clouds, samples)
    for sample, drawing in zip(samples, drawings(clouds, tokens), strict=True):
        xyz = sample[:, :3]
        if normalize:
            xyz = xyz - xyz.mean(axis=0)
            xyz = xyz / np.linalg.norm(xyz, axis=1).max()
        distance = np.linalg.norm(drawing.places[:, None] - xyz, axis=-1)
        assert distance.min(axis=1).max() < 1e-5
        np.testing.assert_array_equal(drawing.groups, np.repeat(np.arange(6), 8))
        for group in range(6):  # distinct points, the nearest ones of one of them
            own = set(distance[drawing.groups == group].argmin(axis=1).tolist())
            among = np.linalg.norm(xyz[:, None] - xyz, axis=-1).argsort(axis=1)[:, :8]
            assert own in [set(nearest.tolist()) for nearest in among]


def test_points_of_hidden_groups_are_blank() -> None:
    clouds = make_modality("point_cloud", {"num_points": 32, "num_groups": 4, "group_size": 8})
    tokens = tokens_of(clouds, [np.random.default_rng(0).normal(size=(32, 3))])
    hidden = torch.tensor([[False, True, False, True]])
    (drawing,) = drawings(clouds, hide(tokens, hidden))
    np.testing.assert_array_equal(np.isnan(drawing.places).all(axis=1), np.isin(drawing.groups, [1, 3]))
    assert not np.isnan(drawing.places[np.isin(drawing.groups, [0, 2])]).any()


# ---- Graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undirected", [True, False])
def test_edges_and_features_are_those_of_the_graph(undirected: bool) -> None:
    """Against networkx: each pair once, no loops; a graph without edges among others."""
    graph = make_modality("graph", {"num_features": 3, "normalize_features": False, "undirected": undirected})
    random, samples = np.random.default_rng(0), []
    for nodes, edges in ((7, 9), (5, 0), (11, 30)):
        samples.append({"x": random.normal(size=(nodes, 3)), "edge_index": random.integers(nodes, size=(2, edges))})
    for sample, drawing in zip(samples, drawings(graph, tokens_of(graph, samples)), strict=True):
        expected = nx.Graph(sample["edge_index"].T.tolist())
        expected.remove_edges_from(list(nx.selfloop_edges(expected)))
        assert [tuple(edge) for edge in drawing.edges.T] == sorted(tuple(sorted(edge)) for edge in expected.edges)
        np.testing.assert_allclose(drawing.values, sample["x"], atol=1e-6)


def test_a_hidden_node_keeps_its_edges() -> None:
    graph = make_modality("graph", {"num_features": 2, "normalize_features": False})
    tokens = tokens_of(graph, [{"x": np.eye(4, 2), "edge_index": np.array([[0, 1, 2], [1, 2, 3]])}])
    (drawing,) = drawings(graph, hide(tokens, torch.tensor([[False, True, False, False]])))
    assert drawing.edges.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert np.isnan(drawing.values).all(axis=1).tolist() == [False, True, False, False]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(count: int = 60) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "length": float(random.lognormal(2, 1)),
            "tiny": float(random.normal(0, 3e-9)),
            "people": int(random.integers(100, 90_000)),
            "colour": [None, "blue", "green", "red"][random.integers(4)],
            "code": int(random.integers(3)),
            "yes": bool(random.integers(2)),
            "age": None if row % 7 == 3 else int(random.integers(90)),
        }
        for row in range(count)
    ]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("scaling", ["standard", "min_max", "quantile"])
def test_cells_are_those_of_the_table(scaling: str, offset: bool) -> None:
    """Whole numbers to the digit, others nearly; categories by name; hidden ones blank."""
    options = {"numerical_scaling": scaling, "categorical_columns": ["code"], "official_offset": offset}
    tabular, rows = make_modality("tabular", options), table()
    tabular.fit(Samples(rows, str))
    tokens = tokens_of(tabular, rows)
    drawn = drawings(tabular, tokens)
    assert len(drawn) == len(rows)
    for row, drawing in zip(rows, drawn, strict=True):
        assert drawing.names == list(row)
        found = dict(zip(drawing.names, drawing.values, strict=True))
        for name, cell in row.items():
            if cell is None:
                assert found[name] == "missing"
            elif isinstance(cell, float):
                assert len(found[name]) < 15
                assert float(found[name]) == pytest.approx(cell, abs=1e-5 * np.ptp([each[name] for each in rows]))
            else:
                assert found[name] == str(cell)
    hidden = torch.zeros(len(rows), tokens.content.shape[1], dtype=torch.bool)
    hidden[:, offset + 3] = True
    for whole, seen in zip(drawn, drawings(tabular, hide(tokens, hidden)), strict=True):
        assert seen.values == [*whole.values[:3], "", *whole.values[4:]]


def test_times_are_seconds_and_numbers_stay_cut_off() -> None:
    start = datetime(2024, 3, 1, tzinfo=UTC)
    rows = [{"time": start + timedelta(hours=row), "number": float(row)} for row in range(50)]
    tabular = make_modality("tabular", {"clip": 2.0})
    tabular.fit(Samples(rows, str))
    numbers = np.arange(50)
    (far,) = drawings(tabular, tokens_of(tabular, [{"time": start + timedelta(hours=7), "number": 1e6}]))
    assert far.names == ["time", "number"] and far.values[0].isdigit()
    stamp = calendar.timegm((2024, 3, 1, 7, 0, 0))
    assert float(far.values[0]) == pytest.approx(stamp, abs=1e-5 * 3600 * 50)
    assert float(far.values[1]) == pytest.approx(numbers.mean() + 2 * numbers.std(), abs=1e-3)


def test_categories_nobody_saw_buckets_and_predictions() -> None:
    tabular = make_modality("tabular", {"schema": TABLE})
    row = {"size": 1.5, "colour": "pink", "weight": np.nan, "word": "any", "age": 40, "yes": False}
    tokens = tokens_of(tabular, [row])
    (drawing,) = drawings(tabular, tokens)
    assert drawing.values[:3] == ["1.5", "unseen", "missing"] and drawing.values[4:] == ["40", "False"]
    assert drawing.values[3] in [f"bucket {number}" for number in range(1, 6)]
    prediction = torch.zeros(1, 6, 1 + 3 + 1 + 5 + 1 + 2)
    prediction[..., 0], prediction[..., 4], prediction[..., 10] = 0.25, -0.5, 1.5
    prediction[..., 2], prediction[..., 7], prediction[..., 12] = 9.0, 9.0, 9.0  # the second, third, second category
    (predicted,) = drawings(tabular, replace(tokens, content=tabular.content_of(prediction, tokens)))
    assert predicted.values == ["1.5", "green", "-0.5", "bucket 3", "70", "True"]
    prediction[..., 4] = -1e-9
    (predicted,) = drawings(tabular, replace(tokens, content=tabular.content_of(prediction, tokens)))
    assert predicted.values[2] == "0"


# ---- Time series -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("instance_norm", [True, False])
def test_lines_are_the_series(independent: bool, stride: int | None, instance_norm: bool) -> None:
    """One drawing for each sample, with all channels; in the units of the series, or in deviations from its mean."""
    samples = MODALITIES["time_series"][1](4)
    options = {"patch_length": 8, "stride": stride, "channel_independent": independent, "instance_norm": instance_norm}
    series = make_modality("time_series", options)
    series.fit(Samples(samples, str))
    drawn = drawings(series, tokens_of(series, samples))
    assert len(drawn) == 4
    deviation = np.nanstd(np.concatenate(samples, axis=1), axis=1, keepdims=True)
    for sample, drawing in zip(samples, drawn, strict=True):
        expected = sample
        if instance_norm:
            spread = np.sqrt(np.nanvar(sample, axis=1, keepdims=True) + 1e-5 * deviation**2)
            expected = (sample - np.nanmean(sample, axis=1, keepdims=True)) / spread
        expected = expected[:, (sample.shape[1] - 8) % (stride or 8) :]
        assert np.isnan(expected).any()
        np.testing.assert_allclose(drawing.values, expected, rtol=1e-5, atol=2e-4)
        assert drawing.names == ["channel 0", "channel 1"]


@pytest.mark.parametrize("independent", [True, False])
def test_hidden_patches_are_gaps_of_their_channel(independent: bool) -> None:
    series = make_modality("time_series", {"patch_length": 4, "channel_independent": independent})
    tokens = tokens_of(series, [np.random.default_rng(0).normal(size=(2, steps)) for steps in (12, 9)])
    hidden = torch.zeros(4, 3, dtype=torch.bool)
    hidden[1, 2] = hidden[2, 0] = True  # of the first sample's second channel, of the second sample's first one
    first, second = drawings(series, hide(tokens, hidden if independent else hidden.view(2, 6)))
    blank = np.zeros((2, 12), dtype=bool)
    blank[1, 8:] = True
    np.testing.assert_array_equal(np.isnan(first.values), blank)
    blank = np.zeros((2, 8), dtype=bool)
    blank[0, :4] = True
    np.testing.assert_array_equal(np.isnan(second.values), blank)


@pytest.mark.parametrize("options, expected", [({}, ["heat", "wind"]), ({"channel_column": "which"}, None)])
def test_channels_have_the_names_of_their_columns(options: dict[str, Any], expected: list[str] | None) -> None:
    """In long form these are columns of values, not names of channels."""
    series = make_modality("time_series", {"patch_length": 4, "value_columns": ["heat", "wind"], **options})
    (drawing,) = drawings(series, tokens_of(series, [np.outer([1.0, 2.0], np.arange(8))]))
    assert drawing.names == (expected or ["channel 0", "channel 1"])


@pytest.mark.parametrize("independent", [True, False])
def test_intervals_are_drawn_as_their_straight_lines(independent: bool) -> None:
    """Those of least squares, by NumPy; with more motifs than intervals, which are not drawn."""
    samples = [np.random.default_rng(steps).normal(size=(2, steps)) for steps in (21, 15)]
    options = {"token_style": "values_and_shapes", "num_motifs": 6, "motif_length": 4, "patch_length": 5}
    options |= {"channel_independent": independent, "instance_norm": False}
    series = make_modality("time_series", options)
    series.fit(Samples(samples, str))
    tokens = tokens_of(series, samples)
    for sample, drawing in zip(samples, drawings(series, tokens), strict=True):
        sample = sample[:, sample.shape[1] % 5 :]
        for channel, line in zip(sample, drawing.values, strict=True):
            assert len(line) == len(channel)
            for start in range(0, len(channel), 5):
                straight = np.polyval(np.polyfit(np.arange(5), channel[start : start + 5], 1), np.arange(5))
                np.testing.assert_allclose(line[start : start + 5], straight, atol=1e-5)
    per_row = 6 + 4
    hidden = torch.zeros(4, per_row, dtype=torch.bool)
    hidden[0, 6 + 1] = hidden[1, 2] = True  # an interval, and a motif
    (seen, _) = drawings(series, hide(tokens, hidden if independent else hidden.view(2, 2 * per_row)))
    blank = np.zeros((2, 20), dtype=bool)
    blank[0, 5:10] = True
    np.testing.assert_array_equal(np.isnan(seen.values), blank)
