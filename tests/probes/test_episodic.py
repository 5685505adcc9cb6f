"""Tests of few-shot episodes: what is drawn, and logistic regression by another solver."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.datasets import load_digits

from mmssl.probes import Points, Task, episodic
from mmssl.probes.episodic import episodes


def found(features: np.ndarray, labels: np.ndarray) -> Points:
    return episodes(Task(np.zeros((2, 1)), np.arange(2), features, labels))


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Shots, support and query of each episode."""
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    drawn = episodic.drawn

    def spy(groups: list[np.ndarray], shots: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        kept.append((shots, *drawn(groups, shots, number)))
        return kept[-1][1:]

    monkeypatch.setattr(episodic, "drawn", spy)
    monkeypatch.setattr(episodic, "EPISODES", 25)
    return kept


def test_an_episode_has_five_classes_and_asks_for_nothing_that_it_has_shown(draws: list) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(8), [40, 40, 40, 17, 40, 40, 40, 40]))
    points = found(np.random.default_rng(1).standard_normal((len(labels), 4)), labels)
    assert {metric: len(each) for metric, each in points.items()} == {"5-way 1-shot": 25, "5-way 5-shot": 25}
    assert [shots for shots, *_ in draws] == [1] * 25 + [5] * 25
    for shots, support, query in draws:
        assert not set(support) & set(query)
        classes, counts = np.unique(labels[support], return_counts=True)
        assert len(classes) == 5 and set(counts) == {shots}
        asked, counts = np.unique(labels[query], return_counts=True)
        assert asked.tolist() == classes.tolist()
        assert all(
            count == (15 if label != 3 else min(15, 17 - shots)) for label, count in zip(asked, counts, strict=True)
        )
        assert len(set(query)) == len(query)
    assert len({support.tobytes() for _, support, _ in draws}) == 50
    assert {label for _, support, _ in draws for label in labels[support]} == set(range(8))


def test_episodes_are_the_same_for_every_row_and_every_global_state(draws: list) -> None:
    labels = np.arange(120) % 6
    for seed in range(2):
        np.random.seed(seed)
        found(np.random.default_rng(seed).standard_normal((120, 3 + seed)), labels)
    for (_, *first), (_, *second) in zip(draws[:50], draws[50:], strict=True):
        np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))


def slow_logistic(features: np.ndarray, labels: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Softmax regression with half the square of its weights beside the sum of its losses, by another solver."""
    classes = np.unique(labels)
    wanted = labels[:, None] == classes
    shape = len(classes), features.shape[1] + 1

    def objective(flat: np.ndarray) -> float:
        weight, bias = np.split(flat.reshape(shape), [-1], axis=1)
        logits = features @ weight.T + bias.T
        return float(0.5 * np.square(weight).sum() + (logsumexp(logits, axis=1) - logits[wanted]).sum())

    best = minimize(objective, np.zeros(shape).ravel(), method="BFGS").x.reshape(shape)
    return classes[(other @ best[:, :-1].T + best[:, -1]).argmax(axis=1)]


def test_the_classifier_is_logistic_regression_on_features_of_length_one(
    draws: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodic, "EPISODES", 4)
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 6
    features = (rng.standard_normal((6, 3))[labels] + 0.5 * rng.standard_normal((150, 3))) * rng.uniform(
        0.1, 20, (150, 1)
    )
    scores = np.concatenate(list(found(features, labels).values()))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = [
        (slow_logistic(unit[support], labels[support], unit[query]) == labels[query]).mean()
        for _, support, query in draws
    ]
    assert len(set(expected)) > 3
    np.testing.assert_allclose(scores, expected, atol=1.01 / 75)  # a query may lie on the border
    assert (np.abs(scores - expected) < 1e-9).sum() >= 7


def test_with_one_shot_of_two_classes_the_nearer_one_wins(draws: list) -> None:
    """The closed form: by symmetry the border is half way between the two."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = np.array([[1, 0, 0], [0, 1, 0]])[labels] + 0.7 * rng.standard_normal((60, 3))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = found(features, labels)["2-way 1-shot"]
    expected = [
        (labels[support][(unit[query] @ unit[support].T).argmax(axis=1)] == labels[query]).mean()
        for _, support, query in draws[:25]
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    assert 0.5 < scores.mean() < 1


def test_classes_with_too_few_samples_are_left_out_and_the_name_says_so(draws: list) -> None:
    labels = np.repeat(np.arange(6), [1, 2, 5, 6, 7, 8])
    assert list(found(np.random.default_rng(0).standard_normal((29, 3)), labels)) == ["5-way 1-shot", "3-way 5-shot"]
    asked = {
        shots: {int(label) for s, support, _ in draws if s == shots for label in labels[support]} for shots in (1, 5)
    }
    assert asked == {1: {1, 2, 3, 4, 5}, 5: {3, 4, 5}}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([9, 1, 1], r"found 1 of 3 classes with 2 test samples or more \(the largest has 9\)"),
        (
            [5, 5, 9],
            r"found 1 of 3 classes with 6 test samples or more \(the largest has 9\); expected two at least: 5-shot",
        ),
    ],
)
def test_less_than_two_classes_are_refused(draws: list, counts: list[int], message: str) -> None:
    labels = np.repeat(np.arange(3), counts)
    with pytest.raises(ValueError, match=message):
        found(np.random.default_rng(0).standard_normal((len(labels), 3)), labels)


def test_pixels_of_digits_by_their_nearest_shown_mean(draws: list) -> None:
    """Not the same classifier as nearest means of features of length one (Wang et al., 2019), but close to it."""
    pixels, labels = load_digits(return_X_y=True)
    scores: dict[str, Any] = found(pixels, labels)
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    for metric, shots in (("5-way 1-shot", 1), ("5-way 5-shot", 5)):
        expected = []
        for _, support, query in [draw for draw in draws if draw[0] == shots]:
            classes = np.unique(labels[support])
            means = np.stack([unit[support][labels[support] == label].mean(axis=0) for label in classes])
            distances = np.square(unit[query][:, None] - means).sum(axis=2)
            expected.append((classes[distances.argmin(axis=1)] == labels[query]).mean())
        assert 0.6 < np.mean(expected) < 1
        assert scores[metric].mean() == pytest.approx(np.mean(expected), abs=0.02)
