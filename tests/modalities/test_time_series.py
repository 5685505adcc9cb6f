"""Time series: series to patches and VSFormer-style tokens, their normalisation, views, and what cannot be used."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.modalities.base import Batch
from mmssl.modalities.time_series import TimeSeries
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.processing import MMSSLFeatureExtractor
from mmssl.samples import Samples
from mmssl.tokens import Tokens

NAN = float("nan")
LENGTHS = [20, 21, 33, 40]
VALUES_AND_SHAPES: dict[str, Any] = {"token_style": "values_and_shapes", "num_motifs": 3, "motif_length": 6}


def keyed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(channels: int, steps: int, seed: int = 0) -> np.ndarray:
    """Channels of different levels and sizes."""
    generator = np.random.default_rng(seed)
    level, size = generator.normal(size=(2, channels, 1)) * [[[50.0]], [[3.0]]]
    return level + size * generator.normal(size=(channels, steps))


def with_gaps(channels: int, steps: int, seed: int = 0) -> np.ndarray:
    """A tenth is missing, and the first patch of the last channel; the ends are known."""
    series = noise(channels, steps, seed)
    series[np.random.default_rng(seed + 1).random(series.shape) < 0.1] = NAN
    series[-1, :8] = NAN
    series[:, -1] = 1.0
    return series


def samples_of(series: list[Any]) -> Samples:
    return Samples(series, "series {}".format)


def batch_of(modality: TimeSeries, lengths: list[int] = LENGTHS, channels: int = 3) -> Batch:
    return modality.collate([modality.prepare(with_gaps(channels, n, seed)) for seed, n in enumerate(lengths)])


def alone(batch: Batch, row: int) -> Batch:
    """One sample of a batch without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: value[row : row + 1, :length] for name, value in batch.items()}


def fitted(**options: Any) -> TimeSeries:
    modality = TimeSeries(**{"patch_length": 4, **options})
    modality.fit(samples_of([with_gaps(3, n, seed) for seed, n in enumerate(LENGTHS)]))
    return modality


# ---- Patches --------------------------------------------------------------------------------------------------------


def patches(series: np.ndarray, size: int, stride: int) -> np.ndarray:
    """(C, n, P) as PatchTST cuts a series (C, L): n = (max(L, P) - P) // S + 1, the first steps left over."""
    length = series.shape[1]
    count = (max(length, size) - size) // stride + 1
    first = length - (size + stride * (count - 1))
    return np.lib.stride_tricks.sliding_window_view(series[:, first:], size, axis=1)[:, ::stride]


@pytest.mark.parametrize(("size", "stride"), [(16, None), (12, 12), (16, 8), (5, 3), (4, 7), (1, 1), (20, None)])
@pytest.mark.parametrize("length", [20, 21, 40])
def test_patches_equal_sliding_windows(size: int, stride: int | None, length: int) -> None:
    modality = TimeSeries(patch_length=size, stride=stride, instance_norm=False)
    series = noise(2, length)
    content = modality.tokenize(modality.collate([modality.prepare(series)])).content
    expected = patches(series.astype(np.float32), size, stride or size)
    np.testing.assert_array_equal(content[:, :, 0], expected)
    assert (content[:, :, 1] == 1).all()
    unused = (length - size) % (stride or size)
    unfolded = torch.from_numpy(series.astype(np.float32))[:, unused:].unfold(1, size, stride or size)
    assert torch.equal(content[:, :, 0], unfolded)


def test_the_published_shape() -> None:
    """L=512 and P=S=12 make 42 patches, the first 8 steps are left over; masked by 40%, int(42 * 0.6) = 25 stay."""
    modality = TimeSeries(patch_length=12, instance_norm=False)
    series = noise(7, 512)
    tokens = modality.tokenize(modality.collate([modality.prepare(series)]))
    assert tokens.content.shape == (7, 42, 2, 12)
    np.testing.assert_array_equal(tokens.content[:, 0, 0], series[:, 8:20].astype(np.float32))
    mask = modality.mask(tokens, 0.4, keyed())
    assert mask.hidden.sum(dim=1).tolist() == [17] * 7
    assert len({tuple(row.tolist()) for row in mask.hidden}) == 7  # each channel has a mask of its own


@pytest.mark.parametrize("instance_norm", [False, True])
def test_first_steps_are_unused(instance_norm: bool) -> None:
    """But by the instance norm, as PatchTST normalises before it cuts."""
    modality = TimeSeries(patch_length=12, instance_norm=instance_norm)
    batch = modality.collate([modality.prepare(noise(2, 512))])
    other = batch | {"series": batch["series"].clone()}
    other["series"][:, :8] += 9.0
    same = torch.equal(modality.tokenize(batch).content, modality.tokenize(other).content)
    assert same == (not instance_norm)
    other["series"][:, :8] -= 9.0
    other["series"][:, 8] += 9.0
    assert not torch.equal(modality.tokenize(batch).content, modality.tokenize(other).content)


