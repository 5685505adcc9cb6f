"""What probes are given and what they return, and how they choose.

Whatever a probe chooses is chosen without the labels that it is tested on: on the published validation set where there
is one, else on a part of the training data.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, PredefinedSplit, ShuffleSplit, StratifiedShuffleSplit

Labelled = tuple[np.ndarray, np.ndarray]


@dataclass
class Task:
    """What a probe is fitted on, chooses on and is tested on.

    Attributes:
        train: (n, *F) features. What F is, a protocol says: ``READS``.
        train_labels: (n,) integers, classes; or floats, quantities.
        test: (m, *F) features.
        test_labels: (m,) labels.
        validation: features and labels of a published validation set, where there is one.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    validation: Labelled | None = None


# Of each metric, what each thing that was tested (a sample, a query, an episode) scores. Their mean is the score, and
# as they are the same things for all features, two scores can be compared in pairs.
Points = dict[str, np.ndarray]
Protocol = Callable[[Task], Points]


def quantities(labels: np.ndarray) -> bool:
    """Whether labels are quantities to be regressed, not classes."""
    return labels.dtype.kind == "f"


def needs_classes(labels: np.ndarray) -> None:
    if quantities(labels):
        raise ValueError("found quantities as labels; this protocol needs classes: use linear, knn, mlp or boosting")


def needs_quantities(labels: np.ndarray) -> None:
    if not quantities(labels):
        raise ValueError("found classes as labels; this protocol needs quantities: use linear, knn, mlp or svm")


def graded(guesses: np.ndarray, task: Task) -> Points:
    """Of each test sample whether its class was guessed, or its part in R², the coefficient of determination."""
    truth = task.test_labels
    if not quantities(task.train_labels):
        return {"accuracy": (guesses == truth).astype(float)}
    return {"R²": 1 - np.square(guesses - truth) / np.square(truth - truth.mean()).mean()}


def a_fifth(labels: np.ndarray) -> ShuffleSplit | StratifiedShuffleSplit:
    """Holds out a fifth of the training data, stratified by class."""
    kind = ShuffleSplit if quantities(labels) else StratifiedShuffleSplit
    return kind(1, test_size=0.2, random_state=0)


def with_validation(task: Task) -> Task:
    """The task itself where it has validation data; else they are a fifth of its training data, no more fitted on."""
    if task.validation is not None:
        return task
    ((inner, outer),) = a_fifth(task.train_labels).split(task.train, task.train_labels)
    return replace(
        task,
        train=task.train[inner],
        train_labels=task.train_labels[inner],
        validation=(task.train[outer], task.train_labels[outer]),
    )


def numbered(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The position of each label among sorted classes, and -1, which no guess equals, where it is none of them."""
    position = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    return np.where(classes[position] == labels, position, -1)


def fit_best(
    estimator: BaseEstimator,
    grid: dict,
    features: np.ndarray,
    labels: np.ndarray,
    folds=None,
    validation: Labelled | None = None,
) -> BaseEstimator:
    """Choose from the grid on the validation data, or on a fifth of the training data (or on ``folds`` of it).

    The chosen one is then fitted on all training data.
    """
    if folds is None:
        folds = a_fifth(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged candidate is a candidate like others
        if validation is None:
            return GridSearchCV(estimator, grid, cv=folds).fit(features, labels)
        both, both_labels = (np.concatenate(pair) for pair in zip((features, labels), validation, strict=True))
        folds = PredefinedSplit(np.repeat([-1, 0], [len(labels), len(validation[1])]))
        search = GridSearchCV(estimator, grid, cv=folds, refit=False).fit(both, both_labels)
        return clone(estimator).set_params(**search.best_params_).fit(features, labels)
