"""The probe of nodes in graphs."""

from dataclasses import replace

import numpy as np
import torch
from sklearn.preprocessing import normalize
from sklearn.utils import assert_all_finite
from torch import Tensor, nn

from mmssl.probes.base import Points, Task, needs_classes, numbered, with_validation

STARTS, EPOCHS = 20, 300


def planetoid(task: Task) -> Points:
    """One linear layer by Adam, taken at its best validation epoch; mean over 20 start values: for nodes of graphs.

    The protocol of DGI (Veličković et al., 2019) and GraphMAE (Hou et al., 2022) on the splits of Planetoid: learning
    rate 0.01, weight decay 1e-4, 300 epochs of all training data at once; of epochs that are equally good, the last.
    Without validation data a stratified fifth of the training data is held out, and not fitted on.
    """
    needs_classes(task.train_labels)
    task = with_validation(task)
    assert task.validation is not None
    parts = [task.train, task.validation[0], task.test]
    for features in parts:
        assert_all_finite(features)
    fit, choose, held_out = (torch.from_numpy(features).float() for features in parts)
    classes = np.unique(task.train_labels)
    numbers, choose_numbers = (
        torch.from_numpy(numbered(classes, labels)) for labels in (task.train_labels, task.validation[1])
    )
    weight, bias = best_linear(fit, numbers, choose, choose_numbers)
    guesses = classes[logits(held_out, weight, bias).argmax(dim=-1).numpy()]
    return {"accuracy": (guesses == task.test_labels[:, None]).mean(axis=1)}


def planetoid_normalized(task: Task) -> Points:
    """The planetoid probe on features less the mean of the training ones, scaled to length 1."""
    centre = task.train.mean(axis=0)
    validation = task.validation
    if validation is not None:
        validation = normalize(validation[0] - centre), validation[1]
    return planetoid(
        replace(task, train=normalize(task.train - centre), test=normalize(task.test - centre), validation=validation)
    )


def best_linear(train: Tensor, labels: Tensor, validation: Tensor, validation_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (F, STARTS, classes) and biases (STARTS, classes) of linear layers at their best validation epochs.

    They are trained side by side: Adam works on each number by itself, so that they do not touch each other.
    """
    classes = int(labels.max()) + 1
    starts = [torch.Generator().manual_seed(seed) for seed in range(STARTS)]
    layers = [nn.init.xavier_uniform_(torch.empty(classes, train.shape[1]), generator=start).T for start in starts]
    weight = torch.stack(layers, dim=1).requires_grad_()
    bias = torch.zeros(STARTS, classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.01, weight_decay=1e-4)
    best, best_weight, best_bias = torch.full((STARTS,), -1), weight.detach().clone(), bias.detach().clone()
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        outputs = logits(train, weight, bias).flatten(0, 1)
        loss = nn.functional.cross_entropy(outputs, labels.repeat_interleave(STARTS))
        (loss * STARTS).backward()  # the mean over samples, the sum over layers
        optimizer.step()
        with torch.no_grad():
            correct = (logits(validation, weight, bias).argmax(dim=-1) == validation_labels[:, None]).sum(dim=0)
            better = correct >= best
            best[better], best_weight[:, better], best_bias[better] = correct[better], weight[:, better], bias[better]
    return best_weight, best_bias


def logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(n, STARTS, classes)."""
    return (features @ weight.flatten(1)).unflatten(1, bias.shape) + bias