@pytest.mark.parametrize("channel_independent", [True, False])
def test_rows_and_places(channel_independent: bool) -> None:
    """A row of each channel, or one of all; each token stands where its coordinates say."""
    modality = fitted(channel_independent=channel_independent)
    batch = batch_of(modality)
    tokens = modality.tokenize(batch)
    for row, length in enumerate(LENGTHS):
        own = modality.tokenize(alone(batch, row))
        for channel in range(3):
            if channel_independent:
                assert tokens.sample is not None and tokens.sample[3 * row + channel] == row
                place, content, valid = (
                    each[3 * row + channel] for each in (tokens.coords, tokens.content, tokens.valid)
                )
                lone = own.content[channel]
                assert place.shape[1] == 1
            else:
                here = tokens.coords[row, :, 0] == channel
                place, content, valid = (each[row][here] for each in (tokens.coords, tokens.content, tokens.valid))
                lone = own.content[0][own.coords[0, :, 0] == channel]
                assert tokens.sample is None
            assert place[:, -1].tolist() == list(range(10)) and valid.tolist() == [n < length // 4 for n in range(10)]
            assert torch.equal(content[valid], lone) and not content[~valid].any()


def test_a_series_of_one_channel_is_one_row() -> None:
    """So that features of samples can be pooled in any way."""
    modality = TimeSeries(patch_length=4)
    assert modality.tokenize(batch_of(modality, channels=1)).sample is None


@pytest.mark.parametrize("options", [{}, {"channel_independent": False}, VALUES_AND_SHAPES])
def test_padding_never_matters(options: dict[str, Any]) -> None:
    """Not even if it is loud, said to be observed, or not a number, bit by bit."""
    modality = fitted(**options)
    batch = batch_of(modality)
    padding = (batch["attention_mask"] == 0)[..., None].expand_as(batch["series"])
    tokens, features = modality.tokenize(batch), modality.raw_features(batch)
    for value in (1e6, NAN):
        other = batch | {
            "series": batch["series"].masked_fill(padding, value),
            "observed_mask": batch["observed_mask"].masked_fill(padding, 1),
        }
        assert torch.equal(modality.tokenize(other).content, tokens.content)
        assert torch.equal(modality.raw_features(other), features)


# ---- Normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_units", [False, True])
def test_instance_norm_has_its_closed_form(with_units: bool) -> None:
    """(x - mean) / sqrt(var + eps) over known steps, biased; eps is 1e-5 of the channel's variance in training."""
    modality = fitted() if with_units else TimeSeries(patch_length=4)
    unit = np.array(modality.channel_std if with_units else [1.0, 1.0, 1.0])
    batch = batch_of(modality)
    tokens = modality.tokenize(batch)
    for row, length in enumerate(LENGTHS):
        series = with_gaps(3, length, row)
        mean, variance = np.nanmean(series, axis=1), np.nanvar(series, axis=1)
        normal = (series - mean[:, None]) / np.sqrt(variance + 1e-5 * unit**2)[:, None]
        expected = patches(normal, 4, 4)
        content = tokens.content[3 * row : 3 * row + 3, : expected.shape[1]]
        np.testing.assert_allclose(content[:, :, 0], np.nan_to_num(expected), atol=2e-4)
        np.testing.assert_array_equal(content[:, :, 1], ~np.isnan(expected))


def test_epsilon_is_that_of_revin() -> None:
    """A step of height 2e-3: its variance is 1e-6, a tenth of eps."""
    modality = TimeSeries(patch_length=4)
    content = modality.tokenize(modality.collate([modality.prepare([0.0, 0, 0, 0, 2e-3, 2e-3, 2e-3, 2e-3])])).content
    torch.testing.assert_close(content[0, 1, 0], torch.full((4,), 1e-3 / (1.1e-5) ** 0.5))


def test_norm_of_the_training_set() -> None:
    """Without the instance norm levels and sizes of a series stay, in units of its channel."""
    modality = fitted(instance_norm=False)
    every = np.concatenate([with_gaps(3, n, seed) for seed, n in enumerate(LENGTHS)], axis=1)
    np.testing.assert_allclose(modality.channel_mean or [], np.nanmean(every, axis=1), rtol=1e-5)
    np.testing.assert_allclose(modality.channel_std or [], np.nanstd(every, axis=1), rtol=1e-5)
    series = with_gaps(3, 40, 3)
    expected = patches((series - np.nanmean(every, axis=1)[:, None]) / np.nanstd(every, axis=1)[:, None], 4, 4)
    content = modality.tokenize(modality.collate([modality.prepare(series)])).content
    np.testing.assert_allclose(content[:, :, 0], np.nan_to_num(expected), atol=1e-4)


@pytest.mark.parametrize("instance_norm", [False, True])
@pytest.mark.parametrize("channel_independent", [False, True])
def test_denormalizing_is_the_inverse(instance_norm: bool, channel_independent: bool) -> None:
    modality = fitted(instance_norm=instance_norm, channel_independent=channel_independent)
    batch = batch_of(modality)
    tokens = modality.tokenize(batch)
    back = modality.denormalize(tokens.content[:, :, 0], batch).reshape(4, 3, -1, 4)
    known = tokens.content[:, :, 1].reshape(4, 3, -1, 4) > 0
    for row, length in enumerate(LENGTHS):
        expected = patches(with_gaps(3, length, row), 4, 4)
        there = known[row, :, : expected.shape[1]].numpy()
        np.testing.assert_allclose(back[row, :, : expected.shape[1]][there], expected[there], rtol=1e-5, atol=1e-4)
        assert there.sum() == (~np.isnan(expected)).sum()


@pytest.mark.parametrize("level", [0.0, 1 / 3, 123_456.7, -1e9])
@pytest.mark.parametrize("steps", [40, 1001])
def test_channels_that_never_change_are_zero(level: float, steps: int) -> None:
    """However large, and however long, where a mean in single precision is not that number."""
    cases: list[dict[str, Any]] = [{}, {"channel_independent": False}, {"instance_norm": False}]
    for options in cases:
        modality = TimeSeries(patch_length=4, **options)
        series = np.stack([np.full(steps, level), noise(1, steps)[0]])
        modality.fit(samples_of([series]))
        content = modality.tokenize(modality.collate([modality.prepare(series)])).content.reshape(2, -1, 2, 4)
        assert content.isfinite().all() and content[0, :, 0].abs().max() < 1e-2 and content[1, :, 0].abs().max() > 1
        if options != {"instance_norm": False}:
            assert not content[0, :, 0].any()


def test_channels_of_which_nothing_is_known() -> None:
    """Their tokens are valid and say so; they are finite and weigh nothing."""
    for options in ({}, {"instance_norm": False}, VALUES_AND_SHAPES):
        modality = TimeSeries(patch_length=4, **options)
        series = noise(2, 40)
        series[1] = NAN
        modality.fit(samples_of([series]))
        batch = modality.collate([modality.prepare(series)])
        tokens = modality.tokenize(batch)
        assert tokens.valid.all() and not tokens.content[1].any() and tokens.content.isfinite().all()
        prediction = torch.randn(tokens.content[:, :, 0].shape, generator=keyed())
        loss, weight = modality.reconstruction_loss(prediction, modality.target(tokens), tokens.valid)
        assert loss.isfinite().all() and not weight[1].any() and (weight[0] > 0).all()
        assert modality.raw_features(batch).isfinite().all()


# ---- The data side --------------------------------------------------------------------------------------------------


def test_shapes_of_samples() -> None:
    """(T,) or (channels, T), in a DataFrame (T, channels); padding at the end is cut off, gaps elsewhere stay."""
    import pandas as pd

    modality, series = TimeSeries(patch_length=4), noise(2, 9)
    expected = torch.from_numpy(series.T.astype(np.float32))
    padded = np.concatenate([series, np.full((2, 5), NAN)], axis=1)
    frame = pd.DataFrame(series.T, columns=["a", "b"])
    for sample in (series, {"x": series}, {"values": series}, padded, frame, series.tolist(), torch.from_numpy(series)):
        out = modality.prepare(sample)["series"]
        assert out.dtype == torch.float32
        assert torch.equal(out, expected)
    assert torch.equal(modality.prepare(series[0])["series"], expected[:, :1])
    gaps = padded.copy()
    gaps[:, :2], gaps[0, 4], gaps[1, 8] = NAN, NAN, NAN
    out = modality.prepare(gaps)["series"]
    assert out.shape == (9, 2) and out.isnan().sum() == 6


MALFORMED: dict[str, tuple[Any, str]] = {
    "short": (
        noise(2, 3),
        r"found a series of 3 steps and 2 channels; expected at least .* 4 steps: lower patch_length",
    ),
    "short but for padding": ([[1, 2, 3, NAN, NAN]] * 2, "found a series of 3 steps"),
    "turned": (noise(2, 30).T, r"found 30 channels; expected 2 \(is it \(T, channels\)\?"),
    "channels": (noise(3, 9), "found 3 channels; expected 2"),
    "nothing known": (np.full((2, 9), NAN), "found nothing but NaN"),
    "infinite": (
        np.where(np.arange(18).reshape(2, 9) == 12, np.inf, 1.0),
        "found inf in channel 1 at step 3; expected",
    ),
    "huge": (np.where(np.arange(18).reshape(2, 9) == 4, -1e20, 1.0), r"found -1e\+20 in channel 0 at step 4"),
    "three axes": (np.zeros((2, 9, 1)), r"found an array of shape \(2, 9, 1\); expected \(T,\) or \(channels, T\)"),
    "empty": (np.zeros((2, 0)), r"found an array of shape \(2, 0\)"),
    "ragged": ([[1, 2, 3, 4], [1, 2]], "found list"),
    "text": ([["1", "2", "3", "4"]], "found <U1; expected"),
    "no file": ({"bytes": None, "path": None}, "expected bytes or a path"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_samples(name: str) -> None:
    sample, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message):
        TimeSeries(patch_length=4, num_channels=2).prepare(sample)


def test_files_in_folders(tmp_path: Path) -> None:
    """One series in each file, by its columns or arrays; labels are the folders'."""
    from mmssl.data import DataArguments, load_samples

    for label, folder in enumerate(("calm", "wild")):
        (tmp_path / folder).mkdir()
        np.savetxt(tmp_path / folder / "one.csv", noise(2, 9 + label).T, delimiter=",", header="a,b", comments="")
        np.save(tmp_path / folder / "two.npy", noise(2, 20))
        np.savez(tmp_path / folder / "three.npz", x=noise(2, 30))
    modality = TimeSeries(patch_length=4)
    samples = load_samples(DataArguments(source=str(tmp_path)), modality)
    modality.fit(samples)
    shapes = [tuple(modality.prepare(value)["series"].shape) for value in samples.values]
    assert shapes == [(9, 2), (30, 2), (20, 2), (10, 2), (30, 2), (20, 2)]
    assert samples.labels is not None and samples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.classes == ["calm", "wild"] and modality.num_channels == 2 and modality.raw_length == 30


def test_excerpts_of_long_series() -> None:
    """The last window in evaluation; in training each window is drawn, and the same key draws the same."""
    modality = TimeSeries(patch_length=4, max_length=8)
    sample = {"series": torch.arange(11.0)[:, None]}
    assert modality.excerpt(sample, None)["series"][:, 0].tolist() == list(range(3, 11))
    starts = [int(modality.excerpt(sample, keyed(seed))["series"][0]) for seed in range(60)]
    assert set(starts) == {0, 1, 2, 3}
    assert starts == [int(modality.excerpt(sample, keyed(seed))["series"][0]) for seed in range(60)]
    assert len(sample["series"]) == 11
    short = {"series": torch.arange(8.0)[:, None]}
    assert modality.excerpt(short, keyed())["series"] is short["series"]
    assert TimeSeries().excerpt(sample, keyed()) is sample


def test_batches_of_different_channels_are_refused() -> None:
    modality = TimeSeries(patch_length=4)
    with pytest.raises(ValueError, match="found series of 1, 2 channels in one batch; expected the same number"):
        modality.collate([modality.prepare(noise(channels, 9)) for channels in (2, 1)])


@pytest.mark.parametrize(
    ("series", "observed", "attention", "message"),
    [
        ((2, 9), (2, 9), (2, 9), r"found shape \(2, 9\).*expected \(batch, T, 3\) twice"),
        ((2, 9, 4), (2, 9, 4), (2, 9), r"found shape \(2, 9, 4\)"),
        ((2, 9, 3), (2, 9, 1), (2, 9), r"observed_mask of \(2, 9, 1\)"),
        ((2, 9, 3), (2, 9, 3), (2, 8), r"attention_mask of \(2, 8\)"),
        ((2, 3, 3), (2, 3, 3), (2, 3), "found 3 steps; expected at least 4"),
    ],
)
def test_malformed_batches(series: Any, observed: Any, attention: Any, message: str) -> None:
    batch = {
        "series": torch.zeros(series),
        "observed_mask": torch.ones(observed),
        "attention_mask": torch.ones(attention),
    }
    with pytest.raises(ValueError, match=message):
        fitted().tokenize(batch)


def test_missing_values_in_a_batch_need_no_mask() -> None:
    modality = fitted()
    batch = batch_of(modality)
    missing = batch["observed_mask"] == 0
    other = {**batch, "series": batch["series"].masked_fill(missing, NAN), "observed_mask": torch.ones_like(missing)}
    assert torch.equal(modality.tokenize(other).content, modality.tokenize(batch).content)


# ---- What is found in the training set ------------------------------------------------------------------------------


def test_fit_leaves_out_what_cannot_be_read() -> None:
    """And takes the number of channels that most series have."""
    modality = TimeSeries(patch_length=4)
    modality.fit(samples_of([noise(1, 99), noise(2, 9), None, noise(2, 3), noise(2, 12)]))
    assert modality.num_channels == 2 and modality.raw_length == 12
    both = np.concatenate([noise(2, 9), noise(2, 12)], axis=1)
    np.testing.assert_allclose(modality.channel_mean or [], both.mean(axis=1), rtol=1e-5)
    with pytest.raises(ValueError, match=r"none of 2 series could be read; series .: found"):
        TimeSeries(patch_length=4).fit(samples_of([None, noise(2, 3)]))


def test_fit_does_nothing_where_the_options_are_set() -> None:
    class Unreadable(list):
        def __getitem__(self, i: Any) -> Any:
            raise AssertionError("read")

    for options in ({}, VALUES_AND_SHAPES):
        modality = fitted(**options)
        before = modality.options()
        modality.fit(samples_of(Unreadable([1, 2])))
        assert modality.options() == before
    partly = TimeSeries(patch_length=4, num_channels=3, channel_mean=[1, 2, 3])
    partly.fit(samples_of([noise(3, 20)]))
    assert partly.channel_mean == [1, 2, 3] and partly.channel_std is not None and partly.raw_length == 20


def test_raw_length_is_no_longer_than_what_is_read() -> None:
    assert fitted(max_length=25).raw_length == 25 and fitted(max_length=99).raw_length == 40


@pytest.mark.parametrize("options", [{}, VALUES_AND_SHAPES | {"crop_scale": [0.5, 1]}])
def test_options_survive_a_config_file(options: dict[str, Any]) -> None:
    modality = fitted(**options)
    again = make_modality("time_series", json.loads(json.dumps(modality.options())))
    assert isinstance(again, TimeSeries) and again.options() == modality.options()
    batch = batch_of(modality)
    assert torch.equal(again.tokenize(batch).content, modality.tokenize(batch).content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_length": 0}, "patch_length: found 0; expected at least 1"),
        ({"stride": 0}, "stride: found 0"),
        ({"max_length": 15}, "max_length: found 15; expected 16 or more"),
        ({"token_style": "words"}, "token_style: found 'words'; expected one of patches, values_and_shapes"),
        ({"distance": "l3"}, "distance: found 'l3'"),
        ({"crop_scale": [0, 1]}, r"crop_scale: found \[0, 1\]"),
        ({"scale": [2, 1]}, r"scale: found \[2, 1\]"),
        ({"jitter": -1.0}, "jitter, time_warp and frequency_mask must be at least 0"),
        ({"frequency_mask": 1.0}, "frequency_mask below 1"),
        ({"num_channels": 2, "channel_std": [1, 0]}, "channel_std: found 0"),
        ({"num_channels": 2, "channel_mean": [1]}, "found 1 entries with num_channels=2"),
        ({"channel_mean": [1]}, "found 1 entries with num_channels=None"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeSeries(**options)


# ---- Loss, masks, pieces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_loss_is_the_mean_over_known_steps(distance: Any) -> None:
    modality = fitted(distance=distance)
    tokens = modality.tokenize(batch_of(modality))
    target = modality.target(tokens)
    prediction = torch.randn(target[:, :, 0].shape, generator=keyed(), requires_grad=True)
    where = (torch.rand(tokens.valid.shape, generator=keyed(1)) < 0.5) & tokens.valid
    errors = []
    for row, token in where.nonzero().tolist():
        for step in range(4):
            if target[row, token, 1, step]:
                difference = float(prediction[row, token, step].detach() - target[row, token, 0, step])
                errors.append(abs(difference) if distance == "l1" else difference**2)
    loss, weight = modality.reconstruction_loss(prediction, target, where)
    mean = (loss * weight).sum() / weight.sum()
    assert mean.item() == pytest.approx(np.mean(errors), rel=1e-5)
    full = (target[:, :, 1] == 1).all(dim=-1)
    assert (weight[where & full] == 1).all() and (weight[where & ~full] < 1).all() and not weight[~where].any()
    mean.backward()
    slope = prediction.grad
    assert slope is not None and slope.isfinite().all()
    assert torch.equal(slope != 0, where[..., None] & (target[:, :, 1] == 1))


@pytest.mark.parametrize("channel_independent", [True, False])
def test_blocks_are_spans_of_time(channel_independent: bool) -> None:
    """In all channels that are read together; spans of up to max_span, so that most hidden patches have neighbours."""
    modality = TimeSeries(patch_length=4, max_span=5, channel_independent=channel_independent)
    tokens = modality.tokenize(modality.collate([modality.prepare(noise(3, 400, seed)) for seed in range(20)]))
    hidden = modality.mask(tokens, 0.5, keyed(), "block").hidden
    lines = hidden if channel_independent else hidden.unflatten(1, (3, 100)).float().mean(dim=1)
    if not channel_independent:
        partly = (lines > 0) & (lines < 1)
        assert partly.sum(dim=1).max() <= 5  # only what the last span covers is hidden in part
        assert hidden.sum(dim=1).tolist() == [150] * 20
    ends = (lines[:, 1:].bool() != lines[:, :-1].bool()).sum(dim=1).float().mean()
    random = modality.mask(tokens, 0.5, keyed(), "random").hidden[:, :100]
    assert ends < 0.7 * (random[:, 1:] != random[:, :-1]).sum(dim=1).float().mean()


@pytest.mark.parametrize("channel_independent", [True, False])
def test_regions_are_spans_of_time(channel_independent: bool) -> None:
    modality = fitted(channel_independent=channel_independent)
    tokens = modality.tokenize(batch_of(modality))
    region = modality.region(tokens, 0.4, keyed())
    for row in range(len(region)):
        assert (
            region[row].sum() == round(0.4 * int(tokens.valid[row].sum())) and not (region & ~tokens.valid)[row].any()
        )
        times = tokens.coords[row, :, -1]
        inside = times[region[row]].unique()
        assert inside.max() - inside.min() == len(inside) - 1
        for time in inside.sort().values[1:-1]:  # what lies between its ends is in it in all channels
            assert region[row][(times == time) & tokens.valid[row]].all()
    allowed = tokens.coords[..., -1] >= 2
    chosen = modality.region(tokens, 0.3, keyed(), allowed)
    assert chosen.any(dim=1).all() and not (chosen & ~allowed).any()


# ---- With an encoder ------------------------------------------------------------------------------------------------


def model_of(modality: TimeSeries, **config: Any) -> MMSSLModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **config}
    return MMSSLModel(MMSSLConfig(modalities={"time_series": modality.options()}, **sizes)).eval()


@pytest.mark.parametrize("token_style", ["patches", "values_and_shapes"])
def test_channels_are_independent(token_style: str) -> None:
    """Another second channel leaves what is said of the first one as it is; read together, it does not."""
    for independent in (True, False):
        modality = fitted(**VALUES_AND_SHAPES | {"token_style": token_style, "channel_independent": independent})
        model, batch = model_of(modality), batch_of(modality)
        other = batch | {"series": batch["series"] + torch.tensor([0.0, 5.0, 0.0]) * torch.randn(4, 40, 1)}
        first, second = (model(**each).last_hidden_state for each in (batch, other))
        if independent:
            assert torch.equal(first[0::3], second[0::3]) and torch.equal(first[2::3], second[2::3])
            assert not torch.allclose(first[1::3], second[1::3], atol=1e-2)
        else:
            channel = modality.tokenize(batch).coords[0, :, 0] // (1 if token_style == "patches" else 2)
            assert not torch.allclose(first[:, channel == 0], second[:, channel == 0], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"channel_independent": False}, VALUES_AND_SHAPES])
def test_pooled_features_are_of_samples(options: dict[str, Any]) -> None:
    """Rows of a sample come together, and a sample has the same features alone as in a padded batch."""
    modality = fitted(**options)
    model, batch = model_of(modality), batch_of(modality)
    pooled = model(**batch).pooler_output
    assert pooled.shape == (4, 16)
    for row in range(4):
        torch.testing.assert_close(model(**alone(batch, row)).pooler_output[0], pooled[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channel_independent", [True, False])
def test_hidden_patches_do_not_reach_the_encoder(channel_independent: bool) -> None:
    """Dropped before it; their content may be anything."""
    modality = fitted(channel_independent=channel_independent)
    objective = MaskedReconstruction(model_of(modality), views=False, decoder_layers=1).eval()
    adapter = objective.model.adapters["time_series"]
    tokens = adapter.tokenize(batch_of(modality))
    hidden = adapter.mask(tokens, 0.75, keyed()).hidden
    spoilt = replace(tokens, content=torch.where(hidden[..., None, None], 99.0, tokens.content))
    first, second = (objective.reconstruct(adapter, each, keyed()) for each in (tokens, spoilt))
    valid, where = first.seen.valid, first.where
    assert torch.equal(first.encoded[valid], second.encoded[valid])
    assert torch.equal(first.prediction[where], second.prediction[where])
    seen = replace(tokens, content=torch.where(hidden[..., None, None], tokens.content, 99.0))
    assert not torch.equal(objective.reconstruct(adapter, seen, keyed()).encoded[valid], first.encoded[valid])


@pytest.mark.parametrize("instance_norm", [True, False])
def test_statistics_of_the_whole_series_leak_amplitude(instance_norm: bool) -> None:
    """As in PatchTST, and as the documentation says; the norm of the training set does not leak."""
    modality = fitted(instance_norm=instance_norm)
    objective = MaskedReconstruction(model_of(modality), views=False, decoder_layers=1).eval()
    adapter = objective.model.adapters["time_series"]
    batch = modality.collate([modality.prepare(noise(3, 40))])
    hidden = adapter.mask(adapter.tokenize(batch), 0.75, keyed()).hidden  # (3, 10)
    steps = hidden.repeat_interleave(4, dim=1).T[None]
    louder = batch | {"series": torch.where(steps, 3 * batch["series"], batch["series"])}
    first, second = (objective.reconstruct(adapter, adapter.tokenize(each), keyed()) for each in (batch, louder))
    assert torch.equal(first.encoded, second.encoded) == (not instance_norm)


def test_masked_patches_are_zero_as_published() -> None:
    """PatchTST: hidden patches are zero after the norm, their places stay, and the encoder reads all of them.

    Here the mask token, in the space of the input, starts as zeros, flags included.
    """
    modality = fitted(instance_norm=True)
    objective = MaskedReconstruction(
        model_of(modality),
        corruption="replace",
        mask_token_space="input",
        mask_ratio=0.4,
        decoder_layers=0,
        views=False,
    )
    adapter = objective.model.adapters["time_series"]
    tokens = adapter.tokenize(batch_of(modality))
    mask = adapter.mask(tokens, 0.4, keyed())
    seen, embedded = objective.masked_content(adapter, tokens, mask, keyed())
    zero = adapter.get_parameter("projection.bias").expand_as(embedded[mask.hidden])  # what zeros are embedded as
    assert torch.equal(embedded[mask.hidden], zero) and objective.input_mask_tokens["time_series_token"].eq(0).all()
    torch.testing.assert_close(embedded[~mask.hidden], adapter.embed(tokens)[~mask.hidden])
    assert torch.equal(seen.coords, tokens.coords)


@pytest.mark.parametrize("options", [{}, {"channel_independent": False}, VALUES_AND_SHAPES])
def test_a_checkpoint_comes_back_whole(options: dict[str, Any], tmp_path: Path) -> None:
    """Options that were found in the training set are in the config; samples go through the processor."""
    modality = fitted(**options)
    model, batch = model_of(modality), batch_of(modality)
    model.save_pretrained(tmp_path)
    again = MMSSLModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).last_hidden_state, model(**batch).last_hidden_state)
    extractor = MMSSLFeatureExtractor(again.config.modalities)
    inputs = extractor([with_gaps(3, n, seed) for seed, n in enumerate(LENGTHS)])
    assert all(torch.equal(inputs[name], batch[name]) for name in batch)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"channel_independent": False}, VALUES_AND_SHAPES])
