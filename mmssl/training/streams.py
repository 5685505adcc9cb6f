"""Where batches come from: an endless stream for each modality, and which of them an optimiser step reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.data import PreparedSamples, load_samples
from mmssl.data.guided import GuidedSampler, clusters_of
from mmssl.randomness import seed_of
from mmssl.training.arguments import Source, TrainArguments


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
        failed: positions of samples that could not be read.
        sampler: the order of guided batches. None: the loader shuffles.
    """

    dataset: PreparedSamples
    loader: DataLoader
    batch_size: int
    weight: float
    epoch: int = 0
    batch: int = 0
    failed: set[int] = field(default_factory=set)
    sampler: GuidedSampler | None = None
    batches: Iterator[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch, self.batches = state["epoch"], state["batch"], None

    def next_inputs(self) -> dict[str, Tensor]:
        """The next batch, on the device."""
        if self.batches is None:
            loader: Any = skip_first_batches(self.loader, self.batch) if self.batch else self.loader
            loader.set_epoch(self.epoch)
            for each in (
                self.dataset,
                self.sampler,
            ):  # which the loader forgets where its batches are sharded or skipped
                if each is not None:
                    each.set_epoch(self.epoch)
            self.batches = iter(loader)
        batch = next(self.batches, None)
        if batch is None:
            self.epoch, self.batch, self.batches = self.epoch + 1, 0, None
            return self.next_inputs()
        self.batch += 1
        self.failed.update(batch["failed"])
        return batch["inputs"]


def open_stream(source: Source, train: TrainArguments, accelerator: Accelerator) -> Stream:
    """A stream at its beginning, its loader not yet prepared by Accelerate.

    Raises:
        ValueError: fewer samples than one batch of all processes needs.
    """
    # The given modality has no parameters and stays on the data side; the model makes its own.
    samples = load_samples(source.data, source.modality)
    source.modality.fit(samples)
    dataset = PreparedSamples(samples, source.modality, source.data.on_error, train.seed, source.data.repeat)
    batch_size = source.per_device_train_batch_size or train.per_device_train_batch_size
    if len(dataset) < (needed := batch_size * accelerator.num_processes):
        raise ValueError(
            f"{source.modality.name}: found {len(dataset)} samples, and one batch needs {needed}; lower "
            "per_device_train_batch_size or raise data.repeat"
        )
    sampler = None
    if source.data.guide is not None:
        clusters = clusters_of(source.data.guide, len(samples), needed, train.seed)
        sampler = GuidedSampler(clusters, source.data.repeat, train.seed)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        collate_fn=dataset.collate,
        num_workers=train.dataloader_num_workers,
        persistent_workers=train.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(train.seed),
    )
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
    share = streams[first].weight / sum(stream.weight for stream in streams.values())
    batches = len(streams[first].loader) // processes
    return max(1, round(train.num_train_epochs * batches / (train.gradient_accumulation_steps * share)))
