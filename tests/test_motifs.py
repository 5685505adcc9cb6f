"""Statistics of intervals and motifs, against slow loops; motifs that were put into noise are found."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.motifs import FLAT, discover_motifs, interval_statistics, match_motifs, recurring, shape_of


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_statistics_of_intervals() -> None:
    """Over known steps alone; the slope is that of NumPy's straight line, times the length."""
    values, known = torch.randn(40, 9, generator=keyed(0)), torch.rand(40, 9, generator=keyed(1)) < 0.3
    out, told = interval_statistics(values, known)
    assert {int(count) for count in known.sum(dim=1)} >= {0, 1, 2, 3}
    for row in range(40):
        there = known[row].numpy()
        x, t = values[row, there].double().numpy(), np.flatnonzero(there)
        assert told[row].tolist() == [len(x) >= 1] * 4 + [len(x) >= 2]
        if len(x) >= 1:
            np.testing.assert_allclose(out[row, :4], [x.mean(), x.std(), x.min(), x.max()], atol=1e-6)
        if len(x) >= 2:
            assert out[row, 4] == pytest.approx(9 * np.polyfit(t, x, 1)[0], abs=1e-5)
        assert not out[row, ~told[row]].any()


def shape(window: np.ndarray) -> np.ndarray:
    return (window - window.mean()) / window.std() if window.std() > FLAT else np.zeros_like(window)


def series_and_motifs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = torch.randn(4, 2, 30, generator=keyed(0))
    values[0, 0, 5:] = 0.5  # flat
    known = torch.rand(values.shape, generator=keyed(1)) < 0.95
    known[1, 1, ::5] = False  # no window of 6 steps is known
    length = torch.tensor([30, 30, 17, 6])
    known &= torch.arange(30) < length[:, None, None]
    known[3] = True & (torch.arange(30) < 6)
    return values, known, length, torch.randn(2, 3, 6, generator=keyed(2)) * 4 + 1


def test_motifs_are_matched_as_a_loop_does() -> None:
    values, known, length, motifs = series_and_motifs()
    out, found = match_motifs(torch.where(known, values, 0.0), known, length, motifs)
    assert out.shape == (4, 2, 3, 8)
    for row in range(4):
        for channel in range(2):
            starts = [s for s in range(int(length[row]) - 5) if known[row, channel, s : s + 6].all()]
            for k in range(3):
                assert bool(found[row, channel, k]) == bool(starts)
                if not starts:
                    assert not out[row, channel, k].any()
                    continue
                motif = shape(motifs[channel, k].double().numpy())
                windows = [values[row, channel, s : s + 6].double().numpy() for s in starts]
                correlations = [float((shape(window) * motif).mean()) for window in windows]
                best = int(np.argmax(correlations))
                distance, place, *difference = out[row, channel, k].tolist()
                if windows[best].std() > FLAT:
                    assert distance == pytest.approx(np.sqrt(((shape(windows[best]) - motif) ** 2).mean()), abs=1e-4)
                assert distance == pytest.approx(np.sqrt(2 - 2 * correlations[best]), abs=1e-4)
                assert place == pytest.approx(starts[best] / max(1, int(length[row]) - 6))
                np.testing.assert_allclose(difference, shape(windows[best]) - motif, atol=1e-4)


def test_a_motif_fits_itself_at_any_level_and_size() -> None:
    values, known, length, _ = series_and_motifs()
    motif = values[2:3, :, 4:10].transpose(0, 1)
    known[2] = torch.arange(30) < 17
    for size, level in ((1, 0), (3, 2), (0.1, -1000)):
        out, found = match_motifs(size * values + level, known, length, motif)
        assert found[2].all()
        torch.testing.assert_close(out[2, :, 0, 1], torch.full((2,), 4 / 11))
        torch.testing.assert_close(out[2, :, 0, 2:], torch.zeros(2, 6), rtol=0, atol=5e-3)
        assert (out[2, :, 0, 0] < 2e-2).all()


def test_what_was_put_into_noise_is_found() -> None:
    """Two shapes, each in half of the series, somewhere: the two motifs overlap them, one each."""
    generator = keyed(0)
    shapes = [torch.sin(torch.linspace(0, 9, 16)), torch.linspace(-1, 1, 16) ** 3 - torch.linspace(-1, 1, 16)]
    shapes = [shape_of(each) for each in shapes]
    series = []
    for number in range(40):
        noise = 0.3 * torch.randn(80, 2, generator=generator)
        start = int(torch.randint(64, (), generator=generator))
        noise[start : start + 16, 1] += 2 * shapes[number % 2]
        series.append(noise)
    motifs = torch.tensor(discover_motifs(series, 2, 16))
    assert motifs.shape == (2, 2, 16)
    torch.testing.assert_close(motifs.mean(dim=-1), torch.zeros(2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(motifs.std(dim=-1, correction=0), torch.ones(2, 2), rtol=0, atol=1e-4)

    def likeness(one: Tensor, other: Tensor) -> float:
        """Greatest correlation over shifts of up to a quarter."""
        wide = torch.nn.functional.pad(other, (4, 4))
        return max(float((one * wide[s : s + 16]).mean()) for s in range(9))

    table = [[likeness(motif, each) for each in shapes] for motif in motifs[1]]
    assert sorted(int(np.argmax(row)) for row in table) == [0, 1]
    assert min(max(row) for row in table) > 0.75
    assert discover_motifs(series, 2, 16) == motifs.tolist()


def test_motifs_are_those_with_the_most_matches() -> None:
    """Points on a line as windows: R is 1, and the points 1, 2, 3 and 101 have two matches each, 4 has one.

    Of them 1 comes first; then 101, as 2 and 3 lie within 2 R of 1; then 4.
    """
    place = torch.tensor([0.0, 1, 2, 3, 4, 100, 101, 102, 200, 300, 302])
    distance = (place[:, None] - place).abs()
    itself = torch.eye(11, dtype=torch.bool)
    assert recurring(distance, itself, 3).tolist() == [1, 6, 4]
    # Windows that overlap are no matches of each other: then 1, 2 and 3 have one at most.
    near = itself.clone()
    near[1:4, 1:4] = True
    assert recurring(distance, near, 1).tolist() == [6]
    assert sorted(recurring(distance, itself, 11).tolist()) == list(range(11))


def test_channels_without_shapes_and_series_too_short() -> None:
    """A constant channel and one that is never known get motifs of zeros."""
    series = [torch.stack([torch.randn(30, generator=keyed(k)), torch.ones(30)], dim=1) for k in range(3)]
    motifs = torch.tensor(discover_motifs([*series, torch.zeros(3, 2)], 4, 8))
    assert motifs[0].any(dim=1).all() and not motifs[1].any()
    motifs = torch.tensor(discover_motifs([torch.full((30, 1), torch.nan)], 4, 8))
    assert not motifs.any()
    few = torch.tensor(discover_motifs([torch.randn(9, 1, generator=keyed(0))], 4, 8))
    assert few[0, :2].any(dim=1).all() and not few[0, 2:].any()
    with pytest.raises(ValueError, match="found no series of 8 steps or more"):
        discover_motifs([torch.zeros(7, 1)], 4, 8)
