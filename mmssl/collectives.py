"""Sums and batches over all processes, with their gradients: for losses that are of the whole batch.

DDP takes the mean of the processes' gradients. So a loss that every process computes for the whole batch, or the mean
over processes of what each computes for its own rows, has the gradient that one process with all rows would have.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def world_size() -> int:
    """Number of processes."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


class Gather(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        everyone = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world_size())]
        torch.distributed.all_gather(everyone, values.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class Sum(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Sum.forward(ctx, gradient)


def gather_batch(values: Tensor) -> Tensor:
    """(B, ...) of each process, of one shape, to (processes * B, ...) of all in order; gradients go back to each."""
    return Gather.apply(values) if world_size() > 1 else values


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over processes; gradients go back to each."""
    return Sum.apply(values) if world_size() > 1 else values


def from_first_process(values: Tensor) -> Tensor:
    """What the first process has drawn, on all of them; without gradient."""
    if world_size() > 1:
        torch.distributed.broadcast(values, src=0)
    return values
