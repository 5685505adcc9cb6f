"""Where batches come from: an endless stream for each modality, and which of them an optimiser step reads."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.data import PreparedSamples, load_samples
from mmssl.data.guided import GuidedSampler, clusters_of
from mmssl.data.streaming import StreamedSamples
from mmssl.randomness import seed_of
from mmssl.training.arguments import Source, TrainArguments
from mmssl.training.stopping import ignore_stop_signals


@dataclass
class Stream:
    """Batches of one modality without end; registered with Accelerate: where it stands is part of every checkpoint.

    Attributes:
        dataset: the samples.
        loader: batches of them, this process's share.
        batch_size: samples of a batch on each device.
        weight: how often the stream is drawn, relative to others.
        epoch: passes over the data done.
        batch: batches done in this epoch, on each process.
        failed: positions of samples that could not be read, and why, since they were last asked for.
        read: samples that were read in this session, or could not be, on this process.
        unreadable: of these, those that could not be.
        indices: of the samples of the last batch, in the data set.
        sampler: the order of guided batches. None: the loader shuffles.
    """

    dataset: Any  # PreparedSamples, or of an endless stream StreamedSamples
    loader: DataLoader
    batch_size: int
    weight: float
    epoch: int = 0
    batch: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    read: int = 0
    unreadable: int = 0
    indices: list[int] = field(default_factory=list)
    sampler: GuidedSampler | None = None
    batches: Iterator[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch, self.batches = state["epoch"], state["batch"], None

    @property
    def epochs(self) -> float | None:
        """Passes over the data done, in parts too."""
        return self.epoch + self.batch / len(self.loader)

    def next_inputs(self) -> dict[str, Tensor]:
        """The next batch, on the device."""
        if self.batches is None:
            loader: Any = skip_first_batches(self.loader, self.batch) if self.batch else self.loader
            loader.set_epoch(self.epoch)
            for each in (self.dataset, self.sampler):  # forgotten by a loader whose batches are sharded or skipped
                if each is not None:
                    each.set_epoch(self.epoch)
            self.batches = iter(loader)
        batch = next(self.batches, None)
        if batch is None:
            self.epoch, self.batch, self.batches = self.epoch + 1, 0, None
            return self.next_inputs()
        self.batch += 1
        self.remember(batch)
        return batch["inputs"]

    def remember(self, batch: dict[str, Any]) -> None:
        """What a batch says of its samples."""
        self.failed |= dict(zip(batch["failed"], batch["reasons"], strict=True))
        self.read += len(batch["indices"]) + len(batch["failed"])
        self.unreadable += len(batch["failed"])
        self.indices = batch["indices"]


@dataclass
class EndlessStream(Stream):
    """A stream of ``StreamedSamples``; its loader is not Accelerate's, as each process reads shards of its own.

    Attributes:
        device: where batches go.
        rows: how many rows each worker of this process has read.
    """

    device: torch.device | None = None
    rows: list[int] = field(default_factory=list)

    @property
    def epochs(self) -> None:
        """Nobody has counted the rows."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch, "rows": gather_object([self.rows])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = state["rows"][PartialState().process_index]
        if len(rows) != len(self.rows):
            raise ValueError(
                f"train.dataloader_num_workers: found {len(self.rows)} readers where the checkpoint had {len(rows)}; "
                "the order of a stream depends on how many there are, so resume with as many workers"
            )
        self.batch, self.rows, self.batches = state["batch"], list(rows), None

    def next_inputs(self) -> dict[str, Tensor]:
        """The next batch, on the device."""
        if self.batches is None:
            self.dataset.resume(self.rows, self.batch, self.batch_size)
            self.batches = iter(self.loader)
            for _ in range(self.batch):  # empty, where they are done
                next(self.batches)
        batch = next(self.batches)
        self.rows[self.batch % len(self.rows)] = self.dataset.rows_before(batch["indices"][-1])
        self.batch += 1
        self.remember(batch)
        return send_to_device(batch["inputs"], self.device)


def open_stream(source: Source, train: TrainArguments, accelerator: Accelerator) -> Stream:
    """A stream at its beginning, its loader not yet prepared by Accelerate.

    Raises:
        ValueError: fewer samples than one batch of all processes needs.
    """
    # The given modality has no parameters and stays on the data side; the model makes its own.
    samples = load_samples(source.data, source.modality)
    source.modality.fit(samples)
    batch_size = source.per_device_train_batch_size or train.per_device_train_batch_size
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "drop_last": True,
        "num_workers": train.dataloader_num_workers,
        "persistent_workers": train.dataloader_num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator().manual_seed(train.seed),
        "worker_init_fn": partial(ignore_stop_signals, main=os.getpid()),
    }
    if source.data.streaming:
        workers = max(1, train.dataloader_num_workers)
        place = accelerator.process_index, accelerator.num_processes, workers
        rows = StreamedSamples(samples, source.modality, source.data, train.seed, *place)
        loader = DataLoader(rows, collate_fn=rows.collate, **options)
        device = accelerator.device
        return EndlessStream(rows, loader, batch_size, source.weight, device=device, rows=[0] * workers)
    cache = source.data.cache_mb * 2**20 / max(1, train.dataloader_num_workers)
    dataset = PreparedSamples(samples, source.modality, source.data.on_error, train.seed, source.data.repeat, cache)
    if len(dataset) < (needed := batch_size * accelerator.num_processes):
        raise ValueError(
            f"{source.modality.name}: found {len(dataset)} samples, and one batch needs {needed}; lower "
            "per_device_train_batch_size or raise data.repeat"
        )
    sampler = None
    if source.data.guide is not None:
        clusters = clusters_of(source.data.guide, len(samples), needed, train.seed)
        sampler = GuidedSampler(clusters, source.data.repeat, train.seed)
    loader = DataLoader(dataset, shuffle=sampler is None, sampler=sampler, collate_fn=dataset.collate, **options)
    return Stream(dataset, loader, batch_size, source.weight, sampler=sampler)


def draw(weights: Mapping[str, float], seed: int, step: int) -> str:
    """The modality of an optimiser step: the same in all processes, and after whatever was drawn before."""
    names = sorted(weights)
    generator = torch.Generator().manual_seed(seed_of(seed, "modality", step))
    shares = torch.tensor([weights[name] for name in names], dtype=torch.float64)
    return names[int(torch.multinomial(shares, 1, generator=generator))]


def count_steps(streams: Mapping[str, Stream], first: str, train: TrainArguments, processes: int) -> int:
    """Optimiser steps of a run; epochs are the first modality's, which is drawn in its share of the steps."""
    if train.max_train_steps is not None:
        return train.max_train_steps
    if isinstance(streams[first], EndlessStream):
        raise ValueError("train.max_train_steps is not set; expected a number of steps, as a stream has no end")
    share = streams[first].weight / sum(stream.weight for stream in streams.values())
    batches = len(streams[first].loader) // processes
    return max(1, round(train.num_train_epochs * batches / (train.gradient_accumulation_steps * share)))
