"""The training loop: knows Accelerate, and nothing of self-supervision."""

import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmssl.data import DataArguments
from mmssl.discovery import options_of
from mmssl.encoder import EncoderConfig
from mmssl.hub import Uploads
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.randomness import keyed_generator
from mmssl.training.allocator import freed_memory_kept
from mmssl.training.arguments import ModelArguments, Source, TrainArguments
from mmssl.training.checkpoint import RECORD, check_same_run, find_checkpoint, flatten, save_checkpoint, whole_or_not
from mmssl.training.failures import Failures, deaths_of_workers_explained
from mmssl.training.health import Health
from mmssl.training.metrics import Metrics, numbers_of
from mmssl.training.nonfinite import Guard
from mmssl.training.peft_layers import add_peft_layers, merge_peft_layers
from mmssl.training.prepare import prepare
from mmssl.training.run import name_of_trained, save_weights
from mmssl.training.schedule import anneal_step, check_length, rate_at, weight_decay
from mmssl.training.setup import check_output_dir, device_name, make_optimizer, prepare_output_dir
from mmssl.training.speed import Work
from mmssl.training.stopping import PREEMPTED, StopSignals
from mmssl.training.streams import EndlessStream, Stream, count_steps, draw, open_stream
from mmssl.training.warm_start import WarmStart, origin, untouched


class Progress:
    """Where a run stands, but for its data; registered with Accelerate, so it is part of every checkpoint.

    Attributes:
        step: optimiser steps done.
        seconds: time it took, over all sessions.
        planned_steps: optimiser steps of the run when it began.
        total_steps: and now, which a resumed run may have changed.
    """

    def __init__(self, total_steps: int) -> None:
        self.step = 0
        self.seconds = 0.0
        self.planned_steps = self.total_steps = total_steps

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
    model: ModelArguments = ModelArguments(),
) -> Path:
    """Pretrain an encoder; start with ``accelerate launch`` for several processes or mixed precision.

    Args:
        modality: what the data are, and how they become tokens.
        objective: the self-supervised loss.
        encoder: shape of the transformer.
        data: where the samples come from.
        train: how to train.
        also: further modalities that share the encoder. Each optimiser step is of one modality, drawn by weight.
        model: what the encoder begins with, and how much of it is trained.

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
    hub = Uploads(accelerator, output_dir, train.hub_model_id, train.hub_private_repo)
    hub.begin()
    if model.peft_type and train.metric_for_best_model:
        raise ValueError(
            "metric_for_best_model: peft's additions are merged at the end alone; leave one of the two out"
        )

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
    checkpoint = find_checkpoint(train.resume_from_checkpoint, output_dir) if train.resume_from_checkpoint else None
    module, started_from = build(objective, config, model, checkpoint)
    if module.needs_labels:
        for stream in streams.values():
            stream.dataset.add_labels()
    if train.activation_checkpointing:
        module.model.activation_checkpointing_enable()
    record = {
        **what_it_is(module, encoder, sources, streams, modality.name),
        "train": asdict(train),
        "model": asdict(model) if model.peft_type else {"init_from": model.init_from},
        "started_from": started_from,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    wrapped, optimizer = prepare(accelerator, module, make_optimizer(module, train), train)
    for stream in streams.values():
        if not isinstance(stream, EndlessStream):
            stream.loader = accelerator.prepare(stream.loader)
    plain = accelerator.unwrap_model(wrapped)
    metrics = Metrics(accelerator, train, streams, modality.name, Work(accelerator, plain))
    guard = Guard(accelerator, plain, streams, train)
    progress = Progress(total_steps)
    health = Health(accelerator, plain, streams, train, total_steps)
    failures = Failures(accelerator, streams, sources, train)
    run = Run(
        accelerator, wrapped, optimizer, streams, train, total_steps, record,
        metrics, guard, health, failures, progress, hub,
    )  # fmt: skip
    accelerator.register_for_checkpointing(run.progress, *streams.values(), guard, health)

    if checkpoint is not None:
        check_same_run(checkpoint, record)
        accelerator.load_state(str(checkpoint))
        check_length(train, progress.step, progress.planned_steps, progress.total_steps, total_steps)
        progress.total_steps = total_steps
        accelerator.print(f"Resumed from {checkpoint}: {run.progress.step} of {total_steps} steps are done.")
    if accelerator.is_main_process:
        prepare_output_dir(output_dir, train, run.progress.step)
        (output_dir / RECORD).write_text(json.dumps(record, indent=2))
    if train.report_to:
        accelerator.init_trackers("mmssl", config={key: str(value) for key, value in flatten(record, "run").items()})

    failures.begin(progress.step)
    health.begin(progress.step)
    with freed_memory_kept(accelerator.device):
        run.to_the_end()

    record |= run.standing()
    if model.peft_type:
        merge_peft_layers(plain)
    save_model(accelerator, wrapped, output_dir / ".model", record)
    if accelerator.is_main_process:
        for file in (output_dir / ".model").iterdir():
            file.replace(output_dir / file.name)  # each of them whole
        (output_dir / ".model").rmdir()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    hub.finish()
    return output_dir


def save_model(accelerator: Accelerator, module: nn.Module, folder: Path, record: dict[str, Any]) -> None:
    """Write what ``AutoModel``, ``AutoProcessor`` and ``load_objective`` load, as a whole or not at all."""
    plain = accelerator.unwrap_model(module)
    state = accelerator.get_state_dict(module)  # by all processes, as each may have a part of it
    with whole_or_not(accelerator, folder) as temporary:
        if accelerator.is_main_process:
            write_model(plain, state, temporary, record)


def write_model(plain: Objective, state: dict[str, Tensor], folder: Path, record: Mapping[str, Any]) -> None:
    """Write the model of these weights, the objective's own ones, the processor and the record, by one process."""
    save_weights(plain, state, folder)
    MMSSLProcessor(MMSSLFeatureExtractor(plain.trained.config.modalities)).save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=2))


