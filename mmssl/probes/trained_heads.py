"""Small heads on all tokens, or on all layers, of a frozen encoder: trained by AdamW, taken at their best epoch."""

import math
from typing import TypeVar

import numpy as np
import torch
from sklearn.utils import assert_all_finite
from torch import Tensor, nn

from mmssl.probes.base import Points, Task, graded, numbered, quantities, with_validation

HEADS = 4
BATCH, STEPS, EPOCHS = 256, 500, 10
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-2


def attentive(task: Task) -> Points:
    """Learned queries attend over frozen tokens, and a linear head reads what they find: as probes of V-JEPA.

    Cross-attention of one query with four heads (Bardes et al., 2024; Darcet et al., 2025), in the form of Psomas et
    al. (2025): one query is the same for all samples, so its projection and that of the keys are one vector a head, and
    the projections of values and output are part of the linear head.

    Features are standardised by the tokens that are trained on. AdamW (learning rate 0.01, weight decay 0.01, batches
    of 256, start values and batches by a fixed seed) makes 500 steps, or ten epochs where that is more; the epoch that
    is best on validation data counts, of equal ones the last. Without validation data a stratified fifth of the
    training data is held out, and not fitted on.

    Raises:
        ValueError: a sample has no token, or a token has NaN in some of its features.
    """
    for features in parts(task):
        there = ~np.isnan(features).all(axis=2)
        if not there.any(axis=1).all():
            raise ValueError(f"found {(~there.any(axis=1)).sum()} samples without any token; leave them out")
        assert_all_finite(features[there])
    return graded(trained(AttentiveHead, task)[1], task)


def weighted_layers(task: Task) -> Points:
    """A weighted mean of all layers, and a linear head on it, trained together: as probes of SUPERB.

    Yang et al. (2021). The weights are a softmax of one number a layer, and begin equal. Each layer is standardised by
    itself, by the samples that are trained on, so that it does not matter more as its numbers are larger. It is trained
    as ``attentive``. Raw features have one layer.
    """
    for features in parts(task):
        assert_all_finite(features)
    return graded(trained(WeightedLayersHead, task)[1], task)


def parts(task: Task) -> list[np.ndarray]:
    """All features there are."""
    return [task.train, task.test, *([] if task.validation is None else task.validation[:1])]


class AttentiveHead(nn.Module):
    """(B, tokens, F), NaN where there is no token, to (B, outputs)."""

    together = (0, 1)  # the axes over which features are standardised

    def __init__(self, shape: tuple[int, ...], outputs: int):
        super().__init__()
        _, width = shape
        self.queries = nn.Parameter(torch.randn(HEADS, width) / math.sqrt(width))
        self.head = nn.Linear(HEADS * width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.attention(tokens)
        return self.head((weights @ tokens.nan_to_num()).flatten(1))

    def attention(self, tokens: Tensor) -> Tensor:
        """(B, HEADS, tokens), 0 where there is no token."""
        absent = tokens.isnan().any(dim=2)
        scores = self.queries @ tokens.nan_to_num().transpose(1, 2) / math.sqrt(tokens.shape[2])
        return scores.masked_fill(absent[:, None], -torch.inf).softmax(dim=-1)


class WeightedLayersHead(nn.Module):
    """(B, layers, F) to (B, outputs)."""

    together = (0,)

    def __init__(self, shape: tuple[int, ...], outputs: int):
        super().__init__()
        layers, width = shape
        self.weights = nn.Parameter(torch.zeros(layers))
        self.head = nn.Linear(width, outputs)

    def forward(self, layers: Tensor) -> Tensor:
        return self.head(self.weights.softmax(dim=0) @ layers)


Head = TypeVar("Head", AttentiveHead, WeightedLayersHead)


def trained(kind: type[Head], task: Task) -> tuple[Head, np.ndarray]:
    """A head at its best validation epoch, and its guesses of the test labels."""
    task = with_validation(task)
    assert task.validation is not None
    mean, deviation = (of(task.train, axis=kind.together, dtype=np.float64) for of in (np.nanmean, np.nanstd))
    deviation = np.where(deviation == 0, 1.0, deviation)
    train, choose, held_out = (
        torch.from_numpy(((features - mean) / deviation).astype(np.float32))
        for features in (task.train, task.validation[0], task.test)
    )
    regress = quantities(task.train_labels)
    classes = np.unique(task.train_labels)
    middle, spread = task.train_labels.mean(), task.train_labels.std() or 1.0
    labels, choose_labels = (
        torch.from_numpy(((each - middle) / spread).astype(np.float32) if regress else numbered(classes, each))
        for each in (task.train_labels, task.validation[1])
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = kind(task.train.shape[1:], 1 if regress else len(classes))
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(0)
    best, best_state = -math.inf, head.state_dict()
    for _ in range(max(EPOCHS, math.ceil(STEPS / math.ceil(len(train) / BATCH)))):
        for index in torch.randperm(len(train), generator=generator).split(BATCH):
            outputs = head(train[index])
            if regress:
                loss = nn.functional.mse_loss(outputs[:, 0], labels[index])
            else:
                loss = nn.functional.cross_entropy(outputs, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        outputs = outputs_of(head, choose)
        if regress:
            good = -float((outputs[:, 0] - choose_labels).square().mean())
        else:
            good = float((outputs.argmax(dim=1) == choose_labels).float().mean())
        if good >= best:
            best, best_state = good, {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(best_state)
    outputs = outputs_of(head, held_out).numpy()
    return head, outputs[:, 0] * spread + middle if regress else classes[outputs.argmax(axis=1)]


@torch.no_grad()
def outputs_of(head: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([head(batch) for batch in inputs.split(BATCH)])
