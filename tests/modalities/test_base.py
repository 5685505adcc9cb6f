"""Tests of what all modalities share: the choice of hidden tokens, blocks, and the reconstruction loss."""

from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from mmssl.modalities.base import Modality, block_order
from mmssl.objectives.base import global_mean
from mmssl.tokens import Tokens

STYLES = ("random", "block")


class Boxes(Modality):
    """A modality with nothing but masks, of both styles."""

    mask_styles: ClassVar = STYLES

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        if style == "random":
            return super().hiding_order(tokens, generator, style)
        return block_order(tokens, [4] * tokens.coords.shape[-1], generator)


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scattered(counts: list[int], length: int) -> Tokens:
    """One row for each count, with so many valid tokens, anywhere between the padding."""
    order = torch.rand(len(counts), length, generator=key(0)).argsort(dim=1)
    coords = torch.arange(length, dtype=torch.float32)[None, :, None].expand(len(counts), -1, -1)
    return Tokens(torch.zeros(len(counts), length, 1), coords, order < torch.tensor(counts)[:, None])


def on_grid(batch: int, rows: int, columns: int) -> Tokens:
    """Tokens at the places of a grid that begins at (-3, 5)."""
    y, x = torch.meshgrid(torch.arange(rows) - 3.0, torch.arange(columns) + 5.0, indexing="ij")
    coords = torch.stack([y, x], dim=-1).flatten(0, 1).expand(batch, -1, -1)
    return Tokens(torch.zeros(batch, rows * columns, 1), coords, torch.ones(batch, rows * columns, dtype=torch.bool))


def hidden_of(count: int, ratio: float) -> int:
    """How many of so many valid tokens are to be hidden."""
    if count == 1:
        return 0
    return count - min(max(int(count * (1 - ratio)), 1), count - 1)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.75, 0.9, 0.99, 1.0])
