"""What is written of a run while it trains: metrics.jsonl, and the same numbers to the trackers."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmssl.objectives.base import ObjectiveOutput
from mmssl.training.arguments import TrainArguments
from mmssl.training.speed import Work, peak_memory
from mmssl.training.streams import Stream

METRICS = "metrics.jsonl"
MEASURING = "health/seconds"


@dataclass
class Metrics:
    """Losses, which are means over all processes, and speeds; in a joint run those of each modality too.

    Attributes:
        streams: batches of each modality.
        first: the modality whose epochs are counted.
        work: what a batch of each modality costs.
        recent: modality, loss and seconds of each optimiser step since the last line.
        logged: time of the last line.
        waited: seconds spent waiting for batches since then.
    """

    accelerator: Accelerator
    train: TrainArguments
    streams: dict[str, Stream]
    first: str
    work: Work
    recent: list[tuple[str, Tensor, float]] = field(default_factory=list)
    logged: float = 0.0
    waited: float = 0.0

    def write(self, step: int, own: dict[str, Any]) -> str:
        """Write a line, with the step's own numbers among the others; returns what the progress bar shows.

        Args:
            step: optimiser steps done.
            own: the step's own numbers. Seconds that went into measuring the run's health do not count as training.
        """
        losses, speeds = {"loss": self.recent[-1][1]}, {}
        if len(self.streams) > 1:
            # A step is of one modality: only the mean over several says how the run is doing.
            losses = {"loss": torch.stack([loss for _, loss, _ in self.recent]).nanmean()}  # without skipped steps
            for name in sorted({name for name, _, _ in self.recent}):  # the same ones in all processes
                steps = [(loss, seconds) for other, loss, seconds in self.recent if other == name]
                seconds = sum(seconds for _, seconds in steps)
                losses[f"loss/{name}"] = torch.stack([loss for loss, _ in steps]).nanmean()
                speeds[f"samples_per_second/{name}"] = len(steps) * self.samples_of_a_step(name) / seconds
        values = self.accelerator.reduce(torch.stack(list(losses.values())), reduction="mean").tolist()
        means = dict(zip(losses, values, strict=True))
        first, now = self.streams[self.first], time.perf_counter()
        elapsed = now - self.logged - own.get(MEASURING, 0.0)
        batches = self.train.gradient_accumulation_steps
        flops = sum(self.work.flops[name] * batches for name, _, _ in self.recent)
        tokens = sum(self.work.tokens[name] * batches for name, _, _ in self.recent) * self.accelerator.num_processes
        line = {
            "step": step,
            "epoch": first.epochs,
            **means,
            **own,
            "samples_per_second": sum(self.samples_of_a_step(name) for name, _, _ in self.recent) / elapsed,
            **speeds,
            "tokens_per_second": tokens / elapsed,
            "data_wait": self.waited / elapsed,
            "mfu": flops / elapsed / self.work.peak,
            "memory_gib": peak_memory(self.accelerator.device),
        }
        if self.accelerator.is_main_process:
            with (Path(self.train.output_dir) / METRICS).open("a") as file:
                # NaN, of a step that was skipped, is no JSON.
                known = {name: None if is_nan(value) else value for name, value in line.items()}
                file.write(json.dumps(known) + "\n")
        self.accelerator.log({name: value for name, value in line.items() if isinstance(value, int | float)}, step=step)
        self.recent.clear()
        self.logged, self.waited = now, 0.0
        shown = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        return f"{shown}, {line['samples_per_second']:.0f} samples/s"

    def samples_of_a_step(self, name: str) -> int:
        """How many samples an optimiser step of this modality has, over all processes."""
        batches = self.train.gradient_accumulation_steps * self.accelerator.num_processes
        return self.streams[name].batch_size * batches


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def numbers_of(out: ObjectiveOutput) -> dict[str, float]:
    """An objective's metrics, and its loss as a share of what the mean would score, where it says that."""
    numbers = {name: value.item() for name, value in out.metrics.items()}
    if numbers.get("trivial"):
        numbers["loss_over_trivial"] = out.loss.item() / numbers["trivial"]
    return numbers
