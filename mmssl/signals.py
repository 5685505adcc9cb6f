"""Arithmetic of signals (B, T, C) that differ in length: gaps, places between steps, frequencies, pictures."""

import math

import torch
from torch import Tensor, nn

from mmssl.tokens import gather


def bridge(series: Tensor, known: Tensor, otherwise: Tensor) -> Tensor:
    """Series (B, T, C) with missing steps on the line between known ones; ``otherwise`` (C,) where none is known.

    Steps before the first known one are as that one, and steps behind the last one as the last one.

    Args:
        series: of any finite value where it is unknown.
        known: (B, T, C) bool.
        otherwise: (C,).
    """
    steps = series.shape[1]
    step = torch.arange(steps, device=series.device)[None, :, None]
    before = torch.where(known, step, -1).cummax(dim=1).values
    after = torch.where(known, step, steps).flip(1).cummin(dim=1).values.flip(1)
    share = (step - before) / (after - before).clamp(min=1)
    low, high = series.gather(1, before.clamp(min=0)), series.gather(1, after.clamp(max=steps - 1))
    low, high = torch.where(before < 0, high, low), torch.where(after == steps, low, high)
    line = torch.where(known.any(dim=1, keepdim=True), torch.lerp(low, high, share), otherwise)
    return torch.where(known, series, line)


def between(series: Tensor, below: Tensor, share: Tensor) -> Tensor:
    """Series (B, T, C) at places (B, R) between steps, by linear interpolation: (B, R, C)."""
    above = below + (share > 0)
    return torch.lerp(gather(series, below), gather(series, above), share[..., None])


def warp(log_speed: Tensor, length: Tensor) -> Tensor:
    """(B, T) the places that are read at each step: from 0 to ``length - 1``, at a speed that changes smoothly.

    The logarithm of the speed lies on the lines between ``log_speed`` (B, knots), evenly spaced.
    """
    step = torch.arange(int(length.max()), device=length.device)
    last = (length - 1).clamp(min=1)[:, None]
    step = step.expand(len(length), -1).minimum(length[:, None] - 1)
    knot = step / last * (log_speed.shape[1] - 1)
    below = knot.floor().long()
    speed = between(log_speed[..., None], below, knot - below)[..., 0].exp()
    way = nn.functional.pad((speed[:, 1:] + speed[:, :-1]).cumsum(dim=1) / 2, (1, 0))
    return (way * last / way.gather(1, last.clamp(max=way.shape[1] - 1))).minimum(length[:, None] - 1.0)


def without(series: Tensor, length: Tensor, hidden: Tensor) -> Tensor:
    """Series (B, T, C) without the frequencies ``hidden`` (B, T // 2 + 1), each of its own ``length``."""
    step = torch.arange(series.shape[1], device=series.device)
    frequency = step.minimum(length[:, None] - step).clamp(min=0)
    spectrum = fourier(series, length).masked_fill(hidden.gather(1, frequency)[..., None], 0.0)
    return fourier(spectrum.conj(), length).real / length[:, None, None]


def fourier(series: Tensor, length: Tensor) -> Tensor:
    """Discrete Fourier transforms of series (B, T, C), the one of row b over its first ``length[b]`` steps.

    As a convolution with a chirp (Bluestein, 1970), so that rows of different lengths go through one FFT.
    """
    steps = series.shape[1]
    step, length = torch.arange(steps, device=series.device), length[:, None]
    # The phase is taken off its full turns in whole numbers: squares of steps are large.
    phase = math.pi * (step.square() % (2 * length)) / length
    chirp = torch.polar(torch.ones_like(phase), phase)[..., None]
    wave = torch.fft.fft(series * chirp.conj() * (step < length)[..., None], 2 * steps, dim=1)
    both_ways = torch.cat([chirp, chirp[:, :1] * 0, chirp[:, 1:].flip(1)], dim=1)
    return torch.fft.ifft(wave * torch.fft.fft(both_ways, dim=1), dim=1)[:, :steps] * chirp.conj()


def draw_lines(height: Tensor, size: tuple[int, int] = (48, 160)) -> Tensor:
    """(B, lanes, steps) lines, 0 at the top and 1 at the bottom of their lane, as (B, lanes * rows, columns, 3).

    NaN steps are left blank, the columns as NaN. A column is black from the line's height at its left edge to that at
    its right one.
    """
    rows, columns = size
    place = torch.linspace(0, height.shape[2] - 1, columns + 1, device=height.device)
    below, share = place.long(), place.frac()
    low, high = height[..., below], height[..., (below + 1).clamp(max=height.shape[2] - 1)]
    low, high = (
        torch.where(low.isnan() & (share >= 0.5), high, low),
        torch.where(high.isnan() & (share < 0.5), low, high),
    )
    edge = torch.lerp(low, high, share).clamp(0, 1) * (rows - 1)
    top, bottom = torch.minimum(edge[..., 1:], edge[..., :-1]), torch.maximum(edge[..., 1:], edge[..., :-1])
    row = torch.arange(rows, device=height.device)[:, None]
    ink = (row >= top[..., None, :] - 1) & (row <= bottom[..., None, :] + 1)
    image = torch.where(ink, 0.0, 1.0).masked_fill(top.isnan()[..., None, :], torch.nan)
    return image.flatten(1, 2)[..., None].expand(-1, -1, -1, 3)
