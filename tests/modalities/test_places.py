"""Places of tokens as classes: against loops over rows and tokens, and without a hint from the padding."""

from fractions import Fraction
from typing import Any

import pytest
import torch

from mmssl.modalities.base import Modality
from mmssl.modeling import make_modality
from mmssl.tokens import Tokens
from tests.matrix.cases import MODALITIES, make_batch

BINS = 32


def relative(count: int) -> list[int]:
    """The bin of the middle of each of ``count`` equal parts."""
    return [int(Fraction(2 * number + 1, 2 * count) * BINS) for number in range(count)]


def tokens_of(modality: Modality, shape: tuple[int, ...]) -> Tokens:
    return modality.tokenize({modality.inputs[0]: torch.randn(shape)})


@pytest.mark.parametrize("size", [(8, 12), (16, 24), (4, 4), (24, 12)])
def test_places_of_patches_are_their_numbers_on_the_grid_of_the_options(size: tuple[int, int]) -> None:
    """Rows first. Of a grid twice as fine two by two patches share a place; a coarser one leaves places out."""
    image = make_modality("image", {"image_size": (8, 12), "patch_size": 4, "num_channels": 1})
    assert image.num_places == 2 * 3
    rows, columns = size[0] // 4, size[1] // 4
    found = image.places(tokens_of(image, (2, 1, *size)))
    expected = [
        int(Fraction(2 * row + 1, 2 * rows) * 2) * 3 + int(Fraction(2 * column + 1, 2 * columns) * 3)
        for row in range(rows)
        for column in range(columns)
    ]
    assert found.dtype == torch.long and found.tolist() == [expected] * 2
    if size == (8, 12):
        assert expected == list(range(6))


@pytest.mark.parametrize("shape", [(8, 4, 6), (4, 4, 6), (16, 8, 12)])
def test_places_of_tubelets_are_numbers_of_time_row_and_column(shape: tuple[int, int, int]) -> None:
    options = {"num_frames": 8, "tubelet_size": 2, "image_size": (4, 6), "patch_size": 2, "num_channels": 1}
    video = make_modality("video", options)
    own = (4, 2, 3)
    assert video.num_places == 24
    grid = [side // 2 for side in shape]
    expected = []
    for place in torch.cartesian_prod(*[torch.arange(side) for side in grid]).tolist():
        t, y, x = (int(Fraction(2 * n + 1, 2 * of) * to) for n, of, to in zip(place, grid, own, strict=True))
        expected.append((t * 2 + y) * 3 + x)
    assert video.places(tokens_of(video, (2, 1, *shape))).tolist() == [expected] * 2
    if shape == (8, 4, 6):
        assert expected == list(range(24))


@pytest.mark.parametrize("channels_together", [None, False, True], ids=["speech", "series", "channels together"])
def test_places_in_time_are_bins_of_the_rows_own_length(channels_together: bool | None) -> None:
    """So a row has the same ones with and without padding, and short rows leave bins out."""
    name = "speech" if channels_together is None else "time_series"
    options = MODALITIES[name][0] | ({"channel_independent": False} if channels_together else {})
    modality = make_modality(name, options)
    assert modality.num_places == BINS
    samples = [modality.prepare(sample) for sample in MODALITIES[name][1](4)]
    together = modality.tokenize(modality.collate(samples))
    found = modality.places(together)
    assert found.dtype == torch.long and found.min() >= 0 and found.max() < BINS
    lanes = 2 if channels_together else 1
    lengths = set()
    for row, (places, valid) in enumerate(zip(found, together.valid, strict=True)):
        count = int(valid.sum()) // lanes
        assert places[valid].tolist() == relative(count) * lanes
        rows_each = len(together.valid) // len(samples)
        alone = modality.tokenize(modality.collate([samples[row // rows_each]]))
        assert modality.places(alone)[row % rows_each].tolist() == places[valid].tolist()
        lengths.add(count)
    assert len(lengths) > 1 and not together.valid.all()


def test_more_tokens_than_bins_share_them_evenly() -> None:
    speech = make_modality("speech", {})
    coords = torch.arange(100.0)[None, :, None]
    valid = torch.arange(100)[None] < 3 * BINS
    places = speech.places(Tokens(torch.zeros(1, 100, 80), coords, valid))
    assert places[0, : 3 * BINS].tolist() == [number // 3 for number in range(3 * BINS)]


def test_shapes_of_motifs_have_no_place() -> None:
    series = make_modality("time_series", {"token_style": "values_and_shapes"})
    with pytest.raises(ValueError, match=r"values_and_shapes.*lie nowhere.*expected 'patches'"):
        _ = series.num_places


@pytest.mark.parametrize("name", ["point_cloud", "graph", "tabular"])
def test_tokens_without_an_order_offer_no_places(name: str) -> None:
    options: Any = MODALITIES[name][0]
    modality = make_modality(name, options)
    assert not modality.offers("places")
    with pytest.raises(NotImplementedError, match=name):
        modality.places(modality.tokenize(make_batch(modality, 2)))
    with pytest.raises(NotImplementedError, match=name):
        _ = modality.num_places
