"""Tables: what is found out about their columns, rows to tokens, SCARF's corruption, and the loss of mixed columns."""

import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from mmssl.data import DataArguments, load_samples
from mmssl.encoder import EncoderConfig
from mmssl.evaluation.pictures import draw_reconstructions
from mmssl.modalities.tabular import Tabular
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.processing import MMSSLFeatureExtractor
from mmssl.samples import Rows, Samples
from mmssl.tokens import Tokens
from mmssl.training import TrainArguments, pretrain
from mmssl.training.setup import make_optimizer

WIDTH = 8


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(count: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns of every kind in mixed order: numbers with gaps, text, whole numbers, bools, many words."""
    g = np.random.default_rng(seed)
    size = g.normal(3, 2, count)
    size[::7] = np.nan
    colour = g.choice(["red", "green", "blue"], count).astype(object)
    colour[1::9] = None
    words = np.array([f"word {n}" for n in g.integers(0, 30, count)], dtype=object)
    age = g.integers(0, 90, count)
    return {"size": size, "colour": colour, "age": age, "word": words, "member": g.random(count) < 0.4}


def samples_of(columns: dict[str, Any], labels: Any = None) -> Samples:
    arrays = {name: np.asarray(cells) for name, cells in columns.items()}
    return Samples(Rows(arrays), "row {}".format, None if labels is None else np.asarray(labels))


def fitted(columns: dict[str, Any] | None = None, labels: Any = None, **options: Any) -> Tabular:
    made = Tabular(**{"max_categories": 10, **options})
    made.fit(samples_of(table() if columns is None else columns, labels))
    return made


def built(made: Tabular, width: int = WIDTH) -> Tabular:
    torch.manual_seed(0)
    return made.build(width)


def batch_of(made: Tabular, columns: dict[str, Any]) -> dict[str, Tensor]:
    return made.collate([made.prepare(row) for row in samples_of(columns).values])


def record(made: Tabular, name: str) -> dict[str, Any]:
    assert made.schema is not None
    return next(each for each in made.schema if each["name"] == name)


def kinds(made: Tabular) -> dict[str, str]:
    return {each["name"]: each["kind"] for each in made.schema or ()}


def mixed(tokens: Tokens, kept: int, seed: int = 0) -> Tokens:
    """Tokens of each row in an order of its own, some left out and one of them twice."""
    index = torch.rand(tokens.valid.shape, generator=key(seed)).argsort(dim=1)[:, :kept]
    index = torch.cat([index, index[:, :1]], dim=1)
    return tokens.select(index, torch.ones_like(index, dtype=torch.bool))


# ---- What fit finds out ---------------------------------------------------------------------------------------------


def test_kinds_statistics_and_categories() -> None:
    columns = table()
    made = fitted(columns)
    assert kinds(made) == {
        "size": "numerical",
        "colour": "categorical",
        "age": "numerical",
        "word": "categorical",
        "member": "categorical",
    }
    for name in ("size", "age"):
        known = [float(x) for x in columns[name] if x == x]
        mean = sum(known) / len(known)
        found = record(made, name)
        assert found["mean"] == pytest.approx(mean)
        assert found["std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in known) / len(known)))
        assert (found["min"], found["max"]) == (min(known), max(known))
        assert found["missing"] == pytest.approx(1 - len(known) / 40)
    assert record(made, "colour")["categories"] == ["blue", "green", "red"]
    assert record(made, "colour")["missing"] == pytest.approx(sum(x is None for x in columns["colour"]) / 40)
    assert record(made, "word") == {"name": "word", "kind": "categorical", "missing": 0.0, "buckets": 10}
    assert record(made, "member")["categories"] == [False, True]


def test_a_set_schema_stays() -> None:
    made = fitted()
    again = Tabular(made.schema)
    again.fit(samples_of({"other": np.arange(9.0)}))
    assert again.schema == made.schema


@pytest.mark.parametrize("scaling", ["standard", "min_max", "quantile"])
def test_only_the_training_rows_count(scaling: str) -> None:
    """Other rows of the same table, wild ones too, change neither what is known nor what training rows become."""
    train, tests = np.arange(30), [np.random.default_rng(1).normal(1e6, 9, 20), np.zeros(20)]
    made = []
    for extra in tests:
        columns = table(30) | {"size": np.r_[table(30)["size"]]}
        columns = {name: np.r_[cells, np.resize(cells, 20)] for name, cells in columns.items()}
        columns["size"][30:] = extra
        columns["colour"][30:] = "violet"
        chosen = Tabular(max_categories=10, numerical_scaling=scaling)  # type: ignore[arg-type]
        chosen.fit(samples_of(columns).select(train))
        made.append(chosen)
    alone = fitted(table(30), numerical_scaling=scaling)
    assert made[0].schema == made[1].schema == alone.schema


def test_rows_as_dicts_give_the_same_schema() -> None:
    rows = list(samples_of(table()).values)
    made = Tabular(max_categories=10)
    made.fit(Samples(rows, str))
    assert made.schema == fitted().schema
    with pytest.raises(ValueError, match=r"row 3: found no column age; set it to None"):
        Tabular().fit(Samples([*rows[:3], {"size": 1.0, "colour": None, "word": "a", "member": True}], str))
    with pytest.raises(ValueError, match="row 0: found list; expected a dict"):
        Tabular().fit(Samples([[1, 2]], str))


def test_options_survive_json_and_prepare_alike() -> None:
    """The config of a checkpoint is all that a processor has."""
    columns = table() | {
        "code": np.r_[np.nan, np.arange(39) % 4],
        "mix": np.array(["a", 1, 2.5, True] * 10, dtype=object),
    }
    made = fitted(columns, numerical_scaling="quantile", categorical_columns=["code"])
    again = make_modality("tabular", json.loads(json.dumps(made.options())))
    assert again.options() == made.options()
    for row in samples_of(columns).values:
        assert torch.equal(again.prepare(row)["cells"].nan_to_num(-1), made.prepare(row)["cells"].nan_to_num(-1))
    assert record(made, "code")["categories"] == [0, 1, 2, 3]


def objects(*cells: Any) -> np.ndarray:
    array = np.empty(len(cells), dtype=object)
    array[:] = cells
    return array


LEFT_OUT: dict[str, tuple[np.ndarray, str]] = {
    "one number": (np.full(40, 7.0), "never changes: 7"),
    "one word": (objects(*["a"] * 40), "never changes: 'a'"),
    "no number": (np.full(40, np.nan), "is always missing"),
    "nothing": (objects(*[None, "", np.nan, pd.NA] * 10), "is always missing"),
    "names": (objects(*[f"name {n}" for n in range(39)], None), "differs in every row"),
    "dicts": (objects(*[{"bytes": b"", "path": None}] * 40), "holds values of type dict"),
    "lists": (objects(*[[1, 2]] * 39, None), "holds values of type list"),
    "arrays": (objects(*[np.ones(n % 3) for n in range(40)]), "holds values of type ndarray"),
    "bytes": (objects(*[b"a", b"b"] * 20), "holds values of type bytes"),
    "clock": (objects(*[datetime(2020, 1, 1, n % 24).time() for n in range(40)]), "holds values of type time"),
    "spans": (np.arange(40).astype("timedelta64[s]"), "holds values of type timedelta64"),
    "complex": (np.arange(40) * 1j, "holds values of type complex128"),
    "mixed times": (objects(*["soon", datetime(2020, 1, 1)] * 20), "holds times among other values"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_columns_that_are_left_out(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells, reason = LEFT_OUT[case]
    made = fitted({case: cells} | table())
    assert list(kinds(made)) == list(table())
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "5 columns are read, 1 left out" in printed
    assert f"{case} left out" in printed
    with pytest.raises(ValueError, match=rf"found no column to learn from \({case}: {reason}"):
        fitted({case: cells})


KEPT: dict[str, tuple[np.ndarray, str]] = {
    "a number or nothing": (np.array([7.0, np.nan] * 20), "numerical"),
    "a word or nothing": (objects(*["a", None] * 20), "categorical"),
    "two numbers": (np.array([0, 1] * 20), "numerical"),
    "decimals": (objects(*[Decimal(n) / 4 for n in range(39)], None), "numerical"),
    "whole numbers and bools": (objects(*[1, True, 3, None] * 10), "numerical"),
    "numbers, empty where missing": (objects(*[1.5, "", 3, None] * 10), "numerical"),
    "text and numbers": (objects(*["x", 1, 2.5, None] * 10), "categorical"),
    "bools": (objects(*[True, np.False_, None, False] * 10), "categorical"),
    "text of NumPy": (np.array(["a", "b"] * 20), "categorical"),
    "times": (np.arange(40).astype("datetime64[h]"), "numerical"),
    "dates": (objects(*[date(2020, 1, 1 + n % 28) for n in range(39)], pd.NaT), "numerical"),
    "some infinite": (np.array([1.0, np.inf, 3.0, -np.inf] * 10), "numerical"),
}


@pytest.mark.parametrize("case", KEPT)
def test_columns_that_are_kept(case: str) -> None:
    cells, kind = KEPT[case]
    made = fitted({case: cells})
    assert kinds(made) == {case: kind}
    for cell in cells:
        if not (isinstance(cell, float) and math.isinf(cell)):
            value = made.prepare({case: cell})["cells"]
            assert value.isnan().item() == bool(pd.isna(cell) or cell == "")
            assert value.isnan() or kind == "numerical" or value >= 1


def test_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    columns = table() | {
        "[red]id[/]": np.arange(100, 140),
        "amount": objects(*[str(n) for n in range(20)] * 2)[:40],
        "price": objects("?", *[str(n % 9) for n in range(39)]),
    }
    fitted(columns, ignore_columns=["age"], max_categories=15)
    printed = capsys.readouterr().out
    line = {name: text for text in printed.splitlines() for name in columns if text.startswith(f"│ {name} ")}
    assert "40 rows: 7 columns are read, 1 left out" in printed
    assert "left out" in line["age"] and "ignore_columns" in line["age"]
    counts = pd.Series(columns["colour"]).value_counts()
    assert f"{counts.index[0]} {counts.iloc[0] / 40:.0%}" in line["colour"]
    assert f"{np.nanmin(columns['size']):.5g} to {np.nanmax(columns['size']):.5g}" in line["size"]
    assert f"{np.isnan(columns['size']).mean():.1%}" in line["size"]
    assert "hashed to 15" in line["word"] and str(len(set(columns["word"]))) in line["word"]
    assert "the row's number?" in line["[red]id[/]"]
    assert "read as text)" in line["amount"]
    assert "read as text because of '?'" in line["price"]


def test_wide_tables_are_printed_in_short(capsys: pytest.CaptureFixture[str]) -> None:
    """What is left out comes first."""
    fitted({f"c{n}": np.random.default_rng(n).normal(size=9) for n in range(200)} | {"same": np.ones(9)})
    printed = capsys.readouterr().out
    assert "200 columns are read, 1 left out" in printed and "and 141 more" in printed and "same" in printed
    assert len(printed.splitlines()) < 70


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted({"x": np.arange(40.0) % 7, "y": np.arange(40) % 2}, labels=np.arange(40) % 2)
    assert not capsys.readouterr().out


def test_numbers_that_are_codes() -> None:
    columns = {"code": np.r_[np.nan, np.arange(59) % 4], "many": np.arange(60), "x": np.arange(60.0)}
    made = fitted(columns, categorical_columns=["code", "many"])
    assert record(made, "code")["categories"] == [0, 1, 2, 3]
    assert record(made, "many")["buckets"] == 10
    for same in (2, 2.0, np.float32(2), np.int16(2)):
        assert (
            made.prepare({"code": same, "many": same, "x": 0})["cells"][:2].tolist()
            == made.prepare({"code": 2, "many": 2, "x": 0})["cells"][:2].tolist()
        )
    assert made.prepare({"code": 2, "many": 1, "x": 0})["cells"][0] == 3
    hours = np.arange(40).astype("datetime64[h]")
    assert kinds(fitted({"time": hours}, categorical_columns=["time"])) == {"time": "numerical"}


# A target left in


def labels_and_leaks() -> dict[str, tuple[np.ndarray, np.ndarray, bool]]:
    g = np.random.default_rng(0)
    classes, quantity, noise = g.integers(0, 3, 300), g.normal(size=300), g.normal(size=300)
    gaps = noise.copy()
    gaps[classes == 0] = np.nan
    skewed, halves, touching = np.exp(3 * quantity), np.arange(300) // 150, np.arange(300.0)
    touching[149] = touching[150]
    rare = np.zeros(300, dtype=int)
    rare[7] = 1
    return {
        "the class": (classes, classes, True),
        "its name": (np.array(["a", "b", "c"], dtype=object)[classes], classes, True),
        "finer than the class": (classes * 3 + g.integers(0, 3, 300), classes, True),
        "intervals of a number": (np.array([5.0, -3.0, 1.0])[classes] + noise.clip(-0.9, 0.9), classes, True),
        "intervals, some missing": (
            np.where(np.arange(300) % 5, np.array([5.0, -3.0, 1.0])[classes] + noise.clip(-0.9, 0.9), np.nan),
            classes,
            True,
        ),
        "missing or not": (np.where(classes == 0, np.nan, 1.0), (classes == 0).astype(int), True),
        "the quantity": (quantity, quantity, True),
        "in other units": (32 - 1.8 * quantity, quantity, True),
        "its power of e": (skewed, quantity, True),
        "rounded": (skewed.round(), skewed, True),
        "close to it": (quantity + 1e-4 * noise, quantity, True),
        "a code of the quantity": (classes, np.array([1.5, 0.5, 9.5])[classes], True),
        "noise and classes": (noise, classes, False),
        "noise and quantities": (noise, quantity, False),
        "related to the class": (classes + 0.5 * noise, classes, False),
        "related to the quantity": (quantity + 0.05 * noise, quantity, False),
        "a class that is wrong once": (np.r_[1 - classes[:1].clip(0, 1), classes[1:]], classes, False),
        "halves": (np.arange(300.0), halves, True),
        "halves that touch": (touching, halves, False),
        "every row its own": (np.arange(300), classes, False),
        "a class of one row": (rare, rare, False),
        "gaps in one class": (gaps, classes, False),
        "one class": (noise, np.zeros(300, dtype=int), False),
    }


@pytest.mark.parametrize("case", labels_and_leaks())
def test_warns_where_a_column_tells_the_labels(case: str) -> None:
    cells, labels, leaks = labels_and_leaks()[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted({"other": np.random.default_rng(5).normal(size=300), "suspect": cells}, labels)
    found = [str(each.message) for each in caught]
    assert len(found) == leaks
    assert all("the column suspect alone tells the labels" in text and "ignore_columns" in text for text in found)


# ---- Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["standard", "min_max"])
def test_scaling_equals_scikit_learn(scaling: str) -> None:
    g = np.random.default_rng(0)
    columns = {"a": g.normal(5, 3, 50), "b": g.exponential(size=50), "c": g.integers(0, 9, 50)}
    columns["a"][::4] = np.nan
    scaler: Any = (StandardScaler if scaling == "standard" else MinMaxScaler)()
    expected = scaler.fit_transform(np.stack(list(columns.values()), axis=1).astype(float))
    found = batch_of(fitted(columns, numerical_scaling=scaling), columns)["cells"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_quantiles_become_those_of_the_normal_distribution() -> None:
    """Those of the training rows; in between on a line; outside like the outermost; ties by their mean rank."""
    values = np.random.default_rng(0).exponential(size=5000) ** 3
    made = fitted({"x": values}, numerical_scaling="quantile")

    def score(number: float) -> float:
        return made.prepare({"x": number})["cells"].item()

    edge = norm.ppf(0.5 / 101)
    for percent in range(1, 100):
        assert score(float(np.quantile(values, percent / 100))) == pytest.approx(norm.ppf(percent / 100), abs=1e-5)
    low, high = np.quantile(values, [0.3, 0.31])
    assert score((3 * low + high) / 4) == pytest.approx((3 * norm.ppf(0.3) + norm.ppf(0.31)) / 4, abs=1e-5)
    assert score(values.min()) == score(values.min() - 9) == pytest.approx(edge, abs=1e-5)
    assert score(values.max()) == score(values.max() + 1e9) == pytest.approx(-edge, abs=1e-5)
    ties = fitted({"x": np.repeat([0.0, 1.0], [80, 20])}, numerical_scaling="quantile")
    zero = np.mean([max(k / 100, 0.5 / 101) for k in range(80)])  # the 80th lies between the two
    assert ties.prepare({"x": 0})["cells"].item() == pytest.approx(norm.ppf(zero), abs=0.02)
    with pytest.raises(ValueError, match=r"column x: found quantiles None; numerical_scaling='quantile' expects"):
        Tabular(fitted({"x": values}).schema, numerical_scaling="quantile")


def test_extreme_numbers_are_cut() -> None:
    made = fitted({"x": np.array([-1.0, 1.0] * 20)}, clip=4.0)
    found = [made.prepare({"x": x})["cells"].item() for x in (-3.9, 3.9, 1e9, -1e9, 10**30, np.finfo(float).max)]
    assert found == pytest.approx([-3.9, 3.9, 4, -4, 4, 4])


def test_large_offsets_keep_their_digits() -> None:
    """Seconds since 1970 have more digits than single precision."""
    times = 1.7e9 + np.arange(40)
    made = fitted({"time": times})
    found = batch_of(made, {"time": times})["cells"][:, 0]
    np.testing.assert_allclose(found, (np.arange(40) - 19.5) / np.arange(40).std(), rtol=1e-5)


def test_order_and_other_columns_do_not_matter() -> None:
    made = fitted()
    for row in samples_of(table()).values:
        items = [*row.items(), ("unknown", object()), ("label", 3)]
        random.Random(0).shuffle(items)
        assert torch.equal(made.prepare(dict(items))["cells"].nan_to_num(-9), made.prepare(row)["cells"].nan_to_num(-9))


ROW = {"size": 3.0, "colour": "red", "age": 7, "word": "word 3", "member": True}


def test_codes_and_cells_that_are_missing() -> None:
    made = fitted()
    expected = 1 + int.from_bytes(blake2b(b"word 3", digest_size=8).digest(), "little") % 10
    assert made.prepare(ROW)["cells"][[1, 3, 4]].tolist() == [3.0, expected, 2.0]
    for missing in (None, "", math.nan, np.nan, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT")):
        cells = made.prepare(dict.fromkeys(ROW, missing))["cells"]
        assert cells.dtype == torch.float32 and cells.isnan().all()


@pytest.mark.parametrize("unseen", ["violet", 3, True, 2.5])
def test_categories_that_training_has_not_seen_are_unknown(unseen: Any) -> None:
    """A code of their own, 0; hashed columns have a bucket for any value."""
    cells = fitted().prepare(ROW | {"colour": unseen, "word": unseen})["cells"]
    assert cells[1] == 0 and 1 <= cells[3] <= 10


def test_true_is_not_unknown_where_one_is_a_category() -> None:
    made = fitted({"code": np.array([0, 1] * 20)}, categorical_columns=["code"])
    assert [made.prepare({"code": cell})["cells"].item() for cell in (0, 1, True, False, 1.0)] == [1, 2, 2, 1, 2]


def test_times_are_seconds_in_utc_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fitted({"time": np.array(["1970-01-01", "1970-01-03"], dtype="datetime64[ns]").repeat(9)})
    assert record(made, "time")["max"] == 2 * 86_400
    noon = datetime(1970, 1, 2, 12)
    same: list[Any] = [
        noon,
        noon.replace(tzinfo=UTC),
        (noon + timedelta(hours=3)).replace(tzinfo=timezone(timedelta(hours=3))),
        np.datetime64("1970-01-02T12"),
        pd.Timestamp(noon),
        pd.Timestamp(noon, tz="UTC").tz_convert("Asia/Tokyo"),
        1.5 * 86_400,
    ]
    for zone in ("UTC", "America/New_York"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert [made.prepare({"time": cell})["cells"].item() for cell in same] == pytest.approx([0.5] * len(same))
        assert made.prepare({"time": date(1970, 1, 2)})["cells"].item() == pytest.approx(0.0)
    monkeypatch.undo()
    time.tzset()
    zoned = fitted({"time": objects(*same[:3], datetime(1970, 1, 1))})
    assert (record(zoned, "time")["min"], record(zoned, "time")["max"]) == (0, 1.5 * 86_400)


MALFORMED: dict[str, tuple[Any, str]] = {
    "text for a number": (ROW | {"age": "seven"}, "column age: found the text 'seven'; expected a number"),
    "a number as text": (ROW | {"age": "7"}, "column age: found the text '7'; expected a number"),
    "infinite": (ROW | {"size": math.inf}, "column size: found inf; expected a finite number"),
    "minus infinite": (ROW | {"age": -np.float32("inf")}, "column age: found -inf; expected a finite number"),
    "a list for a number": (ROW | {"age": [1]}, r"column age: found list \[1\]; expected a number"),
    "a list for a category": (ROW | {"colour": ["red"]}, r"column colour: found list \['red'\]; expected text"),
    "a complex number": (ROW | {"age": 1j}, "column age: found complex 1j; expected a number"),
    "no such column": ({"size": 3.0, "colour": "red"}, "found no column 'age', only size, colour; set unknown ones"),
    "a list": ([3.0, "red"], "found list; expected a row as a dict"),
    "a path": ("table.csv", "found str; expected a row as a dict"),
    "a table": (pd.DataFrame({"age": [3]}), "found DataFrame; expected a row as a dict"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows(case: str) -> None:
    row, message = MALFORMED[case]
    with pytest.raises(ValueError, match=message):
        fitted().prepare(row)


SCRIPT = """
import json, sys
from mmssl.modalities.tabular import Tabular
made = Tabular([{"name": "word", "kind": "categorical", "buckets": 50}])
print(json.dumps([made.prepare({"word": word})["cells"].item() for word in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
def test_hashes_are_the_same_in_every_process() -> None:
    """Python's own differ: they are salted."""
    words = ["a", "ä", "word 3", 7, 7.5, -1.0, True]
    made = Tabular([{"name": "word", "kind": "categorical", "buckets": 50}])
    here = [made.prepare({"word": word})["cells"].item() for word in words]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    texts = ["a", "ä", "word 3", "7", "7.5", "-1", "True"]
    expected = [1.0 + int.from_bytes(blake2b(t.encode(), digest_size=8).digest(), "little") % 50 for t in texts]
    assert here == json.loads(done.stdout) == expected


def test_hashing_uses_all_buckets() -> None:
    made = Tabular([{"name": "x", "kind": "categorical", "buckets": 20}])
    codes = [int(made.prepare({"x": f"value {n}"})["cells"]) for n in range(4000)]
    counts = np.bincount(codes)
    assert counts[0] == 0 and len(counts) == 21
    assert abs(counts[1:] - 200).max() < 5 * math.sqrt(200)


# ---- Tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("official", [False, True])
def test_tokens(official: bool) -> None:
    made = fitted(official_offset=official)
    batch = batch_of(made, table())
    tokens = made.tokenize(batch)
    offset = int(official)
    assert tokens.coords[..., 0].tolist() == [list(range(5 + offset))] * 40
    assert tokens.valid.all() and tokens.content.isfinite().all()
    for row, cells in enumerate(batch["cells"].tolist()):
        expected = [[1.0, 1.0]] * offset + [[0.0, 0.0] if cell != cell else [cell, 1.0] for cell in cells]
        assert tokens.content[row].tolist() == expected


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 5, 1)])
def test_malformed_batches(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cells: found shape .*; expected \(batch, 5 columns\)"):
        fitted().tokenize({"cells": torch.zeros(shape)})


def parts(made: Tabular) -> list[tuple[str, int]]:
    """Kind and number of categories of each column, from the schema."""
    return [(each["kind"], each.get("buckets") or len(each.get("categories", [None]))) for each in made.schema or ()]


def embedded_by_hand(made: Tabular, tokens: Tokens) -> list[list[Tensor]]:
    """FT-Transformer's tokenizer, cell by cell; the table's rows come in the order of the columns."""
    first_row, row = [], int(made.official_offset)
    for kind, categories in parts(made):
        first_row.append(row)
        row += 1 if kind == "numerical" else categories + 1
    assert row == len(made.cell_tokens)
    result = []
    for contents, coords in zip(tokens.content.tolist(), tokens.coords[..., 0].tolist(), strict=True):
        vectors = []
        for (value, known), place in zip(contents, coords, strict=True):
            column = round(place) - int(made.official_offset)
            if column < 0:
                vector = made.cell_tokens[0]
            elif not known:
                vector = made.missing_token
            elif parts(made)[column][0] == "numerical":
                vector = made.cell_tokens[first_row[column]] * value
            else:
                vector = made.cell_tokens[first_row[column] + int(value)]
            vectors.append(vector + made.column_tokens[round(place)])
        result.append(vectors)
    return result


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("order", ["mixed", "as in the table"])
def test_embedding_equals_a_loop(order: str, official: bool) -> None:
    """Whatever the order of the tokens: a token's column is told by its place, not by where it stands."""
    made = built(fitted(official_offset=official))
    columns = table()
    columns["colour"][3] = "violet"
    tokens = made.tokenize(batch_of(made, columns))
    if order == "mixed":
        tokens = mixed(tokens, 4)
    expected = torch.stack([torch.stack(vectors) for vectors in embedded_by_hand(made, tokens)])
    torch.testing.assert_close(made.embed(tokens), expected)


def test_columns_in_another_order_keep_their_kinds() -> None:
    """A model whose table has its columns in another order, with the same weights for each, embeds them the same."""
    first = built(fitted())
    order = [3, 0, 4, 2, 1]
    assert first.schema is not None
    second = built(Tabular([first.schema[column] for column in order]))
    sizes = [1 if kind == "numerical" else count + 1 for kind, count in parts(first)]
    blocks = first.cell_tokens.detach().split(sizes)
    with torch.no_grad():
        second.cell_tokens.copy_(torch.cat([blocks[column] for column in order]))
        second.column_tokens.copy_(first.column_tokens[order])
        second.missing_token.copy_(first.missing_token)
    found = second.embed(second.tokenize(batch_of(second, table())))
    expected = first.embed(first.tokenize(batch_of(first, table())))
    torch.testing.assert_close(found, expected[:, order])
    assert torch.equal(
        second.raw_features(batch_of(second, table())).sum(), first.raw_features(batch_of(first, table())).sum()
    )


def test_a_learned_content_is_embedded_and_gets_a_gradient() -> None:
    """One vector for all columns, as a mask token has; known by halves is the mean of both embeddings."""
    made = built(fitted())
    tokens = made.tokenize(batch_of(made, table()))
    token = torch.tensor([0.7, 0.5], requires_grad=True)
    tokens.content = token.expand_as(tokens.content)
    out = made.embed(tokens)
    out.square().sum().backward()
    assert token.grad is not None and (token.grad != 0).all() and token.grad.isfinite().all()
    ends = []
    for known in (0.0, 1.0):
        tokens.content = torch.tensor([0.7, known]).expand(40, 5, 2)
        ends.append(made.embed(tokens))
    torch.testing.assert_close(out, (ends[0] + ends[1]) / 2)
    # Rounded to a code, and what is no code is cut to the nearest one.
    for value, same in ((0.7, 1.0), (-5.0, 0.0), (1e6, 3.0)):
        rows = []
        for each in (value, same):
            tokens.content = torch.tensor([each, 1.0]).expand(40, 5, 2)
            rows.append(made.embed(tokens)[:, 1])
        assert torch.equal(*rows)
    tokens.content = torch.tensor([1e6, 1.0]).expand(40, 5, 2)
    cut = made.embed(tokens)
    tokens.content = torch.tensor([10.0, 1.0]).expand(40, 5, 2)
    assert torch.equal(cut[:, [0, 2]], made.embed(tokens)[:, [0, 2]])


def test_start_values_are_ft_transformers_and_do_not_decay() -> None:
    made = fitted()
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = MMSSLModel(MMSSLConfig(modalities={"tabular": made.options()}, **sizes))
    own: Any = model.modalities["tabular"]
    for values in (own.cell_tokens, own.column_tokens, own.missing_token):
        assert values.abs().max() <= 1 / 8
        assert values.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.2)
    free = {id(value) for value in make_optimizer(model, TrainArguments("x")).param_groups[1]["params"]}
    assert {id(value) for value in own.parameters()} <= free


@pytest.mark.parametrize("official", [False, True])
def test_positions(official: bool) -> None:
    made = fitted(official_offset=official)
    tokens = mixed(made.tokenize(batch_of(made, table())), 4)
    learned: Any = made.positions(6)
    assert len(learned.index_tokens) == 5 + official
    assert torch.equal(learned(tokens.coords), learned.index_tokens[tokens.coords[..., 0].long()])
    sines = fitted(position_embedding="sincos", official_offset=official).positions(6)(tokens.coords)
    for found, column in zip(sines[0].tolist(), tokens.coords[0, :, 0].tolist(), strict=True):
        angles = [column / 100 ** (k / 3) for k in range(3)]
        assert found == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-6)


