"""Projectors and predictors of joint-embedding objectives. A run throws them away, so they know training alone."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmssl.collectives import sum_over_processes, world_size


class BatchNorm(nn.Module):
    """Batch normalisation by the mean and the biased variance of the global batch, in training and evaluation alike.

    Args:
        width: number of channels.
        affine: learn a scale and a shift for each channel.
        eps: added to the variance.

    Raises:
        ValueError: a global batch of one row, which has no variance.
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, values: Tensor) -> Tensor:
        """(B, D) to (B, D), in full precision."""
        values = values.float()
        count = len(values) * world_size()
        if count < 2:
            raise ValueError("batch normalisation: found a batch of 1 sample; expected at least 2: make it larger")
        values = values - sum_over_processes(values.sum(dim=0)) / count
        variance = sum_over_processes(values.square().sum(dim=0)) / count
        values = values * (variance + self.eps).rsqrt()
        return values if self.weight is None or self.bias is None else values * self.weight + self.bias


def mlp(widths: Sequence[int], batch_norm: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers from the first width to the last, with batch normalisation and an activation between them.

    Layers have a bias only without batch normalisation, as in Barlow Twins and VICReg.
    """
    layers: list[nn.Module] = []
    for number, (width, following) in enumerate(pairwise(widths), start=2):
        layers.append(nn.Linear(width, following, bias=not batch_norm))
        if number < len(widths):
            layers += [BatchNorm(following), activation()] if batch_norm else [activation()]
    return nn.Sequential(*layers)


def projector(width: int, projector_layers: int, projector_hidden_size: int, projector_size: int) -> nn.Sequential:
    """The ``mlp`` that objectives describe by these options.

    Raises:
        ValueError: one of them is below 1.
    """
    if min(projector_layers, projector_hidden_size, projector_size) < 1:
        raise ValueError(
            f"found projector_layers {projector_layers}, projector_hidden_size {projector_hidden_size} and "
            f"projector_size {projector_size}; expected at least 1 of each"
        )
    return mlp([width, *[projector_hidden_size] * (projector_layers - 1), projector_size])
