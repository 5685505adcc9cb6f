"""Tests of the probes: what they reach, what they may look at, and what scikit-learn says by itself."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, ShuffleSplit, StratifiedKFold, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC
from torch import nn

from mmssl.probes import PROTOCOLS, base
from tests.probes.synthetic import CLASSES, make, measured, quantities, r_squared, standardise

OF_CLASSES = [name for name in PROTOCOLS if name != "kernel_ridge"]
# svm goes through all labels; the others fit nothing on training data, and their chance is in tests of their own
UNFITTED = ("retrieval", "clustering", "episodes")
FITTED = [name for name in OF_CLASSES if not name.startswith("svm") and name not in UNFITTED]
NEED_CLASSES = [*UNFITTED, "linear_svm", "svm", "svm_standardized", "planetoid", "planetoid_normalized"]
GUESSING = [name for name in OF_CLASSES if name not in ("retrieval", "clustering")]


@pytest.fixture(autouse=True)
def fewer_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmssl.probes.episodic.EPISODES", 60)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray, GridSearchCV]]:
    """Collects what each probe is fitted on, and what comes out."""
    found: list[tuple[np.ndarray, np.ndarray, GridSearchCV]] = []
    fit_best = base.fit_best

    def spy(estimator, grid, features, labels, folds=None, validation=None) -> GridSearchCV:
        result = fit_best(estimator, grid, features, labels, folds, validation)
        found.append((features.copy(), labels.copy(), result))
        return result

    for module in ("neighbors", "linear_models"):
        monkeypatch.setattr(f"mmssl.probes.{module}.fit_best", spy)
    return found


@pytest.mark.parametrize("name", OF_CLASSES)
def test_separated_classes_are_told_apart(name: str) -> None:
    assert measured(name, *make(noise=1e-3)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", GUESSING)
def test_labels_without_any_relation_give_chance(name: str) -> None:
    """Each guess is right with probability 1 / classes; the mean over draws, or over metrics, varies less."""
    train, labels, test, _ = make(noise=1.0, train=120, test=400)
    rng = np.random.default_rng(1)
    guesses = rng.integers(CLASSES, size=len(test))
    low, high = binom.interval(0.999, len(test), 1 / CLASSES)
    assert low <= measured(name, train, rng.permutation(labels), test, guesses) * len(test) <= high


@pytest.mark.parametrize("name", ["knn", "linear", "few_shot", "knn_weighted", "linear_svm"])
def test_choices_depend_on_training_data_alone(name: str, fits: list) -> None:
    """Other test labels, other test features, fewer test samples: the same probes, fitted on training data."""
    train, labels, test, test_labels = make(noise=1.5)
    rng = np.random.default_rng(1)
    measured(name, train, labels, test, test_labels)
    first = fits.copy()
    for other in ((test, rng.permutation(test_labels)), (100 * test[::-1], test_labels), (test[:7], test_labels[:7])):
        fits.clear()
        measured(name, train, labels, *other)
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
    measured("knn", train, labels, test, test_labels)
    ((fit_on, held_out),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, labels)
    assert len(held_out) == len(train) / 5
    accuracy = {}
    for scaled, metric, k in itertools.product((True, False), ("cosine", "euclidean"), (1, 5, 10, 20, 50)):
        pair = standardise(train[fit_on], train[held_out]) if scaled else [train[fit_on], train[held_out]]
        probe = KNeighborsClassifier(k, metric=metric).fit(pair[0], labels[fit_on])
        accuracy[scaled, metric, k] = probe.score(pair[1], labels[held_out])
    chosen = fits[0][2].best_params_
    scaled = chosen["scale"] != "passthrough"
    key = scaled, chosen["probe__metric"], chosen["probe__n_neighbors"]
    assert len(set(accuracy.values())) > 2
    assert accuracy[key] == max(accuracy.values()) == pytest.approx(fits[0][2].best_score_)


@pytest.mark.parametrize("scale, standardised", [(1e3, True), (1e-3, False)])
def test_knn_is_that_of_scikit_learn_with_what_was_chosen(scale: float, standardised: bool, fits: list) -> None:
    """A column of noise, far larger or far smaller than the others: standardising makes it matter less, or more."""
    train, labels, test, test_labels = make(noise=0.7, columns=2)
    rng = np.random.default_rng(2)
    train = np.hstack([train, scale * rng.standard_normal((len(train), 3))])
    test = np.hstack([test, scale * rng.standard_normal((len(test), 3))])
    accuracy = measured("knn", train, labels, test, test_labels)
    chosen = fits[0][2].best_params_
    assert (chosen["scale"] != "passthrough") == standardised
    if standardised:
        train, test = standardise(train, test)
    probe = KNeighborsClassifier(chosen["probe__n_neighbors"], metric=chosen["probe__metric"])
    assert accuracy == probe.fit(train, labels).score(test, test_labels)


@pytest.mark.parametrize("count", [20, 62, 63])
def test_knn_asks_for_no_more_neighbours_than_there_are_to_choose_on(count: int, fits: list) -> None:
    """A fifth, rounded up, is held out to choose on: 16, 49 and 50 samples are left."""
    assert measured("knn", *make(noise=1e-3, train=count)) == 1.0
    results = fits[0][2].cv_results_
    left = count - -(-count // 5)
    assert set(results["param_probe__n_neighbors"]) == {k for k in (1, 5, 10, 20, 50) if k <= left}
    assert np.isfinite(results["mean_test_score"]).all()


def test_linear_chooses_the_best_penalty_and_fits_it_on_all_training_data(fits: list) -> None:
    train, labels, test, test_labels = make(noise=1.5)
    accuracy = measured("linear", train, labels, test, test_labels)
    ((fit_on, held_out),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, labels)

    def score(penalty: float, *data: np.ndarray) -> float:
        fit, fit_labels, other, other_labels = data
        fit, other = standardise(fit, other)
        return float(LogisticRegression(C=penalty, max_iter=1000).fit(fit, fit_labels).score(other, other_labels))

    inner = (train[fit_on], labels[fit_on], train[held_out], labels[held_out])
    candidates = {penalty: score(penalty, *inner) for penalty in (1e-3, 1e-2, 1e-1, 1.0)}
    chosen = fits[0][2].best_params_["probe__C"]
    assert len(set(candidates.values())) > 1
    assert candidates[chosen] == max(candidates.values())
    assert accuracy == score(chosen, train, labels, test, test_labels)


@pytest.mark.parametrize("name", ["linear", "few_shot"])
def test_scale_and_origin_of_features_do_not_matter_to_linear_probes(name: str) -> None:
    """Powers of two and whole numbers, so that rounding does not matter either."""
    train, labels, test, test_labels = make(noise=1.0)
    train, test = np.round(train * 64), np.round(test * 64)
    scale, origin = 2.0 ** np.array([-12, -6, 0, 0, 6, 12]), np.array([0.0, 4, -8, 16, 0, 32])
    moved = measured(name, (train + origin) * scale, labels, (test + origin) * scale, test_labels)
    assert measured(name, train, labels, test, test_labels) == moved < 1.0


def test_few_shot_is_the_mean_over_five_draws_of_ten_labels_a_class(fits: list) -> None:
    train, labels, test, test_labels = make(noise=1.0)
    accuracy = measured("few_shot", train, labels, test, test_labels)
    assert len(fits) == 5
    assert len({rows.tobytes() for rows, *_ in fits}) == 5
    scores = []
    for rows, own, fit in fits:
        assert np.bincount(own).tolist() == [10] * CLASSES
        assert len(np.unique(rows, axis=0)) == 10 * CLASSES
        probe = LogisticRegression(C=fit.best_params_["probe__C"], max_iter=1000)
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
        measured("few_shot", features, labels, np.hstack([test[:, :1], test[:, : 3 + seed]]), test_labels)
        drawn.append([rows[:, 0].astype(int) for rows, *_ in fits])
    np.testing.assert_array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", OF_CLASSES)
def test_the_same_features_give_the_same_score(name: str) -> None:
    values = []
    for seed in range(2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        values.append(measured(name, *make(noise=1.5)))
    assert values[0] == values[1] < 1.0


@pytest.mark.parametrize("given", [False, True], ids=["held out", "validation"])
@pytest.mark.parametrize("name", FITTED)
def test_no_choice_is_made_by_the_test_labels(name: str, given: bool) -> None:
    """Each guess is right for exactly one class: accuracies for "all are of this class" sum up to 1 over the classes.

    Whoever took the epoch, the penalty or the neighbours that suit the test labels would get more.
    """
    train, labels, test, _ = make(noise=2.0, train=60, test=40)
    validation = make(noise=2.0, train=30, test=1)[:2] if given else None
    scores = [measured(name, train, labels, test, np.full(40, label), validation) for label in range(CLASSES)]
    assert sum(scores) == pytest.approx(1.0, abs=1e-9) and max(scores) < 1


@pytest.mark.parametrize("name", FITTED)
def test_samples_are_tested_one_by_one(name: str) -> None:
    """The accuracy of all is the mean of those of two halves: nothing is fitted on features that are tested on."""
    train, labels, test, test_labels = make(noise=1.5, train=60, test=60)
    test[30:] *= 10
    halves = [measured(name, train, labels, test[half], test_labels[half]) for half in (slice(30), slice(30, None))]
    assert measured(name, train, labels, test, test_labels) == pytest.approx(np.mean(halves), abs=1e-9)


# ---- Choices on a validation set ------------------------------------------------------------------------------------


def test_knn_and_linear_choose_on_the_validation_set_and_fit_on_training_data_alone() -> None:
    train, labels, test, test_labels = make(noise=1.5, train=80, test=200, seed=1)
    validation, rest = (test[:60], test_labels[:60]), (test[60:], test_labels[60:])
    scaled, scaled_validation, scaled_rest = standardise(train, validation[0], rest[0])
    probes = [LogisticRegression(C=C, max_iter=1000).fit(scaled, labels) for C in (1e-3, 1e-2, 1e-1, 1.0)]
    chosen = max(probes, key=lambda probe: probe.score(scaled_validation, validation[1]))
    assert measured("linear", train, labels, *rest, validation) == chosen.score(scaled_rest, rest[1])
    assert chosen is not probes[0] and measured("linear", train, labels, *rest) != chosen.score(scaled_rest, rest[1])

    options = []
    for use, metric, k in itertools.product((True, False), ("cosine", "euclidean"), (1, 5, 10, 20, 50)):
        triple = (scaled, scaled_validation, scaled_rest) if use else (train, validation[0], rest[0])
        probe = KNeighborsClassifier(k, metric=metric).fit(triple[0], labels)
        options.append((probe.score(triple[1], validation[1]), probe.score(triple[2], rest[1])))
    best = max(score for score, _ in options)
    assert measured("knn", train, labels, *rest, validation) in {found for score, found in options if score == best}


# ---- Support vectors by cross-validation ----------------------------------------------------------------------------


@pytest.mark.parametrize("outlier", [1.0, 12.0])
@pytest.mark.parametrize("protocol", ["svm", "svm_standardized"])
def test_svm_is_ten_grid_searches_of_scikit_learn(protocol: str, outlier: float) -> None:
    """Written out: folds of training and test samples together, C chosen inside each training fold."""
    train, labels, test, test_labels = make(noise=2.5, train=90, test=40)
    train[::9] *= outlier  # so that gamma differs from fold to fold
    features, everything = np.concatenate([train, test]), np.concatenate([labels, test_labels])
    scores, chosen = [], set()
    for fit, held_out in StratifiedKFold(10, shuffle=True, random_state=0).split(features, everything):
        search = GridSearchCV(SVC(random_state=42), {"C": [1e-3, 1e-2, 1e-1, 1, 10]}, cv=5)
        scaler = StandardScaler().fit(features[fit]) if protocol == "svm_standardized" else FunctionTransformer()
        search.fit(scaler.transform(features[fit]), everything[fit])
        scores.append(search.score(scaler.transform(features[held_out]), everything[held_out]))
        chosen.add(search.best_params_["C"])
    assert len(chosen) > 1 and len(set(scores)) > 1
    assert measured(protocol, train, labels, test, test_labels) == pytest.approx(np.mean(scores), abs=1e-12)
    validation = test[:15], test_labels[:15]
    moved = measured(protocol, train, labels, test[15:], test_labels[15:], validation)
    order = np.r_[:90, 105:130, 90:105]
    assert moved == measured(
        protocol, features[order][:50], everything[order][:50], features[order][50:], everything[order][50:]
    )


# ---- The probe of nodes ---------------------------------------------------------------------------------------------


def slow_probes(train, labels, validation, validation_labels, test, test_labels) -> dict[str, float]:
    """One layer after the other, as in the papers' code: test accuracy at three epochs, mean over start values."""
    inputs = {name: torch.from_numpy(value).float() for name, value in (("t", train), ("v", validation), ("e", test))}
    target = torch.from_numpy(labels)
    found: dict[str, list[float]] = {"last of the best": [], "first of the best": [], "best test": []}
    for seed in range(20):
        layer = nn.Linear(train.shape[1], CLASSES)
        nn.init.xavier_uniform_(layer.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, weight_decay=1e-4)
        curve = []
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(inputs["t"]), target).backward()
            optimizer.step()
            with torch.no_grad():
                guesses = {name: layer(value).argmax(dim=1).numpy() for name, value in inputs.items()}
            curve.append(((guesses["v"] == validation_labels).mean(), (guesses["e"] == test_labels).mean()))
        chosen, tested = np.array(curve).T
        best = np.flatnonzero(chosen == chosen.max())
        found["last of the best"].append(tested[best[-1]])
        found["first of the best"].append(tested[best[0]])
        found["best test"].append(tested.max())
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_planetoid_is_that_of_the_papers_layer_by_layer() -> None:
    """Twenty layers at once are twenty layers one by one; of the best validation epochs it is the last."""
    train, labels, test, test_labels = make(noise=1.5, train=40, test=300, seed=1)
    validation, held_out = (test[:80], test_labels[:80]), (test[80:], test_labels[80:])
    expected = slow_probes(train, labels, *validation, *held_out)
    found = measured("planetoid", train, labels, *held_out, validation)
    assert found == pytest.approx(expected["last of the best"], abs=3 / (20 * 220))
    assert abs(found - expected["first of the best"]) > 0.005 and expected["best test"] - found > 0.005