def test_raw_features_equal_scikit_learn() -> None:
    """Scaled numbers with 0 for gaps, one-hot categories, flags of the columns that had gaps."""
    columns = {name: cells for name, cells in table().items() if name != "word"}
    made = fitted(columns)
    found = made.raw_features(batch_of(made, columns)).numpy()
    numbers = StandardScaler().fit_transform(np.stack([columns["size"], columns["age"].astype(float)], axis=1))
    colour = OneHotEncoder(categories=[["blue", "green", "red"]], handle_unknown="ignore", sparse_output=False)
    member = columns["member"].astype(float)
    expected = np.column_stack(
        [
            np.nan_to_num(numbers[:, 0]),
            colour.fit_transform(columns["colour"][:, None]),
            np.nan_to_num(numbers[:, 1]),
            1 - member,
            member,
            np.isnan(columns["size"]),
            columns["colour"] == None,  # noqa: E711
        ]
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    official = Tabular(made.schema, official_offset=True)
    np.testing.assert_array_equal(official.raw_features(batch_of(made, columns)), found)
    unknown = made.raw_features(
        batch_of(made, {name: cells[:1] for name, cells in columns.items()} | {"colour": ["x"]})
    )
    assert not unknown[0, 1:4].any()


# ---- Masks and regions ----------------------------------------------------------------------------------------------


def numbers(columns: int, **options: Any) -> Tabular:
    return Tabular(
        [{"name": f"c{n}", "kind": "numerical", "mean": 0, "std": 1, "min": 0, "max": 1} for n in range(columns)],
        **options,
    )


def tokens_of(made: Tabular, rows: int, seed: int = 0) -> Tokens:
    return made.tokenize({"cells": torch.randn(rows, len(made.readers), generator=key(seed))})


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    ("share", "count"), [(0.13628, 7), (0.36819, 20), (0.15625, 8), (0.62245, 34), (0.001, 1), (1.0, 54)]
)
def test_regions_have_the_sizes_of_t_jepa(share: float, count: int, official: bool) -> None:
    """54 columns: contexts of 7 to 20, targets of 8 to 34, by the released shares."""
    made = numbers(54, official_offset=official)
    tokens = tokens_of(made, 6)
    chosen = made.region(tokens, share, key(0))
    assert chosen.sum(dim=1).tolist() == [count] * 6
    assert len({tuple(row) for row in chosen.tolist()}) > 3 or count == 54


