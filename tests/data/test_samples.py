"""Tests of samples: rows held by column, and selections that keep everything together."""

import numpy as np
import pytest

from mmssl.samples import Rows, Samples, Selected


def rows() -> Rows:
    return Rows(
        {
            "age": np.array([30.0, np.nan, 41.0, 52.0]),
            "job": np.array(["smith", None, "baker", "smith"], dtype=object),
            "count": np.array([1, 2, 3, 4]),
        }
    )


def test_rows_are_dicts_of_their_cells() -> None:
    table = rows()
    assert len(table) == 4 and len(Rows({})) == 0
    assert table[2] == {"age": 41, "job": "baker", "count": 3} == table[-2]
    assert np.isnan(table[1]["age"]) and table[1]["job"] is None
    assert [row["count"] for row in table] == [1, 2, 3, 4]  # a loop comes to an end
    assert [row["count"] for row in reversed(table)] == [4, 3, 2, 1]
    for beyond in (4, -5):
        with pytest.raises(IndexError):
            table[beyond]


def test_selected_rows_are_still_held_by_column() -> None:
    """In the order of the positions, twice where one comes twice, and not as views of the whole."""
    table = rows()
    part = table.select(np.array([3, 0, 3]))
    assert [row["count"] for row in part] == [4, 1, 4] and part.columns["job"].tolist() == ["smith"] * 3
    part.columns["count"][:] = 0
    assert table.columns["count"].tolist() == [1, 2, 3, 4]
    assert len(table.select(np.array([], dtype=int))) == 0


def test_samples_of_rows_select_by_column_and_others_stay_as_they_are() -> None:
    samples = Samples(rows(), "row {}".format, labels=np.array([0.5, 1.5, 2.5, 3.5]))
    part = samples.select(np.array([2, 3, 0])).select(np.array([1, 0]))
    assert isinstance(part.values, Rows) and part.values.columns["count"].tolist() == [4, 3]
    assert [part.name(i) for i in range(2)] == ["row 3", "row 2"]
    assert part.labels is not None and part.labels.tolist() == [3.5, 2.5] and part.labels.dtype == np.float64
    assert isinstance(Samples(["a", "b"], str).select(np.array([1])).values, Selected)
