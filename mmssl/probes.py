"""Probes of frozen features. Whatever is chosen is chosen without the labels that are tested on.

Each takes features (n, F) and labels (n,) to fit on and to test on, and returns the accuracy, between 0 and 1, or where
labels are quantities (floats), the coefficient of determination R², at most 1. Where the data have a published
validation set, a pair of features and labels, choices are made on it; else on a part of the training data.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    PredefinedSplit,
    ShuffleSplit,
    StratifiedKFold,
    StratifiedShuffleSplit,
)
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import SVC
from sklearn.utils import assert_all_finite
from torch import Tensor, nn

Protocol = Callable[..., float]
Labelled = tuple[np.ndarray, np.ndarray]

SHOTS, DRAWS = 10, 5
FOLDS, STRENGTHS = 10, (1e-3, 1e-2, 1e-1, 1.0, 10.0)
STARTS, EPOCHS = 20, 300


def quantities(labels: np.ndarray) -> bool:
    """Whether labels are quantities to be regressed, not classes."""
    return labels.dtype.kind == "f"


def needs_classes(labels: np.ndarray) -> None:
    if quantities(labels):
        raise ValueError("found quantities as labels; this protocol needs classes: use linear, knn, mlp or boosting")


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
        kind = ShuffleSplit if quantities(labels) else StratifiedShuffleSplit
        folds = kind(1, test_size=0.2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged candidate is a candidate like others
        if validation is None:
            return GridSearchCV(estimator, grid, cv=folds).fit(features, labels)
        both, both_labels = (np.concatenate(pair) for pair in zip((features, labels), validation, strict=True))
        folds = PredefinedSplit(np.repeat([-1, 0], [len(labels), len(validation[1])]))
        search = GridSearchCV(estimator, grid, cv=folds, refit=False).fit(both, both_labels)
        return clone(estimator).set_params(**search.best_params_).fit(features, labels)


def knn(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """Nearest neighbours: standardised features or not, cosine or Euclidean distance, 1 to 50 neighbours."""
    neighbors = KNeighborsRegressor() if quantities(train_labels) else KNeighborsClassifier()
    pipeline = Pipeline([("scale", StandardScaler()), ("probe", neighbors)])
    grid = {
        "probe__n_neighbors": [k for k in (1, 5, 10, 20, 50) if k < 0.8 * len(train)],
        "probe__metric": ["cosine", "euclidean"],
        "scale": [StandardScaler(), "passthrough"],
    }
    return float(fit_best(pipeline, grid, train, train_labels, validation=validation).score(test, test_labels))


def linear_probe(labels: np.ndarray) -> tuple[Pipeline, dict]:
    """Logistic or ridge regression on standardised features, and the strengths of its penalty to choose from."""
    if quantities(labels):
        return Pipeline([("scale", StandardScaler()), ("probe", Ridge())]), {
            "probe__alpha": [1.0, 10.0, 100.0, 1e3, 1e4]
        }
    logistic = LogisticRegression(max_iter=1000)
    return Pipeline([("scale", StandardScaler()), ("probe", logistic)]), {"probe__C": [1e-3, 1e-2, 1e-1, 1.0]}


def linear(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """Logistic or ridge regression on standardised features; the strength of its penalty is chosen."""
    best = fit_best(*linear_probe(train_labels), train, train_labels, validation=validation)
    return float(best.score(test, test_labels))


def few_shot(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """The linear probe with ten labels a class, or a hundred quantities: mean over five draws, the same for every row.

    The penalty is chosen by cross-validation of the drawn labels alone: a validation set would be more shots.
    """
    scores = []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(train))
        if quantities(train_labels):
            index, folds = order[: 10 * SHOTS], KFold(5, shuffle=True, random_state=0)
        else:
            index = np.concatenate([order[train_labels[order] == label][:SHOTS] for label in np.unique(train_labels)])
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
        best = fit_best(*linear_probe(train_labels), train[index], train_labels[index], folds)
        scores.append(best.score(test, test_labels))
    return float(np.mean(scores))


def mlp(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """A network of one hidden layer of 256 on standardised features, stopped early on a tenth of its training data.

    Its weight decay is chosen; quantities are standardised as the features are.
    """
    options = {"hidden_layer_sizes": (256,), "early_stopping": True, "random_state": 0}
    network: BaseEstimator = MLPClassifier(**options)
    name = "probe__alpha"
    if quantities(train_labels):
        network = TransformedTargetRegressor(MLPRegressor(**options), transformer=StandardScaler())
        name = "probe__regressor__alpha"
    pipeline = Pipeline([("scale", StandardScaler()), ("probe", network)])
    best = fit_best(pipeline, {name: [1e-4, 1e-1]}, train, train_labels, validation=validation)
    return float(best.score(test, test_labels))


def boosting(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """Gradient boosting of trees by histograms, stopped early on a tenth of its training data: for raw columns."""
    kind = HistGradientBoostingRegressor if quantities(train_labels) else HistGradientBoostingClassifier
    trees = kind(max_iter=500, early_stopping=True, random_state=0)
    grid = {"learning_rate": [0.05, 0.1], "max_leaf_nodes": [15, 31]}
    return float(fit_best(trees, grid, train, train_labels, validation=validation).score(test, test_labels))


def svm(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """RBF support vectors by 10-fold cross-validation of all labels there are, test ones included: for TU graphs.

    The protocol of InfoGraph (Sun et al., 2020) and GraphMAE (Hou et al., 2022): folds are stratified and shuffled; C
    is one of 1e-3, ..., 10, by the accuracy of 5-fold cross-validation inside the training folds; gamma is
    scikit-learn's "scale"; the score is the mean accuracy of the ten folds. Distances are computed once for all of it,
    which saves time and changes nothing.
    """
    return cross_validated_svm([(train, train_labels), (test, test_labels), *([validation] if validation else [])])


def svm_standardized(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """The svm protocol on features that are standardised by the training folds."""
    parts = [(train, train_labels), (test, test_labels), *([validation] if validation else [])]
    return cross_validated_svm(parts, standardize=True)


def cross_validated_svm(parts: Sequence[Labelled], standardize: bool = False) -> float:
    """Mean accuracy of ten folds of all parts together."""
    features, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    needs_classes(labels)
    features = features.astype(np.float64)

    def accuracies(fit: np.ndarray, held_out: np.ndarray, strengths: Sequence[float]) -> list[float]:
        gamma = 1 / (features.shape[1] * (scaled[fit].var() or 1.0))
        kernel, other = (np.exp(-gamma * distances[np.ix_(rows, fit)]) for rows in (fit, held_out))
        machines = [SVC(C=strength, kernel="precomputed") for strength in strengths]
        return [machine.fit(kernel, labels[fit]).score(other, labels[held_out]) for machine in machines]

    scores: list[float] = []
    scaled, distances = features, euclidean_distances(features, squared=True)  # once for all folds
    for fit, held_out in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, labels):
        if standardize:
            scaled = StandardScaler().fit(features[fit]).transform(features)
            distances = euclidean_distances(scaled, squared=True)
        inner = StratifiedKFold(5).split(fit, labels[fit])
        chosen = np.mean([accuracies(fit[one], fit[other], STRENGTHS) for one, other in inner], axis=0).argmax()
        scores += accuracies(fit, held_out, STRENGTHS[chosen : chosen + 1])
    return float(np.mean(scores))


def planetoid(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """One linear layer by Adam, taken at its best validation epoch; mean over 20 start values: for nodes of graphs.

    The protocol of DGI (Veličković et al., 2019) and GraphMAE (Hou et al., 2022) on the splits of Planetoid: learning
    rate 0.01, weight decay 1e-4, 300 epochs of all training data at once; of epochs that are equally good, the last.
    Without validation data a stratified fifth of the training data is held out, and not fitted on.
    """
    needs_classes(train_labels)
    if validation is None:
        ((inner, outer),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, train_labels)
        validation = train[outer], train_labels[outer]
        train, train_labels = train[inner], train_labels[inner]
    for features in (train, validation[0], test):
        assert_all_finite(features)
    classes, numbers = np.unique(train_labels, return_inverse=True)
    number = {label: position for position, label in enumerate(classes)}
    # A class that the training data lack is never guessed: its validation labels are -1, which nothing equals.
    validation_numbers = np.array([number.get(label, -1) for label in validation[1]])
    fit, choose, held_out = (torch.from_numpy(array).float() for array in (train, validation[0], test))
    weight, bias = best_linear(fit, torch.from_numpy(numbers), choose, torch.from_numpy(validation_numbers))
    guesses = classes[logits(held_out, weight, bias).argmax(dim=-1).numpy()]
    return float((guesses == test_labels[:, None]).mean())


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


def planetoid_normalized(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: Labelled | None = None,
) -> float:
    """The planetoid probe on features less the mean of the training ones, scaled to length 1."""
    centre = train.mean(axis=0)
    if validation is not None:
        validation = normalize(validation[0] - centre), validation[1]
    return planetoid(normalize(train - centre), train_labels, normalize(test - centre), test_labels, validation)


PROTOCOLS: dict[str, Protocol] = {
    "knn": knn,
    "linear": linear,
    "few_shot": few_shot,
    "mlp": mlp,
    "boosting": boosting,
    "svm": svm,
    "svm_standardized": svm_standardized,
    "planetoid": planetoid,
    "planetoid_normalized": planetoid_normalized,
}
DEFAULT_PROTOCOLS = ("knn", "linear", "few_shot")
RAW_ONLY = ("boosting",)  # a baseline on columns as they are: trees do not read embeddings well
