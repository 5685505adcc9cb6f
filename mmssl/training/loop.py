"""The training loop: knows Accelerate, and nothing of self-supervision."""

import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmssl.data import DataArguments
from mmssl.discovery import options_of
from mmssl.encoder import EncoderConfig
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.randomness import keyed_generator
from mmssl.training.arguments import Source, TrainArguments
from mmssl.training.checkpoint import RECORD, check_same_run, find_checkpoint, flatten, save_checkpoint
from mmssl.training.metrics import Metrics
from mmssl.training.run import save_heads
from mmssl.training.schedule import learning_rate, weight_decay
from mmssl.training.setup import check_output_dir, device_name, make_optimizer, prepare_output_dir
from mmssl.training.streams import Stream, count_steps, draw, open_stream


class Progress:
    """Where a run stands, but for its data; registered with Accelerate, so it is part of every checkpoint.

    Attributes:
        step: optimiser steps done.
        seconds: time it took, over all sessions.
    """

    def __init__(self) -> None:
        self.step = 0
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
    also: Sequence[Source] = (),
) -> Path:
    """Pretrain an encoder; start with ``accelerate launch`` for several processes or mixed precision.

    Args:
        modality: what the data are, and how they become tokens.
        objective: the self-supervised loss.
        encoder: shape of the transformer.
        data: where the samples come from.
        train: how to train.
        also: further modalities that share the encoder. Each optimiser step is of one modality, drawn by weight.

    Returns:
        The folder of the run, which ``AutoModel.from_pretrained`` and ``AutoProcessor.from_pretrained`` load.

    Raises:
        ValueError: among others, if two sources are of the same modality.
    """
    output_dir = Path(train.output_dir)
    # In a joint run, the parameters of the modalities that a step does not read get no gradient.
    joint = [DistributedDataParallelKwargs(find_unused_parameters=True)] if also else None
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=train.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        log_with=train.report_to,
        project_dir=train.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=train.seed),
        kwargs_handlers=joint,
    )
    check_output_dir(output_dir, train)

    sources: dict[str, Source] = {}
    for source in (Source(modality, data), *also):
        if source.modality.name in sources:
            raise ValueError(
                f"also: found two sources of the modality {source.modality.name}; expected one of each, as the model "
                "knows a batch by its modality: put the samples into one folder or table"
            )
        sources[source.modality.name] = source
    streams = {name: open_stream(source, train, accelerator) for name, source in sorted(sources.items())}
    total_steps = count_steps(streams, modality.name, train, accelerator.num_processes)

    torch.manual_seed(train.seed)
    options = {name: source.modality.options() for name, source in sources.items()}
    config = MMSSLConfig(modalities=options, **asdict(encoder))
    config._attn_implementation = train.attn_implementation
    module = objective(MMSSLModel(config))
    if train.activation_checkpointing:
        module.model.activation_checkpointing_enable()
    record = {
        "modality": options,
        "objective": {type(module).__name__: options_of(module)},
        "encoder": asdict(encoder),
        "data": asdict(data),
        "samples": len(streams[modality.name].dataset.samples),
        "also": {
            source.modality.name: {
                "data": asdict(source.data),
                "samples": len(streams[source.modality.name].dataset.samples),
                "weight": source.weight,
                "per_device_train_batch_size": streams[source.modality.name].batch_size,
            }
            for source in also
        },
        "train": asdict(train),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            name: importlib.metadata.version(name) for name in ("mmssl", "torch", "transformers", "accelerate")
        },
    }
    optimizer = make_optimizer(module, train)
    module, optimizer, *loaders = accelerator.prepare(
        module, optimizer, *(stream.loader for stream in streams.values())
    )
    for stream, loader in zip(streams.values(), loaders, strict=True):
        stream.loader = loader
    metrics = Metrics(accelerator, train, streams, modality.name)
    run = Run(accelerator, module, optimizer, streams, train, total_steps, record, metrics)
    accelerator.register_for_checkpointing(run.progress, *streams.values())

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
        done = accelerator.unwrap_model(module, keep_torch_compile=False)
        done.trained.save_pretrained(output_dir)
        MMSSLProcessor(MMSSLFeatureExtractor(config.modalities)).save_pretrained(output_dir)
        record |= {
            "steps": total_steps,
            "minutes": run.progress.seconds / 60,
            "device": device_name(accelerator.device),
        }
        (output_dir / RECORD).write_text(json.dumps(record, indent=2))
        save_heads(done, output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir


@dataclass
class Run:
    """A run between its first step and its last.

    Attributes:
        streams: batches of each modality.
        total_steps: optimiser steps of the whole run.
        record: what the run is; goes into every checkpoint.
        metrics: what is written while it trains.
    """

    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    streams: dict[str, Stream]
    train: TrainArguments
    total_steps: int
    record: dict[str, Any]
    metrics: Metrics
    progress: Progress = field(default_factory=Progress)

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
        weights = {name: stream.weight for name, stream in self.streams.items()}
        self.metrics.logged = begun = time.perf_counter()
        while progress.step < self.total_steps:
            started = time.perf_counter()
            name = draw(weights, train.seed, progress.step)
            loss, out, rate, norm = self.train_step(name)
            if len(self.streams) > 1 and accelerator.device.type != "cpu":
                torch.accelerator.synchronize()  # or the clock would give this step's work to the next one's modality
            now = time.perf_counter()
            self.metrics.recent.append((name, loss, now - started))
            progress.seconds += now - begun  # what was saved in between is part of a run, but of no modality
            begun = now
            progress.step += 1
            accelerator.unwrap_model(self.module).after_step(progress.step / self.total_steps)
            every = train.checkpointing_steps
            saves = every is not None and progress.step % every == 0
            if progress.step % train.logging_steps == 0 or progress.step == self.total_steps or saves:
                own = {"learning_rate": rate, "grad_norm": float(norm)}
                own |= {name: value.item() for name, value in out.metrics.items()}
                bar.set_postfix_str(self.metrics.write(progress.step, own), refresh=False)  # and stop if not finite
            bar.update()
            if saves:
                output_dir, limit = Path(train.output_dir), train.checkpoints_total_limit
                save_checkpoint(accelerator, output_dir, progress.step, self.record, limit)
        bar.close()
        self.report_failed()

    def train_step(self, name: str) -> tuple[Tensor, ObjectiveOutput, float, Any]:
        """An optimiser step, all of its batches of one modality.

        Returns:
            The loss, the output for the last batch, the learning rate, and the norm of the gradient.
        """
        accelerator, train, stream = self.accelerator, self.train, self.streams[name]
        rate = learning_rate(
            self.progress.step,
            self.total_steps,
            round(train.warmup_ratio * self.total_steps),
            train.learning_rate,
            train.min_learning_rate,
            train.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        decay = weight_decay(self.progress.step, self.total_steps, train.weight_decay, train.final_weight_decay)
        self.optimizer.param_groups[0]["weight_decay"] = decay  # of weight matrices; the other group has none
        # Batches of the same number must not be masked alike, only because there are several modalities.
        key = [train.seed] if len(self.streams) == 1 else [train.seed, name]
        losses: list[Tensor] = []
        norm: Any = 0.0
        for _ in range(train.gradient_accumulation_steps):
            asked = time.perf_counter()
            inputs = stream.next_inputs()
            self.metrics.waited += time.perf_counter() - asked
            rank = accelerator.process_index
            generator = keyed_generator(accelerator.device, *key, stream.epoch, stream.batch, rank)
            with accelerator.accumulate(self.module):
                out = self.module(inputs, generator)
                accelerator.backward(out.loss)
                if accelerator.sync_gradients:
                    limit = train.max_grad_norm or math.inf  # the norm is logged, clipped or not
                    norm = accelerator.clip_grad_norm_(self.module.parameters(), limit)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(out.loss.detach())
        return torch.stack(losses).mean(), out, rate, norm

    def report_failed(self) -> None:
        """Count and name the samples that could not be read, by any process."""
        for modality, stream in self.streams.items():
            failed = sorted(set(gather_object(sorted(stream.failed))))
            if failed:
                names = "\n  ".join(stream.dataset.samples.name(position) for position in failed[:10])
                self.accelerator.print(
                    f"{modality}: {len(failed)} of {len(stream.dataset.samples)} samples could not be read and "
                    f"were skipped, among them:\n  {names}"
                )
