"""Tests of clustering: its scores by their formulas."""

from math import comb

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from mmssl.probes import Task
from mmssl.probes.clusters import clustering
from tests.probes.synthetic import make


def scored(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    found = clustering(Task(np.zeros((2, 1)), np.arange(2), features, labels))
    assert [(metric, points.shape) for metric, points in found.items()] == [("NMI", (1,)), ("ARI", (1,))]
    return float(found["NMI"][0]), float(found["ARI"][0])


def agreement(classes: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """NMI and ARI from the table of counts."""
    table = np.array(
        [[np.sum((classes == c) & (clusters == k)) for k in np.unique(clusters)] for c in np.unique(classes)]
    )
    n, rows, columns = len(classes), table.sum(axis=1), table.sum(axis=0)

    def entropy(counts: np.ndarray) -> float:
        shares = counts[counts > 0] / n
        return float(-(shares * np.log(shares)).sum())

    shared = entropy(rows) + entropy(columns) - entropy(table.ravel())
    pairs, row_pairs, column_pairs = (sum(comb(int(c), 2) for c in counts) for counts in (table.ravel(), rows, columns))
    expected = row_pairs * column_pairs / comb(n, 2)
    rand = (pairs - expected) / ((row_pairs + column_pairs) / 2 - expected)
    return 2 * shared / (entropy(rows) + entropy(columns)), rand


def test_scores_are_those_of_ten_starts_of_k_means_by_their_formulas() -> None:
    """Features are standardised by hand; the best of ten starts is not the first one."""
    _, _, features, labels = make(noise=1.0, test=120)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    best = KMeans(4, n_init=10, random_state=0).fit(scaled)
    assert best.inertia_ < KMeans(4, n_init=1, random_state=0).fit(scaled).inertia_
    assert scored(features, labels) == pytest.approx(agreement(labels, best.labels_), abs=1e-9)
    assert 0.1 < scored(features, labels)[0] < 0.95


def test_names_of_classes_and_scales_of_columns_do_not_matter() -> None:
    _, _, features, labels = make(noise=1.0)
    moved = scored(np.round(features * 64) * 2.0 ** np.arange(6) + 512, 10 - 3 * labels)
    assert scored(np.round(features * 64), labels) == pytest.approx(moved, abs=1e-9)


def test_labels_without_any_relation_give_nothing() -> None:
    _, _, features, labels = make(noise=1.0, test=400)
    information, rand = scored(features, np.random.default_rng(1).permutation(labels))
    assert abs(rand) < 0.02 and 0 <= information < 0.04


def test_pixels_of_digits_fall_into_their_classes_by_half() -> None:
    """What users of k-means on these pixels know: far from chance, far from solved."""
    information, rand = scored(*load_digits(return_X_y=True))
    assert 0.5 < information < 0.85 and 0.3 < rand < 0.8
