"""Shapes that stand apart on a floor, each point labelled: a small set for the evaluation of features at each place.

A cloud shows 2 to 4 of the ten families of ``mmssl.data.shapes``, all different, each in a quarter of a square floor.
Like the shapes, it is geometry and no scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmssl.data.shapes import FAMILIES, Shapes

SIZES = {"train": 1000, "test": 200}
QUARTER = 1.8  # side of the part of the floor that is for one shape, no point of which is 0.8 from its middle
POINTS = 512  # of each shape, and of the floor
CLASSES = ("floor", *FAMILIES)


@dataclass(frozen=True)
class ShapeScenes(Sequence):
    """Clouds (N, 3) float32 or their labels, made when they are indexed; N is 512 for each shape and for the floor.

    Attributes:
        split: "train" or "test".
        part: the "points", or their "labels", (N,) int64: 0 on the floor, 1 plus the number of the family on a shape.
            Points come in random order.
    """

    split: str
    part: Literal["points", "labels"] = "points"

    def __post_init__(self) -> None:
        if self.split not in SIZES or self.part not in ("points", "labels"):
            raise ValueError(
                f"shape scenes: found split {self.split!r} and part {self.part!r}; expected train or test; and points "
                "or labels"
            )

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, i):
        index = range(len(self))[i]  # raises IndexError, which ends a loop over the sequence
        rng = np.random.default_rng([list(SIZES).index(self.split), index])
        shapes = Shapes(self.split, POINTS)
        count = rng.integers(2, 5)
        quarters, families = rng.permutation(4)[:count], rng.permutation(len(FAMILIES))[:count]
        floor = np.append(rng.uniform(-QUARTER, QUARTER, (POINTS, 2)), rng.normal(0, 0.005, (POINTS, 1)), axis=1)
        parts, labels = [floor], [np.zeros(POINTS, dtype=np.int64)]
        for quarter, family in zip(quarters, families, strict=True):
            shape = shapes[family + len(FAMILIES) * rng.integers(len(shapes) // len(FAMILIES))]
            middle = QUARTER * (np.array(divmod(quarter, 2)) - 0.5)
            parts.append(shape + np.append(middle, -shape[:, 2].min()))
            labels.append(np.full(POINTS, 1 + family))
        order = rng.permutation(POINTS * (1 + count))
        found = labels if self.part == "labels" else [part.astype(np.float32) for part in parts]
        return np.concatenate(found)[order]
