"""Dropout whose mask is cheap to draw on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 2**16  # of 16 random bits


def dropout(values: Tensor, p: float, training: bool = True) -> Tensor:
    """As torch's function; on a CPU, values are dropped by 16 random bits each.

    torch's is 11 to 16 % of a training step there, most of it random numbers (docs/performance.md). The share that is
    dropped is ``p`` to within 2**-17.
    """
    share = round(p * LEVELS)
    if not training or share == 0:
        return values
    if values.device.type != "cpu" or share == LEVELS:
        return nn.functional.dropout(values, p)
    return Dropped.apply(values, share, 1 / (1 - p))


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` by the function above."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: int, scale: float) -> Tensor:
        count = values.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
        kept = (bits >= share - LEVELS // 2).view(values.shape)
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return scaled(values, kept, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return scaled(grad, kept, ctx.scale), None, None


def scaled(values: Tensor, kept: Tensor, scale: float) -> Tensor:
    """What is kept, times the scale; bytes become numbers faster than booleans do."""
    return values * kept.view(torch.uint8).to(values.dtype).mul_(scale)