def test_planetoid_without_a_validation_set_holds_a_fifth_out_and_does_not_fit_on_it() -> None:
    train, labels, test, test_labels = make(noise=1.5, train=60, test=100)
    ((fit, held_out),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, labels)
    expected = measured("planetoid", train[fit], labels[fit], test, test_labels, (train[held_out], labels[held_out]))
    assert measured("planetoid", train, labels, test, test_labels) == expected != 1.0


@pytest.mark.parametrize("probe", ["planetoid", "planetoid_normalized"])
def test_planetoid_knows_classes_by_their_label_and_validates_on_others_too(probe) -> None:
    """Labels with gaps; a validation class that no training sample has counts as wrong and changes nothing else."""
    train, labels, test, test_labels = make(noise=1.5, train=60, test=100)
    validation = test[:40], test_labels[:40]
    expected = measured(probe, train, labels, test[40:], test_labels[40:], validation)
    names = np.array([7, 3, 90, 12])
    order = np.argsort(np.argsort(names))  # start values go by the order of the classes
    first = measured(
        probe, train, order[labels], test[40:], order[test_labels[40:]], (test[:40], order[test_labels[:40]])
    )
    assert (
        measured(probe, train, names[labels], test[40:], names[test_labels[40:]], (test[:40], names[test_labels[:40]]))
        == first
    )
    strange = np.concatenate([validation[0], test[:5]]), np.concatenate([validation[1], np.full(5, 55)])
    assert measured(probe, train, labels, test[40:], test_labels[40:], strange) == expected


