"""Tests of the sets that come with the packages: that they are what they say, and that splits share nothing."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes

from mmssl.data.builtin import BUILTIN, arrow_head, breast_cancer, diabetes, digits, digits_table, moving_digits
from mmssl.samples import Rows, Samples


def matrix(samples: Samples) -> np.ndarray:
    assert isinstance(samples.values, Rows)
    return np.stack(list(samples.values.columns.values()), axis=1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_as_a_table_are_the_digits(split: str) -> None:
    images, table = digits(split), digits_table(split)
    np.testing.assert_array_equal(matrix(table).reshape(-1, 8, 8), np.stack(list(images.values)))
    np.testing.assert_array_equal(table.labels, images.labels)
    assert list(table.values[3]) == [f"pixel_{i}" for i in range(64)]


@pytest.mark.parametrize(("source", "whole"), [(breast_cancer, load_breast_cancer()), (diabetes, None)])
def test_splits_of_tables_are_all_of_scikit_learns_rows_once(source, whole) -> None:
    whole = whole or load_diabetes(scaled=False)
    parts = [source("train"), source("test")]
    rows = np.concatenate([np.column_stack([matrix(part), part.labels]) for part in parts])
    expected = np.column_stack([whole.data, whole.target])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert len(parts[1]) == len(whole.target) // 5
    assert list(parts[0].values.columns) == [str(name) for name in whole.feature_names]


def test_what_is_regressed_has_no_classes() -> None:
    found = diabetes("train")
    assert found.labels is not None and found.labels.dtype.kind == "f" and not len(found.classes)
    assert list(breast_cancer("train").classes) == ["malignant", "benign"]


def test_arrow_heads_are_those_of_the_archive() -> None:
    """Sizes as the archive states them: 36 and 175 series of 251 steps, three types."""
    for split, count in (("train", 36), ("test", 175)):
        found = arrow_head(split)
        assert len(found) == count and found.values[0].shape == (1, 251)
        assert np.unique(np.asarray(found.labels)).tolist() == [0, 1, 2] and len(found.classes) == 3


def test_moving_digits_are_labelled_by_their_direction() -> None:
    found = moving_digits("test")
    assert found.values[0].shape == (8, 32, 32) and len(found.classes) == 8
    assert np.bincount(np.asarray(found.labels)).tolist() == [60] * 8


@pytest.mark.parametrize("name", sorted(set(BUILTIN) - {"espeak_digits"}))
def test_no_other_splits(name: str) -> None:
    with pytest.raises(ValueError, match=f"data.split: found 'validation'; {name} has the splits train and test"):
        BUILTIN[name]("validation")