def test_other_tokens_are_learned(options: dict[str, Any]) -> None:
    """What the matrix tests of patches: all parameters get a gradient, and waves are learned."""
    modality = TimeSeries(patch_length=8, **options)
    time = np.arange(64)
    series = [np.sin([[0.1 + 0.03 * k], [0.2 + 0.03 * k]] * time) for k in range(8)]
    modality.fit(samples_of(series))
    objective = MaskedReconstruction(
        model_of(modality, hidden_size=32), views=False, mask_ratio=0.5, decoder_layers=1, decoder_hidden_size=32
    ).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    batch = modality.collate([modality.prepare(each) for each in series])
    losses = []
    for _ in range(150):  # of one mask: what is hidden can be learned by heart
        loss = objective(batch, keyed()).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in objective.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- Raw features ---------------------------------------------------------------------------------------------------


def test_raw_features_are_the_values() -> None:
    """Of series of one length, to the bit; NATOPS' 24 x 51 or any other."""
    series = [noise(3, 51, seed) for seed in range(5)]
    modality = TimeSeries(patch_length=4)
    modality.fit(samples_of(series))
    features = modality.raw_features(modality.collate([modality.prepare(each) for each in series]))
    np.testing.assert_array_equal(features, np.stack(series).reshape(5, -1).astype(np.float32))


