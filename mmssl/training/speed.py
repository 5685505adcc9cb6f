"""How well a run uses its device: the work of a batch, counted once, over what the device does at its best."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from mmssl.objectives.base import Batch, Objective, split_labels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Work:
    """Floating point operations and tokens of a batch of each modality, on this process.

    They are those of the first batch that this session trains on: later ones of other lengths are taken to be like it.
    Matrix products, convolutions and attention count, forwards and backwards, as ``torch.utils.flop_counter`` has it,
    and so does what activation checkpointing computes again.

    Args:
        accelerator: its device and precision.
        objective: what is trained.

    Attributes:
        peak: floating point operations per second of the device's matrix products in that precision, as measured.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective):
        self.objective = objective
        self.peak = measured_peak(accelerator.device, DTYPES.get(accelerator.mixed_precision, torch.float32))
        self.flops: dict[str, int] = {}
        self.tokens: dict[str, int] = {}

    @contextmanager
    def counted(self, modality: str, inputs: Batch) -> Iterator[None]:
        """Around the forward and the backward pass of a batch."""
        if modality in self.flops:
            yield
            return
        batch, _ = split_labels(inputs)
        with torch.no_grad():
            self.tokens[modality] = int(self.objective.model.adapters[modality].tokenize(batch).valid.sum())
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops[modality] = counter.get_total_flops()


@cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the best of three products of large matrices, on the CPU with torch's threads."""
    size = 512 if device.type == "cpu" else 8192 if dtype != torch.float32 else 4096
    generator = torch.Generator(device).manual_seed(0)
    one, two = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):  # the first one warms up
        begun = time.perf_counter()
        one @ two
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds[1:])


def peak_memory(device: torch.device) -> float:
    """GiB: the most that torch has held on a GPU so far, or that this process has had in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
