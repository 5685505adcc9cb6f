"""Nearest neighbours."""

import numpy as np
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from mmssl.probes.base import Points, Task, fit_best, graded, quantities

TEMPERATURE = 0.07


def knn(task: Task) -> Points:
    """Nearest neighbours: standardised features or not, cosine or Euclidean distance, 1 to 50 neighbours."""
    neighbors = KNeighborsRegressor() if quantities(task.train_labels) else KNeighborsClassifier()
    pipeline = Pipeline([("scale", StandardScaler()), ("probe", neighbors)])
    grid = {
        "probe__n_neighbors": [k for k in (1, 5, 10, 20, 50) if k < 0.8 * len(task.train)],
        "probe__metric": ["cosine", "euclidean"],
        "scale": [StandardScaler(), "passthrough"],
    }
    best = fit_best(pipeline, grid, task.train, task.train_labels, validation=task.validation)
    return graded(best.predict(task.test), task)


def knn_weighted(task: Task) -> Points:
    """Nearest neighbours by cosine, whose votes weigh exp(cosine / 0.07): 10, 20, 100 or 200, as far as there are.

    The classifier of Wu et al. (2018), as DINO (Caron et al., 2021) takes it; guessed quantities are the weighted mean.
    Features are as they are, not standardised. Where there are less than 13 training samples, one neighbour votes.
    """
    kind = KNeighborsRegressor if quantities(task.train_labels) else KNeighborsClassifier
    counts = [k for k in (10, 20, 100, 200) if k < 0.8 * len(task.train)] or [1]
    neighbors = kind(metric="cosine", weights=from_distance)
    best = fit_best(neighbors, {"n_neighbors": counts}, task.train, task.train_labels, validation=task.validation)
    return graded(best.predict(task.test), task)


def from_distance(distances: np.ndarray) -> np.ndarray:
    """The weights of votes, less a factor that all have: the distance is 1 - cosine."""
    return np.exp(-distances / TEMPERATURE)
