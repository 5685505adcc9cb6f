"""Point sets of a batch: farthest point sampling, nearest neighbours and Chamfer distances, in PyTorch alone.

All take differences of coordinates before they square them: ``|a|^2 + |b|^2 - 2ab`` would lose its digits far from the
origin. Nothing of the size (points x points) is ever made.
"""

import torch
from torch import Tensor

MAX_DISTANCES = 2**22  # held at one time: 16 MiB


@torch.no_grad()
def farthest_points(points: Tensor, valid: Tensor, count: int) -> Tensor:
    """Farthest point sampling (Eldar et al., 1997): each chosen point is the one farthest from those before it.

    The first one is the first valid point of a row; among equally far ones the first is chosen. A row with fewer
    different points than ``count`` gives some of them again.

    Args:
        points: (B, N, 3) finite, padding too.
        valid: (B, N) bool; others are never chosen.
        count: how many to choose.

    Returns:
        (B, count) long, in the order of choice.
    """
    x, y, z = points.movedim(-1, 0).contiguous()
    chosen = valid.long().argmax(dim=1, keepdim=True)
    nearest = torch.where(valid, torch.inf, -1.0).to(points.dtype)  # squared distance to the nearest chosen point
    distance, difference = torch.empty_like(nearest), torch.empty_like(nearest)
    index = [chosen]
    for _ in range(count - 1):
        torch.sub(x, x.gather(1, chosen), out=distance).square_()
        for plane in (y, z):
            torch.sub(plane, plane.gather(1, chosen), out=difference)
            distance.addcmul_(difference, difference)
        torch.minimum(nearest, distance, out=nearest)
        chosen = nearest.argmax(dim=1, keepdim=True)
        index.append(chosen)
    return torch.cat(index, dim=1)


@torch.no_grad()
def nearest_points(centres: Tensor, points: Tensor, valid: Tensor, count: int) -> Tensor:
    """The ``count`` valid points nearest to each centre, the nearest first.

    A row of fewer valid points than ``count`` gives the nearest one again for those that lack.

    Args:
        centres: (B, G, 3).
        points: (B, N, 3) finite, padding too; N is at least ``count``.
        valid: (B, N) bool.
        count: how many to find.

    Returns:
        (B, G, count) long.
    """
    found = []
    for part in centres.split(max(1, MAX_DISTANCES // valid.numel()), dim=1):
        distance = distances(part, points).masked_fill_(~valid[:, None], torch.inf)
        nearest = distance.topk(count, dim=-1, largest=False)
        found.append(torch.where(nearest.values.isinf(), nearest.indices[..., :1], nearest.indices))
    return torch.cat(found, dim=1)


@torch.no_grad()
def distances(first: Tensor, second: Tensor) -> Tensor:
    """(..., A, 3) and (..., B, 3) to (..., A, B); without gradient."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def chamfer(first: Tensor, second: Tensor, squared: bool = True) -> Tensor:
    """Chamfer distance between point sets (Fan et al., 2017).

    With ``squared`` the mean squared distance from each point of the one set to the nearest of the other, plus the
    same the other way round; without, half the sum of the two means of the distances themselves. These are
    ChamferDistanceL2 and ChamferDistanceL1 of Point-MAE (Pang et al., 2022).

    The nearest points are found without a gradient and the distances to them taken anew, so that value and gradient
    are exact; where two points coincide the gradient is zero.

    Args:
        first: (..., A, 3).
        second: (..., B, 3).
        squared: squared distances, or plain ones.

    Returns:
        (...) one distance for each pair of sets.
    """
    distance = distances(first, second)
    to_second = first - pick(second, distance.min(dim=-1).indices)
    to_first = second - pick(first, distance.min(dim=-2).indices)
    if squared:
        return to_second.square().sum(dim=-1).mean(dim=-1) + to_first.square().sum(dim=-1).mean(dim=-1)
    # The gradient of this norm at zero is zero, that of a square root would be infinite.
    norm = torch.linalg.vector_norm
    return (norm(to_second, dim=-1).mean(dim=-1) + norm(to_first, dim=-1).mean(dim=-1)) / 2


def pick(points: Tensor, index: Tensor) -> Tensor:
    """``points`` (..., N, 3) at ``index`` (..., K): (..., K, 3)."""
    return points.gather(-2, index[..., None].expand(*index.shape, points.shape[-1]))
