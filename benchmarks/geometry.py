"""Point set operations beside the obvious ways to write them, and their share of a whole Point-MAE step.

    python benchmarks/geometry.py [--rounds 7] [--batch_size 32] [--step_batch_size 8] [--threads 2]

The two ways alternate in one process on the same 1,024 points, 64 groups of 32; the table quotes medians, and the
ratio of each round's pair. The step has the published size of Point-MAE: forward, backward and AdamW.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.geometry import chamfer, farthest_points, nearest_points, pick
from mmssl.modalities.point_cloud import PointCloud
from mmssl.objectives.masked_reconstruction import MaskedReconstruction

POINTS, GROUPS, SIZE, HIDDEN = 1024, 64, 32, 38


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs, after two of warm-up")
    parser.add_argument("--batch_size", type=int, default=32, help="clouds in the comparisons")
    parser.add_argument("--step_batch_size", type=int, default=8, help="clouds in the step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare(arguments.batch_size, arguments.rounds)
    share_of_step(arguments.step_batch_size, arguments.rounds)


def compare(batch: int, rounds: int) -> None:
    torch.manual_seed(0)
    points, valid = torch.randn(batch, POINTS, 3), torch.ones(batch, POINTS, dtype=torch.bool)
    centres = pick(points, farthest_points(points, valid, GROUPS))
    first, second = (0.2 * torch.randn(batch * HIDDEN, SIZE, 3) for _ in range(2))
    first.requires_grad_()

    def backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        first.grad = None
        value = loss(first, second).mean()
        value.backward()
        return value.detach()

    operations: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "farthest points": (lambda: farthest_points(points, valid, GROUPS), lambda: broadcast_farthest(points)),
        "nearest points": (
            lambda: nearest_points(centres, points, valid, SIZE),
            lambda: torch.cdist(centres, points).topk(SIZE, largest=False).indices,
        ),
        "Chamfer, forward and backward": (lambda: backward(chamfer), lambda: backward(cdist_chamfer)),
    }
    table = Table(
        "operation", "mmssl ms", "obvious ms", "ratio", "min", "max", title=f"batch of {batch} clouds, medians"
    )
    for name, (ours, obvious) in operations.items():
        # cdist multiplies matrices: where two points are equally far but for rounding it may name the other one first.
        assert torch.isclose(ours(), obvious(), rtol=1e-4).float().mean() > 0.999, name
        times = alternate([ours, obvious], rounds)
        ratios = [a / b for a, b in zip(*times, strict=True)]
        table.add_row(
            name,
            *(f"{1000 * statistics.median(values):.1f}" for values in times),
            *(f"{f(ratios):.2f}" for f in (statistics.median, min, max)),
        )
    Console().print(table)


def broadcast_farthest(points: Tensor) -> Tensor:
    rows = torch.arange(len(points))
    index = [torch.zeros(len(points), dtype=torch.long)]
    nearest = torch.full(points.shape[:2], torch.inf)
    for _ in range(GROUPS - 1):
        nearest = nearest.minimum((points - points[rows, index[-1]][:, None]).square().sum(dim=-1))
        index.append(nearest.argmax(dim=1))
    return torch.stack(index, dim=1)


def cdist_chamfer(first: Tensor, second: Tensor) -> Tensor:
    distance = torch.cdist(first, second).square()
    return distance.amin(dim=-1).mean(dim=-1) + distance.amin(dim=-2).mean(dim=-1)


def share_of_step(batch: int, rounds: int) -> None:
    torch.manual_seed(0)
    modality = PointCloud(scale=(2 / 3, 3 / 2), translate=0.2)
    config = MMSSLConfig(
        modalities={"point_cloud": modality.options()},
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        qkv_bias=False,
        position_every_block=True,
    )
    decoder: dict[str, Any] = {"decoder_layers": 4, "decoder_hidden_size": 384, "decoder_attention_heads": 6}
    objective = MaskedReconstruction(MMSSLModel(config), mask_ratio=0.6, **decoder)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    clouds = [modality.excerpt({"points": torch.randn(POINTS, 3)}, None) for _ in range(batch)]
    inputs = modality.collate(clouds)
    first, second = (0.2 * torch.randn(batch, HIDDEN, SIZE, 3) for _ in range(2))
    first.requires_grad_()

    def step() -> None:
        optimizer.zero_grad()
        objective(inputs, generator).loss.backward()
        optimizer.step()

    parts: dict[str, Callable[[], object]] = {
        "whole step": step,
        "view": lambda: modality.view(inputs, generator),
        "grouping": lambda: modality.tokenize(inputs),
        "Chamfer, forward and backward": lambda: chamfer(first, second).mean().backward(),
    }
    times = alternate(list(parts.values()), rounds)
    table = Table("part", "median ms", "share of the step", title=f"Point-MAE, published size, batch {batch}")
    for name, values in zip(parts, times, strict=True):
        share = statistics.median(a / b for a, b in zip(values, times[0], strict=True))
        table.add_row(name, f"{1000 * statistics.median(values):.1f}", f"{100 * share:.1f}%")
    Console().print(table)


def alternate(functions: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round, all in turn; two rounds of warm-up are left out."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 2):
        for function, values in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            values.append(time.perf_counter() - start)
    return [values[2:] for values in times]


if __name__ == "__main__":
    main()
