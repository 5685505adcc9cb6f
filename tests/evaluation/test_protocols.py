"""Tests of the probes: what they reach, what they may look at, and what scikit-learn says by itself."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier

from mmssl.evaluation import protocols
from mmssl.evaluation.protocols import PROTOCOLS, few_shot, knn, linear

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
CLASSES = 4


def make(noise: float, train: int = 120, test: int = 100, columns: int = 6, seed: int = 0) -> Split:
    """Gaussian classes of equal size around random means: features and labels to fit on, then those to test on."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((CLASSES, columns))
    labels = rng.permutation(np.arange(train + test) % CLASSES)
    features = means[labels] + noise * rng.standard_normal((train + test, columns))
    return features[:train], labels[:train], features[train:], labels[train:]


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    return [(each - train.mean(axis=0)) / train.std(axis=0) for each in (train, *others)]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray, GridSearchCV]]:
    """Collects what each probe is fitted on, and what comes out."""
    found: list[tuple[np.ndarray, np.ndarray, GridSearchCV]] = []
    fit_best = protocols.fit_best

    def spy(estimator, grid, features, labels, folds=None) -> GridSearchCV:
        result = fit_best(estimator, grid, features, labels, folds)
        found.append((features.copy(), labels.copy(), result))
        return result

    monkeypatch.setattr(protocols, "fit_best", spy)
    return found


@pytest.mark.parametrize("name", PROTOCOLS)
def test_separated_classes_are_told_apart(name: str) -> None:
    assert PROTOCOLS[name](*make(noise=1e-3)) == 1.0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_labels_without_any_relation_give_chance(name: str) -> None:
    """Each guess is right with probability 1 / classes; the mean over draws of few_shot varies less than one draw."""
    train, labels, test, _ = make(noise=1.0, train=160, test=600)
    rng = np.random.default_rng(1)
    guesses = rng.integers(CLASSES, size=len(test))
    low, high = binom.interval(0.999, len(test), 1 / CLASSES)
    assert low <= PROTOCOLS[name](train, rng.permutation(labels), test, guesses) * len(test) <= high


@pytest.mark.parametrize("name", PROTOCOLS)
def test_choices_depend_on_training_data_alone(name: str, fits: list) -> None:
    """Other test labels, other test features, fewer test samples: the same probes, fitted on training data."""
    train, labels, test, test_labels = make(noise=1.5)
    rng = np.random.default_rng(1)
    PROTOCOLS[name](train, labels, test, test_labels)
    first = fits.copy()
    for other in ((test, rng.permutation(test_labels)), (100 * test[::-1], test_labels), (test[:7], test_labels[:7])):
        fits.clear()
        PROTOCOLS[name](train, labels, *other)
        for (rows, own, fit), (first_rows, first_own, first_fit) in zip(fits, first, strict=True):
            np.testing.assert_array_equal(rows, first_rows)
            np.testing.assert_array_equal(own, first_own)
            assert str(fit.best_params_) == str(first_fit.best_params_)
            np.testing.assert_array_equal(fit.cv_results_["mean_test_score"], first_fit.cv_results_["mean_test_score"])
    known = {(*row, label) for row, label in zip(train.tolist(), labels, strict=True)}
    assert all(
        {(*row, label) for row, label in zip(rows.tolist(), own, strict=True)} <= known for rows, own, _ in first
    )


def test_knn_chooses_the_best_on_a_fifth_of_the_training_data(fits: list) -> None:
    """A loop over the grid, standardised by the statistics of the four fifths that are fitted on."""
    train, labels, test, test_labels = make(noise=1.5)
    knn(train, labels, test, test_labels)
    ((fit_on, held_out),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, labels)
    assert len(held_out) == len(train) / 5
    accuracy = {}
    for scaled, metric, k in itertools.product((True, False), ("cosine", "euclidean"), (1, 5, 10, 20, 50)):
        pair = standardise(train[fit_on], train[held_out]) if scaled else [train[fit_on], train[held_out]]
        probe = KNeighborsClassifier(k, metric=metric).fit(pair[0], labels[fit_on])
        accuracy[scaled, metric, k] = probe.score(pair[1], labels[held_out])
    chosen = fits[0][2].best_params_
    scaled = chosen["standardscaler"] != "passthrough"
    key = scaled, chosen["kneighborsclassifier__metric"], chosen["kneighborsclassifier__n_neighbors"]
    assert len(set(accuracy.values())) > 2
    assert accuracy[key] == max(accuracy.values()) == pytest.approx(fits[0][2].best_score_)


