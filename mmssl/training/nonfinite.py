"""Steps whose loss or gradient is not finite: their samples are named, and they end the run or are skipped.

The flag of a step is made on the device. To "stop", the CPU looks at it when the next batch has been read, or before
anything is written or saved, so that it never waits while the device has nothing to do. To "skip", it has to know
before the optimiser's step, and waits for the device once in each step.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmssl.collectives import sum_over_processes
from mmssl.objectives.base import Batch, Objective, ObjectiveOutput, split_labels
from mmssl.training.arguments import TrainArguments
from mmssl.training.streams import Stream

REPORTS = "nonfinite"
MOST_IN_A_ROW = 10  # more skipped steps one after the other end a run: it is the weights then, not the samples
MOST_REPORTS = 20  # of skipped steps; those after them are counted


@dataclass
class Part:
    """A batch of an optimiser step: where it was read, and what became of it."""

    epoch: int
    batch: int
    indices: list[int]
    inputs: Batch
    loss: Tensor | None = None
    embedding: Tensor | None = None


class Guard:
    """Watches whether losses and gradients are finite; what it has counted is part of every checkpoint.

    Args:
        accelerator: all of its processes come to the same verdict.
        objective: its buffers (queues, centres, statistics) are not to be changed by a skipped step.
        streams: batches of each modality.
        train: says what to do, and where reports go.
    """

    def __init__(
        self, accelerator: Accelerator, objective: Objective, streams: dict[str, Stream], train: TrainArguments
    ):
        self.accelerator, self.objective, self.streams, self.train = accelerator, objective, streams, train
        self.skips = train.on_nonfinite == "skip"
        self.skipped = self.in_a_row = self.step = 0
        self.modality = ""
        self.parts: list[Part] = []
        self.buffers: list[Tensor] = []
        self.kept: list[tuple[nn.Module, str, list]] = []
        self.norm: Any = None
        self.flag: Tensor | None = None

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def before(self, step: int, modality: str, inputs: Batch) -> None:
        """A batch of this step, counted from 1, has been read, and the objective has not seen it yet."""
        if step != self.step:
            self.look()
            self.step, self.modality, self.parts = step, modality, []
            if self.skips:
                self.remember()
        stream = self.streams[modality]
        self.parts.append(Part(stream.epoch, stream.batch, stream.indices, inputs))

    def after(self, out: ObjectiveOutput, norm: Any) -> bool:
        """The loss has been differentiated; ``norm`` of the gradient is None before the last batch of a step.

        Returns:
            Whether the optimiser may take its step.
        """
        self.parts[-1].loss, self.parts[-1].embedding = out.loss.detach(), out.embedding
        if norm is None:
            return True
        self.norm = norm
        bad = ~torch.stack([part.loss for part in self.parts if part.loss is not None]).isfinite().all()
        if self.accelerator.scaler is None:  # with float16, gradients that overflow are the scaler's to see to
            norm = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            bad = bad | ~norm.isfinite().to(bad.device)
        self.flag = sum_over_processes(bad.float())
        if self.skips and self.flag:
            self.skip()
            return False
        self.in_a_row = 0
        return True

    def look(self) -> None:
        """Wait for the last step's flag, if it has not been looked at.

        Raises:
            FloatingPointError: a loss or the gradient was not finite; says which, and where its samples are named.
        """
        flag, self.flag = self.flag, None
        if flag is not None and not self.skips and flag:
            raise FloatingPointError(self.report())

    def remember(self) -> None:
        """Keep what a forward pass changes: buffers, and lists in which objectives leave things for ``after_step``."""
        self.buffers = [buffer.clone() for buffer in self.objective.buffers()]
        self.kept = [
            (module, name, list(value))
            for module in self.objective.modules()
            for name, value in vars(module).items()
            if isinstance(value, list)
        ]

    def skip(self) -> None:
        """Put everything back to where it was before the step.

        Raises:
            FloatingPointError: more than ``MOST_IN_A_ROW`` steps one after the other.
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row > MOST_IN_A_ROW:
            raise FloatingPointError(f"{self.in_a_row} steps in a row had to be skipped: {self.report()}")
        if self.skipped <= MOST_REPORTS:
            message = self.report()
            if self.accelerator.is_main_process:
                tqdm.write(f"Skipped a step: {message}")
        with torch.no_grad():
            for buffer, before in zip(self.objective.buffers(), self.buffers, strict=True):
                buffer.copy_(before)
        for module, name, kept in self.kept:
            setattr(module, name, kept)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # which it wants between two looks at gradients

    def counts(self) -> dict[str, float]:
        """What metrics.jsonl holds of it."""
        return {"skipped_steps": self.skipped} if self.skips else {}

    def report(self) -> str:
        """Write which samples the step has read, and their inputs; returns one line that says it.

        Of a step of several batches or processes only those whose own loss is not finite, if there are such.
        """
        losses = [float(part.loss) for part in self.parts if part.loss is not None]
        everywhere = gather_object(losses)
        wrong = [loss for loss in everywhere if not math.isfinite(loss)]
        accelerator, folder = self.accelerator, Path(self.train.output_dir) / REPORTS
        folder.mkdir(parents=True, exist_ok=True)
        rank = accelerator.process_index
        file = folder / f"step_{self.step}{f'_process_{rank}' if rank else ''}.safetensors"
        described: list[dict[str, Any]] = []
        inputs: dict[str, Tensor] = {}
        for number, (part, loss) in enumerate(zip(self.parts, losses, strict=True)):
            if not wrong or not math.isfinite(loss):
                of_part = {"process": rank, "part": number, "loss": str(loss), "inputs": file.name}
                described.append(of_part | self.describe(part))
                inputs |= {f"{number}.{name}": value.cpu().contiguous() for name, value in part.inputs.items()}
        if inputs:
            save_file(inputs, file)
        batches = gather_object(described)
        norm = float(self.norm)
        path = folder / f"step_{self.step}.json"
        if accelerator.is_main_process:
            found = {"step": self.step, "modality": self.modality, "seed": self.train.seed, "grad_norm": str(norm)}
            path.write_text(json.dumps(found | {"batches": batches}, indent=2))
        what = f"the loss is {wrong[0]}" if wrong else f"the norm of the gradient is {norm} and the loss finite"
        samples = [sample for batch in batches for sample in batch["samples"]]
        bad = [sample for sample in samples if not (sample["finite_input"] and sample["finite_representation"])]
        advice = "lower train.learning_rate or set train.max_grad_norm, and resume from the last checkpoint"
        if 0 < len(bad) < len(samples):
            names = ", ".join(sample["name"] for sample in bad[:3]) + (", ..." if len(bad) > 3 else "")
            advice = f"look first at {names}, whose input or representation is not finite"
        return f"{what} at step {self.step}; {advice} ({path} names all of its samples)"

    @torch.no_grad()
    def describe(self, part: Part) -> dict[str, Any]:
        """A batch for people: which samples it has, and what is wrong with each."""
        dataset, count = self.streams[self.modality].dataset, len(part.indices)
        batch, _ = split_labels(part.inputs)
        tokens = self.objective.model.adapters[self.modality].tokenize(batch)
        rows = tokens.content.float().flatten(1).abs().amax(dim=1).cpu()  # NaN where there is one
        sample = torch.arange(count) if tokens.sample is None else tokens.sample.cpu()
        largest = [float(rows[sample == number].max()) for number in range(count)]
        known = torch.ones(count, dtype=torch.bool)
        if part.embedding is not None and len(part.embedding) == count:
            known = part.embedding.isfinite().all(dim=1).cpu()
        samples = [
            {
                "name": dataset.name(index),
                "index": index,
                "finite_input": math.isfinite(largest[number]),
                "largest_input": largest[number] if math.isfinite(largest[number]) else None,
                "finite_representation": bool(known[number]),
            }
            for number, index in enumerate(part.indices)
        ]
        return {"epoch": part.epoch, "batch": part.batch, "samples": samples}
