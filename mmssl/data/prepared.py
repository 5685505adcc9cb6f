"""Prepared samples for a DataLoader: what runs in the workers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmssl.modalities.base import Modality
from mmssl.randomness import seed_of
from mmssl.samples import Samples


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
    """

    def __init__(
        self,
        samples: Samples,
        modality: Modality,
        on_error: Literal["raise", "skip"] = "raise",
        seed: int | None = None,
        repeat: int = 1,
    ):
        if repeat < 1:
            raise ValueError(f"data.repeat: found {repeat}; expected at least 1")
        self.repeat = repeat
        self.samples, self.modality, self.on_error, self.seed = samples, modality, on_error, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change
        self.last: tuple[int, dict[str, Tensor]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's loaders."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples) * self.repeat

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], list[int]]:
        failed: list[int] = []
        for step in range(len(self.samples)):
            position = (index + step) % len(self.samples)
            try:
                return self.excerpt(position, index // len(self.samples)), failed
            except (ValueError, OSError) as error:
                if self.on_error == "raise":
                    raise ValueError(f"{self.samples.name(position)}: {error}") from error
                failed.append(position)
        raise ValueError(
            f"none of {len(self.samples)} samples could be read; the last was {self.samples.name(failed[-1])}"
        )

    def excerpt(self, position: int, turn: int = 0) -> dict[str, Tensor]:
        if self.last is None or self.last[0] != position:  # one huge sample is prepared once
            self.last = position, self.modality.prepare(self.samples.values[position])
        generator = None
        if self.seed is not None:
            key = seed_of(self.seed, "excerpt", int(self.epoch), position, turn)
            generator = torch.Generator().manual_seed(key)
        return self.modality.excerpt(self.last[1], generator)

    def collate(self, items: Sequence[tuple[dict[str, Tensor], list[int]]]) -> dict[str, Any]:
        """The modality's batch as "inputs", and the positions of unreadable samples, a list of int, as "failed"."""
        failed = [position for _, positions in items for position in positions]
        return {
            "inputs": self.modality.collate([sample for sample, _ in items]),
            "failed": failed,
        }