def build(
    objective: Callable[[MMSSLModel], Objective], config: MMSSLConfig, model: ModelArguments, checkpoint: Path | None
) -> tuple[Objective, dict[str, Any] | None]:
    """The objective and what it trains, and what the record says of the weights that these begin with.

    Weights come first, then what peft adds to them, then the objective, whose teachers are copies of both. Those of a
    run that is resumed come from its checkpoint, later.
    """
    student = MMSSLModel(config)
    start = WarmStart(model.init_from, config) if model.init_from and checkpoint is None else None
    if start is not None:
        start.load_model(student)
    started_from = start.record() if start is not None else None
    if checkpoint is not None:
        started_from = origin(checkpoint)
    if model.peft_type and started_from:
        add_peft_layers(student, model, untouched(started_from))
    module = objective(student)
    if start is not None:
        start.load_heads(module)
        started_from = start.record()
        if PartialState().is_main_process:
            start.show()
    return module, started_from


def what_it_is(
    module: Objective, encoder: EncoderConfig, sources: dict[str, Source], streams: dict[str, Stream], first: str
) -> dict[str, Any]:
    """What run.json says of the model, the objective and the data."""
    return {
        "modality": {name: source.modality.options() for name, source in sources.items()},
        "objective": {type(module).__name__: options_of(module)},
        "trained": name_of_trained(module),
        "reads_labels": module.needs_labels,
        "encoder": asdict(encoder),
        "data": asdict(sources[first].data),
        "samples": len(streams[first].dataset.samples),
        "also": {
            name: {
                "data": asdict(source.data),
                "samples": len(streams[name].dataset.samples),
                "weight": source.weight,
                "per_device_train_batch_size": streams[name].batch_size,
            }
            for name, source in sources.items()
            if name != first
        },
        "versions": {
            name: importlib.metadata.version(name) for name in ("mmssl", "torch", "transformers", "accelerate")
        },
    }


