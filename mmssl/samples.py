"""Samples: raw data before a modality has prepared them, with the labels that probes read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np


@dataclass
class Samples:
    """Raw samples, as a modality's ``prepare`` takes them.

    Attributes:
        values: one raw sample each; may read from disk when indexed.
        name: how an error names sample i: its path, or its row in a table.
        labels: (n,) int, the number of a class, or float, a quantity; or None where there are none.
        classes: name of each class.
        token_labels: (tokens,) int for each sample, -1 where a token has none, if labels are of tokens (nodes).
        token_splits: (tokens,) str for each sample, "train", "validation", "test" or "", where a split is published.
        dense_labels: int for each element of each sample, if labels are of elements, -1 where one has none: (H, W) of
            pixels, (points,) of points; may read from disk when indexed. 0 is the background, which is no object.
    """

    values: Sequence[Any]
    name: Callable[[int], str]
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    token_labels: Sequence[np.ndarray] | None = None
    token_splits: Sequence[np.ndarray] | None = None
    dense_labels: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def select(self, index: np.ndarray) -> "Samples":
        """The samples at these positions."""
        index = np.asarray(index)
        rows = self.values.select(index) if isinstance(self.values, Rows) else Selected(self.values, index)
        return Samples(
            values=rows,
            name=partial(name_of_selected, self.name, index),
            labels=None if self.labels is None else self.labels[index],
            classes=self.classes,
            token_labels=None if self.token_labels is None else [self.token_labels[i] for i in index],
            token_splits=None if self.token_splits is None else [self.token_splits[i] for i in index],
            dense_labels=None if self.dense_labels is None else Selected(self.dense_labels, index),
        )


def name_of_selected(name: Callable[[int], str], index: np.ndarray, i: int) -> str:
    return name(int(index[i]))


@dataclass
class Selected(Sequence):
    """A sequence seen through a list of positions."""

    values: Sequence[Any]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i):
        return self.values[int(self.positions[i])]


@dataclass
class Rows(Sequence):
    """Rows of a table as dicts, held by column so that whole columns can be read at once.

    Attributes:
        columns: (n,) array for each name; of numbers, text or objects, NaN or None where a cell is missing.
    """

    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):  # which ends a loop over the sequence
            raise IndexError(i)
        return {name: column[i] for name, column in self.columns.items()}

    def select(self, index: np.ndarray) -> "Rows":
        """The rows at these positions."""
        return Rows({name: column[index] for name, column in self.columns.items()})


def file_of(record: dict[str, Any]) -> Any:
    """The bytes of a ``{"bytes", "path"}`` record as data sets hold them, or where there are none, its path."""
    found = record["path"] if record.get("bytes") is None and "path" in record else record.get("bytes")
    if found is None:
        raise ValueError(f"found a record of {', '.join(sorted(record))} that holds no file; expected bytes or a path")
    return found


def number_array(sample: Any) -> np.ndarray:
    """Anything like an array of numbers, in an order and a type that torch takes."""
    array = np.array(sample)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"found {type(sample).__name__}; expected a path, bytes, a record or an array of numbers")
    return array.astype(np.float32) if array.dtype.kind == "b" else array.astype(array.dtype.newbyteorder("="))
