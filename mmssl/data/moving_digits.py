"""Handwritten digits that move: a small labelled set of clips for examples and tests, made from random parameters.

A digit of scikit-learn's 8x8 ones, 12 pixels large, moves in a straight line at an even speed over a black frame of
32x32 pixels and never leaves it. The middle of its path is drawn alike for all directions and speeds, so the middle
frame says nothing about either; the first and the last one, whose place depends on the direction, say a little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

SIZES = {"train": 1920, "test": 480}
FRAME, DIGIT = 32, 12  # sides in pixels
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
PATHS = {"slow": 2.0, "medium": 4.0, "fast": 6.0}  # pixels from the first frame to the last
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class MovingDigits(Sequence):
    """Clips (num_frames, 32, 32) uint8, made when they are indexed; every combination of labels is as frequent.

    Attributes:
        split: "train" or "test", which show different images of the digits.
        label: what ``labels`` are: the "direction", the "speed" or the "digit".
        num_frames: frames of a clip; more of them show the same path in smaller steps.
    """

    split: str
    label: Literal["direction", "speed", "digit"] = "direction"
    num_frames: int = 8

    def __post_init__(self) -> None:
        if self.split not in SIZES or self.label not in ("direction", "speed", "digit") or self.num_frames < 1:
            raise ValueError(
                f"moving digits: found split {self.split!r}, label {self.label!r} and {self.num_frames} frames; "
                "expected train or test; direction, speed or digit; and at least one frame"
            )

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, i):
        index = range(len(self))[i]  # raises IndexError, which ends a loop over the sequence
        rng = np.random.default_rng([list(SIZES).index(self.split), index])
        direction, speed, digit = (int(label[0]) for label in factors(np.array([index])))
        image = rng.choice(digit_images(self.split)[digit])
        angle, path = direction * np.pi / 4, list(PATHS.values())[speed]
        free = (FRAME - DIGIT * 9 / 8 - max(PATHS.values())) / 2  # interpolation adds half a pixel of the digit
        middle = FRAME / 2 + rng.uniform(-free, free, 2)
        way = np.linspace(-path / 2, path / 2, self.num_frames)[:, None]
        centres = middle + way * np.array([np.sin(angle), np.cos(angle)])  # (y, x)
        rows, columns = coverage(centres[:, 0]), coverage(centres[:, 1])
        frames = rows @ image @ columns.swapaxes(1, 2)
        return (frames * (255 / 16)).round().astype(np.uint8)

    @property
    def labels(self) -> np.ndarray:
        """(clips,) int, the number of each clip's class."""
        direction, speed, digit = factors(np.arange(len(self)))
        return {"direction": direction, "speed": speed, "digit": digit}[self.label]

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list({"direction": DIRECTIONS, "speed": PATHS, "digit": DIGITS}[self.label])


def factors(index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Direction, speed and digit of the clips with these numbers."""
    rest, direction = np.divmod(index, len(DIRECTIONS))
    rest, speed = np.divmod(rest, len(PATHS))
    return direction, speed, rest % len(DIGITS)


def coverage(centres: np.ndarray) -> np.ndarray:
    """(frames, 32, 8): how much each pixel of a frame takes of each pixel of a digit, along one axis.

    The mean over the frame's pixel of a bilinear interpolation of the digit, so that motion of any speed looks even.
    """
    edge = (np.arange(FRAME + 1) - centres[:, None]) * (8 / DIGIT) + 3.5  # where the digit's pixels are 0, 1, ..., 7
    offset = np.clip(edge[..., None] - np.arange(8), -1, 1)
    integral = offset - offset * np.abs(offset) / 2  # of 1 - |offset|
    return np.diff(integral, axis=1) * (DIGIT / 8)


@lru_cache
def digit_images(split: str) -> list[np.ndarray]:
    """The images of each digit in a split, (images, 8, 8) from 0 to 16."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    order = {"train": order[:1437], "test": order[1437:]}[split]
    return [data.images[order[data.target[order] == digit]] for digit in range(10)]