def test_planetoid_leaves_the_global_random_state_and_refuses_what_is_not_finite() -> None:
    train, labels, test, test_labels = make(noise=1.5, train=40, test=20)
    before = torch.get_rng_state()
    measured("planetoid", train, labels, test, test_labels)
    assert torch.equal(torch.get_rng_state(), before)
    test[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        measured("planetoid", train, labels, test, test_labels)


def test_planetoid_normalized_centres_by_training_features_and_sets_lengths_to_one() -> None:
    """Written out; then: origin and scale of all features do not matter, nor the length of a test row from there."""
    train, labels, test, test_labels = make(noise=1.5, train=60, test=100)
    validation = test[:40], test_labels[:40]
    centre = train.mean(axis=0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows - centre) / np.linalg.norm(rows - centre, axis=1, keepdims=True)

    found = measured("planetoid_normalized", train, labels, test[40:], test_labels[40:], validation)
    rest = test_labels[40:]
    assert found == measured(
        "planetoid", unit(train), labels, unit(test[40:]), rest, (unit(validation[0]), validation[1])
    )
    assert found != measured("planetoid", train, labels, test[40:], rest, validation)
    moved = [8 * (rows + 3) for rows in (train, test[40:], validation[0])]
    assert measured(
        "planetoid_normalized", moved[0], labels, moved[1], rest, (moved[2], validation[1])
    ) == pytest.approx(found, abs=2e-3)
    longer = centre + (test[40:] - centre) * np.linspace(0.5, 9, 60)[:, None]
    assert measured("planetoid_normalized", train, labels, longer, rest, validation) == pytest.approx(found, abs=2e-3)


def test_linear_probe_of_quantities_is_ridge_regression_in_closed_form() -> None:
    train, labels, test, test_labels = quantities()
    fit_on, held_out = next(ShuffleSplit(1, test_size=0.2, random_state=0).split(train))

    def guesses(x: np.ndarray, y: np.ndarray, other: np.ndarray, alpha: float) -> np.ndarray:
        x, other = standardise(x, other)
        weight = np.linalg.solve(x.T @ x + alpha * np.eye(5), x.T @ (y - y.mean()))
        return other @ weight + y.mean()

    alphas = [1.0, 10.0, 100.0, 1e3, 1e4]
    inner = [r_squared(guesses(train[fit_on], labels[fit_on], train[held_out], a), labels[held_out]) for a in alphas]
    expected = r_squared(guesses(train, labels, test, alphas[int(np.argmax(inner))]), test_labels)
    assert measured("linear", train, labels, test, test_labels) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in NEED_CLASSES])
def test_quantities_are_regressed_well_and_noise_is_not(name: str) -> None:
    train, labels, test, test_labels = quantities(noise=0.1, train=500)
    assert 0.6 < measured(name, train, labels, test, test_labels) <= 1.0
    shuffled = np.random.default_rng(1).permutation(labels)
    assert measured(name, train, shuffled, test, test_labels) < 0.2


@pytest.mark.parametrize("name", NEED_CLASSES)
def test_protocols_of_classes_refuse_quantities(name: str) -> None:
    with pytest.raises(ValueError, match="found quantities as labels; this protocol needs classes"):
        measured(name, *quantities())


def test_a_protocol_of_quantities_refuses_classes() -> None:
    with pytest.raises(ValueError, match="found classes as labels; this protocol needs quantities"):
        measured("kernel_ridge", *make(noise=1.0))
