"""Arithmetic of signals of unequal length, row by row against NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.signals import between, bridge, draw_lines, fourier, warp, without

LENGTHS = torch.tensor([1, 2, 7, 8, 50, 97, 100])


def signals(seed: int = 0) -> Tensor:
    """(7, 100, 2), of any value behind their ends."""
    return torch.randn(7, 100, 2, generator=torch.Generator().manual_seed(seed))


def test_fourier_equals_numpy_row_by_row() -> None:
    """Each over its own length, prime or not; what lies behind it does not matter."""
    x = signals()
    for row, length in enumerate(LENGTHS.tolist()):
        expected = np.fft.fft(x[row, :length].double().numpy(), axis=0)
        np.testing.assert_allclose(fourier(x, LENGTHS)[row, :length], expected, atol=2e-5)


def test_fourier_of_long_signals_keeps_its_digits() -> None:
    """Squares of steps exceed what single precision counts."""
    x = torch.randn(1, 20_011, 1, generator=torch.Generator().manual_seed(0))
    expected = np.fft.fft(x[0, :, 0].double().numpy())
    np.testing.assert_allclose(fourier(x, torch.tensor([20_011]))[0, :, 0], expected, atol=2e-5 * 20_011**0.5)


def test_without_equals_zeroing_bins() -> None:
    x = signals()
    hidden = torch.rand(7, 51, generator=torch.Generator().manual_seed(1)) < 0.4
    out = without(x, LENGTHS, hidden)
    for row, length in enumerate(LENGTHS.tolist()):
        spectrum = np.fft.rfft(x[row, :length].double().numpy(), axis=0)
        spectrum[hidden[row, : len(spectrum)].numpy()] = 0
        np.testing.assert_allclose(out[row, :length], np.fft.irfft(spectrum, length, axis=0), atol=1e-5)
    torch.testing.assert_close(without(x, LENGTHS, torch.zeros_like(hidden))[6], x[6], rtol=0, atol=1e-5)


def test_bridge_equals_interpolation() -> None:
    """Between known steps on the line, outside of them as the nearest; known ones stay to the bit."""
    x = signals()
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    known[0], known[1, :, 1] = False, False
    out = bridge(x, known, torch.tensor([7.0, -7.0]))
    assert torch.equal(out[known], x[known])
    for row in range(7):
        for channel in range(2):
            there = known[row, :, channel].numpy()
            if not there.any():
                assert (out[row, :, channel] == (7.0, -7.0)[channel]).all()
                continue
            expected = np.interp(np.arange(100), np.flatnonzero(there), x[row, there, channel])
            np.testing.assert_allclose(out[row, :, channel], expected, atol=1e-5)


def test_between() -> None:
    """At steps to the bit, also where the step after does not exist."""
    x = signals()
    below = torch.tensor([[0, 5, 99]]).expand(7, -1)
    share = torch.tensor([[0.25, 0.0, 0.0]]).expand(7, -1)
    out = between(x, below, share)
    torch.testing.assert_close(out[:, 0], 0.75 * x[:, 0] + 0.25 * x[:, 1])
    assert torch.equal(out[:, 1:], x[:, [5, 99]])


def test_warp() -> None:
    """From the first step to the last, always forwards, at the speed of the curve; where that is flat, at one pace."""
    curve = 0.5 * torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    place = warp(curve, LENGTHS)
    plain = warp(torch.zeros(7, 6), LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        own = place[row, :length].double().numpy()
        assert own[0] == 0 and own[-1] == pytest.approx(length - 1) and own.max() <= length - 1
        assert (np.diff(own) > 0).all()
        speed = np.exp(np.interp(np.linspace(0, 5, length), np.arange(6), curve[row].double().numpy()))
        way = np.concatenate([[0], np.cumsum((speed[1:] + speed[:-1]) / 2)])
        np.testing.assert_allclose(own, way / max(way[-1], 1e-9) * (length - 1), rtol=1e-4, atol=1e-5)
        assert plain[row, :length].tolist() == list(range(length))


def test_lines_are_drawn() -> None:
    """A flat line in the middle, a rising one from below to the top, and nothing where nothing is known."""
    line = torch.stack([torch.full((11,), 0.5), torch.linspace(1, 0, 11)])[None]
    line[0, 0, 5:] = torch.nan
    picture = draw_lines(line, (21, 40))
    assert picture.shape == (1, 42, 40, 3)
    flat, rising = picture[0, :21, :, 0], picture[0, 21:, :, 0]
    assert ((flat[:, :15] == 0).sum(dim=0) == 3).all() and (flat[9:12, :15] == 0).all()
    assert flat[:, 20:].isnan().all() and not flat[:, :15].isnan().any()
    assert rising[20, 0] == 0 and rising[0, 39] == 0 and not rising.isnan().any()
    middle = (rising * 0 + torch.arange(21.0)[:, None])[rising == 0]
    assert (rising == 0).any(dim=0).all() and middle.mean() == pytest.approx(10, abs=0.5)
