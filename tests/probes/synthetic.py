"""Features and labels that are drawn, and what protocols measure of them."""

from typing import Any

import numpy as np

from mmssl.probes import PROTOCOLS, READS, Task

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
CLASSES = 4


def make(noise: float, train: int = 120, test: int = 100, columns: int = 6, seed: int = 0) -> Split:
    """Gaussian classes of equal size around random means: features and labels to fit on, then those to test on."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((CLASSES, columns))
    labels = rng.permutation(np.arange(train + test) % CLASSES)
    features = means[labels] + noise * rng.standard_normal((train + test, columns))
    return features[:train], labels[:train], features[train:], labels[train:]


def measured(protocol: str, *given: Any) -> float:
    """The mean of what a protocol measures of each test sample, and over what it measures."""
    train, labels, test, test_labels, *rest = given
    validation = rest[0] if rest else None
    if validation is not None:
        validation = shaped(protocol, validation[0]), validation[1]
    task = Task(shaped(protocol, train), labels, shaped(protocol, test), test_labels, validation)
    return float(np.mean([points.mean() for points in PROTOCOLS[protocol](task).values()]))


def shaped(protocol: str, features: np.ndarray) -> np.ndarray:
    """Features as the protocol reads them: the same in two tokens or layers; a third token is missing."""
    pair = np.stack([features, features], axis=1)
    missing = np.full_like(features[:, None], np.nan)
    reads = READS.get(protocol, "pooled")
    return {"pooled": features, "layers": pair, "tokens": np.concatenate([pair, missing], axis=1)}[reads]


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    return [(each - train.mean(axis=0)) / train.std(axis=0) for each in (train, *others)]


def quantities(noise: float = 0.5, train: int = 150, test: int = 80) -> Split:
    """A linear function of random features, and noise."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((train + test, 5))
    labels = 100 + 30 * (features @ [1.0, -2.0, 0.5, 0.0, 1.5]) + 30 * noise * rng.standard_normal(train + test)
    return features[:train], labels[:train], features[train:], labels[train:]


def r_squared(guesses: np.ndarray, labels: np.ndarray) -> float:
    return 1 - np.square(guesses - labels).sum() / np.square(labels - labels.mean()).sum()