def test_regions_are_any_columns_that_are_allowed() -> None:
    """As many of the columns as asked, from the allowed ones; any two equally often together."""
    made = numbers(6)
    tokens = tokens_of(made, 6000)
    chosen = made.region(tokens, 0.5, key(0)).double()
    together = chosen.T @ chosen / 6000
    expected = torch.full((6, 6), 0.5 * 2 / 5, dtype=torch.float64).fill_diagonal_(0.5)
    assert (together - expected).abs().max() < 5 * math.sqrt(0.25 / 6000)
    allowed = torch.arange(6) % 2 == 0
    rest = made.region(tokens, 0.5, key(1), allowed.expand(6000, -1))
    assert (rest == allowed).all()
    assert (made.region(tokens, 0.1, key(1), allowed.expand(6000, -1)).sum(dim=1) == 1).all()


@pytest.mark.parametrize("official", [False, True])
def test_every_column_is_hidden_and_chosen_but_officially_never_the_last(official: bool) -> None:
    """The released code of T-JEPA counts the learned token as the first column, and never reaches the last one."""
    made = numbers(7, official_offset=official)
    tokens = tokens_of(made, 2000)
    mask = made.mask(tokens, 0.5, key(0))
    region = made.region(tokens, 0.3, key(0))
    visible = torch.zeros_like(mask.hidden).scatter(1, mask.visible_index, mask.visible_valid)
    expected = [True] * 7 + [False] * official
    for chosen in (mask.hidden, visible, region):
        assert chosen.any(dim=0).tolist() == expected
        assert not chosen.all(dim=0).any()
    assert mask.hidden.sum(dim=1).eq(4).all() and region.sum(dim=1).eq(2).all()
    allowed = torch.ones_like(tokens.valid)
    assert made.region(tokens, 1.0, key(0), allowed).sum(dim=1).eq(7).all()
    with pytest.raises(ValueError, match=r"tabular has no mask style 'block'; it offers: random"):
        made.mask(tokens, 0.5, key(0), "block")


