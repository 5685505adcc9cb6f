"""Farthest points, nearest points and Chamfer distances against slow loops and closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl import geometry
from mmssl.geometry import chamfer, farthest_points, nearest_points


def keyed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(batch: int = 3, count: int = 50, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, count, 3, generator=keyed(seed), dtype=dtype)


def some_valid(batch: int = 3, count: int = 50, seed: int = 5) -> Tensor:
    """Half of the points, in no order; not the first one."""
    valid = torch.rand(batch, count, generator=keyed(seed)) < 0.5
    valid[:, 0] = False
    return valid


def slow_farthest(points: np.ndarray, valid: np.ndarray, count: int) -> list[int]:
    """From the definition: the point whose nearest chosen one is farthest."""
    chosen = [int(np.flatnonzero(valid)[0])]
    while len(chosen) < count:
        gaps = [min(math.dist(points[i], points[j]) for j in chosen) if valid[i] else -1.0 for i in range(len(points))]
        chosen.append(int(np.argmax(gaps)))
    return chosen


def slow_chamfer(first: np.ndarray, second: np.ndarray, squared: bool) -> float:
    def one_way(a: np.ndarray, b: np.ndarray) -> float:
        nearest = [min(math.dist(p, q) for q in b) for p in a]
        return float(np.mean([d**2 if squared else d for d in nearest]))

    total = one_way(first, second) + one_way(second, first)
    return total if squared else total / 2


# ---- Farthest points ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_farthest_points_equal_a_slow_loop(padded: bool) -> None:
    points = clouds()
    valid = some_valid() if padded else torch.ones(3, 50, dtype=torch.bool)
    found = farthest_points(points, valid, 20)
    for row in range(3):
        assert found[row].tolist() == slow_farthest(points[row].double().numpy(), valid[row].numpy(), 20)
        assert len(set(found[row].tolist())) == 20


def test_farthest_points_of_a_line() -> None:
    """0, then the end, then the middle, then the quarters."""
    line = torch.zeros(1, 9, 3)
    line[0, :, 1] = torch.arange(9.0)
    assert farthest_points(line, torch.ones(1, 9, dtype=torch.bool), 5)[0].tolist() == [0, 8, 4, 2, 6]


def test_farthest_points_start_at_the_first_point_near_the_origin_too() -> None:
    """Some extensions skip points with a squared norm below 1e-3."""
    points = clouds() * 1e-3
    found = farthest_points(points, torch.ones(3, 50, dtype=torch.bool), 50)
    assert (found[:, 0] == 0).all()
    assert (found.sort(dim=1).values == torch.arange(50)).all()


def test_farthest_points_do_not_change_with_place_and_size() -> None:
    """On a grid of powers of two, where shifting and scaling are exact."""
    points = torch.randint(0, 64, (3, 50, 3), generator=keyed()) / 64
    valid = torch.ones(3, 50, dtype=torch.bool)
    expected = farthest_points(points, valid, 16)
    for other in (points + torch.tensor([4.0, -8.0, 16.0]), points * 8, points / 8 - 2):
        assert torch.equal(farthest_points(other, valid, 16), expected)


def test_farthest_points_far_from_the_origin() -> None:
    """Coordinates near 4096 on a grid of 1/1024: the squares have more digits than single precision."""
    points = torch.randint(0, 1024, (2, 40, 3), generator=keyed()) / 1024 + 4096
    valid = torch.ones(2, 40, dtype=torch.bool)
    found = farthest_points(points, valid, 10)
    assert torch.equal(found, farthest_points(points.double(), valid, 10))
    for row in range(2):
        assert found[row].tolist() == slow_farthest(points[row].double().numpy(), valid[row].numpy(), 10)


def test_rows_of_equal_points_do_not_fail() -> None:
    points = torch.full((2, 30, 3), 0.3)
    points[1, 10:20] = 1.0  # two different points, thirty in all
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[:, 25:] = False
    centres = farthest_points(points, valid, 8)
    assert (centres < 25).all() and centres[1, :2].tolist() == [0, 10]
    near = nearest_points(points[:, :4], points, valid, 12)
    assert (near < 25).all()
    assert not (geometry.pick(points, near.flatten(1)).unflatten(1, (4, 12)) - points[:, :4, None])[0].any()


# ---- Nearest points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_nearest_points_equal_a_slow_loop(padded: bool) -> None:
    points = clouds()
    valid = some_valid() if padded else torch.ones(3, 50, dtype=torch.bool)
    centres = torch.stack([points[row, valid[row]][:7] for row in range(3)])
    found = nearest_points(centres, points, valid, 9)
    for row in range(3):
        for number, centre in enumerate(centres[row]):
            gaps = [math.dist(centre, p) if ok else math.inf for p, ok in zip(points[row], valid[row], strict=True)]
            assert found[row, number].tolist() == np.argsort(gaps)[:9].tolist()
    assert torch.equal(geometry.pick(points, found[..., 0]), centres)  # the centre itself, at no distance


def test_nearest_points_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points, valid = clouds(count=80), some_valid(count=80)
    whole = nearest_points(points, points, valid, 6)
    for most in (1, 250, 1000):
        monkeypatch.setattr(geometry, "MAX_DISTANCES", most)
        assert torch.equal(nearest_points(points, points, valid, 6), whole)


def test_padding_is_no_neighbour_even_where_points_lack() -> None:
    points, valid = clouds(1, 20), torch.zeros(1, 20, dtype=torch.bool)
    valid[0, [3, 7]] = True
    found = nearest_points(points[:, [7]], points, valid, 5)
    assert found[0, 0].tolist() == [7, 3, 7, 7, 7]


# ---- Chamfer distance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 9)])
def test_chamfer_equals_a_slow_loop(squared: bool, sizes: tuple[int, int]) -> None:
    first, second = clouds(6, sizes[0]).view(2, 3, -1, 3), clouds(6, sizes[1], seed=1).view(2, 3, -1, 3)
    found = chamfer(first, second, squared)
    expected = [[slow_chamfer(a.numpy(), b.numpy(), squared) for a, b in zip(*pair, strict=True)] for pair in
                zip(first, second, strict=True)]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(chamfer(second, first, squared), found)  # either way round


def test_chamfer_closed_forms() -> None:
    """{0} and {3, 5} on a line: 9 + (9 + 25) / 2 squared, (3 + (3 + 5) / 2) / 2 plain."""
    first, second = torch.zeros(1, 3), torch.tensor([[3.0, 0, 0], [5.0, 0, 0]])
    assert chamfer(first, second) == 9 + (9 + 25) / 2
    assert chamfer(first, second, squared=False) == (3 + (3 + 5) / 2) / 2
    assert chamfer(second, second.flip(0)) == 0


@pytest.mark.parametrize("squared", [True, False])
def test_chamfer_gradient_equals_finite_differences(squared: bool) -> None:
    first, second = clouds(2, 6, dtype=torch.float64), clouds(2, 7, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: chamfer(a, b, squared), (first.requires_grad_(), second.requires_grad_())
    )


@pytest.mark.parametrize("squared", [True, False])
def test_chamfer_gradient_is_zero_where_points_coincide(squared: bool) -> None:
    first = clouds(2, 6).requires_grad_()
    chamfer(first, first.detach().flip(1), squared).sum().backward()
    assert first.grad is not None and not first.grad.any()


@pytest.mark.parametrize("squared", [True, False])
def test_chamfer_keeps_its_digits_far_from_the_origin(squared: bool) -> None:
    """Sets 1e-3 wide at 100: the product form has nothing left but rounding."""
    first, second = (100 + 1e-3 * clouds(4, 32, seed=seed) for seed in (0, 1))
    exact = chamfer(first.double(), second.double(), squared)
    torch.testing.assert_close(chamfer(first, second, squared).double(), exact, rtol=1e-5, atol=0)


def test_chamfer_stays_in_single_precision_under_autocast() -> None:
    first, second = clouds(4, 32), clouds(4, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = chamfer(first, second)
    assert torch.equal(half, chamfer(first, second))