def test_raw_features_of_other_lengths_are_interpolated() -> None:
    """As NumPy does, over gaps too; the same number of them whatever the batch."""
    modality = fitted()
    batch = batch_of(modality, [20, 33, 40, 61])
    features = modality.raw_features(batch)
    assert features.shape == (4, 120)
    for row, length in enumerate([20, 33, 40, 61]):
        torch.testing.assert_close(modality.raw_features(alone(batch, row))[0], features[row])
        for channel, series in enumerate(with_gaps(3, length, row)):
            known = np.flatnonzero(~np.isnan(series))
            filled = np.interp(np.arange(length), known, series[known])
            expected = np.interp(np.linspace(0, length - 1, 40), np.arange(length), filled)
            np.testing.assert_allclose(features[row, 40 * channel : 40 * channel + 40], expected, rtol=1e-4, atol=1e-3)


# ---- Views ----------------------------------------------------------------------------------------------------------

VIEWS: dict[str, dict[str, Any]] = {
    "jitter": {"jitter": 0.3},
    "scale": {"scale": [0.5, 2.0]},
    "time_warp": {"time_warp": 0.4},
    "crop": {"crop_scale": [0.4, 0.9]},
    "frequency_mask": {"frequency_mask": 0.3},
    "all": {
        "jitter": 0.3,
        "scale": [0.5, 2.0],
        "time_warp": 0.4,
        "crop_scale": [0.4, 0.9],
        "frequency_mask": 0.3,
        "instance_norm": False,
    },
}


