"""Tests of kernel ridge regression: its closed form."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.datasets import load_diabetes
from sklearn.model_selection import ShuffleSplit

from tests.probes.synthetic import Split, measured, quantities, r_squared, standardise


def slow_ridge(train: np.ndarray, labels: np.ndarray, other: np.ndarray, gamma: float, alpha: float) -> np.ndarray:
    train, other = standardise(train, other)
    kernel = np.exp(-gamma * cdist(train, train) ** 2)
    weight = np.linalg.solve(kernel + alpha * np.eye(len(train)), labels - labels.mean())
    return np.exp(-gamma * cdist(other, train) ** 2) @ weight + labels.mean()


def chosen(fit: tuple[np.ndarray, np.ndarray], choose: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Width and penalty that are best on the second part."""
    pairs = [(share / fit[0].shape[1], alpha) for share in (0.01, 0.1, 1.0) for alpha in (1e-3, 1e-2, 1e-1, 1.0)]
    return max(pairs, key=lambda pair: r_squared(slow_ridge(*fit, choose[0], *pair), choose[1]))


def curved(train: int = 200, test: int = 150) -> Split:
    """A product and a wave of two of four features: no linear function tells anything of it."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((train + test, 4))
    labels = 5 * features[:, 0] * features[:, 1] + np.cos(2 * features[:, 0]) + 40
    return features[:train], labels[:train], features[train:], labels[train:]


@pytest.mark.parametrize("given", [False, True], ids=["held out", "validation"])
@pytest.mark.parametrize("source", [quantities, curved])
def test_kernel_ridge_is_its_closed_form_and_chooses_without_the_test_labels(source, given: bool) -> None:
    train, labels, test, test_labels = source()
    validation = (test[:40], test_labels[:40]) if given else None
    test, test_labels = test[40:], test_labels[40:]
    ((inner, outer),) = ShuffleSplit(1, test_size=0.2, random_state=0).split(train)
    best = (
        chosen((train, labels), validation)
        if validation
        else chosen((train[inner], labels[inner]), (train[outer], labels[outer]))
    )
    expected = r_squared(slow_ridge(train, labels, test, *best), test_labels)
    assert measured("kernel_ridge", train, labels, test, test_labels, validation) == pytest.approx(expected, abs=1e-7)


def test_kernel_ridge_finds_what_no_linear_function_does() -> None:
    assert measured("linear", *curved()) < 0.2 < 0.9 < measured("kernel_ridge", *curved())


@pytest.mark.parametrize(("components", "tolerance"), [(120, 0.02), (60, 0.3)])
def test_the_approximation_for_many_samples_comes_close(
    components: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By nearly all samples it is nearly exact; by few it is worse."""
    exact = measured("kernel_ridge", *curved())
    monkeypatch.setattr("mmssl.probes.kernels.MOST_EXACT", 199)
    monkeypatch.setattr("mmssl.probes.kernels.COMPONENTS", components)
    values = []
    for seed in range(2):
        np.random.seed(seed)
        values.append(measured("kernel_ridge", *curved()))
    assert values[0] == values[1] == pytest.approx(exact, abs=tolerance)
    assert values[0] != exact


def test_units_of_quantities_do_not_matter() -> None:
    train, labels, test, test_labels = quantities()
    score = measured("kernel_ridge", train, labels, test, test_labels)
    assert measured("kernel_ridge", train, 1e4 * labels - 7, test, 1e4 * test_labels - 7) == pytest.approx(
        score, abs=1e-9
    )


def test_kernel_ridge_of_the_diabetes_data_is_its_closed_form() -> None:
    features, labels = load_diabetes(return_X_y=True)
    train, choose, test = slice(0, 250), slice(250, 350), slice(350, None)
    best = chosen((features[train], labels[train]), (features[choose], labels[choose]))
    expected = r_squared(slow_ridge(features[train], labels[train], features[test], *best), labels[test])
    given = features[train], labels[train], features[test], labels[test], (features[choose], labels[choose])
    assert 0.35 < expected < 0.6 and measured("kernel_ridge", *given) == pytest.approx(expected, abs=1e-7)
