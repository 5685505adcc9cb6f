"""Transforms that an objective can ask for: against numpy, undone again, and without a hint but the content."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import make_modality
from mmssl.tokens import Tokens

CASES: dict[str, dict[str, Any]] = {
    "image": {"image_size": 8, "patch_size": 2, "num_channels": 3},
    "video": {"num_frames": 12, "tubelet_size": 1, "image_size": 6, "patch_size": 2, "num_channels": 1},
    "speech": {"sampling_rate": 8000, "num_mels": 20, "n_fft": 200, "win_length": 200, "hop_length": 80},
    "time_series": {"patch_length": 4},
    "point_cloud": {"num_points": 40, "num_groups": 6, "group_size": 4, "num_channels": 1},
}
PRETEXTS: dict[tuple[str, str], int] = {
    ("image", "rotation"): 4,
    ("image", "jigsaw"): 24,
    ("video", "rotation"): 4,
    ("video", "order"): 6,
    ("video", "speed"): 3,
    ("speech", "order"): 6,
    ("speech", "reverse"): 2,
    ("time_series", "order"): 6,
    ("time_series", "reverse"): 2,
    ("time_series", "flip"): 2,
    ("point_cloud", "up"): 6,
}
LENGTHS = {"speech": (1600, 1801, 2402), "time_series": (31, 24, 41), "point_cloud": (40, 33, 24)}
ORDERS = list(itertools.permutations(range(3)))
every_pretext = pytest.mark.parametrize(("name", "pretext"), PRETEXTS)


def make(name: str, **options: Any) -> Modality:
    return make_modality(name, CASES[name] | options)


def noise(name: str) -> Batch:
    """Three random samples, of different lengths where there are such, with known and unknown steps."""
    generator = torch.Generator().manual_seed(0)
    if name == "image":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    if name == "video":
        return {"pixel_values_videos": torch.randn(3, 1, 12, 6, 6, generator=generator)}
    lengths = torch.tensor(LENGTHS[name])
    attention = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if name == "speech":
        return {
            "input_values": torch.randn(attention.shape, generator=generator) * attention,
            "attention_mask": attention,
        }
    width = 2 if name == "time_series" else 4
    values = torch.randn(*attention.shape, width, generator=generator) * attention[..., None]
    if name == "point_cloud":
        return {"points": values, "attention_mask": attention}
    known = (torch.rand(values.shape, generator=generator) < 0.9) & (attention[..., None] == 1)
    return {"series": values * known, "observed_mask": known.long(), "attention_mask": attention}


def apply(modality: Modality, batch: Batch, pretext: str, number: int) -> Batch:
    return modality.transform(batch, pretext, torch.full((3,), number))


def jigsaw(pixels: np.ndarray, number: int) -> np.ndarray:
    pieces = [pixels[:, :4, :4], pixels[:, :4, 4:], pixels[:, 4:, :4], pixels[:, 4:, 4:]]
    a, b, c, d = (pieces[source] for source in list(itertools.permutations(range(4)))[number])
    return np.concatenate([np.concatenate([a, b], axis=2), np.concatenate([c, d], axis=2)], axis=1)


def order(values: np.ndarray, number: int, unit: int, fade: int = 0) -> np.ndarray:
    """Along the first axis; segments fade in and out over ``fade`` steps, half a step from their ends on."""
    size = len(values) // (3 * unit) * unit
    rest = len(values) - 3 * size
    ramp = np.array([min(1, (min(i, size - 1 - i) + 0.5) / fade) if fade else 1 for i in range(size)])
    segments = [values[rest + size * part :][:size] for part in ORDERS[number]]
    return np.concatenate([values[:rest], *[(segment.T * ramp).T for segment in segments]])


def speed(frames: np.ndarray, number: int) -> np.ndarray:
    """3 of 12 frames: the 1st, 3rd and 5th of the 12 in the middle and so on."""
    return frames[:, {0: [4, 5, 6], 1: [3, 5, 7], 2: [1, 5, 9]}[number]]


DIRECTIONS = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, -1), (0, -1, 0), (-1, 0, 0)]  # where z comes to point
SLOW: dict[tuple[str, str], Callable[[np.ndarray, int], np.ndarray]] = {
    ("image", "rotation"): lambda pixels, k: np.rot90(pixels, k, axes=(1, 2)),
    ("image", "jigsaw"): jigsaw,
    ("video", "rotation"): lambda pixels, k: np.rot90(pixels, k, axes=(2, 3)),
    ("video", "order"): lambda pixels, k: order(pixels.transpose(1, 0, 2, 3), k, 1).transpose(1, 0, 2, 3),
    ("video", "speed"): speed,
    ("speech", "order"): lambda wave, k: order(wave, k, 1, fade=100),
    ("speech", "reverse"): lambda wave, k: wave[::-1] if k else wave,
    ("time_series", "order"): lambda steps, k: order(steps, k, 4),
    ("time_series", "reverse"): lambda steps, k: steps[::-1] if k else steps,
    ("time_series", "flip"): lambda steps, k: -steps if k else steps,
}


@pytest.mark.parametrize("name", [*CASES, "graph", "tabular"])
def test_what_is_offered(name: str) -> None:
    expected = {pretext: count for (modality, pretext), count in PRETEXTS.items() if modality == name}
    assert (make(name) if name in CASES else make_modality(name, {})).pretexts == expected


@pytest.mark.parametrize(("name", "pretext"), SLOW)
def test_equals_numpy_sample_by_sample(name: str, pretext: str) -> None:
    modality, batch = make(name), noise(name)
    before = {key: value.clone() for key, value in batch.items()}
    for number in range(PRETEXTS[name, pretext]):
        found = apply(modality, batch, pretext, number)
        for key in set(batch) - {"attention_mask"}:
            for row in range(3):
                length = LENGTHS[name][row] if name in LENGTHS else None
                own, new = batch[key][row][:length].numpy(), found[key][row][:length].numpy()
                flags = key == "observed_mask" and pretext == "flip"
                expected = own if flags else SLOW[name, pretext](own, number)
                np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


@every_pretext
def test_transforms_are_distinct_and_keep_what_there_is(name: str, pretext: str) -> None:
    """Each is a rearrangement of the same values, up to signs: nothing is lost, so each can be undone."""
    modality, batch = make(name), noise(name)
    main = modality.inputs[0]
    results = [apply(modality, batch, pretext, number)[main] for number in range(PRETEXTS[name, pretext])]
    for first, second in itertools.combinations(results, 2):
        assert all(not torch.equal(one, two) for one, two in zip(first, second, strict=True))
    if pretext != "speed":
        for result in results:
            torch.testing.assert_close(
                result.abs().flatten(1).sort(dim=1).values,
                results[0].abs().flatten(1).sort(dim=1).values,
                rtol=1e-6,
                atol=1e-7,
            )
    if (name, pretext) not in {("speech", "order"), ("video", "speed")}:
        assert torch.equal(results[0], batch[main])


@every_pretext
def test_the_number_of_one_sample_changes_no_other(name: str, pretext: str) -> None:
    modality, batch = make(name), noise(name)
    count = PRETEXTS[name, pretext]
    numbers = torch.tensor([count - 1, 0, 1])
    mixed = modality.transform(batch, pretext, numbers)
    for row, number in enumerate(numbers.tolist()):
        alone = apply(modality, batch, pretext, number)
        assert all(torch.equal(mixed[key][row], alone[key][row]) for key in batch)


@every_pretext
def test_tokens_tell_nothing_by_their_number_validity_and_places(name: str, pretext: str) -> None:
    """But for the places of a point cloud, which are content turned with it."""
    modality, batch = make(name), noise(name)
    read: list[Tokens] = []
    for number in range(PRETEXTS[name, pretext]):
        changed = apply(modality, batch, pretext, number)
        assert set(changed) == set(batch)
        assert all(changed[key].dtype == batch[key].dtype for key in batch)
        read.append(modality.tokenize(changed))
    for tokens in read[1:]:
        assert tokens.content.shape == read[0].content.shape
        assert torch.equal(tokens.valid, read[0].valid)
        assert name == "point_cloud" or torch.equal(tokens.coords, read[0].coords)
        assert not torch.equal(tokens.content, read[0].content)


@pytest.mark.parametrize(("name", "pretext"), [case for case in PRETEXTS if case[0] in LENGTHS])
def test_padding_never_comes_into_the_sample(name: str, pretext: str) -> None:
    modality, batch = make(name), noise(name)
    main = modality.inputs[0]
    real = batch["attention_mask"].bool()
    spoilt = {**batch, main: torch.where(real.view(*real.shape, *[1] * (batch[main].dim() - 2)), batch[main], 1e4)}
    for number in range(PRETEXTS[name, pretext]):
        clean, found = (modality.tokenize(apply(modality, each, pretext, number)) for each in (batch, spoilt))
        assert torch.equal(clean.valid, found.valid)
        torch.testing.assert_close(clean.content[clean.valid], found.content[clean.valid])


def rotated(number: int) -> Tensor:
    """(3, 3) the map of xyz, as columns where the three axes go."""
    cloud = make("point_cloud")
    points = torch.cat([torch.eye(3), torch.zeros(21, 3)])
    batch = {"points": torch.nn.functional.pad(points, (0, 1))[None], "attention_mask": torch.ones(1, 24).long()}
    return cloud.transform(batch, "up", torch.tensor([number]))["points"][0, :3, :3].T


def test_clouds_are_turned_by_rotations_that_bring_up_into_all_six_directions() -> None:
    matrices = [rotated(number) for number in range(6)]
    assert torch.equal(matrices[0], torch.eye(3))
    for matrix in matrices:
        assert torch.equal(matrix @ matrix.T, torch.eye(3))
        assert torch.linalg.det(matrix).item() == pytest.approx(1)
    for axis in (2, 1):  # z or y, whichever is up in the data
        assert {tuple(matrix[:, axis].long().tolist()) for matrix in matrices} == set(DIRECTIONS)
    batch = noise("point_cloud")
    for number, matrix in enumerate(matrices):
        found = apply(make("point_cloud"), batch, "up", number)["points"]
        assert torch.equal(found[..., :3], batch["points"][..., :3] @ matrix.T)
        assert torch.equal(found[..., 3:], batch["points"][..., 3:])


def test_images_and_frames_that_all_look_the_same_stay_the_same() -> None:
    """There is nothing in the tokens that would tell the transform of a constant."""
    for name in ("image", "video"):
        modality, batch = make(name), {key: torch.full_like(value, 0.3) for key, value in noise(name).items()}
        for pretext, count in modality.pretexts.items():
            read = [modality.tokenize(apply(modality, batch, pretext, number)) for number in range(count)]
            assert all(torch.equal(tokens.content, read[0].content) for tokens in read)


def test_whole_patches_are_moved() -> None:
    """Pieces of a jigsaw and segments of a series are cut between tokens, so that none is torn apart."""
    image, series = make("image"), make("time_series", instance_norm=False)
    for modality, pretext in ((image, "jigsaw"), (series, "order")):
        batch = noise(modality.name)
        before, after = (modality.tokenize(apply(modality, batch, pretext, number)) for number in (0, 3))
        for row in range(len(before.valid)):
            first, second = (
                {tuple(token.flatten().tolist()) for token in each.content[row, each.valid[row]]}
                for each in (before, after)
            )
            assert first == second


def test_frames_of_speech_inside_a_segment_are_moved_as_they_are() -> None:
    """With segments of whole hops; those near the ends hear the joint."""
    speech = make("speech", rms_level=None)
    wave = torch.randn(1, 3 * 1600, generator=torch.Generator().manual_seed(0))
    batch = {"input_values": wave, "attention_mask": torch.ones_like(wave).long()}
    number = ORDERS.index((2, 0, 1))
    before, after = (
        speech.log_mel(speech.transform(batch, "order", torch.tensor([n])))[0][0]  # type: ignore[operator]
        for n in (0, number)
    )
    for place, source in enumerate(ORDERS[number]):
        own, new = slice(20 * source + 3, 20 * source + 18), slice(20 * place + 3, 20 * place + 18)
        torch.testing.assert_close(after[new], before[own], rtol=1e-4, atol=1e-4)


def test_series_too_short_for_three_patches_are_cut_anywhere() -> None:
    series = make("time_series")
    values = torch.arange(1.0, 9.0)[None, :, None]
    batch = {
        "series": values,
        "observed_mask": torch.ones_like(values).long(),
        "attention_mask": torch.ones(1, 8).long(),
    }
    found = series.transform(batch, "order", torch.tensor([ORDERS.index((2, 1, 0))]))["series"]
    assert found.flatten().tolist() == [1, 2, 7, 8, 5, 6, 3, 4]


def test_upside_down_changes_the_sign_of_what_is_read() -> None:
    """With the mean of the series, and with that of the training set, which is not zero."""
    for instance_norm in (True, False):
        options = {"num_channels": 2, "channel_mean": [5.0, -3.0], "channel_std": [2.0, 0.5]}
        series, batch = make("time_series", instance_norm=instance_norm, **options), noise("time_series")
        before, after = (series.tokenize(apply(series, batch, "flip", number)).content for number in (0, 1))
        torch.testing.assert_close(after[:, :, 0], -before[:, :, 0], atol=1e-5, rtol=1e-5)
        assert torch.equal(after[:, :, 1], before[:, :, 1])


def test_in_training_what_is_read_of_a_long_clip_is_transformed() -> None:
    """Else a reversed clip would begin with what training never reads, and a segment would be missing."""
    batch = noise("speech")
    short = {key: value[:, :1500] for key, value in batch.items()}
    for pretext in ("order", "reverse"):
        speech = make("speech", max_seconds=1500 / 8000)
        found, expected = (apply(speech.train(), each, pretext, 1) for each in (batch, short))
        assert all(torch.equal(found[key], expected[key]) for key in batch)
        whole = apply(speech.eval(), batch, pretext, 1)
        assert whole["input_values"].shape == batch["input_values"].shape


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("image", {"image_size": (8, 12)}, "rotation"),
        ("image", {"image_size": 6}, "jigsaw"),
        ("video", {"image_size": (6, 8)}, "rotation"),
        ("video", {"num_frames": 4, "tubelet_size": 2}, "order speed"),
        ("video", {"num_frames": 4, "tubelet_size": 1}, "speed"),
        ("video", {"num_frames": 12, "tubelet_size": 4}, "speed"),
    ],
)
def test_what_the_options_rule_out_is_not_offered(name: str, options: dict[str, Any], missing: str) -> None:
    pretexts = make(name, **options).pretexts
    assert set(make(name).pretexts) - set(pretexts) == set(missing.split())


def test_batches_that_do_not_suit_are_refused() -> None:
    image, video, number = make("image"), make("video"), torch.zeros(2, dtype=torch.long)
    wide = {"pixel_values": torch.zeros(2, 3, 8, 12)}
    with pytest.raises(ValueError, match=r"found 8x12 pixels.*squares"):
        image.transform(wide, "rotation", number)
    with pytest.raises(ValueError, match=r"found 3x3 patches.*even"):
        image.transform({"pixel_values": torch.zeros(2, 3, 6, 6)}, "jigsaw", number)
    for pretext in ("order", "speed"):
        with pytest.raises(ValueError, match=rf"{pretext}.*clips of 2 frames"):
            video.transform({"pixel_values_videos": torch.zeros(2, 1, 2, 6, 6)}, pretext, number)
    for name in CASES:
        with pytest.raises(ValueError, match=rf"{name} has no pretext 'rotate'.*it offers: \w+"):
            make(name).transform(noise(name), "rotate", torch.zeros(3, dtype=torch.long))