def test_the_official_learned_token_is_no_cell() -> None:
    """The same in every row, never altered, and nothing to predict, wherever it stands."""
    made = built(fitted(official_offset=True, alteration_ratio=1.0))
    tokens = mixed(made.tokenize(batch_of(made, table())), 6)
    learned = tokens.coords[..., 0] == 0
    vectors = made.embed(tokens)[learned]
    assert learned.any(dim=1).all() and torch.equal(vectors, vectors[:1].expand_as(vectors))
    altered, where = made.alter(tokens, key(0))
    assert torch.equal(where, ~learned)
    assert torch.equal(altered.content[learned], tokens.content[learned])
    assert not made.target(tokens)[..., 1][learned].any()
    assert not made.positions(4)(tokens.coords)[learned].std(dim=0).any()


# ---- SCARF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 1.0])
def test_views_draw_cells_from_other_rows(ratio: float) -> None:
    made = fitted(corruption_ratio=ratio)
    batch = batch_of(made, table())
    before = batch["cells"].clone()
    view = made.view(batch, key(0))
    cells = view.batch["cells"].nan_to_num(-99)
    before = before.nan_to_num(-99)
    assert torch.equal(batch["cells"].nan_to_num(-99), before)
    if not ratio:
        assert torch.equal(cells, before) and not view.parameters
        return
    corrupted, source = view.parameters["corrupted"], view.parameters["source"]
    assert corrupted.sum(dim=1).tolist() == [math.floor(5 * ratio + 1e-9)] * 40
    for row in range(40):
        for column in range(5):
            assert source[row, column] != row
            expected = before[int(source[row, column]), column] if corrupted[row, column] else before[row, column]
            assert cells[row, column] == expected


