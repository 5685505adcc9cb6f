"""The training loop: knows Accelerate, and nothing of self-supervision."""

import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.discovery import options_of
from mmssl.encoder import EncoderConfig
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.randomness import keyed_generator
from mmssl.training.arguments import TrainArguments
from mmssl.training.checkpoint import RECORD, check_same_run, find_checkpoint, flatten, save_checkpoint
from mmssl.training.run import save_heads
from mmssl.training.schedule import learning_rate
from mmssl.training.setup import (
    METRICS,
    check_output_dir,
    count_steps,
    device_name,
    make_loader,
    make_optimizer,
    prepare_output_dir,
)


class Progress:
    """Where a run stands; registered with Accelerate, so it is part of every checkpoint.

    Attributes:
        step: optimiser steps done.
        seconds: time it took, over all sessions.
        epoch: passes over the data done.
        batch: batches done in this epoch, on each process.
    """

    def __init__(self) -> None:
        self.step = self.epoch = self.batch = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)


def pretrain(
    modality: Modality,
    objective: Callable[[MMSSLModel], Objective],
    encoder: EncoderConfig = EncoderConfig(),
    data: DataArguments = DataArguments(),
    train: TrainArguments = TrainArguments(),
) -> Path:
    """Pretrain an encoder; start with ``accelerate launch`` for several processes or mixed precision.

    Args:
        modality: what the data are, and how they become tokens.
        objective: the self-supervised loss.
        encoder: shape of the transformer.
        data: where the samples come from.
        train: how to train.

    Returns:
        The folder of the run, which ``AutoModel.from_pretrained`` and ``AutoProcessor.from_pretrained`` load.
    """
    output_dir = Path(train.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=train.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        log_with=train.report_to,
        project_dir=train.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=train.seed),
    )
    check_output_dir(output_dir, train)

    # The given modality has no parameters and stays on the data side; the model makes its own.
    dataset = PreparedSamples(load_samples(data, modality), modality, data.on_error, train.seed)
    loader = make_loader(dataset, train, accelerator)
    total_steps = count_steps(len(loader) // accelerator.num_processes, train)

    torch.manual_seed(train.seed)
    config = MMSSLConfig(modalities={modality.name: modality.options()}, **asdict(encoder))
    config._attn_implementation = train.attn_implementation
    module = objective(MMSSLModel(config))
    if train.activation_checkpointing:
        module.model.activation_checkpointing_enable()
    record = {
        "modality": {modality.name: modality.options()},
        "objective": {type(module).__name__: options_of(module)},
        "encoder": asdict(encoder),
        "data": asdict(data),
        "train": asdict(train),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "samples": len(dataset),
        "versions": {
            name: importlib.metadata.version(name) for name in ("mmssl", "torch", "transformers", "accelerate")
        },
    }
    optimizer = make_optimizer(module, train)
    module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    run = Run(accelerator, module, optimizer, loader, dataset, train, total_steps, record)
    accelerator.register_for_checkpointing(run.progress)

    if train.resume_from_checkpoint:
        checkpoint = find_checkpoint(train.resume_from_checkpoint, output_dir)
        check_same_run(checkpoint, record)
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resumed from {checkpoint}: {run.progress.step} of {total_steps} steps are done.")
    if accelerator.is_main_process:
        prepare_output_dir(output_dir, train, run.progress.step)
        (output_dir / RECORD).write_text(json.dumps(record, indent=2))
    if train.report_to:
        accelerator.init_trackers("mmssl", config={key: str(value) for key, value in flatten(record, "run").items()})

    run.to_the_end()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(module, keep_torch_compile=False)
        trained.model.save_pretrained(output_dir)
        MMSSLProcessor(MMSSLFeatureExtractor(config.modalities)).save_pretrained(output_dir)
        record |= {
            "steps": total_steps,
            "minutes": run.progress.seconds / 60,
            "device": device_name(accelerator.device),
        }
        (output_dir / RECORD).write_text(json.dumps(record, indent=2))
        save_heads(trained, output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir


@dataclass
class Run:
    """A run between its first step and its last.

    Attributes:
        total_steps: optimiser steps of the whole run.
        record: what the run is; goes into every checkpoint.
        failed: positions of samples that could not be read.
        losses: of the batches since the last optimiser step.
        logged: time of the last line of metrics, and ``logged_step`` its step.
        waited: seconds spent waiting for batches since then.
    """

    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    dataset: PreparedSamples
    train: TrainArguments
    total_steps: int
    record: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    failed: set[int] = field(default_factory=set)
    losses: list[Tensor] = field(default_factory=list)
    logged: float = 0.0
    logged_step: int = 0
    waited: float = 0.0

    def to_the_end(self) -> None:
        """Train until ``total_steps`` optimiser steps are done."""
        accelerator, train, progress = self.accelerator, self.train, self.progress
        self.module.train()
        bar = tqdm(
            total=self.total_steps,
            initial=progress.step,
            unit="step",
            disable=not accelerator.is_local_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
        )
        self.logged = time.perf_counter()
        self.logged_step = progress.step
        while progress.step < self.total_steps:
            batches: Any = self.loader
            if progress.batch:
                batches = accelerator.skip_first_batches(self.loader, progress.batch)
            batches.set_epoch(progress.epoch)
            asked = begun = time.perf_counter()
            for batch in batches:
                self.waited += time.perf_counter() - asked
                progress.batch += 1
                self.failed.update(batch["failed"])
                out, rate, norm = self.train_batch(batch["inputs"])
                if accelerator.sync_gradients:
                    progress.step += 1
                    progress.seconds += time.perf_counter() - begun
                    begun = time.perf_counter()
                    accelerator.unwrap_model(self.module).after_step(progress.step / self.total_steps)
                    every = train.checkpointing_steps
                    saves = every is not None and progress.step % every == 0
                    if progress.step % train.logging_steps == 0 or progress.step == self.total_steps or saves:
                        bar.set_postfix_str(self.log(out, rate, norm), refresh=False)  # and stop if it is not finite
                    self.losses.clear()
                    bar.update()
                    if saves:
                        output_dir, limit = Path(train.output_dir), train.checkpoints_total_limit
                        save_checkpoint(accelerator, output_dir, progress.step, self.record, limit)
                    if progress.step >= self.total_steps:
                        break
                asked = time.perf_counter()
            else:
                progress.epoch, progress.batch = progress.epoch + 1, 0
        bar.close()
        self.report_failed()

    def train_batch(self, inputs: dict[str, Tensor]) -> tuple[ObjectiveOutput, float, Any]:
        """Forward, backward and, where accumulation ends, an optimiser step; also its rate and the gradient's norm."""
        accelerator, train, progress = self.accelerator, self.train, self.progress
        warmup = round(train.warmup_ratio * self.total_steps)
        rate = learning_rate(
            progress.step,
            self.total_steps,
            warmup,
            train.learning_rate,
            train.min_learning_rate,
            train.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rank = accelerator.process_index
        generator = keyed_generator(accelerator.device, train.seed, progress.epoch, progress.batch, rank)
        norm: Any = 0.0
        with accelerator.accumulate(self.module):
            out = self.module(inputs, generator)
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                limit = train.max_grad_norm or math.inf  # the norm is logged, clipped or not
                norm = accelerator.clip_grad_norm_(self.module.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(out.loss.detach())
        return out, rate, norm

    def log(self, out: ObjectiveOutput, rate: float, norm: Any) -> str:
        """Write a line of metrics.jsonl and to the trackers; returns what the progress bar shows.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        accelerator, train, progress = self.accelerator, self.train, self.progress
        loss = accelerator.reduce(torch.stack(self.losses).mean(), reduction="mean").item()
        now = time.perf_counter()
        batch_size = train.per_device_train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
        metrics = {
            "step": progress.step,
            "epoch": progress.epoch + progress.batch / len(self.loader),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": float(norm),
            **{name: value.item() for name, value in out.metrics.items()},
            "samples_per_second": (progress.step - self.logged_step) * batch_size / (now - self.logged),
            "data_wait": self.waited / (now - self.logged),
        }
        if accelerator.is_main_process:
            with (Path(train.output_dir) / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        accelerator.log(metrics, step=progress.step)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {progress.step}; lower train.learning_rate or set train.max_grad_norm, "
                "and resume from the last checkpoint"
            )
        self.logged, self.logged_step, self.waited = now, progress.step, 0.0
        return f"loss {loss:.4f}, {metrics['samples_per_second']:.0f} samples/s"

    def report_failed(self) -> None:
        """Count and name the samples that could not be read, by any process."""
        failed = sorted(set(gather_object(sorted(self.failed))))
        if failed:
            names = "\n  ".join(self.dataset.samples.name(position) for position in failed[:10])
            self.accelerator.print(
                f"{len(failed)} of {len(self.dataset)} samples could not be read and were skipped, among them:\n"
                f"  {names}"
            )