def test_count_of_hidden_tokens_and_their_indices_equal_a_loop(ratio: float, style: str) -> None:
    tokens = scattered(list(range(1, 51)), 53)
    mask = Boxes().mask(tokens, ratio, key(1), style)
    for row, count in enumerate(range(1, 51)):
        hidden = mask.hidden[row].nonzero().flatten().tolist()
        valid = tokens.valid[row].nonzero().flatten().tolist()
        assert len(hidden) == hidden_of(count, ratio)
        assert set(hidden) <= set(valid)
        assert mask.hidden_index[row][mask.hidden_valid[row]].tolist() == hidden
        assert mask.visible_index[row][mask.visible_valid[row]].tolist() == sorted(set(valid) - set(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_may_have_its_own_ratio(dtype: torch.dtype) -> None:
    counts = [2 + i % 40 for i in range(400)]
    ratio = 0.02 + 0.96 * torch.rand(len(counts), generator=key(0), dtype=dtype)
    hidden = Boxes().mask(scattered(counts, 41), ratio, key(1)).hidden.sum(dim=1)
    assert hidden.tolist() == [hidden_of(count, r) for count, r in zip(counts, ratio.tolist(), strict=True)]


@pytest.mark.parametrize("style", STYLES)
def test_mask_follows_from_the_seed_alone(style: str) -> None:
    tokens = on_grid(4, 6, 6)
    first, again, other = (Boxes().mask(tokens, 0.5, key(seed), style).hidden for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_valid_token_is_hidden_equally_often() -> None:
    draws, count, hidden = 40_000, 10, 7  # int(10 * (1 - 0.7)) = 3 stay visible
    pattern = scattered([count], 13).valid
    tokens = Tokens(torch.zeros(draws, 13, 1), torch.zeros(draws, 13, 1), pattern.expand(draws, -1))
    share = Boxes().mask(tokens, 0.7, key(0)).hidden.double().mean(dim=0)
    expected = hidden / count
    deviation = (expected * (1 - expected) / draws) ** 0.5
    assert (share[pattern[0]] - expected).abs().max() < 5 * deviation
    assert (share[~pattern[0]] == 0).all()


@pytest.mark.parametrize("style", STYLES)
def test_every_token_is_hidden_and_visible_at_times(style: str) -> None:
    hidden = Boxes().mask(on_grid(1000, 6, 7), 0.25, key(0), style).hidden
    assert hidden.any(dim=0).all(), "a place that is never hidden"
    assert not hidden.all(dim=0).any(), "a place that is always hidden"


def test_unknown_style_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'tube'.* random, block"):
        Boxes().mask(on_grid(1, 2, 2), 0.5, key(0), "tube")


def test_each_block_is_a_box_of_uniform_place_and_size() -> None:
    """The block laid first, against GMML: a corner anywhere, sides from 1 to the longest, cut at the border."""
    draws, rows, columns, longest = 6000, 5, 7, (2, 4)
    first = block_order(on_grid(draws, rows, columns), longest, key(0)).floor() == 0
    covered = first.view(draws, rows, columns)
    y, x = covered.any(dim=2), covered.any(dim=1)
    height, width = y.sum(dim=1), x.sum(dim=1)
    assert torch.equal(covered, y[:, :, None] & x[:, None, :]), "a block is not a box"
    top, left = y.int().argmax(dim=1), x.int().argmax(dim=1)
    assert all(y[i, t : t + h].all() for i, (t, h) in enumerate(zip(top.tolist(), height.tolist(), strict=True)))
    assert all(x[i, s : s + w].all() for i, (s, w) in enumerate(zip(left.tolist(), width.tolist(), strict=True)))

    def is_uniform(values: Tensor, choices: int) -> bool:
        share = torch.bincount(values, minlength=choices).double() / len(values)
        return len(share) == choices and bool(((share - 1 / choices).abs() < 5 * (choices * len(values)) ** -0.5).all())

    assert is_uniform(top * columns + left, rows * columns)
    assert is_uniform(height[top <= rows - longest[0]] - 1, longest[0])
    assert is_uniform(width[left <= columns - longest[1]] - 1, longest[1])


@pytest.mark.parametrize("place", [-1e4, 1e4])
def test_blocks_ignore_the_places_of_padding(place: float) -> None:
    tokens = on_grid(50, 4, 4)
    tokens.valid = torch.rand(tokens.valid.shape, generator=key(3)) < 0.6
    tokens.valid[:, 0] = True
    far = Tokens(tokens.content, torch.where(tokens.valid[..., None], tokens.coords, place), tokens.valid)
    near = Boxes().mask(tokens, 0.5, key(0), "block").hidden
    assert torch.equal(Boxes().mask(far, 0.5, key(0), "block").hidden, near)


def test_within_a_block_each_token_may_be_the_first_to_be_hidden() -> None:
    draws = 4000
    order = block_order(on_grid(draws, 4, 5), (4, 5), key(0))
    fraction = order.double() % 1  # uniform, whatever the place
    assert (fraction.mean(dim=0) - 0.5).abs().max() < 5 / (12 * draws) ** 0.5


def components(hidden: Tensor) -> int:
    """Number of connected groups of hidden places on a grid, by flood fill over the four neighbours."""
    left = {(int(y), int(x)) for y, x in hidden.nonzero()}
    count = 0
    while left:
        count, front = count + 1, [left.pop()]
        while front:
            y, x = front.pop()
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            front += near
    return count


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_blocks_make_larger_groups_than_random_masks(ratio: float) -> None:
    draws, side = 40, 14

    def mean_size(style: str) -> float:
        hidden = Boxes().mask(on_grid(draws, side, side), ratio, key(0), style).hidden.view(draws, side, side)
        return hidden.sum().item() / sum(components(one) for one in hidden)

    assert mean_size("block") > 2 * mean_size("random")


def loss_inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    prediction, target = torch.randn(2, 3, 4, *shape, generator=key(0))
    return prediction.requires_grad_(), target


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("elements", [False, True])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_reconstruction_loss_equals_a_loop(
    distance: Literal["l1", "l2"], elements: bool, shape: tuple[int, ...]
) -> None:
    modality = Modality()
    modality.distance = distance
    prediction, target = loss_inputs(shape)
    where = torch.rand((3, 4, *shape) if elements else (3, 4), generator=key(1)) < 0.5
    where[0, 0] = False  # a token of which nothing counts
    loss, weight = modality.reconstruction_loss(prediction, target, where)
    total, things, terms = 0.0, 0, 0
    for b in range(3):
        for n in range(4):
            p, t = prediction[b, n].flatten().tolist(), target[b, n].flatten().tolist()
            counted = where[b, n].expand(shape).flatten().tolist() if not elements else where[b, n].flatten().tolist()
            errors = [abs(x - y) if distance == "l1" else (x - y) ** 2 for x, y in zip(p, t, strict=True)]
            chosen = [error for error, use in zip(errors, counted, strict=True) if use]
            expected = len(chosen) if elements else int(bool(chosen))
            assert weight[b, n] == expected
            if chosen:
                assert loss[b, n].item() == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)
            total, things, terms = total + sum(chosen), things + expected, terms + len(chosen)
    assert torch.isfinite(loss).all()
    # The loss of a batch is the mean over all elements that count.
    assert global_mean(loss, weight).item() == pytest.approx(total / terms, rel=1e-5)
    assert weight.sum() == things


@pytest.mark.parametrize("elements", [False, True])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_what_does_not_count_has_no_influence(distance: Literal["l1", "l2"], elements: bool) -> None:
    modality = Modality()
    modality.distance = distance
    prediction, target = loss_inputs((5,))
    where = torch.rand((3, 4, 5) if elements else (3, 4), generator=key(1)) < 0.5
    counted = where if elements else where[..., None].expand(3, 4, 5)
    value = global_mean(*modality.reconstruction_loss(prediction, target, where))
    (gradient,) = torch.autograd.grad(value, prediction)
    error = prediction - target
    slope = error.sign() if distance == "l1" else 2 * error
    torch.testing.assert_close(gradient, slope * counted / counted.sum())
    assert (gradient[~counted] == 0).all()
    wild = torch.where(counted, prediction, 1e6)
    assert global_mean(*modality.reconstruction_loss(wild, target, where)) == value


def test_reconstruction_loss_of_half_precision_is_computed_in_single() -> None:
    prediction, target = loss_inputs((5,))
    half = prediction.bfloat16()
    where = torch.ones(3, 4, dtype=torch.bool)
    loss, _ = Modality().reconstruction_loss(half, target, where)
    torch.testing.assert_close(loss, (half.float() - target).square().mean(dim=-1), rtol=1e-6, atol=0)