def test_every_cell_and_every_other_row_is_drawn_equally_often() -> None:
    made = numbers(5, corruption_ratio=0.6)
    batch = {"cells": torch.arange(4.0)[:, None].expand(-1, 5)}
    draws = [made.view(batch, key(seed)).parameters for seed in range(1500)]
    corrupted = torch.stack([draw["corrupted"] for draw in draws]).double()
    assert (corrupted.mean(dim=0) - 0.6).abs().max() < 5 * math.sqrt(0.24 / 1500)
    source = torch.stack([draw["source"] for draw in draws])
    counts = torch.stack([(source == row).double().mean(dim=0) for row in range(4)])  # (from, row, column)
    expected = ((1 - torch.eye(4)) / 3)[..., None].expand_as(counts)
    assert (counts - expected).abs().max() < 5 * math.sqrt(2 / 9 / 1500)
    # Columns draw for themselves: two of them name the same row as often as chance has it.
    assert abs((source[..., 0] == source[..., 1]).double().mean() - 1 / 3) < 5 * math.sqrt(2 / 9 / 1500)


def test_a_row_alone_stays_as_it_is() -> None:
    made = fitted(corruption_ratio=0.6)
    batch = batch_of(made, {name: cells[1:2] for name, cells in table().items()})
    assert torch.equal(made.view(batch, key(0)).batch["cells"].nan_to_num(-9), batch["cells"].nan_to_num(-9))


