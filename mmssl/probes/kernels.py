"""Kernels: support vectors by cross-validation of all labels, and ridge regression."""

from collections.abc import Sequence

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.compose import TransformedTargetRegressor
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mmssl.probes.base import Points, Task, fit_best, graded, needs_classes, needs_quantities

FOLDS, STRENGTHS = 10, (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_EXACT, COMPONENTS = 3000, 1000


def svm(task: Task) -> Points:
    """RBF support vectors by 10-fold cross-validation of all labels there are, test ones included: for TU graphs.

    The protocol of InfoGraph (Sun et al., 2020) and GraphMAE (Hou et al., 2022): folds are stratified and shuffled; C
    is one of 1e-3, ..., 10, by the accuracy of 5-fold cross-validation inside the training folds; gamma is
    scikit-learn's "scale"; the score is the mean accuracy of the ten folds. Distances are computed once for all of it,
    which saves time and changes nothing.
    """
    return cross_validated_svm(task)


def svm_standardized(task: Task) -> Points:
    """The svm protocol on features that are standardised by the training folds."""
    return cross_validated_svm(task, standardize=True)


def cross_validated_svm(task: Task, standardize: bool = False) -> Points:
    """Accuracy in ten folds of all labels: of the training, the test and the validation samples, in this order.

    Samples of a smaller fold weigh more, so that their mean is the mean of the folds.
    """
    parts = [(task.train, task.train_labels), (task.test, task.test_labels)]
    parts += [task.validation] if task.validation is not None else []
    features, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    needs_classes(labels)
    features = features.astype(np.float64)

    def correct(fit: np.ndarray, held_out: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
        gamma = 1 / (features.shape[1] * (scaled[fit].var() or 1.0))
        kernel, other = (np.exp(-gamma * distances[np.ix_(rows, fit)]) for rows in (fit, held_out))
        machines = [SVC(C=strength, kernel="precomputed") for strength in strengths]
        return np.stack([machine.fit(kernel, labels[fit]).predict(other) == labels[held_out] for machine in machines])

    points = np.empty(len(labels))
    scaled, distances = features, euclidean_distances(features, squared=True)  # once for all folds
    for fit, held_out in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, labels):
        if standardize:
            scaled = StandardScaler().fit(features[fit]).transform(features)
            distances = euclidean_distances(scaled, squared=True)
        inner = StratifiedKFold(5).split(fit, labels[fit])
        accuracies = [correct(fit[one], fit[other], STRENGTHS).mean(axis=1) for one, other in inner]
        chosen = np.mean(accuracies, axis=0).argmax()
        weight = len(labels) / (FOLDS * len(held_out))
        points[held_out] = weight * correct(fit, held_out, STRENGTHS[chosen : chosen + 1])[0]
    return {"accuracy": points}


def kernel_ridge(task: Task) -> Points:
    """Ridge regression of quantities with an RBF kernel on standardised features; its width and penalty are chosen.

    gamma is one of 0.01, 0.1, 1, over the number of features. Above 3,000 training samples the kernel is Nyström's
    approximation (Williams and Seeger, 2001) by 1,000 of them, the same ones for every row.
    """
    needs_quantities(task.train_labels)
    gammas = [share / task.train.shape[1] for share in (0.01, 0.1, 1.0)]
    steps: list[tuple[str, BaseEstimator]] = [("scale", StandardScaler())]
    if len(task.train) <= MOST_EXACT:
        steps.append(("probe", KernelRidge(kernel="rbf")))
        grid = {"probe__gamma": gammas}
    else:
        steps += [("kernel", Nystroem(n_components=COMPONENTS, random_state=0)), ("probe", Ridge())]
        grid = {"kernel__gamma": gammas}
    grid["probe__alpha"] = [1e-3, 1e-2, 1e-1, 1.0]
    # A kernel has no intercept: quantities are standardised as the features are.
    regressor = TransformedTargetRegressor(Pipeline(steps), transformer=StandardScaler())
    grid = {f"regressor__{name}": values for name, values in grid.items()}
    best = fit_best(regressor, grid, task.train, task.train_labels, validation=task.validation)
    return graded(best.predict(task.test), task)
