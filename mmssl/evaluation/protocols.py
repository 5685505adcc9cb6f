"""Probes of frozen features, all scikit-learn's. Whatever is chosen is chosen on training data alone.

Each takes features and labels to fit on and to test on, and returns an accuracy between 0 and 1.
"""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Protocol = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]

SHOTS, DRAWS = 10, 5


def fit_best(
    estimator: BaseEstimator, grid: dict, features: np.ndarray, labels: np.ndarray, folds=None
) -> GridSearchCV:
    """Choose from the grid on a fifth of the training data (or on ``folds`` of it), then fit on all of it."""
    split = StratifiedShuffleSplit(1, test_size=0.2, random_state=0) if folds is None else folds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged candidate is a candidate like others
        return GridSearchCV(estimator, grid, cv=split).fit(features, labels)


def knn(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Nearest neighbours: standardised features, cosine or Euclidean distance, 1 to 50 neighbours."""
    pipeline = make_pipeline(StandardScaler(), KNeighborsClassifier())
    grid = {
        "kneighborsclassifier__n_neighbors": [k for k in (1, 5, 10, 20, 50) if k < 0.8 * len(train)],
        "kneighborsclassifier__metric": ["cosine", "euclidean"],
        "standardscaler": [StandardScaler(), "passthrough"],
    }
    return float(fit_best(pipeline, grid, train, train_labels).score(test, test_labels))


def linear(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Logistic regression on standardised features; the strength of its penalty is chosen."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}
    return float(fit_best(pipeline, grid, train, train_labels).score(test, test_labels))


def few_shot(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """The linear probe with ten labels a class: mean over five draws of the labels, the same ones for every encoder."""
    scores = []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(train))
        index = np.concatenate([order[train_labels[order] == label][:SHOTS] for label in np.unique(train_labels)])
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        grid = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}
        best = fit_best(
            pipeline, grid, train[index], train_labels[index], StratifiedKFold(5, shuffle=True, random_state=0)
        )
        scores.append(best.score(test, test_labels))
    return float(np.mean(scores))


PROTOCOLS: dict[str, Protocol] = {"knn": knn, "linear": linear, "few_shot": few_shot}
