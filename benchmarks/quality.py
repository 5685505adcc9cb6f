"""What time_to_quality.py compares: a data set, its probes, and sides that learn from it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.cli import parse_pretrain
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.probes import PROTOCOLS, Task

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
Scores = dict[str, float]


@dataclass
class Learner:
    """A side.

    Attributes:
        module: what is trained.
        loss: of a batch.
        features: of samples, (B, D).
    """

    module: nn.Module
    loss: Callable[[Any, torch.Generator], Tensor]
    features: Callable[[Any], Tensor]


@dataclass
class Data:
    """Training batches, and probes of features.

    Attributes:
        draw: the next batch to train on.
        score: of what a function makes of the samples.
        raw: what it is without any encoder.
    """

    draw: Callable[[torch.Generator], Any]
    score: Callable[[Callable[[Any], Tensor]], Scores]
    raw: Callable[[Any], Tensor]


@dataclass
class Field:
    """A data set and those who learn from it.

    Attributes:
        read: the data from a path; for exploring, with training data held out in the place of the test data.
        sides: each by its name.
        budget: CPU seconds that tell the sides apart.
        rates: learning rates to choose from.
        optimizer: further options of AdamW.
    """

    read: Callable[[str, bool], Data]
    sides: dict[str, Callable[[], Learner]]
    budget: tuple[float, ...]
    rates: tuple[float, ...]
    optimizer: dict[str, Any]


def ours(recipe: str, *flags: str, features: Callable[[MMSSLModel, Any], Tensor]) -> Learner:
    """A recipe of examples/recipes, with further flags of ``mmssl pretrain``."""
    given = parse_pretrain(["--config", str(RECIPES / recipe), *flags])
    modality = given["modality"]
    model = MMSSLModel(MMSSLConfig(modalities={modality.name: modality.options()}, **asdict(given["encoder"])))
    objective = given["objective"](model)
    return Learner(
        objective, lambda batch, generator: objective(batch, generator).loss, lambda batch: features(model, batch)
    )


Labelled = tuple[Tensor, np.ndarray]


def labelled(train: Labelled, test: Labelled, raw: Callable[[Tensor], Tensor], batch_size: int) -> Data:
    """Of samples in one tensor each: random batches, and a linear and a kNN probe."""

    def score(features: Callable[[Tensor], Tensor]) -> Scores:
        with torch.no_grad():
            fit, held_out = (torch.cat([features(part) for part in samples.split(500)]) for samples, _ in (train, test))
        return probed(Task(fit.numpy(), train[1], held_out.numpy(), test[1]), "linear", "knn")

    def draw(generator: torch.Generator) -> Tensor:
        return train[0][torch.randint(len(train[0]), (batch_size,), generator=generator)]

    return Data(draw, score, raw)


def held_out(both: Labelled, count: int) -> tuple[Labelled, Labelled]:
    """All but the last so many samples, and these."""
    samples, labels = both
    return (samples[:-count], labels[:-count]), (samples[-count:], labels[-count:])


def probed(task: Task, *protocols: str) -> Scores:
    return {name: float(next(iter(PROTOCOLS[name](task).values())).mean()) for name in protocols}