@pytest.mark.parametrize("scale, standardised", [(1e3, True), (1e-3, False)])
def test_knn_is_that_of_scikit_learn_with_what_was_chosen(scale: float, standardised: bool, fits: list) -> None:
    """A column of noise, far larger or far smaller than the others: standardising makes it matter less, or more."""
    train, labels, test, test_labels = make(noise=0.7, columns=2)
    rng = np.random.default_rng(2)
    train = np.hstack([train, scale * rng.standard_normal((len(train), 3))])
    test = np.hstack([test, scale * rng.standard_normal((len(test), 3))])
    accuracy = knn(train, labels, test, test_labels)
    chosen = fits[0][2].best_params_
    assert (chosen["standardscaler"] != "passthrough") == standardised
    if standardised:
        train, test = standardise(train, test)
    probe = KNeighborsClassifier(
        chosen["kneighborsclassifier__n_neighbors"], metric=chosen["kneighborsclassifier__metric"]
    )
    assert accuracy == probe.fit(train, labels).score(test, test_labels)


@pytest.mark.parametrize("count", [20, 62, 63])
def test_knn_asks_for_no_more_neighbours_than_there_are_to_choose_on(count: int, fits: list) -> None:
    """A fifth, rounded up, is held out to choose on: 16, 49 and 50 samples are left."""
    assert knn(*make(noise=1e-3, train=count)) == 1.0
    results = fits[0][2].cv_results_
    left = count - -(-count // 5)
    assert set(results["param_kneighborsclassifier__n_neighbors"]) == {k for k in (1, 5, 10, 20, 50) if k <= left}
    assert np.isfinite(results["mean_test_score"]).all()


def test_linear_chooses_the_best_penalty_and_fits_it_on_all_training_data(fits: list) -> None:
    train, labels, test, test_labels = make(noise=1.5)
    accuracy = linear(train, labels, test, test_labels)
    ((fit_on, held_out),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, labels)

    def score(penalty: float, *data: np.ndarray) -> float:
        fit, fit_labels, other, other_labels = data
        fit, other = standardise(fit, other)
        return float(LogisticRegression(C=penalty, max_iter=1000).fit(fit, fit_labels).score(other, other_labels))

    inner = (train[fit_on], labels[fit_on], train[held_out], labels[held_out])
    candidates = {penalty: score(penalty, *inner) for penalty in (1e-3, 1e-2, 1e-1, 1.0)}
    chosen = fits[0][2].best_params_["logisticregression__C"]
    assert len(set(candidates.values())) > 1
    assert candidates[chosen] == max(candidates.values())
    assert accuracy == score(chosen, train, labels, test, test_labels)


@pytest.mark.parametrize("name", ["linear", "few_shot"])
def test_scale_and_origin_of_features_do_not_matter_to_linear_probes(name: str) -> None:
    """Powers of two and whole numbers, so that rounding does not matter either."""
    train, labels, test, test_labels = make(noise=1.0)
    train, test = np.round(train * 64), np.round(test * 64)
    scale, origin = 2.0 ** np.array([-12, -6, 0, 0, 6, 12]), np.array([0.0, 4, -8, 16, 0, 32])
    moved = PROTOCOLS[name]((train + origin) * scale, labels, (test + origin) * scale, test_labels)
    assert PROTOCOLS[name](train, labels, test, test_labels) == moved < 1.0


def test_few_shot_is_the_mean_over_five_draws_of_ten_labels_a_class(fits: list) -> None:
    train, labels, test, test_labels = make(noise=1.0)
    accuracy = few_shot(train, labels, test, test_labels)
    assert len(fits) == 5
    assert len({rows.tobytes() for rows, *_ in fits}) == 5
    scores = []
    for rows, own, fit in fits:
        assert np.bincount(own).tolist() == [10] * CLASSES
        assert len(np.unique(rows, axis=0)) == 10 * CLASSES
        probe = LogisticRegression(C=fit.best_params_["logisticregression__C"], max_iter=1000)
        scaled, scaled_test = standardise(rows, test)
        scores.append(probe.fit(scaled, own).score(scaled_test, test_labels))
    assert len(set(scores)) > 1
    assert accuracy == pytest.approx(np.mean(scores), abs=1e-12)


def test_few_shot_draws_the_same_samples_for_every_encoder(fits: list) -> None:
    """The first column is the number of the row; all else differs, and so does the global random state."""
    train, labels, test, test_labels = make(noise=1.0)
    drawn = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        np.random.seed(seed)
        fits.clear()
        features = np.hstack([np.arange(len(train))[:, None], rng.standard_normal((len(train), 3 + seed))])
        few_shot(features, labels, np.hstack([test[:, :1], test[:, : 3 + seed]]), test_labels)
        drawn.append([rows[:, 0].astype(int) for rows, *_ in fits])
    np.testing.assert_array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_same_features_give_the_same_score(name: str) -> None:
    values = []
    for seed in range(2):
        np.random.seed(seed)
        values.append(PROTOCOLS[name](*make(noise=1.5)))
    assert values[0] == values[1] < 1.0