@pytest.mark.parametrize("kept", [3, 5])
def test_alteration_takes_contents_of_the_same_column(kept: int) -> None:
    """Tokens in any order: each altered one holds what another token of its column holds; all others stay."""
    made = numbers(5)
    cells = torch.arange(60.0).view(12, 5)  # 5 * row + column
    tokens = mixed(made.tokenize({"cells": cells}), kept)
    before = tokens.content.clone()
    altered, where = made.alter(tokens, key(0))
    assert torch.equal(tokens.content, before) and torch.equal(altered.coords, tokens.coords)
    assert where.sum(dim=1).tolist() == [math.floor((kept + 1) * 0.6)] * 12
    assert torch.equal(altered.content[..., 0] % 5, tokens.coords[..., 0])
    assert torch.equal(altered.content[~where], before[~where])
    assert (altered.content[where] != before[where]).any(
        dim=1
    ).double().mean() > 0.8  # a repeated token may meet itself
    whole, where = made.alter(made.tokenize({"cells": cells}), key(0))
    assert (whole.content[..., 0][where] != cells[where]).all()


def test_alteration_ignores_padding() -> None:
    made = numbers(5, alteration_ratio=1.0)
    tokens = tokens_of(made, 8)
    tokens.valid = torch.rand(tokens.valid.shape, generator=key(1)) < 0.7
    tokens.content = torch.where(tokens.valid[..., None], tokens.content, 1e6)
    altered, where = made.alter(tokens, key(0))
    assert torch.equal(where, tokens.valid)
    assert altered.content[where].abs().max() < 10


# ---- Reconstruction -------------------------------------------------------------------------------------------------


def loss_inputs(made: Tabular, keep: int = 4) -> tuple[Tensor, Tensor, Tokens]:
    columns = table()
    columns["colour"][::5] = "violet"
    tokens = mixed(made.tokenize(batch_of(made, columns)), keep)
    torch.manual_seed(0)
    prediction = 3 * torch.randn(*tokens.valid.shape, made.num_outputs, generator=key(3))
    return prediction.requires_grad_(), made.target(tokens), tokens


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_loss_equals_a_loop(distance: str, official: bool) -> None:
    """Each column by itself, with torch's own losses; missing cells and unknown categories weigh nothing."""
    made = fitted(distance=distance, official_offset=official)
    prediction, target, tokens = loss_inputs(made)
    where = torch.rand(target.shape[:2], generator=key(1)) < 0.7
    loss, weight = made.reconstruction_loss(prediction, target, where)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    starts = np.cumsum([int(official), *(count for _, count in parts(made))]).tolist()
    kinds_seen = set()
    for b, n in np.ndindex(*where.shape):
        column, (value, known) = int(tokens.coords[b, n, 0]) - official, tokens.content[b, n].tolist()
        kind, count = parts(made)[column] if column >= 0 else ("learned", 1)
        told = bool(known) and kind != "learned" and not (kind == "categorical" and value == 0)
        assert weight[b, n] == float(where[b, n] and told)
        if not told:
            continue
        own = prediction[b, n, starts[column] : starts[column] + count]
        if kind == "categorical":
            expected = torch.nn.functional.cross_entropy(own[None], torch.tensor([int(value) - 1]))
        else:
            difference = torch.nn.functional.l1_loss if distance == "l1" else torch.nn.functional.mse_loss
            expected = difference(own[0], torch.tensor(value))
        torch.testing.assert_close(loss[b, n], expected)
        kinds_seen.add((column, kind))
    assert len(kinds_seen) == 5


