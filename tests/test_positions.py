"""Positions against their formulas written out, and against transformers' tables of MAE and VideoMAE."""

import math

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEConfig
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from mmssl.positions import (
    GridPositions,
    IndexPositions,
    MLPPositions,
    NoPositions,
    RasterPositions,
    SinCosPositions,
)


def grid(rows: int, columns: int) -> Tensor:
    """(rows * columns, 2) places (y, x), rows first."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


def by_formula(place: list[float], width: int, order: tuple[int, ...], temperature: float) -> list[float]:
    """Vaswani et al. (2017) with all sines of an axis before its cosines, one axis after the other.

    The axes get pairs of a sine and a cosine in turn, until the width is used up.
    """
    bands = [0] * len(order)
    for pair in range(width // 2):
        bands[pair % len(order)] += 1
    result = []
    for axis, count in zip(order, bands, strict=True):
        angles = [place[axis] / temperature ** (k / count) for k in range(count)]
        result += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return result


@pytest.mark.parametrize(
    ("axes", "order", "width", "temperature"),
    [
        (1, None, 8, 10_000.0),
        (1, None, 6, 100.0),
        (2, None, 12, 10_000.0),
        (2, (1, 0), 12, 10_000.0),
        (3, None, 24, 1000.0),
        (3, (2, 0, 1), 6, 10_000.0),
        (2, (1, 0), 18, 10_000.0),
        (3, None, 16, 10_000.0),
        (3, (2, 0, 1), 8, 100.0),
        (3, None, 1024, 10_000.0),
    ],
)
def test_the_formula_at_fractional_and_negative_places(
    axes: int, order: tuple[int, ...] | None, width: int, temperature: float
) -> None:
    coords = 20 * torch.rand(2, 5, axes, generator=torch.Generator().manual_seed(0)) - 5
    found = SinCosPositions(width, axes, temperature, order)(coords)
    expected = [
        [by_formula(place, width, order or tuple(range(axes)), temperature) for place in row]
        for row in coords.double().tolist()
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def table_of_mae() -> Tensor:
    """(7, 7, 16): what transformers' MAE adds to the patches of a grid of 7x7."""
    embeddings = ViTMAEEmbeddings(ViTMAEConfig(image_size=7, patch_size=1, hidden_size=16))
    embeddings.initialize_weights()
    return embeddings.position_embeddings.detach()[0, 1:].unflatten(0, (7, 7))


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (4, 4), (2, 5), (7, 3), (1, 6)])
def test_equals_the_table_of_transformers_mae(rows: int, columns: int, table_of_mae: Tensor) -> None:
    """transformers has square tables only; a rectangular grid is a corner of one."""
    found = SinCosPositions(16, axes=2, order=(1, 0))(grid(rows, columns)[None])[0]
    torch.testing.assert_close(found, table_of_mae[:rows, :columns].flatten(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("order", "changed"), [((1, 0), slice(0, 8)), (None, slice(8, 16))])
def test_x_has_the_first_half_of_the_channels_in_the_order_of_mae(
    order: tuple[int, ...] | None, changed: slice
) -> None:
    """Patch (0, 1) differs from patch (0, 0) in the share of x alone."""
    origin, right = SinCosPositions(16, axes=2, order=order)(torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]))[0]
    differs = torch.zeros(16, dtype=torch.bool)
    differs[changed] = True
    assert torch.equal(origin != right, differs)


@pytest.mark.parametrize("dtype", [torch.long, torch.bfloat16, torch.float64])
def test_computed_in_single_precision_whatever_the_coords(dtype: torch.dtype) -> None:
    positions = SinCosPositions(8, axes=1)
    coords = torch.arange(200)[None, :, None]
    assert torch.equal(positions(coords.to(dtype)), positions(coords.float()))


@pytest.mark.parametrize(("width", "axes"), [(12, 3), (16, 2), (24, 3), (384, 3), (192, 2), (8, 1)])
def test_equal_shares_are_those_of_one_table_for_all_axes(width: int, axes: int) -> None:
    """To the last bit: models trained where widths had to be multiples of ``2 * axes`` stay what they are."""
    coords = 20 * torch.rand(3, 7, axes, generator=torch.Generator().manual_seed(0)) - 5
    bands = width // (2 * axes)
    angle = coords[..., None] * 10_000.0 ** (-torch.arange(bands, dtype=torch.float32) / bands)
    expected = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
    assert torch.equal(SinCosPositions(width, axes)(coords), expected)


