"""Linear probes: of all labels, and of few."""

from collections.abc import Callable, Iterator

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from mmssl.probes.base import Points, Task, fit_best, graded, needs_classes, quantities

SHOTS, DRAWS, SHARES = 10, 5, (0.01, 0.1)


def linear_probe(labels: np.ndarray) -> tuple[Pipeline, dict]:
    """Logistic or ridge regression on standardised features, and the strengths of its penalty to choose from."""
    if quantities(labels):
        return Pipeline([("scale", StandardScaler()), ("probe", Ridge())]), {
            "probe__alpha": [1.0, 10.0, 100.0, 1e3, 1e4]
        }
    logistic = LogisticRegression(max_iter=1000)
    return Pipeline([("scale", StandardScaler()), ("probe", logistic)]), {"probe__C": [1e-3, 1e-2, 1e-1, 1.0]}


def linear(task: Task) -> Points:
    """Logistic or ridge regression on standardised features; the strength of its penalty is chosen."""
    best = fit_best(*linear_probe(task.train_labels), task.train, task.train_labels, validation=task.validation)
    return graded(best.predict(task.test), task)


def linear_svm(task: Task) -> Points:
    """Linear support vectors, one class against the others, on standardised features; C is chosen: for point clouds.

    As they are probed since Achlioptas et al. (2018), by Point-MAE (Pang et al., 2022) too.
    """
    needs_classes(task.train_labels)
    pipeline = Pipeline([("scale", StandardScaler()), ("probe", LinearSVC(random_state=0))])
    grid = {"probe__C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}
    best = fit_best(pipeline, grid, task.train, task.train_labels, validation=task.validation)
    return graded(best.predict(task.test), task)


def few_shot(task: Task) -> Points:
    """The linear probe with ten labels a class, or a hundred quantities: mean over five draws, the same for every row.

    The penalty is chosen by cross-validation of the drawn labels alone: a validation set would be more shots.
    """
    fewest, shots = shots_of(task.train_labels)
    if fewest < shots:
        what = "labels" if quantities(task.train_labels) else "labels of a class"
        raise ValueError(f"found {fewest} {what}; expected at least {shots}: leave few_shot out, or use low_label")
    found = [graded(cross_validated(task, index).predict(task.test), task) for index in draws(task, lambda _: shots)]
    return {metric: np.mean([points[metric] for points in found], axis=0) for metric in found[0]}


def shots_of(labels: np.ndarray) -> tuple[int, int]:
    """How many labels the rarest class has, or how many quantities there are, and how many few_shot draws of them."""
    if quantities(labels):
        return len(labels), 10 * SHOTS
    return int(np.unique(labels, return_counts=True)[1].min()), SHOTS


def default_protocols(labels: np.ndarray) -> list[str]:
    """knn and linear, and few_shot where there are enough labels for it."""
    fewest, shots = shots_of(labels)
    return ["knn", "linear", *(["few_shot"] if fewest >= shots else [])]


def low_label(task: Task) -> Points:
    """The linear probe with 1 % and with 10 % of the training labels: means over five draws, the same for every row.

    Draws are stratified, with one label a class at least (ten quantities). The penalty is chosen by 5-fold
    cross-validation of the drawn labels alone; where some class has less than five of them, it is C = 0.1. The shares
    are those of SimCLR (Chen et al., 2020), which fine-tunes on them.
    """
    regress = quantities(task.train_labels)
    points = {}
    for share in SHARES:
        found = []
        for index in draws(task, share_of(share, at_least=10 if regress else 1)):
            drawn = task.train_labels[index]
            if regress or np.unique(drawn, return_counts=True)[1].min() >= 5:
                probe = cross_validated(task, index)
            else:
                probe = linear_probe(drawn)[0].set_params(probe__C=0.1).fit(task.train[index], drawn)
            found.append(graded(probe.predict(task.test), task)["R²" if regress else "accuracy"])
        points[f"{100 * share:.0f} %"] = np.mean(found, axis=0)
    return points


def share_of(share: float, at_least: int) -> Callable[[int], int]:
    return lambda count: max(at_least, round(share * count))


def draws(task: Task, shots: Callable[[int], int]) -> Iterator[np.ndarray]:
    """Positions of training samples, drawn five times: of each class, or of all quantities, ``shots`` of their number.

    Which ones, the labels say and the number of the draw, not the features.
    """
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(task.train))
        own = task.train_labels[order]
        groups = [order] if quantities(own) else [order[own == label] for label in np.unique(own)]
        yield np.concatenate([group[: shots(len(group))] for group in groups])


def cross_validated(task: Task, index: np.ndarray) -> BaseEstimator:
    """The linear probe of a few training samples, its penalty chosen by 5-fold cross-validation of them."""
    kind = KFold if quantities(task.train_labels) else StratifiedKFold
    folds = kind(5, shuffle=True, random_state=0)
    return fit_best(*linear_probe(task.train_labels), task.train[index], task.train_labels[index], folds)
