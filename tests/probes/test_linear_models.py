"""Tests of linear support vectors and of the linear probe with few labels: written out."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmssl.probes import PROTOCOLS, Task, default_protocols
from mmssl.probes.linear_models import draws
from tests.probes.synthetic import make, measured, quantities, r_squared, standardise


def slow_svm(train: np.ndarray, labels: np.ndarray, other: np.ndarray, strength: float) -> np.ndarray:
    """One class against the others: half the square of weights and bias, and C times the squared hinge losses."""
    train, other = (np.hstack([each, np.ones((len(each), 1))]) for each in standardise(train, other))
    scores = []
    for label in np.unique(labels):
        sign = np.where(labels == label, 1.0, -1.0)

        def objective(weight: np.ndarray, sign: np.ndarray = sign) -> float:
            return 0.5 * weight @ weight + strength * np.square(np.maximum(0, 1 - sign * (train @ weight))).sum()

        scores.append(other @ minimize(objective, np.zeros(train.shape[1]), method="BFGS").x)
    return np.unique(labels)[np.argmax(scores, axis=0)]


@pytest.mark.parametrize("given", [False, True], ids=["held out", "validation"])
def test_linear_svm_is_the_best_of_five_strengths_by_another_solver(given: bool) -> None:
    train, labels, test, test_labels = make(noise=2.0, train=120, test=300)
    validation = (test[:100], test_labels[:100]) if given else None
    test, test_labels = test[100:], test_labels[100:]
    ((inner, outer),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, labels)
    fit, fit_labels = (train, labels) if given else (train[inner], labels[inner])
    choose, wanted = validation or (train[outer], labels[outer])
    accuracy = {C: (slow_svm(fit, fit_labels, choose, C) == wanted).mean() for C in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
    chosen = max(accuracy, key=lambda C: accuracy[C])
    assert len(set(accuracy.values())) > 1
    found = measured("linear_svm", train, labels, test, test_labels, validation)
    expected = (slow_svm(train, labels, test, chosen) == test_labels).mean()
    assert found == pytest.approx(expected, abs=1.01 / 200)  # a sample may lie on the border


def test_linear_svm_of_pixels_of_digits_by_another_solver() -> None:
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels[:, pixels[:600].std(axis=0) > 0]
    given = pixels[:600], labels[:600], pixels[1000:], labels[1000:], (pixels[600:1000], labels[600:1000])
    accuracy = measured("linear_svm", *given)
    assert 0.85 < accuracy < 1 and abs(accuracy - measured("linear", *given)) < 0.05


def test_draws_are_stratified_and_the_same_for_every_row() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [300, 40, 4]))
    task = Task(np.zeros((344, 2)), labels, np.zeros((1, 2)), labels[:1])
    other = Task(np.ones((344, 5)), labels, np.ones((1, 5)), labels[:1])
    for share, counts in ((0.01, [3, 1, 1]), (0.1, [30, 4, 1])):
        drawn = list(draws(task, lambda count: max(1, round(share * count))))  # noqa: B023
        assert [np.bincount(labels[index]).tolist() for index in drawn] == [counts] * 5
        assert all(len(set(index)) == sum(counts) for index in drawn)
        assert len({index.tobytes() for index in drawn}) == 5
        np.random.seed(3)
        for one, another in zip(drawn, draws(other, lambda count: max(1, round(share * count))), strict=True):  # noqa: B023
            np.testing.assert_array_equal(one, another)


def test_low_label_is_the_mean_over_draws_and_has_its_penalty_from_them_alone() -> None:
    """1 % of some 75 a class is one label, whose penalty is fixed; 10 % are eight, by which it is chosen."""
    train, labels, test, test_labels = make(noise=1.2, train=300, test=200)
    task = Task(train, labels, test, test_labels, (test[:30], test_labels[::-1][:30]))
    found = PROTOCOLS["low_label"](task)
    assert list(found) == ["1 %", "10 %"]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    strengths = set()
    for metric, share in {"1 %": 0.01, "10 %": 0.1}.items():
        scores = []
        for index in draws(task, lambda count: max(1, round(share * count))):  # noqa: B023
            assert set(np.bincount(labels[index])) <= ({1} if share == 0.01 else {7, 8})
            strength = 0.1
            if share == 0.1:
                pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
                search = GridSearchCV(pipeline, {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}, cv=folds)
                strength = search.fit(train[index], labels[index]).best_params_["logisticregression__C"]
                strengths.add(strength)
            scaled, scaled_test = standardise(train[index], test)
            probe = LogisticRegression(C=strength, max_iter=1000).fit(scaled, labels[index])
            scores.append(probe.score(scaled_test, test_labels))
        assert len(set(scores)) > 1
        assert found[metric].shape == (200,)
        assert found[metric].mean() == pytest.approx(np.mean(scores), abs=1e-12)
    assert len(strengths) > 1
    assert 0.25 < found["1 %"].mean() < found["10 %"].mean() < 1


def test_low_label_of_quantities_takes_ten_at_least() -> None:
    train, labels, test, test_labels = quantities(noise=0.1, train=300)
    task = Task(train, labels, test, test_labels)
    found = PROTOCOLS["low_label"](task)
    for metric, count in (("1 %", 10), ("10 %", 30)):
        scores = []
        for index in draws(task, lambda _: count):  # noqa: B023
            pipeline = make_pipeline(StandardScaler(), Ridge())
            grid = {"ridge__alpha": [1.0, 10.0, 100.0, 1e3, 1e4]}
            search = GridSearchCV(pipeline, grid, cv=KFold(5, shuffle=True, random_state=0))
            scores.append(r_squared(search.fit(train[index], labels[index]).predict(test), test_labels))
        assert found[metric].mean() == pytest.approx(np.mean(scores), abs=1e-9)


def test_low_label_of_pixels_of_digits_grows_with_the_labels() -> None:
    pixels, labels = load_digits(return_X_y=True)
    found = PROTOCOLS["low_label"](Task(pixels[:1000], labels[:1000], pixels[1000:], labels[1000:]))
    assert 0.3 < found["1 %"].mean() < 0.7 < found["10 %"].mean() < 0.95


@pytest.mark.parametrize("count, names", [(99, ["knn", "linear"]), (100, ["knn", "linear", "few_shot"])])
def test_few_shot_of_quantities_needs_a_hundred(count: int, names: list[str]) -> None:
    train, labels, test, test_labels = quantities(train=count)
    assert default_protocols(labels) == names
    if "few_shot" not in names:
        with pytest.raises(ValueError, match="found 99 labels; expected at least 100"):
            measured("few_shot", train, labels, test, test_labels)
