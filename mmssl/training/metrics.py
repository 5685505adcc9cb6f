"""What is written of a run while it trains: metrics.jsonl, and the same numbers to the trackers."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from mmssl.training.arguments import TrainArguments
from mmssl.training.streams import Stream

METRICS = "metrics.jsonl"


@dataclass
class Metrics:
    """Losses, which are means over all processes, and speeds; in a joint run those of each modality too.

    Attributes:
        streams: batches of each modality.
        first: the modality whose epochs are counted.
        recent: modality, loss and seconds of each optimiser step since the last line.
        logged: time of the last line.
        waited: seconds spent waiting for batches since then.
    """

    accelerator: Accelerator
    train: TrainArguments
    streams: dict[str, Stream]
    first: str
    recent: list[tuple[str, Tensor, float]] = field(default_factory=list)
    logged: float = 0.0
    waited: float = 0.0

    def write(self, step: int, own: dict[str, float]) -> str:
        """Write a line, with the step's own numbers among the others; returns what the progress bar shows.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        losses, speeds = {"loss": self.recent[-1][1]}, {}
        if len(self.streams) > 1:
            # A step is of one modality: only the mean over several says how the run is doing.
            losses = {"loss": torch.stack([loss for _, loss, _ in self.recent]).mean()}
            for name in sorted({name for name, _, _ in self.recent}):  # the same ones in all processes
                steps = [(loss, seconds) for other, loss, seconds in self.recent if other == name]
                seconds = sum(seconds for _, seconds in steps)
                losses[f"loss/{name}"] = torch.stack([loss for loss, _ in steps]).mean()
                speeds[f"samples_per_second/{name}"] = len(steps) * self.samples_of_a_step(name) / seconds
        values = self.accelerator.reduce(torch.stack(list(losses.values())), reduction="mean").tolist()
        means = dict(zip(losses, values, strict=True))
        first, now = self.streams[self.first], time.perf_counter()
        line = {
            "step": step,
            "epoch": first.epoch + first.batch / len(first.loader),
            **means,
            **own,
            "samples_per_second": sum(self.samples_of_a_step(name) for name, _, _ in self.recent) / (now - self.logged),
            **speeds,
            "data_wait": self.waited / (now - self.logged),
        }
        if self.accelerator.is_main_process:
            with (Path(self.train.output_dir) / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log(line, step=step)
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(
                f"the loss is {line['loss']} at step {step}; lower train.learning_rate or set train.max_grad_norm, "
                "and resume from the last checkpoint"
            )
        self.recent.clear()
        self.logged, self.waited = now, 0.0
        shown = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        return f"{shown}, {line['samples_per_second']:.0f} samples/s"

    def samples_of_a_step(self, name: str) -> int:
        """How many samples an optimiser step of this modality has, over all processes."""
        batches = self.train.gradient_accumulation_steps * self.accelerator.num_processes
        return self.streams[name].batch_size * batches
