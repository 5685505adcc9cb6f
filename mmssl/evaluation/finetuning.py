"""Fine-tuning for classes or quantities: encoder and a linear head, beside the same from an untrained encoder.

Layer-wise decay of the learning rate as in BEiT (Bao et al., 2022) and MAE (He et al., 2022): lower layers are more
general, and change less. A head on a frozen encoder that reads views of the training samples is MAE's and SimCLR's
(Chen et al., 2020) linear probe.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from mmssl.data import DataArguments, PreparedSamples, Samples
from mmssl.evaluation.features import Pooling, pooled
from mmssl.evaluation.models import fresh, learned_labels, load_own, pick_modality
from mmssl.evaluation.scores import Score
from mmssl.evaluation.splits import check_labels, labelled_pair
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel, make_modality
from mmssl.probes import Task, quantities
from mmssl.probes.base import graded
from mmssl.randomness import keyed_generator


def finetune(
    checkpoints: Sequence[str | Path],
    data: DataArguments,
    test: DataArguments | None = None,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    freeze_encoder: bool = False,
    augment: dict[str, Any] | None = None,
    batch_size: int = 64,
    pooling: Pooling = "mean",
    modality: str | None = None,
) -> list[Score]:
    """Train encoder and head together, from checkpoints that differ in their seed alone and from untrained encoders.

    A stratified fifth of the training data is held out: the epoch that is best on it is what is tested.

    Args:
        checkpoints: folders or Hub names of pretrained models, one for each seed.
        data: labelled samples to train on.
        test: those to test on. None: as in ``evaluate``.
        epochs: passes over the training data.
        learning_rate: greatest one, of AdamW; a tenth of the steps warm up, then it falls as a cosine.
        weight_decay: AdamW's; biases, norms and learned tokens have none.
        layer_decay: the learning rate of a layer is this factor times that of the layer above it; that of the embedding
            is the lowest, that of the head is ``learning_rate``. 1: all learn alike.
        freeze_encoder: train the head alone, on features standardised as by the probe ``linear``.
        augment: options of the modality's views, such as {"crop_scale": [0.5, 1.0]}, beside those of the checkpoint:
            each training sample is read through a view, and a large one in an excerpt, that differ from epoch to epoch.
            What is validated and tested is read as it is, and so is everything with None.
        batch_size: samples in a batch.
        pooling: from tokens to samples, as in ``evaluate``.
        modality: which modality of a model that has several.

    Raises:
        ValueError: no labels, or labels of tokens; an encoder that mmssl has not pretrained; views that the modality
            does not have, or that change nothing; a layer_decay that is not above 0 and at most 1, or of a frozen
            encoder.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: found {layer_decay}; expected a factor above 0 and at most 1")
    if freeze_encoder and layer_decay != 1:
        raise ValueError(f"layer_decay: found {layer_decay}, and a frozen encoder, whose layers learn nothing; use 1.0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [load_own(checkpoint) for checkpoint in checkpoints]
    adapter = models[0].adapters[pick_modality(models[0], modality)]
    if augment is not None and not adapter.offers("view"):
        raise ValueError(f"augment: {adapter.name} offers no views; leave the flag out")
    train, held_out = labelled_pair(data, test, adapter, not any(map(learned_labels, checkpoints)))
    if train.token_labels is not None:
        raise ValueError("data: found labels of tokens; fine-tuning is of samples: use mmssl evaluate for tokens")
    labels = check_labels(train, "data")
    classes, metric = (None, "R²") if quantities(labels) else (labels, "accuracy")
    fit, choose = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=classes)
    parts = [Batches(each, adapter, batch_size) for each in (train.select(fit), train.select(choose), held_out)]
    views = None if augment is None else viewing(adapter, augment, parts[0]).to(device)
    protocol = "linear head" if freeze_encoder else "fine-tuned"
    rows = {"untrained": [fresh(model, seed) for seed, model in enumerate(models)], "pretrained": models}
    scores = []
    for row, starts in rows.items():
        seeds = []
        for seed, model in enumerate(starts):
            torch.nn.Module.to(model, device)
            learner = Learner(model, pooling, parts[0], seed)
            if freeze_encoder:
                learner.freeze_encoder(parts[0])
            optimizer = torch.optim.AdamW(parameter_groups(learner, learning_rate, weight_decay, layer_decay))
            learner.learn(parts[0], parts[1], epochs, optimizer, views, f"{protocol}, {row} {seed}")
            seeds.append(learner.points(parts[2]))
        values = [float(points.mean()) for points in seeds]
        scores.append(Score(protocol, row, values, len(labels), len(held_out), metric, np.mean(seeds, axis=0)))
    return scores


