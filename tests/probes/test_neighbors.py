"""Tests of the neighbours whose votes weigh: loops in numpy, and a case that can be counted."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mmssl.probes import PROTOCOLS, Task, base
from tests.probes.synthetic import make, measured, quantities, r_squared


def slow_votes(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    """Classes by the largest sum of exp(cosine / 0.07), or weighted means of quantities, one test sample at a time."""
    guesses = []
    for row in test:
        cosine = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        nearest = np.argsort(-cosine, kind="stable")[:k]
        weight = np.exp(cosine[nearest] / 0.07)
        if labels.dtype.kind == "f":
            guesses.append((weight * labels[nearest]).sum() / weight.sum())
        else:
            guesses.append(np.bincount(labels[nearest], weight).argmax())
    return np.array(guesses)


def test_classes_are_those_of_a_loop_over_votes() -> None:
    """k is chosen on validation data; with 300 training samples, all four of them are tried."""
    train, labels, test, test_labels = make(noise=2.0, train=300, test=260)
    validation, rest = (test[:100], test_labels[:100]), (test[100:], test_labels[100:])
    accuracy = {k: (slow_votes(train, labels, validation[0], k) == validation[1]).mean() for k in (10, 20, 100, 200)}
    chosen = max(accuracy, key=lambda k: accuracy[k])
    assert len(set(accuracy.values())) > 1
    points = PROTOCOLS["knn_weighted"](Task(train, labels, *rest, validation))["accuracy"]
    np.testing.assert_array_equal(points, slow_votes(train, labels, rest[0], chosen) == rest[1])


def test_quantities_are_the_weighted_mean() -> None:
    train, labels, test, test_labels = quantities(train=300, test=160)
    validation, rest = (test[:80], test_labels[:80]), (test[80:], test_labels[80:])
    scores = {k: r_squared(slow_votes(train, labels, validation[0], k), validation[1]) for k in (10, 20, 100, 200)}
    chosen = max(scores, key=lambda k: scores[k])
    expected = r_squared(slow_votes(train, labels, rest[0], chosen), rest[1])
    assert measured("knn_weighted", train, labels, *rest, validation) == pytest.approx(expected, abs=1e-9)


def test_one_near_neighbour_outvotes_nine_far_ones() -> None:
    """exp(1 / 0.07) is far more than 9 exp(0.5 / 0.07): a majority, or a weak temperature, would say otherwise."""
    train = np.array([[1.0, 0.0]] + [[0.5, np.sqrt(0.75)]] * 9 + [[-1.0, 0.0]] * 20)
    labels = np.array([0] + [1] * 9 + [2] * 20)
    validation = np.array([[-1.0, 0.01]]), np.array([2])
    assert measured("knn_weighted", train, labels, np.array([[1.0, 0.0]]), np.array([0]), validation) == 1.0
    assert measured("knn_weighted", train, labels, np.array([[0.5, 0.8]]), np.array([1]), validation) == 1.0


@pytest.mark.parametrize(("count", "expected"), [(8, [1]), (12, [1]), (13, [10]), (126, [10, 20, 100])])
def test_no_more_neighbours_than_there_are(count: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[dict[str, Any]] = []

    def spy(estimator, grid, *given, **options):
        grids.append(grid)
        return base.fit_best(estimator, grid, *given, **options)

    monkeypatch.setattr("mmssl.probes.neighbors.fit_best", spy)
    assert np.isfinite(measured("knn_weighted", *quantities(train=count)))
    assert grids == [{"n_neighbors": expected}]


def test_lengths_do_not_matter() -> None:
    train, labels, test, test_labels = make(noise=2.0)
    longer, longer_test = (rows * np.linspace(0.1, 9, len(rows))[:, None] for rows in (train, test))
    score = measured("knn_weighted", train, labels, test, test_labels)
    assert measured("knn_weighted", longer, labels, longer_test, test_labels) == score < 1


def test_pixels_of_digits_by_a_loop() -> None:
    pixels, labels = load_digits(return_X_y=True)
    train, choose, test = slice(0, 800), slice(800, 1000), slice(1000, 1300)
    accuracy = {
        k: (slow_votes(pixels[train], labels[train], pixels[choose], k) == labels[choose]).mean()
        for k in (10, 20, 100, 200)
    }
    chosen = max(accuracy, key=lambda k: accuracy[k])
    expected = (slow_votes(pixels[train], labels[train], pixels[test], chosen) == labels[test]).mean()
    given = (pixels[train], labels[train], pixels[test], labels[test], (pixels[choose], labels[choose]))
    assert 0.9 < expected == measured("knn_weighted", *given)