def test_gradients_stay_finite_and_in_their_own_columns() -> None:
    made = fitted()
    prediction, target, tokens = loss_inputs(made)
    wild = (prediction.detach() * 1e4).requires_grad_()
    where = torch.ones(target.shape[:2], dtype=torch.bool)
    for each in (prediction, wild):
        loss, weight = made.reconstruction_loss(each, target, where)
        (loss * weight).sum().backward()
        assert each.grad is not None and each.grad.isfinite().all()
    assert prediction.grad is not None
    starts = np.cumsum([0, *(count for _, count in parts(made))]).tolist()
    for b, n in np.ndindex(*where.shape):
        column = int(tokens.coords[b, n, 0])
        own = torch.zeros(made.num_outputs, dtype=torch.bool)
        own[starts[column] : starts[column + 1]] = True
        assert not prediction.grad[b, n][~own].any()
        assert prediction.grad[b, n][own].any() == (weight[b, n] > 0)
    half, _ = made.reconstruction_loss(prediction.bfloat16(), target, where)
    assert torch.equal(half, made.reconstruction_loss(prediction.bfloat16().float(), target, where)[0])


def test_targets_carry_no_gradient() -> None:
    made = fitted()
    tokens = made.tokenize(batch_of(made, table()))
    tokens.content.requires_grad_()
    assert not made.target(tokens).requires_grad


def test_a_perfect_prediction_gives_the_contents_back() -> None:
    made = fitted()
    tokens = mixed(made.tokenize(batch_of(made, table())), 4)
    starts = np.cumsum([0, *(count for _, count in parts(made))]).tolist()
    prediction = torch.full((*tokens.valid.shape, made.num_outputs), 50.0)  # other columns' outputs do not count
    for b, n in np.ndindex(*tokens.valid.shape):
        column, value = int(tokens.coords[b, n, 0]), tokens.content[b, n, 0]
        if parts(made)[column][0] == "numerical":
            prediction[b, n, starts[column]] = value
        else:
            prediction[b, n, starts[column] : starts[column + 1]] = 0.0
            prediction[b, n, starts[column] + max(int(value) - 1, 0)] = 40.0
    known = tokens.content[..., 1] > 0
    found = made.content_of(prediction, tokens)
    assert torch.equal(found[known], tokens.content[known]) and (found[..., 1] == 1).all()
    loss, weight = made.reconstruction_loss(prediction, made.target(tokens), tokens.valid)
    assert (loss * weight).sum() < 1e-6 and weight.sum() == known.sum()


@pytest.mark.parametrize("scaling", ["standard", "min_max"])
def test_pictures(scaling: str, tmp_path: Path) -> None:
    """A strip: greys grow with numbers, categories have colours, hidden and missing cells are blank."""
    made = fitted(numerical_scaling=scaling)
    tokens = made.tokenize(batch_of(made, table()))
    picture = made.picture(tokens)
    assert picture.shape == (40, 1, 5, 3)
    known = tokens.content[..., 1] > 0
    assert torch.equal(picture[:, 0].isnan().any(dim=-1), ~known)
    assert (picture.nan_to_num(0.5) >= 0).all() and (picture.nan_to_num(0.5) <= 1).all()
    age, colour = picture[:, 0, 2], picture[:, 0, 1]
    assert torch.equal(age[:, 0], age[:, 1]) and torch.equal(
        age[:, 0].argsort(stable=True), tokens.content[:, 2, 0].argsort(stable=True)
    )
    assert len(colour[known[:, 1]].unique(dim=0)) == 3
    hidden = torch.rand(40, 5, generator=key(0)) < 0.5
    tokens.content = tokens.content.masked_fill(hidden[..., None], torch.nan)
    assert made.picture(tokens)[:, 0][hidden].isnan().all()
    for corruption in ("drop", "alter"):
        objective = objective_of(made, corruption=corruption)
        drawn = draw_reconstructions(
            objective, batch_of(made, {k: v[:3] for k, v in table().items()}), tmp_path / "x.png"
        )
        assert drawn is not None and drawn.stat().st_size > 1000


# ---- Together with the rest -----------------------------------------------------------------------------------------


def objective_of(made: Tabular, **options: Any) -> MaskedReconstruction:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MMSSLModel(MMSSLConfig(modalities={"tabular": made.options()}, **sizes))
    return MaskedReconstruction(model, decoder_layers=1, decoder_hidden_size=16, decoder_attention_heads=2, **options)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"corruption": "drop"},
        {"corruption": "replace", "mask_token_space": "input", "replace_ratio": 0.3},
        {"corruption": "alter"},
    ],
    ids=lambda options: options["corruption"],
)
@pytest.mark.parametrize("columns", ["all", "numbers", "categories"])
def test_missing_cells_train(columns: str, options: dict[str, Any], official: bool) -> None:
    """With gaps, an empty row, and tables of one kind alone: finite losses, and a gradient for all parameters."""
    names = {"all": list(table()), "numbers": ["size", "age"], "categories": ["colour", "word", "member"]}[columns]
    cells = {name: table()[name].astype(object) for name in names}
    for each in cells.values():
        each[5] = None
    made = fitted(cells, corruption_ratio=0.5, official_offset=official)
    objective = objective_of(made, **options)
    loss = objective(batch_of(made, cells), key(0)).loss
    loss.backward()
    assert loss.isfinite() and loss > 0
    for name, value in objective.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), name
    if columns == "all":
        own: Any = objective.model.modalities["tabular"]
        assert own.missing_token.grad.any()