def viewing(modality: Modality, options: dict[str, Any], train: "Batches") -> Modality:
    """The modality with these options of its views.

    Raises:
        ValueError: an unknown option, or two views of the training samples that are equal.
    """
    other = make_modality(modality.name, modality.options() | options)
    batch, _ = next(train.in_order(torch.device("cpu")))
    one, two = (
        other.tokenize(other.view(batch, torch.Generator().manual_seed(seed)).batch).content for seed in range(2)
    )
    if torch.equal(one.nan_to_num(), two.nan_to_num()):
        raise ValueError(
            f"augment: with {options} views of {modality.name} change nothing; set options of its views, which "
            f"`mmssl pretrain --modality.help {type(modality).__name__}` shows"
        )
    return other


@dataclass
class Batches:
    """Labelled samples, batch by batch, with their labels.

    Attributes:
        samples: what is read.
        modality: which reads it.
        size: samples in a batch.
    """

    samples: Samples
    modality: Modality
    size: int

    def __len__(self) -> int:
        return -(-len(self.samples) // self.size)

    @property
    def labels(self) -> np.ndarray:
        assert self.samples.labels is not None
        return self.samples.labels

    def in_order(self, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
        """All samples as they are."""
        return self.read(PreparedSamples(self.samples, self.modality), list(range(len(self.samples))), device)

    def shuffled(
        self, device: torch.device, views: Modality | None, seed: int, epoch: int
    ) -> Iterator[tuple[Batch, Tensor]]:
        """All samples in an order drawn by seed and epoch, with ``views`` through views drawn by them too."""
        order = torch.randperm(len(self.samples), generator=keyed_generator(torch.device("cpu"), seed, "order", epoch))
        dataset = PreparedSamples(self.samples, self.modality, seed=None if views is None else seed)
        dataset.set_epoch(epoch)
        for number, (batch, labels) in enumerate(self.read(dataset, order.tolist(), device)):
            generator = keyed_generator(device, seed, "view", epoch, number)  # and the key of this step's dropout
            yield batch if views is None else views.view(batch, generator).batch, labels

    def read(self, dataset: PreparedSamples, order: list[int], device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
        chosen = [order[start : start + self.size] for start in range(0, len(order), self.size)]
        loader = DataLoader(dataset, batch_sampler=chosen, collate_fn=dataset.collate)
        for index, batch in zip(chosen, loader, strict=True):
            inputs = {name: value.to(device) for name, value in batch["inputs"].items()}
            yield inputs, torch.from_numpy(self.labels[index]).to(device)


class Learner(nn.Module):
    """A model, and a linear head on its pooled output: logits of classes, or one quantity, standardised.

    Args:
        model: the encoder, which learns too.
        pooling: from tokens to samples.
        train: what it will learn from: tells the width of the pooled output, and the classes, or the scale of labels.
        seed: of the head's start values, and of whatever is random in ``learn``.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, model: MMSSLModel, pooling: Pooling, train: Batches, seed: int):
        super().__init__()
        self.model, self.seed, self.frozen = model, seed, False
        self.read = pooled(model, pooling)
        labels = train.labels
        self.regresses = quantities(labels)
        self.mean, self.std = (float(labels.mean()), float(labels.std())) if self.regresses else (0.0, 1.0)
        with torch.no_grad():
            width = self.read(next(train.in_order(model.device))[0]).shape[1]
        self.head = nn.Linear(width, 1 if self.regresses else int(labels.max()) + 1)
        nn.init.normal_(self.head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.to(model.device)

    @torch.no_grad()
    def freeze_encoder(self, train: Batches) -> None:
        """From now on the head alone learns, from features standardised over the training samples as they are."""
        self.frozen = True
        self.model.requires_grad_(False).eval()
        features = torch.cat([self.read(batch).float() for batch, _ in train.in_order(self.model.device)])
        std, self.centre = torch.std_mean(features, dim=0, correction=0)
        self.scale = std.where(std > 1e-6, 1)  # one that never changes stays as it is

    def forward(self, batch: Batch) -> Tensor:
        return self.head((self.read(batch).to(self.head.weight.dtype) - self.centre) / self.scale)

    def loss(self, batch: Batch, labels: Tensor) -> Tensor:
        """Cross-entropy of classes, squared error of a standardised quantity."""
        if self.regresses:
            return nn.functional.mse_loss(self(batch)[:, 0], ((labels - self.mean) / self.std).float())
        return nn.functional.cross_entropy(self(batch), labels)

    def learn(
        self,
        train: Batches,
        validation: Batches,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        views: Modality | None = None,
        title: str = "fine-tune",
    ) -> None:
        """Train, with ``views`` on views, and keep the epoch that is best on the validation data."""
        total = epochs * len(train)
        schedule = get_cosine_schedule_with_warmup(optimizer, total // 10, total)
        best, kept = -np.inf, copy.deepcopy(self.state_dict())
        bar = tqdm(total=total, desc=title, unit="step", mininterval=5)
        for epoch in range(epochs):
            self.train()
            for batch, labels in train.shuffled(self.model.device, views, self.seed, epoch):
                optimizer.zero_grad()
                self.loss(batch, labels).backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            score = self.points(validation).mean()
            bar.set_postfix_str(f"validation {score:.3f}")
            if score > best:
                best, kept = score, copy.deepcopy(self.state_dict())
        bar.close()
        self.load_state_dict(kept)

    def train(self, mode: bool = True) -> "Learner":
        """A frozen encoder stays in evaluation mode: without dropout, and with its own statistics."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    @torch.inference_mode()
    def points(self, batches: Batches) -> np.ndarray:
        """What each sample scores: whether its class was guessed, or its part in R²."""
        self.eval()
        outputs = torch.cat([self(batch) for batch, _ in batches.in_order(self.model.device)]).double()
        guesses = outputs[:, 0] * self.std + self.mean if self.regresses else outputs.argmax(dim=1)
        truth, nothing = batches.labels, np.empty((len(outputs), 0))  # features are read already
        (found,) = graded(guesses.numpy(force=True), Task(nothing, truth, nothing, truth)).values()
        return found


def parameter_groups(learner: Learner, learning_rate: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """What learns, by how many layers lie above it and by whether it decays, as an optimiser takes it.

    Layers are the embedding (with places, learned tokens, and the first norm of a post-norm encoder), each block, and
    the head with the last norm of a pre-norm encoder.
    """
    encoder = learner.model.encoder
    layers: list[list[nn.Module]] = [[block] for block in encoder.layers]
    layers.append([learner.head, encoder.norm] if encoder.config.norm_position == "pre" else [learner.head])
    number_of = {
        parameter: number
        for number, modules in enumerate(layers, start=1)
        for module in modules
        for parameter in module.parameters()
    }
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            above = len(layers) - number_of.get(parameter, 0)
            decays = parameter.ndim > 1 and "token" not in name.rpartition(".")[2]  # learned tokens have several axes
            groups.setdefault((above, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**above,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (above, decays), parameters in groups.items()
    ]