@pytest.mark.parametrize(("width", "axes"), [(15, 1), (0, 1), (2, 2), (4, 3), (17, 3)])
def test_a_width_that_axes_cannot_share_is_refused(width: int, axes: int) -> None:
    with pytest.raises(ValueError, match=rf"{axes} axes need an even width of at least {2 * axes}; found {width}$"):
        SinCosPositions(width, axes)


def test_nothing_is_stored() -> None:
    """No table that a checkpoint could lose or fill with garbage."""
    assert not SinCosPositions(8, axes=2).state_dict()
    assert not list(SinCosPositions(8, axes=2).buffers())


def filled(width: int, axes: int, hidden_size: int, gate: float | None = None) -> MLPPositions:
    positions = MLPPositions(width, axes, hidden_size, gate)
    with torch.no_grad():
        for name, parameter in positions.named_parameters():
            if name != "gate":
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                )
    return positions


@pytest.mark.parametrize(("axes", "hidden_size"), [(3, 5), (1, 2)])
@torch.no_grad()
def test_learned_positions_are_linear_gelu_linear(axes: int, hidden_size: int) -> None:
    """GELU is x times the normal distribution function."""
    positions = filled(4, axes, hidden_size)
    coords = 3 * torch.randn(2, 3, axes, generator=torch.Generator().manual_seed(0))
    first, second = positions.fc1, positions.fc2
    for row, places in zip(positions(coords), coords, strict=True):
        for found, place in zip(row.tolist(), places.tolist(), strict=True):
            inner = []
            for weights, bias in zip(first.weight.tolist(), first.bias.tolist(), strict=True):
                x = bias + sum(w * c for w, c in zip(weights, place, strict=True))
                inner.append(x * (1 + math.erf(x / math.sqrt(2))) / 2)
            expected = [
                bias + sum(w * x for w, x in zip(weights, inner, strict=True))
                for weights, bias in zip(second.weight.tolist(), second.bias.tolist(), strict=True)
            ]
            assert found == pytest.approx(expected, abs=1e-4)


def test_the_gate_starts_closed_and_can_open() -> None:
    """At first places add nothing, whatever their size; the gate has a slope, and scales what lies behind it."""
    coords = 1e3 * torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    gated, plain = filled(4, 2, 8, gate=0.0), filled(4, 2, 8)
    assert not gated(coords).any()
    gated(coords).sum().backward()
    assert gated.gate is not None and gated.gate.grad is not None
    torch.testing.assert_close(gated.gate.grad, plain(coords).sum()[None])
    with torch.no_grad():
        gated.gate.fill_(-2.0)
    assert torch.equal(gated(coords), -2 * plain(coords))
    assert {name for name, _ in gated.named_parameters()} - {name for name, _ in plain.named_parameters()} == {"gate"}


@pytest.mark.parametrize("dtype", [torch.long, torch.bfloat16, torch.float64])
def test_learned_positions_have_the_precision_of_their_weights(dtype: torch.dtype) -> None:
    coords, positions = torch.arange(6).view(1, 3, 2), filled(4, 2, 8)
    assert torch.equal(positions(coords.to(dtype)), positions(coords.float()))
    assert positions.double()(coords.to(dtype)).dtype == torch.float64


@pytest.mark.parametrize("axes", [0, 3])
def test_without_places_all_is_zero(axes: int) -> None:
    positions = NoPositions(6)
    assert torch.equal(positions(torch.randn(2, 3, axes)), torch.zeros(2, 3, 6))
    assert not positions.state_dict()


def test_learned_places_are_rows_of_a_table() -> None:
    """In any order and number, also of places that are not quite whole; start values are normal with deviation 0.02."""
    torch.manual_seed(0)
    positions = IndexPositions(64, 50)
    index = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))
    for coords in (index[..., None], index[..., None].float() + 0.3, index[..., None].double() - 0.3):
        found = positions(coords)
        for row, places in zip(found, index.tolist(), strict=True):
            assert torch.equal(row, torch.stack([positions.index_tokens[place] for place in places]))
    assert positions.index_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    positions(index[..., None])[0, 0].sum().backward()
    touched = torch.zeros(50, 64)
    touched[index[0, 0]] = 1
    assert positions.index_tokens.grad is not None and torch.equal(positions.index_tokens.grad, touched)


def all_places(*grid: int) -> Tensor:
    """(1, product of the grid, axes), the last axis fastest."""
    return torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).flatten(0, -2)[None].float()


