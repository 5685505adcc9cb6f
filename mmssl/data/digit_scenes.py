"""Handwritten digits before photographs, each pixel labelled: a small set for the evaluation of features at each place.

A picture of 32x32 grey pixels shows 2 to 4 different digits of scikit-learn's 8x8 ones, 14 pixels large and brighter
than most of what is behind them: a piece of one of scikit-learn's two photographs, darkened. Each digit lies in a
quarter of the picture of its own, so that none covers another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from mmssl.data.moving_digits import digit_images

SIZES = {"train": 2000, "test": 300}
SIDE, DIGIT = 32, 14  # in pixels
CLASSES = ("background", *(str(digit) for digit in range(10)))


@dataclass(frozen=True)
class DigitScenes(Sequence):
    """Pictures (32, 32) uint8 or their labels, made when they are indexed.

    Attributes:
        split: "train" or "test", which show different images of digits, before different parts of the photographs.
        part: the "image", or its "labels", (32, 32) int64: 0 behind the digits, 1 plus the digit where there is ink.
            Two digits of a picture are never the same, so that each label in it is one object.
    """

    split: str
    part: Literal["image", "labels"] = "image"

    def __post_init__(self) -> None:
        if self.split not in SIZES or self.part not in ("image", "labels"):
            raise ValueError(
                f"digit scenes: found split {self.split!r} and part {self.part!r}; expected train or test; and image "
                "or labels"
            )

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, i):
        index = range(len(self))[i]  # raises IndexError, which ends a loop over the sequence
        rng = np.random.default_rng([list(SIZES).index(self.split), index])
        image = background(self.split, rng)
        labels = np.zeros((SIDE, SIDE), dtype=np.int64)
        count = rng.integers(2, 5)
        quarters, digits = rng.permutation(4)[:count], rng.permutation(10)[:count]
        for quarter, digit in zip(quarters, digits, strict=True):
            small = PILImage.fromarray((rng.choice(digit_images(self.split)[digit]) * (255 / 16)).astype(np.uint8))
            ink = np.asarray(small.resize((DIGIT, DIGIT), PILImage.Resampling.BICUBIC)) / 255
            top, left = SIDE // 2 * np.array(divmod(quarter, 2)) + rng.integers(0, SIDE // 2 - DIGIT + 1, 2)
            place = np.s_[top : top + DIGIT, left : left + DIGIT]
            image[place] += ink * (rng.uniform(0.6, 1.0) - image[place])
            labels[place][ink > 0.3] = 1 + digit
        return labels if self.part == "labels" else (image * 255).round().astype(np.uint8)


def background(split: str, rng: np.random.Generator) -> np.ndarray:
    """A piece of a photograph, half as bright, (32, 32) from 0 to 0.6."""
    photograph = photographs(split)[rng.integers(2)]
    top, left = (rng.integers(0, side - SIDE + 1) for side in photograph.shape)
    return 0.6 * photograph[top : top + SIDE, left : left + SIDE]


@lru_cache
def photographs(split: str) -> list[np.ndarray]:
    """The part of each photograph that belongs to a split, grey, at half its size, (214, 256 or 64) from 0 to 1."""
    from sklearn.datasets import load_sample_images

    columns = {"train": np.s_[:256], "test": np.s_[256:]}[split]
    halves = [PILImage.fromarray(image).convert("L").reduce(2) for image in load_sample_images().images]
    return [np.asarray(image)[:, columns] / 255 for image in halves]