def test_no_view_is_the_sample_itself() -> None:
    modality = fitted()
    batch = batch_of(modality)
    view = modality.view(batch, keyed())
    assert view.parameters == {}
    assert view.batch.keys() == batch.keys() and all(torch.equal(view.batch[name], batch[name]) for name in batch)


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_what_their_parameters_say(name: str) -> None:
    """Each sample on its own, in NumPy, from what was recorded; a step is known where all it was made of is known."""
    modality = fitted(**VIEWS[name])
    batch = batch_of(modality)
    before = {key: value.clone() for key, value in batch.items()}
    view = modality.view(batch, keyed())
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    parameters = {key: value.double().numpy() for key, value in view.parameters.items()}
    mean, std = np.array(modality.channel_mean), np.array(modality.channel_std)
    for row, length in enumerate(LENGTHS):
        x = with_gaps(3, length, row).T
        if "log_speed" in parameters:
            start, kept = int(parameters["start"][row]), int(parameters["kept"][row])
            assert 4 <= kept <= length and 0 <= start <= length - kept
            least, greatest = modality.crop_scale
            assert max(4, round(least * length) - 1) <= kept <= round(greatest * length) + 1
            speed = np.exp(np.interp(np.linspace(0, 5, kept), np.arange(6), parameters["log_speed"][row]))
            way = np.concatenate([[0], np.cumsum((speed[1:] + speed[:-1]) / 2)])
            place = start + way / way[-1] * (kept - 1)
            whole = np.abs(place - np.rint(place)) < 1e-5
            place = np.where(whole, np.rint(place), place)
            below, share = np.floor(place).astype(int), (place % 1)[:, None]
            above = np.where(whole, below, below + 1)
            x = np.where(whole[:, None], x[below], (1 - share) * x[below] + share * x[above])
        known = ~np.isnan(x)
        if "hidden_frequencies" in parameters:
            hidden = parameters["hidden_frequencies"][row].astype(bool)
            assert hidden.sum() == round(0.3 * (len(x) // 2)) and not hidden[0] and not hidden[len(x) // 2 + 1 :].any()
            for channel in range(3):
                there = np.flatnonzero(known[:, channel])
                filled = np.interp(np.arange(len(x)), there, x[there, channel]) if len(there) else x[:, channel] * 0
                spectrum = np.fft.rfft(filled)
                spectrum[hidden[: len(spectrum)]] = 0
                x[:, channel] = np.fft.irfft(spectrum, len(x))
        if "scale" in parameters:
            assert (parameters["scale"][row] >= 0.5).all() and (parameters["scale"][row] <= 2).all()
            x = mean + (x - mean) * parameters["scale"][row]
        x[~known] = NAN
        if "noise" in parameters:
            unit = std if not modality.instance_norm else np.sqrt(np.nanvar(x, axis=0) + 1e-5 * std**2)
            x = x + parameters["noise"][row, : len(x)] * unit
        out = {key: value[row] for key, value in view.batch.items()}
        assert out["attention_mask"].tolist() == [n < len(x) for n in range(len(out["attention_mask"]))]
        np.testing.assert_array_equal(out["observed_mask"][: len(x)], known)
        np.testing.assert_allclose(out["series"][: len(x)], np.nan_to_num(x), rtol=1e-4, atol=2e-3)
        assert not out["series"][len(x) :].any() and not out["observed_mask"][len(x) :].any()


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_keyed(name: str) -> None:
    modality = fitted(**VIEWS[name])
    batch = batch_of(modality)
    first, again, other = (modality.view(batch, keyed(seed)).batch["series"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_jitter_has_the_size_that_was_asked_for() -> None:
    modality = TimeSeries(patch_length=4, jitter=0.3)
    batch = modality.collate([modality.prepare(noise(3, 5000))])
    change = (modality.view(batch, keyed()).batch["series"] - batch["series"])[0].std(dim=0)
    torch.testing.assert_close(change / batch["series"][0].std(dim=0), torch.full((3,), 0.3), rtol=0.05, atol=0)


def test_scales_are_spread_evenly_and_crops_reach_everywhere() -> None:
    modality = TimeSeries(patch_length=4, scale=[0.5, 2.0], crop_scale=[0.5, 0.5])
    batch = modality.collate([modality.prepare(noise(3, 8, seed)) for seed in range(300)])
    parameters = modality.view(batch, keyed()).parameters
    assert parameters["scale"].mean().item() == pytest.approx(1.25, abs=0.05)
    assert parameters["scale"].std().item() == pytest.approx(1.5 / 12**0.5, abs=0.05)
    assert (parameters["kept"] == 4).all() and set(parameters["start"].tolist()) == {0, 1, 2, 3, 4}


# ---- VSFormer-style tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_independent", [True, False])
def test_values_and_shapes_stand_side_by_side(channel_independent: bool) -> None:
    """Motifs first, then intervals; each kind fills its own places, and the coordinates tell kind and number."""
    modality = fitted(channel_independent=channel_independent, **VALUES_AND_SHAPES)
    batch = batch_of(modality)
    tokens = modality.tokenize(batch)
    content = tokens.content.reshape(12, 13, 2, 13)  # three motifs and ten intervals; five statistics and 2 + 6 numbers
    coords = tokens.coords.reshape(12, 13, 2) if not channel_independent else tokens.coords
    kinds = coords[..., 0] if channel_independent else coords[..., 0] % 2
    assert kinds.tolist() == [[1] * 3 + [0] * 10] * 12
    if not channel_independent:
        assert (coords[..., 0] // 2).unflatten(0, (4, 3)).tolist() == [[[c] * 13 for c in range(3)]] * 4
    assert coords[..., 1].tolist() == [[*range(3), *range(10)]] * 12
    assert not content[:, :3, :, :5].any() and not content[:, 3:, :, 5:].any()
    valid = tokens.valid.reshape(4, -1, 13)[:, 0]
    assert valid.tolist() == [[True] * 3 + [n < length // 4 for n in range(10)] for length in LENGTHS]
    # The second interval of a sample, in its own units.
    series = with_gaps(3, 40, 3)
    back = modality.denormalize(content[:, :, 0, :4].reshape(12, 13, 4), batch)[9:]
    for channel in range(3):
        interval = series[channel, 4:8]
        known = interval[~np.isnan(interval)]
        told = content[9 + channel, 4, 1, :4].bool()
        assert told.all() == bool(len(known))
        if len(known):
            assert back[channel, 4, 0].item() == pytest.approx(known.mean(), rel=1e-4)
            assert back[channel, 4, 2].item() == pytest.approx(known.min(), rel=1e-4, abs=1e-3)
            assert back[channel, 4, 3].item() == pytest.approx(known.max(), rel=1e-4, abs=1e-3)


def test_motifs_are_found_in_the_training_set() -> None:
    """A bump that all series have is the first motif, and its token says where it is in a new one."""
    bump = np.concatenate([np.linspace(0, 3, 5), np.linspace(2.4, 0, 5)])
    generator = np.random.default_rng(0)

    def series(start: int) -> np.ndarray:
        made = 0.2 * generator.normal(size=60)
        made[start : start + 10] += bump
        return made

    modality = TimeSeries(patch_length=4, token_style="values_and_shapes", num_motifs=2, motif_length=10)
    modality.fit(samples_of([series(int(start)) for start in generator.integers(50, size=30)]))
    assert np.shape(modality.motifs or []) == (1, 2, 10)
    starts = [7, 21, 44]
    tokens = modality.tokenize(modality.collate([modality.prepare(series(start)) for start in starts]))
    place = tokens.content[:, 0, 0, 6] * 50
    assert (place - torch.tensor(starts)).unique().round().numel() <= 2 and (
        place - torch.tensor(starts)
    ).abs().max() <= 4
    assert (tokens.content[:, 0, 0, 5] < 0.6).all()  # the distance: a correlation of at least 0.8


def test_motifs_must_be_known_and_fit() -> None:
    modality = TimeSeries(patch_length=4, **VALUES_AND_SHAPES)
    with pytest.raises(ValueError, match="motifs: they are not known; call fit"):
        modality.tokenize(batch_of(modality))
    modality = TimeSeries(patch_length=4, **VALUES_AND_SHAPES, num_channels=3, motifs=[[[1.0] * 6] * 2] * 3)
    with pytest.raises(ValueError, match=r"motifs: found shape \(3, 2, 6\); expected .* \(3, 3, 6\)"):
        modality.tokenize(batch_of(modality))
    with pytest.raises(ValueError, match="expected at least one patch or motif, 6 steps"):
        modality.prepare(noise(3, 5))


# ---- Pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"channel_independent": False}, {"stride": 2}, VALUES_AND_SHAPES])
def test_pictures(options: dict[str, Any]) -> None:
    """Blank where tokens are hidden, black and white elsewhere, one lane for each channel of a row."""
    modality = fitted(**options)
    tokens = modality.tokenize(modality.collate([modality.prepare(noise(3, 40, seed)) for seed in range(2)]))
    picture = modality.picture(tokens)
    assert picture.shape[0] == len(tokens.content) and picture.shape[3] == 3
    assert not picture.nan_to_num(0.5).lt(0).any() and not picture.nan_to_num(0.5).gt(1).any()
    if modality.token_style == "patches":
        assert picture.isfinite().all() and (picture == 0).any(dim=1).all()  # a line through all columns
        assert picture.shape[1] == 48 * (1 if modality.channel_independent else 3)
        tokens.content[:, 5:] = NAN
        hidden = modality.picture(tokens).isnan()
        assert hidden.any() and not hidden.all()


def test_a_picture_shows_the_values() -> None:
    """The line's height is that of the value: 0 in the middle, a deviation an eighth of the height."""
    modality = TimeSeries(patch_length=4, instance_norm=False)
    series = np.concatenate([np.zeros(20), np.full(20, 2.0)])
    picture = modality.picture(modality.tokenize(modality.collate([modality.prepare(series)])))[0, :, :, 0]
    row = torch.arange(48.0)[:, None].expand(-1, 160)
    left, right = picture[:, :70], picture[:, 90:]
    assert row[:, :70][left == 0].mean() == pytest.approx(23.5, abs=0.6)
    assert row[:, 90:][right == 0].mean() == pytest.approx(0.25 * 47, abs=0.6)


def test_predictions_become_contents() -> None:
    modality = fitted()
    tokens = modality.tokenize(batch_of(modality))
    prediction = torch.randn(tokens.content[:, :, 0].shape, generator=keyed())
    content = modality.content_of(prediction, tokens)
    assert content.shape == tokens.content.shape and torch.equal(content[:, :, 0], prediction)
    assert torch.equal(content[:, :, 1], tokens.content[:, :, 1])


def test_tokens_can_be_chosen() -> None:
    """Rows that an objective repeats or cuts still find their samples."""
    modality = fitted()
    tokens: Tokens = modality.tokenize(batch_of(modality))
    hidden: Tensor = torch.randn(12, 10, 4, generator=keyed())
    expected = torch.stack(
        [hidden[3 * row : 3 * row + 3][tokens.valid[3 * row : 3 * row + 3]].mean(0) for row in range(4)]
    )
    torch.testing.assert_close(tokens.pool(hidden), expected)
    torch.testing.assert_close(tokens.repeat(2).pool(hidden.repeat_interleave(2, 0)), expected)


@pytest.mark.parametrize("channel_independent", [True, False])
def test_motif_prior_is_the_distance_of_each_motif(channel_independent: bool) -> None:
    options = VALUES_AND_SHAPES | {"channel_independent": channel_independent, "patch_length": 6}
    modality = TimeSeries(**options, motif_prior=0.5)
    values = [np.random.default_rng(seed).standard_normal((2, 30)) for seed in range(3)]
    modality.fit(Samples(values, str))
    tokens = modality.tokenize(modality.collate([modality.prepare(each) for each in values]))
    assert tokens.prior is not None and tokens.prior.shape == (*tokens.valid.shape, tokens.valid.shape[1])
    kind = tokens.coords[..., 0].long() % 2  # 1: motifs
    for row, column in np.ndindex(*tokens.valid.shape):
        distance = tokens.content[row, column, 0, 5] if kind[row, column] else torch.zeros(())
        assert torch.equal(tokens.prior[row, :, column], (-0.5 * distance).expand(tokens.valid.shape[1]))
    assert (tokens.prior < 0).any()
    assert TimeSeries(**options, motifs=modality.motifs, num_channels=2).prior(tokens.content) is None


@pytest.mark.parametrize("channel_independent", [True, False])
def test_future_hides_the_last_patches(channel_independent: bool) -> None:
    """Of 8 patches at a ratio of a quarter the last two, whatever is drawn; of a shorter series its own last ones."""
    modality = TimeSeries(patch_length=4, channel_independent=channel_independent)
    batch = modality.collate([modality.prepare(np.random.default_rng(0).standard_normal((2, t))) for t in (32, 16)])
    tokens = modality.tokenize(batch)
    hidden = modality.mask(tokens, 0.25, torch.Generator().manual_seed(0), "future").hidden
    time = tokens.coords[..., -1]
    last = torch.where(tokens.valid, time, -1).amax(dim=1, keepdim=True)
    patches = last + 1
    assert torch.equal(hidden, tokens.valid & (time >= patches - (patches / 4)))
