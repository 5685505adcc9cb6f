"""Tests of retrieval: loops, scikit-learn's average precision, and all orders of ties."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from mmssl.probes import Points, Task
from mmssl.probes.ranking import retrieval
from tests.probes.synthetic import make


def ranked(features: np.ndarray, labels: np.ndarray) -> Points:
    return retrieval(Task(np.zeros((2, 1)), np.arange(2), features, labels))


def others(features: np.ndarray, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the gallery of a query, and how alike they are."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gallery = np.delete(np.arange(len(features)), query)
    return gallery, (unit[gallery] @ unit[query]).round(9)


def test_average_precision_is_that_of_scikit_learn_and_top_k_a_loop() -> None:
    _, _, features, labels = make(noise=2.0, test=90)
    found = ranked(features, labels)
    for query in range(len(labels)):
        gallery, alike = others(features, query)
        match = labels[gallery] == labels[query]
        assert found["mAP"][query] == pytest.approx(average_precision_score(match, alike), abs=1e-12)
        best = match[np.argsort(-alike)]
        assert found["top-1"][query] == best[0]
        assert found["top-5"][query] == best[:5].any()
    assert 0.2 < found["top-1"].mean() < found["top-5"].mean() < 1


def test_ties_are_worth_their_mean_over_all_orders() -> None:
    """Seven samples of few directions; average precision takes ties at once, as scikit-learn's."""
    rng = np.random.default_rng(0)
    for _ in range(6):
        features = np.array([[0, 1], [1, 0], [1, 1]])[rng.integers(3, size=7)] * rng.uniform(1, 9, (7, 1))
        labels = np.array([0, 0, 0, 1, 1, 2, 2])
        found = ranked(features, labels)
        for query in range(7):
            gallery, alike = others(features, query)
            match = labels[gallery] == labels[query]
            assert found["mAP"][query] == pytest.approx(average_precision_score(match, alike), abs=1e-12)
            orders = [
                list(order) for order in itertools.permutations(range(6)) if (np.diff(alike[list(order)]) <= 0).all()
            ]
            for rank in (1, 5):
                expected = np.mean([match[order][:rank].any() for order in orders])
                assert found[f"top-{rank}"][query] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
def test_features_that_are_all_equal_give_chance_in_any_order(value: float) -> None:
    labels = np.repeat([0, 1], [30, 10])
    found = ranked(np.full((40, 37), value), labels)
    share = np.where(labels == 0, 29 / 39, 9 / 39)
    for metric in ("mAP", "top-1"):
        np.testing.assert_allclose(found[metric], share, atol=1e-12)


def test_random_features_give_the_closed_form_of_chance() -> None:
    """Of a random order of N others with R matches, the mean of average precision is known."""
    features = np.random.default_rng(0).standard_normal((400, 300))
    labels = np.arange(400) % 4
    found = ranked(features, labels)
    ranks = np.arange(1, 400)
    expected = np.mean(1 / ranks + (1 - 1 / ranks) * 98 / 398)
    assert abs(found["mAP"].mean() - expected) < 4 * found["mAP"].std() / np.sqrt(400)
    low, high = binom.interval(0.999, 400, 99 / 399)
    assert low <= found["top-1"].sum() <= high


def test_a_query_without_another_of_its_class_is_left_out_but_can_be_found() -> None:
    angles = np.radians([0, 10, 13, 90, 91])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = ranked(features, np.array([0, 7, 0, 3, 3]))
    assert found["mAP"].tolist() == [0.5, 0.5, 1.0, 1.0]  # 7 stands between the two of class 0
    assert found["top-1"].tolist() == [0, 0, 1, 1]


def test_blocks_lengths_and_order_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, features, labels = make(noise=2.0, test=50)
    found = ranked(features, labels)
    order = np.random.default_rng(0).permutation(50)
    moved = ranked((features * np.linspace(1, 9, 50)[:, None])[order], labels[order] * 3 + 5)
    monkeypatch.setattr("mmssl.probes.ranking.BLOCK", 7)
    in_blocks = ranked(features, labels)
    for metric, points in found.items():
        np.testing.assert_allclose(in_blocks[metric], points, atol=1e-12)
        np.testing.assert_allclose(moved[metric], points[order], atol=1e-12)


def test_few_samples() -> None:
    pair = ranked(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([4, 4]))
    assert [points.tolist() for points in pair.values()] == [[1, 1]] * 3
    with pytest.raises(ValueError, match="found 3 test samples of as many classes; expected two of some class"):
        ranked(np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match="NaN"):
        ranked(np.array([[np.nan], [1.0]]), np.array([4, 4]))


def test_pixels_of_digits_by_leaving_one_out() -> None:
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[:700], labels[:700]
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -1)
    nearest = labels[alike.argmax(axis=1)] == labels
    found = ranked(pixels, labels)
    assert 0.9 < nearest.mean() < 1
    np.testing.assert_array_equal(found["top-1"], nearest)
    assert found["top-1"].mean() < found["top-5"].mean() < 1 and 0.4 < found["mAP"].mean() < 0.9
