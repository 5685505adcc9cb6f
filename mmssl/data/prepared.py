"""Prepared samples for a DataLoader: what runs in the workers."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmssl.modalities.base import Modality
from mmssl.randomness import seed_of
from mmssl.samples import Samples

TENSOR_BYTES = 1000  # of Python's and torch's, of one tensor
MOST_IN_A_ROW = 1000  # unreadable samples one after the other; then the rest of a large data set is not tried either


class PreparedSamples(Dataset):
    """Raw samples through the modality's ``prepare``; errors name the file or row.

    With ``on_error="skip"`` an unreadable sample gives way to the next readable one, so that batches keep their size;
    which ones were unreadable travels with the batch, since workers cannot count for the main process.

    Args:
        samples: the raw samples.
        modality: used for ``prepare`` and ``collate`` alone.
        on_error: "raise" or "skip".
        seed: random excerpts of large samples, others in each epoch. None: always the same ones, for evaluation.
        repeat: how many times each sample is there, with excerpts of its own each time.
        cache_bytes: how much memory the prepared samples may take that are kept for the next epochs; once it is full,
            others are prepared each time. The last one is always kept.
    """

    def __init__(
        self,
        samples: Samples,
        modality: Modality,
        on_error: Literal["raise", "skip"] = "raise",
        seed: int | None = None,
        repeat: int = 1,
        cache_bytes: float = 0,
    ):
        if repeat < 1:
            raise ValueError(f"data.repeat: found {repeat}; expected at least 1")
        self.repeat = repeat
        self.samples, self.modality, self.on_error, self.seed = samples, modality, on_error, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change
        self.last: tuple[int, dict[str, Tensor]] | None = None
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.room = cache_bytes
        self.reasons: dict[int, str] = {}  # why samples could not be read, by this process
        self.labels: Tensor | None = None

    def add_labels(self) -> None:
        """From now on a batch holds the ``labels`` of its samples, (B,) float, for objectives that need them.

        Raises:
            ValueError: not all samples have one that is a number.
        """
        self.labels = label_numbers(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's loaders."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples) * self.repeat

    def name(self, index: int) -> str:
        """How an error names it."""
        return self.samples.name(index % len(self.samples))

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], list[int], int]:
        """A sample; positions of unreadable ones that it stands in for; and where it is found itself, as an index."""
        failed: list[int] = []
        for step in range(min(len(self.samples), MOST_IN_A_ROW)):
            position = (index + step) % len(self.samples)
            try:
                turn = index // len(self.samples)
                return self.excerpt(position, turn), failed, turn * len(self.samples) + position
            except (ValueError, OSError) as error:
                if self.on_error == "raise":
                    raise ValueError(f"{self.samples.name(position)}: {error}") from error
                failed.append(position)
                self.reasons[position] = str(error)
        raise ValueError(
            f"none of {len(failed)} samples could be read; the last was {self.samples.name(failed[-1])}: "
            f"{self.reasons[failed[-1]]}"
        )

    def excerpt(self, position: int, turn: int = 0) -> dict[str, Tensor]:
        prepared = self.prepared(position)
        generator = None
        if self.seed is not None:
            key = seed_of(self.seed, "excerpt", int(self.epoch), position, turn)
            generator = torch.Generator().manual_seed(key)
        sample = self.modality.excerpt(prepared, generator)
        return sample if self.labels is None else {**sample, "labels": self.labels[position]}

    def prepared(self, position: int) -> dict[str, Tensor]:
        if position in self.kept:
            return self.kept[position]
        if self.last is None or self.last[0] != position:  # one huge sample is prepared once
            self.last = position, self.modality.prepare(self.samples.values[position])
            # Of a view all that it is a view of stays in memory; so does what a tensor is besides its numbers.
            size = sum(value.untyped_storage().nbytes() + TENSOR_BYTES for value in self.last[1].values())
            if size <= self.room:
                self.kept[position] = self.last[1]
                self.room -= size
        return self.last[1]

    def collate(self, items: Sequence[tuple[dict[str, Tensor], list[int], int]]) -> dict[str, Any]:
        """The modality's batch as "inputs"; the positions of unreadable samples, a list of int, as "failed", and why
        they are, as "reasons"; and the indices of the samples, in order, as "indices"."""
        failed = [position for _, positions, _ in items for position in positions]
        samples = [sample for sample, _, _ in items]
        inputs = self.modality.collate(samples)
        if self.labels is not None:
            inputs["labels"] = torch.stack([sample["labels"] for sample in samples])
        return {
            "inputs": inputs,
            "failed": failed,
            "reasons": [self.reasons[position] for position in failed],
            "indices": [index for _, _, index in items],
        }


def label_numbers(samples: Samples) -> Tensor:
    """The labels of all samples as numbers, (n,) float: quantities as they are, classes by names that are numbers.

    So an integer column and folders named 18, 19, 20 count by what they say. Names that are words have no order.

    Raises:
        ValueError: there are no labels, or one is missing or no number; names the sample.
    """
    if samples.labels is None:
        raise ValueError(
            "data.label_column: found no label for each sample; expected one, as the objective learns from labels: "
            "name the column of numbers that holds them"
        )
    values = samples.labels.astype(np.float64)
    if samples.labels.dtype.kind in "iu":  # numbers of classes, below 0 where a sample is in none
        names = np.array([number_of(name) for name in samples.classes])
        values = np.where(values < 0, np.nan, names[samples.labels] if len(names) else values)
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        first = int(bad[0])
        label = samples.labels[first]
        found = samples.classes[label] if len(samples.classes) and label >= 0 else label
        raise ValueError(
            f"data.label_column: the label of {samples.name(first)} is {found}; expected a number for each sample, as "
            "the objective asks how far labels lie apart: name another column, or leave such samples out"
        )
    return torch.from_numpy(values).float()


def number_of(name: str) -> float:
    """The number that a text is, NaN if it is none."""
    try:
        return float(name)
    except ValueError:
        return np.nan