def test_hidden_cells_cannot_be_seen() -> None:
    """Whatever stands in them, the encoder's output for the others stays."""
    made = fitted()
    objective = objective_of(made, corruption="drop", views=False).eval()
    batch = batch_of(made, table())
    hidden = made.mask(made.tokenize(batch), 0.75, key(0)).hidden
    other = {"cells": torch.where(hidden, batch["cells"].roll(1, dims=0), batch["cells"])}
    first, second = (objective(each, key(0)).embedding for each in (batch, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, objective({"cells": batch["cells"].roll(1, dims=0)}, key(0)).embedding)


def test_rows_do_not_depend_on_their_batch() -> None:
    made = fitted()
    model = objective_of(made).model.eval()
    batch = batch_of(made, table())
    whole = model(**batch).pooler_output
    alone = torch.cat([model(cells=cells[None]).pooler_output for cells in batch["cells"]])
    torch.testing.assert_close(alone, whole)


def test_trained_on_a_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run finds the columns out; model and processor read rows, a test split too; infinite numbers are skipped."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    frame = pd.DataFrame(table(64)).assign(label=np.arange(64) % 2, part=["train"] * 48 + ["test"] * 16)
    frame.loc[3, "size"] = np.inf
    frame.loc[63, "colour"] = "violet"
    frame.to_csv(tmp_path / "table.csv", index=False)
    data = DataArguments(str(tmp_path / "table.csv"), filter="part=train", on_error="skip")
    made = Tabular(max_categories=10)
    train = TrainArguments(str(tmp_path / "run"), max_train_steps=6, per_device_train_batch_size=16, logging_steps=1)
    run = pretrain(
        made, partial(MaskedReconstruction, mask_ratio=0.5, decoder_layers=1), EncoderConfig(16, 1, 2), data, train
    )
    assert kinds(made) == kinds(fitted())
    finite = frame["size"][:48].replace([np.inf], np.nan).dropna()
    assert record(made, "size")["mean"] == pytest.approx(finite.mean())
    test = load_samples(DataArguments(data.source, filter="part=test"), made)
    model, processor = AutoModel.from_pretrained(run), AutoProcessor.from_pretrained(run)
    batch = processor(list(test.values))
    assert batch["cells"].shape == (16, 5) and batch["cells"][15, 1] == 0
    assert model(**batch).pooler_output.isfinite().all()
    assert model.config.modalities["tabular"]["schema"] == made.schema
    with pytest.raises(ValueError, match=r"row 3: column size: found inf"):
        pretrain(
            Tabular(made.schema),
            partial(MaskedReconstruction, decoder_layers=1),
            EncoderConfig(16, 1, 2),
            DataArguments(data.source, filter="part=train"),
            TrainArguments(str(tmp_path / "other"), max_train_steps=6, per_device_train_batch_size=16),
        )


ADULT = Path(os.environ.get("MMSSL_DATA", "../shared/data")) / "tabular" / "adult"


@pytest.mark.skipif(not ADULT.is_dir(), reason="UCI Adult is not here: set MMSSL_DATA")
def test_adult_is_read_as_it_is_documented() -> None:
    frame, meta = pd.read_parquet(ADULT / "data.parquet"), json.loads((ADULT / "meta.json").read_text())
    frame = frame[frame["split"] == "train"]
    labels = (frame.pop("income") == ">50K").to_numpy().astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = fitted({name: frame[name].to_numpy() for name in frame}, labels, max_categories=100)
    expected = dict.fromkeys(meta["numerical"], "numerical") | dict.fromkeys(meta["categorical"], "categorical")
    assert kinds(made) == expected
    assert [each["name"] for each in made.schema or () if each["missing"]] == [
        "workclass",
        "occupation",
        "native_country",
    ]


# ---- Options --------------------------------------------------------------------------------------------------------


def test_without_a_schema_there_is_nothing_to_build() -> None:
    message = r"schema: found none; .* call fit\(samples\) first"
    with pytest.raises(ValueError, match=message):
        Tabular().build(8)
    with pytest.raises(ValueError, match=message):
        MMSSLModel(MMSSLConfig(modalities={"tabular": {}}))
    with pytest.raises(ValueError, match=message):
        MMSSLFeatureExtractor({"tabular": {}})({"a": 1})


NUMBER = {"name": "a", "kind": "numerical", "mean": 0.0, "std": 1.0, "min": 0.0, "max": 1.0}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schema": []}, "schema: found the columns .*expected at least one"),
    ({"schema": [NUMBER, NUMBER]}, r"schema: found the columns \['a', 'a'\].*each name once"),
    ({"schema": [{"name": "a", "kind": "date"}]}, "schema: found .*expected a name, and the kind"),
    ({"schema": [{"kind": "numerical"}]}, "schema: found .*expected a name"),
    ({"schema": [{"name": "a", "kind": "numerical", "mean": 0.0}]}, "column a: found std None"),
    ({"schema": [NUMBER | {"std": math.inf}]}, "column a: found std inf"),
    ({"schema": [NUMBER | {"min": None}], "numerical_scaling": "min_max"}, "column a: found min None"),
    ({"schema": [{"name": "a", "kind": "categorical"}]}, "column a: expected either categories or buckets"),
    (
        {"schema": [{"name": "a", "kind": "categorical", "categories": ["x"], "buckets": 3}]},
        "column a: expected either categories or buckets",
    ),
    ({"schema": [{"name": "a", "kind": "categorical", "categories": ["x", "x"]}]}, "column a: .*different categories"),
    ({"schema": [{"name": "a", "kind": "categorical", "categories": []}]}, "column a: .*different categories"),
    ({"schema": [{"name": "a", "kind": "categorical", "buckets": 2**24}]}, "column a: .*expected 1 to 16777215"),
    ({"numerical_scaling": "robust"}, "numerical_scaling: found 'robust'; expected one of standard, min_max, quantile"),
    ({"distance": "l3"}, "distance: found 'l3'"),
    ({"position_embedding": "rope"}, "position_embedding: found 'rope'"),
    ({"ignore_columns": "age"}, "ignore_columns: found the text 'age'; expected a list"),
    ({"alteration_ratio": 1.5}, "alteration_ratio: found 1.5; expected a share"),
    ({"corruption_ratio": -0.1}, "corruption_ratio: found -0.1; expected a share"),
    ({"max_categories": 0}, "max_categories: found 0"),
    ({"clip": 0.0}, "clip: found 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tabular(**options)


@pytest.mark.parametrize("option", ["ignore_columns", "categorical_columns"])
def test_options_that_name_no_column(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}: found agee; the table has size, colour, age"):
        Tabular(**{option: ["agee"]}).fit(samples_of(table()))  # type: ignore[arg-type]


def test_fit_twice_is_the_same_and_the_order_of_rows_does_not_matter() -> None:
    """A resumed run and other processes must find the same columns."""
    order = np.random.default_rng(3).permutation(40)
    first, again = fitted(), fitted()
    assert json.dumps(first.schema) == json.dumps(again.schema)
    shuffled = fitted({name: cells[order] for name, cells in table().items()})
    assert record(shuffled, "colour") == record(first, "colour")
    assert record(shuffled, "size") == pytest.approx(record(first, "size"))