@pytest.mark.parametrize(("grid", "width"), [((2, 3, 4), 16), ((8, 14, 14), 384), ((1, 1, 5), 6), ((3, 2), 8)])
def test_equals_the_table_of_transformers_videomae(grid: tuple[int, ...], width: int) -> None:
    """In any order; and a longer clip goes on."""
    table = get_sinusoid_encoding_table(2 * math.prod(grid), width)[0]
    coords = all_places(2 * grid[0], *grid[1:])
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0)).view(2, -1)
    found = RasterPositions(width, grid)(coords[0, order])
    torch.testing.assert_close(found, table[order], atol=1e-6, rtol=0)
    assert not RasterPositions(width, grid).state_dict()


def test_between_places_counts_the_nearest_and_none_is_outside_but_in_time() -> None:
    positions = RasterPositions(8, (2, 3, 4))
    stretched = torch.tensor([[[1.0, 0.6, 2.4], [0.0, -0.4, 3.4], [5.0, 2.4, -0.3], [0.0, 9.0, 9.0]]])
    nearest = torch.tensor([[[1.0, 1.0, 2.0], [0.0, 0.0, 3.0], [5.0, 2.0, 0.0], [0.0, 2.0, 3.0]]])
    assert torch.equal(positions(stretched), positions(nearest))
    assert torch.equal(positions(nearest.bfloat16()), positions(nearest))
    with pytest.raises(ValueError, match=r"of a number need an even width; found 7$"):
        RasterPositions(7, (2, 3))


def multilinear(table: Tensor, place: list[float]) -> Tensor:
    """One axis after the other, each between its two neighbours, none of them outside."""
    if not place:
        return table
    at = min(max(place[0], 0.0), len(table) - 1.0)
    low = min(int(at), max(len(table) - 2, 0))
    high = min(low + 1, len(table) - 1)
    first, second = (multilinear(table[index], place[1:]) for index in (low, high))
    return first + (at - low) * (second - first)


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (4, 1), (1, 1), (2, 3, 4), (1, 3, 2), (3, 1, 1)], ids=str)
@torch.no_grad()
def test_places_of_a_grid_are_interpolated(grid: tuple[int, ...]) -> None:
    """Also outside of it; on it they are the table, in the order of the patches."""
    torch.manual_seed(0)
    positions = GridPositions(6, grid)
    table = positions.grid_tokens.normal_()
    assert table.shape == (*grid, 6)
    coords = (torch.tensor(grid) + 2) * torch.rand(3, 7, len(grid)) - 1.5
    found = positions(coords)
    for row, places in zip(found, coords.tolist(), strict=True):
        expected = torch.stack([multilinear(table, place) for place in places])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    on_it = positions(all_places(*grid).expand(2, -1, -1))
    torch.testing.assert_close(on_it, table.flatten(0, -2).expand(2, -1, -1), atol=1e-6, rtol=0)


def test_on_a_large_grid_whole_places_are_the_table() -> None:
    positions = GridPositions(4, (8, 37, 37))
    found = positions(all_places(8, 37, 37))[0]
    torch.testing.assert_close(found, positions.grid_tokens.detach().flatten(0, 2), atol=1e-6, rtol=0)


def test_gradients_reach_the_neighbours_of_a_place_by_their_shares() -> None:
    """Start values are normal with deviation 0.02."""
    torch.manual_seed(0)
    positions = GridPositions(48, (4, 5))
    assert positions.grid_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    positions(torch.tensor([[[1.25, 3.5], [0.0, 0.0]]])).sum().backward()
    shares = torch.zeros(4, 5)
    shares[1, 3:5], shares[2, 3:5], shares[0, 0] = 0.375, 0.125, 1
    assert positions.grid_tokens.grad is not None
    torch.testing.assert_close(positions.grid_tokens.grad, shares[..., None].expand(-1, -1, 48), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_table_of_places_has_the_precision_of_its_weights(dtype: torch.dtype) -> None:
    positions = GridPositions(4, (20, 30)).to(dtype)
    coords = torch.tensor([[[18.3, 28.6], [19.0, 29.0]]])
    found, table = positions(coords), positions.grid_tokens.detach().double()
    assert found.dtype == dtype
    expected = torch.stack([multilinear(table, place) for place in coords[0].double().tolist()])
    torch.testing.assert_close(found[0].double(), expected, atol=2e-4 if dtype == torch.bfloat16 else 1e-12, rtol=1e-2)
