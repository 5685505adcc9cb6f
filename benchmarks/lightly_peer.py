"""SimCLR, MoCo, Barlow Twins, VICReg and DINO beside lightly: losses of the same embeddings, steps per second, probes.

    pip install lightly==1.6.*                        # for this script alone
    python benchmarks/lightly_peer.py --data "$MMSSL_DATA/images/cifar10_jpg" --output docs/lightly.json

Both sides train the same encoder from the same start values, on the same views of the same batches, with the same
optimiser; lightly brings heads and losses. Steps of the two alternate, so that their ratio does not depend on what else
the machine does. Probes are linear, on the means of tokens, fitted on training images and tested on test images.
"""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import CLI
from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, VICRegLoss
from lightly.models.modules.heads import (
    BarlowTwinsProjectionHead,
    DINOProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    VICRegProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.modalities.base import Batch
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.barlow_twins import BarlowTwins
from mmssl.objectives.base import Objective, ObjectiveOutput, represent, views_of
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.self_distillation import SelfDistillation
from mmssl.objectives.vicreg import VICReg
from mmssl.probes import PROTOCOLS, Task

WIDTH, HIDDEN, OUT, KEYS, PROTOTYPES, MOMENTUM = 96, 512, 128, 1024, 1024, (0.99, 1.0)
VIEWS: dict[str, Any] = {"crop_scale": (0.4, 1.0), "horizontal_flip": 0.5, "color_jitter": 0.4}
OURS: dict[str, Callable[[MMSSLModel], Objective]] = {
    "SimCLR": lambda model: Contrastive(model, 0.1, 2, HIDDEN, OUT),
    "MoCo": lambda model: Contrastive(model, 0.2, 2, HIDDEN, OUT, batch_norm=False, momentum=MOMENTUM, queue_size=KEYS),
    "Barlow Twins": lambda model: BarlowTwins(model, 3, HIDDEN, HIDDEN, 1 / HIDDEN),
    "VICReg": lambda model: VICReg(model, 3, HIDDEN, HIDDEN),
    "DINO": lambda model: SelfDistillation(
        model, PROTOTYPES, 3, HIDDEN, OUT, MOMENTUM, teacher_temperature=(0.04, 0.04), freeze_prototypes=0.0
    ),
}


class Peer(Objective):
    """lightly's head, loss and moving average on our encoder and our views."""

    def __init__(self, model: MMSSLModel, head: Callable[[], nn.Module], loss: nn.Module, momentum: bool = False):
        super().__init__(model)
        self.head, self.loss, self.momentum = head(), loss, momentum
        if momentum:
            self.teacher, self.teacher_head = copy.deepcopy(model).eval(), head()
            self.teacher_head.load_state_dict(self.head.state_dict())
            deactivate_requires_grad(self.teacher), deactivate_requires_grad(self.teacher_head)

    def after_step(self, progress: float) -> None:
        if self.momentum:
            momentum = cosine_schedule(round(1000 * progress), 1001, *MOMENTUM)
            update_momentum(self.model, self.teacher, momentum)
            update_momentum(self.head, self.teacher_head, momentum)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        views = views_of(modality, batch, generator)
        said = [self.head(represent(self.model, modality, view)) for view in views]
        if not self.momentum:
            return ObjectiveOutput(self.loss(*said))
        with torch.no_grad():
            known = [self.teacher_head(represent(self.teacher, modality, view)) for view in views]
        if isinstance(self.loss, DINOLoss):
            return ObjectiveOutput(self.loss(known, said))
        return ObjectiveOutput((self.loss(said[0], known[1]) + self.loss(said[1], known[0])) / 2)

    @property
    def trained(self) -> MMSSLModel:
        return self.teacher if isinstance(self.loss, DINOLoss) else self.model


PEERS: dict[str, Callable[[MMSSLModel], Objective]] = {
    "SimCLR": lambda model: Peer(model, lambda: SimCLRProjectionHead(WIDTH, HIDDEN, OUT), NTXentLoss(0.1)),
    "MoCo": lambda model: Peer(
        model,
        lambda: MoCoProjectionHead(WIDTH, HIDDEN, OUT),
        NTXentLoss(0.2, memory_bank_size=(KEYS, OUT)),
        momentum=True,
    ),
    "Barlow Twins": lambda model: Peer(
        model, lambda: BarlowTwinsProjectionHead(WIDTH, HIDDEN, HIDDEN), BarlowTwinsLoss(1 / HIDDEN)
    ),
    "VICReg": lambda model: Peer(model, lambda: VICRegProjectionHead(WIDTH, HIDDEN, HIDDEN), VICRegLoss()),
    "DINO": lambda model: Peer(
        model,
        lambda: DINOProjectionHead(WIDTH, HIDDEN, OUT, PROTOTYPES),
        DINOLoss(PROTOTYPES, 0.04, 0.04, 1),
        momentum=True,
    ),
}


def main(
    data: str, seeds: tuple[int, ...] = (0, 1, 2), steps: int = 500, batch_size: int = 128, output: str = ""
) -> None:
    """Compare.

    Args:
        data: folder with train.parquet and test.parquet.
        seeds: of start values, batches and views.
        steps: optimiser steps of each run.
        batch_size: samples of a batch.
        output: JSON file to write the numbers to.
    """
    modality = Image(image_size=32, patch_size=8, **VIEWS)
    train, test = (read(f"{data}/{name}.parquet", count, modality) for name, count in (("train", 5000), ("test", 2000)))
    table = Table(
        "objective", "loss, lightly's of the same embeddings", "steps/s, ratio to lightly", "probe", "lightly's probe"
    )
    rows = {}
    for name in OURS:
        different = max(difference(name, train[0][:batch_size], seed) for seed in seeds)
        ratios, scores = [], {"ours": list[float](), "lightly": list[float]()}
        for seed in seeds:
            models, ratio = trained(name, train[0], seed, steps, batch_size)
            ratios.append(ratio)
            for side, model in zip(scores, models, strict=True):
                features = [embed(model, images) for images, _ in (train, test)]
                (points,) = PROTOCOLS["linear"](Task(features[0], train[1], features[1], test[1])).values()
                scores[side].append(float(points.mean()))
        mean = {side: f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}" for side, found in scores.items()}
        faster = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{different:.1e} apart", faster, mean["ours"], mean["lightly"])
        rows[name] = {"difference": different, "ratios": ratios, "scores": scores}
        if output:
            Path(output).write_text(json.dumps(rows, indent=1))
    Console().print(table)


def read(source: str, count: int, modality: Image) -> tuple[Tensor, np.ndarray]:
    samples = load_samples(DataArguments(source, max_samples=count), modality)
    prepared = PreparedSamples(samples, modality)
    assert samples.labels is not None
    return torch.stack([prepared[i][0]["pixel_values"] for i in range(len(prepared))]), samples.labels


def make(seed: int, build: Callable[[MMSSLModel], Objective]) -> Objective:
    torch.manual_seed(seed)
    config = MMSSLConfig(
        modalities={"image": {"image_size": 32, "patch_size": 8, **VIEWS}},
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return build(MMSSLModel(config)).train()


def difference(name: str, pixels: Tensor, seed: int) -> float:
    """Relative difference of our loss and lightly's of what our head says of the same views."""
    ours: Any = make(seed, OURS[name])
    peer: Any = make(seed, PEERS[name])
    heads = [ours.head, ours.teacher_head.module] if name == "DINO" else [ours.projector]
    if name == "MoCo":
        heads.append(ours.teacher_projector.module)
    said: dict[nn.Module, list[Tensor]] = {head: [] for head in heads}
    for head in heads:
        head.register_forward_hook(lambda module, _, out: said[module].append(out))
    own = ours({"pixel_values": pixels}, torch.Generator().manual_seed(seed)).loss
    loss, (of_student, *of_teacher) = peer.loss, said.values()
    if name == "DINO":
        other = loss(of_teacher[0], of_student)
    elif name == "MoCo":
        both = []
        for query, key in ((of_student[0], of_teacher[0][1]), (of_student[1], of_teacher[0][0])):
            loss.memory_bank.bank = ours.queue.features.clone()
            loss.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
            both.append(loss(query, key))
        other = torch.stack(both).mean()
    else:
        other = loss(*of_student)
    return float((own - other).abs() / other.abs())


def trained(name: str, pixels: Tensor, seed: int, steps: int, batch_size: int) -> tuple[list[MMSSLModel], float]:
    """Both sides after training on the same batches, and how many of our steps go into the time of one of lightly's."""
    sides = [make(seed, OURS[name]), make(seed, PEERS[name])]
    optimizers = [torch.optim.AdamW([p for p in s.parameters() if p.requires_grad], 1e-3) for s in sides]
    order, spent = torch.Generator().manual_seed(seed), (list[float](), list[float]())
    for step in range(steps):
        batch = {"pixel_values": pixels[torch.randperm(len(pixels), generator=order)[:batch_size]]}
        for which in (0, 1) if step % 2 else (1, 0):
            side, optimizer, start = sides[which], optimizers[which], time.perf_counter()
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 10 * (step + 1) / steps) * (1 - step / steps)
            loss = side(batch, torch.Generator().manual_seed(seed * steps + step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            side.after_step((step + 1) / steps)
            spent[which].append(time.perf_counter() - start)
    return [side.trained for side in sides], float(np.median(spent[1]) / np.median(spent[0]))


@torch.inference_mode()
def embed(model: MMSSLModel, pixels: Tensor) -> np.ndarray:
    return torch.cat([model.eval()(pixel_values=each).pooler_output for each in pixels.split(500)]).numpy()


if __name__ == "__main__":
    CLI(main, as_positional=False)
