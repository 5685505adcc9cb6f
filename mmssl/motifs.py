"""Intervals of a series as statistics, and what recurs in series as motifs; series are (..., T), with known flags.

The tokens of VSFormer (Xi et al., 2024) are of these two kinds. VSFormer learns with labels and its code is not public:
these are VSFormer-style, with motifs that are found without labels, and without its class-specific attention.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

STATISTICS = 5
FLAT = 1e-2  # a window whose standard deviation is less, where that of its series is 1, has no shape
WINDOWS = 1024  # drawn to find motifs: distances of all pairs are computed


def interval_statistics(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, standard deviation, least, greatest value and slope over the known steps of each interval.

    Args:
        values: (..., P) steps of intervals, of any finite value where they are unknown.
        known: (..., P) bool.

    Returns:
        (..., 5) statistics, 0 where they are unknown, and which are known. The slope, by least squares, is the change
        over one interval, and needs two steps.
    """
    count = known.sum(dim=-1)
    number = count.clamp(min=1)
    time = torch.arange(values.shape[-1], device=values.device) / values.shape[-1]

    def mean(of: Tensor) -> Tensor:
        return (of * known).sum(dim=-1) / number

    level = mean(values)
    centred, lag = values - level[..., None], time - mean(time.expand_as(values))[..., None]
    slope = mean(centred * lag) / mean(lag.square()).clamp(min=1e-12)
    least = values.masked_fill(~known, torch.inf).amin(dim=-1)
    greatest = values.masked_fill(~known, -torch.inf).amax(dim=-1)
    statistics = torch.stack([level, mean(centred.square()).sqrt(), least, greatest, slope], dim=-1)
    needed = torch.tensor([1, 1, 1, 1, 2], device=values.device)
    found = count[..., None] >= needed
    return torch.where(found, statistics, 0.0), found


def shape_of(windows: Tensor) -> Tensor:
    """Windows (..., m) less their mean, with standard deviation 1; flat ones are zero."""
    centred = windows - windows.mean(dim=-1, keepdim=True)
    std = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(std > FLAT, centred / std.clamp(min=FLAT), 0.0)


def match_motifs(values: Tensor, known: Tensor, length: Tensor, motifs: Tensor) -> tuple[Tensor, Tensor]:
    """Where each motif fits its channel best, how well, and what differs there.

    Args:
        values: (B, C, T) series of standard deviation about 1.
        known: (B, C, T) bool; windows with unknown steps fit nothing.
        length: (B,) steps of each series.
        motifs: (C, K, m) shapes to look for, in each channel its own.

    Returns:
        (B, C, K, 2 + m): the least distance of shapes over the root of m (0 for equal ones, the root of 2 for
        uncorrelated ones and flat windows), its place from 0 at the beginning of the series to 1 at its end, and the
        shape of the window there less the motif; and (B, C, K) bool, False where no window is known.
    """
    channels, count, size = motifs.shape
    shapes = shape_of(motifs)
    # Shapes have no level; without that of the series the difference of two squares below keeps its digits.
    level = (values * known).sum(dim=2, keepdim=True) / known.sum(dim=2, keepdim=True).clamp(min=1)
    values = torch.where(known, values - level, 0.0)
    mean, square, held = (
        nn.functional.avg_pool1d(each, size, stride=1)[:, :, None] for each in (values, values.square(), known.float())
    )
    std, whole = (square - mean.square()).clamp(min=0).sqrt(), held > 1 - 0.5 / size
    with torch.autocast(values.device.type, enabled=False):
        product = nn.functional.conv1d(values, shapes.flatten(0, 1)[:, None], groups=channels)
    # The shape of a motif has no mean, so that of the window need not be taken off.
    correlation = product.unflatten(1, (channels, count)) / (size * std.clamp(min=FLAT))
    correlation = torch.where(std > FLAT, correlation, 0.0).masked_fill(~whole, -torch.inf)
    best, place = correlation.max(dim=-1)
    found = best > -torch.inf
    steps = (place[..., None] + torch.arange(size, device=values.device)).flatten(2)
    window = shape_of(values.gather(2, steps).unflatten(2, (count, size)))
    distance = (2 - 2 * best.clamp(-1, 1)).sqrt()
    share = place / (length - size).clamp(min=1)[:, None, None]
    content = torch.cat([distance[..., None], share[..., None], window - shapes], dim=-1)
    return content.masked_fill(~found[..., None], 0.0), found


def discover_motifs(series: Sequence[Tensor], count: int, size: int) -> list[list[list[float]]]:
    """Shapes that recur most in each channel: the K-motifs of Lin et al. (2002), of a random sample of windows.

    A window's matches are the windows of its channel no farther away than R, those that overlap it by more than half
    left out; R is the median of the distances to the nearest match, so that half of the windows have one. The first
    motif is the window with the most matches; each further one is that of the windows farther than 2 R from all motifs.
    Where none is left, it is the window farthest from all motifs.

    Args:
        series: (T, C) each, of standard deviation about 1 and NaN where a value is missing.
        count: motifs K of each channel.
        size: steps m of a motif.

    Returns:
        (C, K, m) the motifs, of mean 0 and standard deviation 1; zeros where a channel has too few windows that are
        known and not flat.

    Raises:
        ValueError: no series is as long as a motif.
    """
    starts = torch.tensor([max(0, len(each) - size + 1) for each in series])
    ends, total = starts.cumsum(0), int(starts.sum())
    if not total:
        raise ValueError(f"found no series of {size} steps or more; expected some, to find motifs of that length")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(total, (8 * WINDOWS,), generator=generator).unique() if total > 8 * WINDOWS else None
    chosen = torch.arange(total) if chosen is None else chosen
    owner = torch.searchsorted(ends, chosen, right=True)
    first = chosen - (ends - starts)[owner]
    windows = torch.stack([series[i][s : s + size] for i, s in zip(owner.tolist(), first.tolist(), strict=True)])
    motifs = torch.zeros(windows.shape[2], count, size)
    for channel in range(len(motifs)):
        shapes = shape_of(windows[..., channel])  # NaN is no shape either
        usable = shapes.any(dim=1).nonzero()[:, 0]
        usable = usable[torch.randperm(len(usable), generator=generator)[:WINDOWS]]
        if len(usable):
            near = (owner[usable, None] == owner[usable]) & (
                (first[usable, None] - first[usable]).abs() < (size + 1) // 2
            )
            distance = torch.cdist(shapes[usable], shapes[usable])
            index = recurring(distance, near, min(count, len(usable)))
            motifs[channel, : len(index)] = shapes[usable[index]]
    return motifs.tolist()


def recurring(distance: Tensor, near: Tensor, count: int) -> Tensor:
    """The K-motifs among windows, (K,) long, by distances (W, W) and which windows overlap each other (W, W)."""
    others = distance.masked_fill(near, torch.inf)
    profile = others.amin(dim=1)
    radius = profile.median()
    matches = (others <= radius).sum(dim=1)
    order = matches + 0.5 / (1 + profile)  # of windows with as many matches, the one with the nearest match
    free, index = torch.ones_like(matches, dtype=torch.bool), list[int]()
    for _ in range(count):
        score = order if free.any() else distance[index].amin(dim=0)
        allowed = free if free.any() else torch.ones_like(free).index_fill(0, torch.tensor(index), False)
        best = int(score.masked_fill(~allowed, -torch.inf).argmax())
        index.append(best)
        free &= (distance[best] > 2 * radius) & ~near[best]
    return torch.tensor(index)
