"""Samples that are read while training, shard by shard and without end: more of them than memory or disk hold.

Every process reads shards of its own, and every worker of it a part of these, so that each pass over them reads each
row once. Shards come in another order in each pass, and rows through a buffer that the next one is drawn from.

Where a worker stands is the number of rows it has read. To resume, it reads past them without preparing them, and so
comes to the same rows in the same order, whatever the buffer held.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mmssl.data.prepared import MOST_IN_A_ROW
from mmssl.data.sources import DataArguments, column_of, find_table, load_table
from mmssl.modalities.base import Modality
from mmssl.randomness import seed_of
from mmssl.samples import Samples


class StreamedSamples(IterableDataset):
    """Rows of shards through the modality's ``prepare``, without end; the counterpart of ``PreparedSamples``.

    Args:
        samples: the first rows, for what has to see samples before training does.
        modality: used for ``prepare`` and ``collate`` alone.
        arguments: which table, and how it is read.
        seed: the order of shards and rows, and random excerpts of large samples, follow from it.
        rank: number of this process.
        processes: how many there are.
        workers: how many read for this process, at least 1.

    Raises:
        ValueError: no table, a choice that a stream does not have, or fewer shards than readers.
    """

    def __init__(
        self,
        samples: Samples,
        modality: Modality,
        arguments: DataArguments,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        workers: int = 1,
    ):
        self.samples, self.modality, self.arguments, self.seed = samples, modality, arguments, seed
        self.rank, self.processes, self.workers = rank, processes, workers
        self.on_error = arguments.on_error
        found = find_table(arguments, modality)
        if found is None:
            raise ValueError(
                f"data.streaming: {arguments.source} is no table of parquet, CSV or .tar shards nor a data set on the "
                "Hub; leave it out: files of a folder are read one by one anyway"
            )
        defaults = DataArguments()
        for name in ("filter", "max_samples", "repeat", "cache_mb", "guide"):
            if getattr(arguments, name) != getattr(defaults, name):
                raise ValueError(f"data.{name}: a stream has no such choice; leave it or data.streaming out")
        table = load_table(arguments, found, streaming=True)
        if table.num_shards // processes < workers:
            raise ValueError(
                f"data.streaming: found {table.num_shards} shards for {processes} processes of {workers} readers "
                f"each; expected at least {processes * workers}: lower train.dataloader_num_workers, or write more"
            )
        self.column = column_of(table, arguments, modality)
        table = table.shard(processes, rank)  # workers divide what is left among themselves
        self.table = table.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer_size)
        self.rows = [0] * workers
        self.batches = 0
        self.batch_size = 0

    def resume(self, rows: Sequence[int], batches: int, batch_size: int) -> None:
        """Go on after so many batches of this process, of whose workers each has read so many rows."""
        self.rows, self.batches, self.batch_size = list(rows), batches, batch_size

    def name(self, index: int) -> str:
        """How an error names what has this index."""
        index, rank = divmod(index, self.processes)
        row, worker = divmod(index, self.workers)
        return f"{self.arguments.source}, row {row} that worker {worker} of process {rank} read"

    def rows_before(self, index: int) -> int:
        """How many rows a worker had read when it came to the one of this index, itself included."""
        return index // (self.processes * self.workers)

    def add_labels(self) -> None:
        """Labels are not streamed.

        Raises:
            ValueError: always.
        """
        raise ValueError("data.streaming: the objective needs labels, which are not streamed; leave it out")

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor] | None, dict[int, str], int]]:
        """Samples; of unreadable rows that each stands in for, the indices and why; and its own index."""
        info = get_worker_info()
        worker = info.id if info else 0
        # Batches come from workers in turn. Empty ones in place of those that are done keep whose turn it is.
        done = len(range(worker, self.batches, self.workers))
        yield from [(None, {}, 0)] * (done * self.batch_size)
        failed: dict[int, str] = {}
        row = 0
        table = copy.deepcopy(
            self.table
        )  # its epoch is in memory that all workers share, and they are at different ones
        for epoch in count():
            before = row
            table.set_epoch(epoch)
            for value in table:
                row += 1
                if row <= self.rows[worker]:
                    continue
                index = (row * self.workers + worker) * self.processes + self.rank
                try:
                    sample = self.prepare(value, index)
                except (ValueError, OSError) as error:
                    if self.on_error == "raise":
                        raise ValueError(f"{self.name(index)}: {error}") from error
                    failed[index] = str(error)
                    if len(failed) == MOST_IN_A_ROW:
                        raise ValueError(
                            f"none of {len(failed)} rows could be read; the last is {self.name(index)}"
                        ) from error
                    continue
                yield sample, failed, index
                failed = {}
            if row == before:
                raise ValueError(f"data.source {self.arguments.source}: found no rows for worker {worker} to read")

    def prepare(self, row: dict[str, Any], index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "excerpt", index))
        return self.modality.excerpt(self.modality.prepare(row[self.column] if self.column else row), generator)

    def collate(self, items: Sequence[tuple[dict[str, Tensor], dict[int, str], int]]) -> dict[str, Any]:
        """A batch as ``PreparedSamples`` makes it; without inputs where it has been trained on already."""
        indices = [index for _, _, index in items]
        failed = {index: reason for _, others, _ in items for index, reason in others.items()}
        samples = [sample for sample, _, _ in items]
        inputs = None if samples[0] is None else self.modality.collate(samples)
        return {"inputs": inputs, "failed": list(failed), "reasons": list(failed.values()), "indices": indices}