@dataclass
class Run:
    """A run between its first step and its last.

    Attributes:
        streams: batches of each modality.
        total_steps: optimiser steps of the whole run.
        record: what the run is; goes into every checkpoint.
        metrics: what is written while it trains.
        guard: sees to steps that are not finite.
        health: measures what features are worth.
        failures: knows the samples that could not be read.
        hub: uploads the model at checkpoints, if that is asked for.
    """

    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    streams: dict[str, Stream]
    train: TrainArguments
    total_steps: int
    record: dict[str, Any]
    metrics: Metrics
    guard: Guard
    health: Health
    failures: Failures
    progress: Progress
    hub: Uploads

    def standing(self) -> dict[str, Any]:
        """What the record says of a run that has come this far."""
        done = {"steps": self.progress.step, "minutes": self.progress.seconds / 60}
        return {**done, "device": device_name(self.accelerator.device), "health": self.health.summary()}

    def to_the_end(self) -> None:
        """Train until ``total_steps`` optimiser steps are done.

        Raises:
            SystemExit: with ``PREEMPTED``, after a signal that asks to stop, when a checkpoint has been saved.
        """
        with StopSignals() as stop, deaths_of_workers_explained():
            self.train_until(stop)
        self.failures.report()
        self.health.report()

    def train_until(self, stop: StopSignals) -> None:
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
            if not self.guard.in_a_row:  # else the step was skipped
                accelerator.unwrap_model(self.module).after_step(progress.step / self.total_steps)
            every = train.checkpointing_steps
            anneals = progress.step == anneal_step(train, self.total_steps)
            saves = anneals or (every is not None and progress.step % every == 0)
            measures = self.health.due(progress.step)
            logs = progress.step % train.logging_steps == 0 or progress.step == self.total_steps or saves or measures
            # Processes ask each other at steps at which they wait for each other anyway.
            stops = (logs or accelerator.num_processes == 1) and stop.anywhere(accelerator)
            if logs or stops:
                self.guard.look()  # nothing is written or saved of a step that was not finite
                own = {"learning_rate": rate, "grad_norm": float(norm)} | self.guard.counts()
                own |= numbers_of(out) | self.failures.gather(progress.step)
                if measures:
                    own |= self.health.measure(progress.step, own.get("loss_over_trivial"))
                bar.set_postfix_str(self.metrics.write(progress.step, own), refresh=False)
            bar.update()
            if measures and train.metric_for_best_model and self.health.is_best():
                best = Path(train.output_dir) / "best"
                save_model(accelerator, self.module, best, self.record | {"steps": progress.step})
            if saves or stops:
                output_dir, limit = Path(train.output_dir), train.checkpoints_total_limit
                saved = save_checkpoint(accelerator, output_dir, progress.step, self.record, limit, keep=anneals)
            if saves and not stops and progress.step < self.total_steps:
                record = self.record | self.standing() | {"total_steps": self.total_steps}
                self.hub.checkpoint(self.module, record, partial(write_model, accelerator.unwrap_model(self.module)))
            if stops and progress.step < self.total_steps:
                bar.close()
                accelerator.print(
                    f"Stopped by a signal after step {progress.step} of {self.total_steps}; {saved} is whole: go on "
                    "with --train.resume_from_checkpoint latest"
                )
                accelerator.end_training()
                raise SystemExit(PREEMPTED)
        bar.close()

    def train_step(self, name: str) -> tuple[Tensor, ObjectiveOutput, float, Any]:
        """An optimiser step, all of its batches of one modality.

        Returns:
            The loss, the output for the last batch, the learning rate, and the norm of the gradient.
        """
        accelerator, train, stream = self.accelerator, self.train, self.streams[name]
        rate = rate_at(self.progress.step, train, self.total_steps, self.progress.planned_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        decay = weight_decay(self.progress.step, self.total_steps, train.weight_decay, train.final_weight_decay)
        self.optimizer.param_groups[0]["weight_decay"] = decay  # of weight matrices; the other group has none
        # Batches of the same number must not be masked alike, only because there are several modalities.
        key = [train.seed] if len(self.streams) == 1 else [train.seed, name]
        losses: list[Tensor] = []
        norm: Any = None
        for _ in range(train.gradient_accumulation_steps):
            asked = time.perf_counter()
            inputs = stream.next_inputs()
            self.metrics.waited += time.perf_counter() - asked
            self.guard.before(self.progress.step + 1, name, inputs)
            rank = accelerator.process_index
            generator = keyed_generator(accelerator.device, *key, stream.epoch, stream.batch, rank)
            with accelerator.accumulate(self.module), self.metrics.work.counted(name, inputs):
                with accelerator.autocast():  # which FSDP2 leaves to its caller
                    out = self.module(inputs, generator)
                accelerator.backward(out.loss)
                if accelerator.sync_gradients:
                    limit = train.max_grad_norm or math.inf  # the norm is logged, clipped or not
                    norm = accelerator.clip_grad_norm_(self.module.parameters(), limit)
                if self.guard.after(out, norm):
                    self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(out.loss.detach())
        return torch.stack(losses).mean(), out, rate, norm
