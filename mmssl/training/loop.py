"""The training loop: knows Accelerate, and nothing of self-supervision."""

import importlib.metadata
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.discovery import options_of
from mmssl.encoder import EncoderConfig
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.training.arguments import TrainArguments
from mmssl.training.checkpoint import RECORD, check_same_run, find_checkpoint, save_checkpoint, step_folders
from mmssl.training.randomness import keyed_generator
from mmssl.training.run import save_heads
from mmssl.training.schedule import learning_rate

METRICS = "metrics.jsonl"


class Progress:
    """Where a run stands; registered with Accelerate, so it is part of every checkpoint.

    Attributes:
        step: optimiser steps done.
        epoch: passes over the data done.
        batch: batches done in this epoch, on each process.
    """

    def __init__(self) -> None:
        self.step = self.epoch = self.batch = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
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

    # The data side gets a modality of its own, without parameters, so that workers never see the trained one.
    dataset = PreparedSamples(load_samples(data, modality), type(modality)(**modality.options()), data.on_error)
    loader = make_loader(dataset, train, accelerator)
    total_steps = count_steps(len(loader) // accelerator.num_processes, train)

    torch.manual_seed(train.seed)
    config = MMSSLConfig(modalities={modality.name: modality.options()}, **asdict(encoder))
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
    progress = Progress()
    accelerator.register_for_checkpointing(progress)

    if train.resume_from_checkpoint:
        checkpoint = find_checkpoint(train.resume_from_checkpoint, output_dir)
        check_same_run(checkpoint, record)
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resumed from {checkpoint}: {progress.step} of {total_steps} steps are done.")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        drop_later_lines(output_dir / METRICS, progress.step)
        (output_dir / RECORD).write_text(json.dumps(record, indent=2))
    if train.report_to:
        accelerator.init_trackers("mmssl")

    minutes = run_steps(
        accelerator, module, optimizer, loader, progress, total_steps, train, output_dir, record, dataset
    )

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(module)
        trained.model.save_pretrained(output_dir)
        save_heads(trained, output_dir)
        MMSSLProcessor(MMSSLFeatureExtractor(config.modalities)).save_pretrained(output_dir)
        record |= {"steps": progress.step, "minutes": minutes, "device": device_name(accelerator.device)}
        (output_dir / RECORD).write_text(json.dumps(record, indent=2))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir


def run_steps(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    progress: Progress,
    total_steps: int,
    train: TrainArguments,
    output_dir: Path,
    record: dict[str, Any],
    dataset: PreparedSamples,
) -> float:
    """Train until ``total_steps`` optimiser steps are done; returns the minutes it took."""
    module.train()
    batch_size = train.per_device_train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
    warmup = round(train.warmup_ratio * total_steps)
    bar = tqdm(
        total=total_steps,
        initial=progress.step,
        unit="step",
        disable=not accelerator.is_local_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
    )
    failed: set[int] = set()
    started = time.perf_counter()
    window_start, window_steps, waited = started, 0, 0.0
    micro_losses: list[torch.Tensor] = []

    while progress.step < total_steps:
        batches: Any = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
        batches.set_epoch(progress.epoch)
        asked = time.perf_counter()
        for batch in batches:
            waited += time.perf_counter() - asked
            progress.batch += 1
            failed.update(batch["failed"].tolist())
            rate = learning_rate(
                progress.step,
                total_steps,
                warmup,
                train.learning_rate,
                train.min_learning_rate,
                train.lr_scheduler_type,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator = keyed_generator(
                accelerator.device, train.seed, progress.epoch, progress.batch, accelerator.process_index
            )
            with accelerator.accumulate(module):
                out = module(batch["inputs"], generator)
                accelerator.backward(out.loss)
                if accelerator.sync_gradients:
                    limit = train.max_grad_norm or math.inf  # the norm is logged, clipped or not
                    norm = float(accelerator.clip_grad_norm_(module.parameters(), limit) or 0.0)
                optimizer.step()
                optimizer.zero_grad()
            micro_losses.append(out.loss.detach())
            if accelerator.sync_gradients:
                progress.step += 1
                window_steps += 1
                accelerator.unwrap_model(module).after_step(progress.step / total_steps)
                if progress.step % train.logging_steps == 0 or progress.step == total_steps:
                    loss = accelerator.reduce(torch.stack(micro_losses).mean(), reduction="mean").item()
                    elapsed = time.perf_counter() - window_start
                    metrics = {
                        "step": progress.step,
                        "epoch": progress.epoch + progress.batch / len(loader),
                        "loss": loss,
                        "learning_rate": rate,
                        "grad_norm": norm,
                        **{name: value.item() for name, value in out.metrics.items()},
                        "samples_per_second": window_steps * batch_size / elapsed,
                        "data_wait": waited / elapsed,
                    }
                    log(accelerator, output_dir, metrics)
                    bar.set_postfix_str(
                        f"loss {loss:.4f}, {metrics['samples_per_second']:.0f} samples/s", refresh=False
                    )
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss is {loss} at step {progress.step}; lower train.learning_rate or set "
                            "train.max_grad_norm, and resume from the last checkpoint"
                        )
                    window_start, window_steps, waited = time.perf_counter(), 0, 0.0
                micro_losses.clear()
                bar.update()
                if train.checkpointing_steps and progress.step % train.checkpointing_steps == 0:
                    save_checkpoint(accelerator, output_dir, progress.step, record, train.checkpoints_total_limit)
                if progress.step >= total_steps:
                    break
            asked = time.perf_counter()
        else:
            progress.epoch, progress.batch = progress.epoch + 1, 0
    bar.close()
    if failed:
        names = "\n  ".join(dataset.samples.name(position) for position in sorted(failed)[:10])
        accelerator.print(
            f"{len(failed)} of {len(dataset)} samples could not be read and were skipped, among them:\n  {names}"
        )
    return (time.perf_counter() - started) / 60


def check_output_dir(output_dir: Path, train: TrainArguments) -> None:
    """Refuse a file, and a folder that holds another run, before anything is computed."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file; expected a folder, or a name that is free")
    if train.resume_from_checkpoint or not ((output_dir / RECORD).exists() or step_folders(output_dir)):
        return
    if not train.overwrite_output_dir:
        raise ValueError(
            f"output_dir: {output_dir} holds another run; resume it with --train.resume_from_checkpoint latest, "
            "delete it with --train.overwrite_output_dir true, or choose another folder"
        )
    shutil.rmtree(output_dir, ignore_errors=True)  # every process may try


def make_loader(dataset: PreparedSamples, train: TrainArguments, accelerator: Accelerator) -> DataLoader:
    needed = train.per_device_train_batch_size * accelerator.num_processes
    if len(dataset) < needed:
        raise ValueError(
            f"found {len(dataset)} samples, and one batch needs {needed}; lower train.per_device_train_batch_size"
        )
    return DataLoader(
        dataset,
        batch_size=train.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=dataset.collate,
        num_workers=train.dataloader_num_workers,
        persistent_workers=train.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(train.seed),
    )


def count_steps(batches_per_epoch: int, train: TrainArguments) -> int:
    if train.max_train_steps is not None:
        return train.max_train_steps
    return max(1, round(train.num_train_epochs * batches_per_epoch / train.gradient_accumulation_steps))


def make_optimizer(module: nn.Module, train: TrainArguments) -> torch.optim.AdamW:
    """AdamW; only weight matrices decay. Learned tokens are told by their names, as some have more than one axis."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim <= 1 or "token" in name.rpartition(".")[2] else decayed).append(parameter)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )


def log(accelerator: Accelerator, output_dir: Path, metrics: dict[str, float]) -> None:
    if accelerator.is_main_process:
        with (output_dir / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    accelerator.log(metrics, step=int(metrics["step"]))


def drop_later_lines(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that a run resumes from."""
    if path.exists():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        path.write_text("".join(line + "\n" for line in lines))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
