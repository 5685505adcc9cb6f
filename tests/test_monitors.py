"""Tests of the monitors of collapse: closed forms and NumPy's singular values."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.monitors import MOST_ROWS, effective_rank, spread


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_numpy(features: Tensor) -> float:
    """Roy and Vetterli (2007): the exponential of the entropy of the singular values' shares."""
    values = features.double().numpy()
    singular = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    share = singular / singular.sum()
    return float(np.exp(-sum(p * np.log(p) for p in share if p > 0)))


def along_axes(lengths: list[float], width: int) -> Tensor:
    """Rows plus and minus each length along an axis of its own, turned at random: singular values sqrt(2) * lengths."""
    rows = torch.zeros(2 * len(lengths), width)
    for axis, length in enumerate(lengths):
        rows[2 * axis, axis], rows[2 * axis + 1, axis] = length, -length
    return rows @ torch.linalg.qr(random(width, width)).Q


def test_isotropic_features_have_the_rank_of_their_width() -> None:
    assert effective_rank(along_axes([3.0] * 12, 12)).item() == pytest.approx(12, rel=1e-5)


@pytest.mark.parametrize("width", [8, 40], ids=["narrower than rows", "wider than rows"])
def test_rank_is_that_of_the_directions_in_use(width: int) -> None:
    assert effective_rank(along_axes([0.5] * 5, width)).item() == pytest.approx(5, rel=1e-4)
    assert effective_rank(torch.outer(random(20), random(width, seed=1))).item() == pytest.approx(1, rel=1e-4)
    share = np.array([8, 4, 2, 1, 1]) / 16
    expected = np.exp(-(share * np.log(share)).sum())  # 2 ** (15 / 8)
    assert expected == pytest.approx(2 ** (15 / 8))
    assert effective_rank(along_axes([8.0, 4.0, 2.0, 1.0, 1.0], width)).item() == pytest.approx(expected, rel=1e-4)


def test_rank_of_few_rows_is_one_less_than_them() -> None:
    """Orthogonal rows lose one direction, that of their mean, when they are centred."""
    assert effective_rank(torch.eye(7, 30)).item() == pytest.approx(6, rel=1e-5)


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (30, 30), (MOST_ROWS, 16), (2, 9)], ids=str)
def test_rank_equals_that_by_numpy(shape: tuple[int, int]) -> None:
    features = random(*shape) @ torch.diag(torch.linspace(0.01, 2, shape[1])) + 5
    assert effective_rank(features).item() == pytest.approx(by_numpy(features), rel=1e-4)


def test_scale_shift_and_rotation_do_not_matter() -> None:
    features = random(60, 10) * torch.arange(10)
    turned = 1e-3 * features @ torch.linalg.qr(random(10, 10, seed=1)).Q + 4
    assert effective_rank(turned).item() == pytest.approx(effective_rank(features).item(), rel=1e-3)


def test_rank_of_many_rows_is_that_of_evenly_spaced_ones() -> None:
    features = random(1000, 12) * torch.linspace(0.1, 3, 12)
    rows = np.linspace(0, 999, MOST_ROWS).astype(int)
    assert effective_rank(features).item() == pytest.approx(by_numpy(features[rows]), rel=1e-4)
    late = torch.cat([torch.zeros(5000, 12), random(5000, 12)])  # the last rows are looked at too
    assert effective_rank(late) > 8


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("rows", [1, 3, 255, 1001])
def test_constant_features_have_rank_one_and_no_spread(rows: int, value: float) -> None:
    features = (value * random(16)).expand(rows, -1)
    assert effective_rank(features).item() == pytest.approx(1, abs=1e-3)
    assert spread(features).item() == pytest.approx(0, abs=1e-6 * abs(value))


def test_spread_is_the_mean_standard_deviation_of_the_columns() -> None:
    features = random(37, 5) * torch.tensor([1.0, 2.0, 0.0, 7.0, 0.1]) + 3
    assert spread(features).item() == pytest.approx(features.numpy().std(axis=0, ddof=1).mean(), rel=1e-5)
    assert spread(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).item() == pytest.approx(2**0.5 / 2)


@pytest.mark.parametrize("rows", [0, 1])
def test_spread_of_less_than_two_rows_is_zero(rows: int) -> None:
    assert spread(random(rows, 4)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_give_numbers_in_single_without_gradient(dtype: torch.dtype) -> None:
    features = random(40, 6).to(dtype).requires_grad_()
    for monitor in (effective_rank, spread):
        value = monitor(features)
        assert not value.requires_grad
        torch.testing.assert_close(value, monitor(features.detach().float()), rtol=1e-4, atol=0, check_dtype=False)
    assert effective_rank(features).dtype == torch.float32
