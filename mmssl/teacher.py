"""An exponential moving average of a model: the teacher of BYOL, DINO, data2vec and the JEPAs."""

import copy
import math
from typing import Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Teacher(nn.Module, Generic[M]):
    """Holds a copy of a module that never gets a gradient and always is in evaluation mode.

    Args:
        student: the module to follow.
        momentum: share of the teacher that an optimiser step keeps, at the beginning and at the end of training.
        schedule: how it goes from one to the other: in a "linear" way, or by half a period of a "cosine" (BYOL, DINO).
    """

    def __init__(self, student: M, momentum: tuple[float, float], schedule: Literal["linear", "cosine"] = "linear"):
        super().__init__()
        start, end = momentum
        if not (0 <= start <= 1 and 0 <= end <= 1):
            raise ValueError(f"momentum: found {list(momentum)}; expected two numbers from 0 to 1, at start and end")
        self.momentum, self.schedule = (start, end), schedule
        self.module: M = copy.deepcopy(student)
        self.module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, progress: float) -> None:
        """``teacher = m * teacher + (1 - m) * student``, once after each optimiser step; buffers are copied.

        Args:
            student: the module after its step.
            progress: share of training that is done, from 0 to 1.
        """
        start, end = self.momentum
        if self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        momentum = start + (end - start) * progress
        own: list[Tensor] = list(self.module.parameters())
        other: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(own, other, 1 - momentum)
        for buffer, source in zip(self.module.buffers(), student.buffers(), strict=True):
            buffer.copy_(source)
