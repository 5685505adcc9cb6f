"""Time series from files, against what stands in the files and against aeon's own arrays."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmssl.data import DataArguments, load_samples
from mmssl.modalities.time_series import TimeSeries
from mmssl.samples import Samples
from mmssl.series_files import TableForm, read_collection, read_series

DATA = Path(os.environ.get("MMSSL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "timeseries"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no series in {DATA}; set MMSSL_DATA")
NAMES = ("x", "series")
NAN = float("nan")


@pytest.fixture
def aeon() -> Any:
    return pytest.importorskip("aeon.datasets", reason="aeon is not installed")


def collection(source: Any, form: TableForm | None = None) -> Samples:
    samples = read_collection(str(source), form or TableForm(), NAMES)
    assert samples is not None
    return samples


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# aeon's data sets and .ts files


def test_a_data_set_of_aeon(aeon: Any) -> None:
    """Series of equal length; the two parts of the published split, and both together."""
    values, labels = aeon.load_classification("BasicMotions", split="train")
    samples = collection("aeon:BasicMotions:train")
    np.testing.assert_array_equal(np.stack(samples.values), values)
    assert samples.labels is not None
    assert [samples.classes[i] for i in samples.labels] == list(labels)
    assert samples.name(3) == "aeon:BasicMotions:train, series 3"
    test, both = collection("aeon:BasicMotions:test"), collection("aeon:BasicMotions")
    assert (len(samples), len(test), len(both)) == (40, 40, 80)
    np.testing.assert_array_equal(both.values[40], test.values[0])


def test_a_data_set_of_unequal_lengths(aeon: Any) -> None:
    """270 utterances of nine speakers, as published, of 7 to 26 steps."""
    samples = collection("aeon:JapaneseVowels:train")
    assert len(samples) == 270 and samples.values[0].shape == (12, 20)
    assert {value.shape[0] for value in samples.values} == {12}
    lengths = [value.shape[1] for value in samples.values]
    assert (min(lengths), max(lengths)) == (7, 26)
    assert np.bincount(samples.labels if samples.labels is not None else []).tolist() == [30] * 9


def test_quantities_are_labels(aeon: Any) -> None:
    values, quantities = aeon.load_regression("Covid3Month", split="test")
    samples = collection("aeon:Covid3Month:test")
    assert samples.classes == () and samples.labels is not None and samples.labels.dtype == np.float64
    np.testing.assert_array_equal(samples.labels, quantities)
    np.testing.assert_array_equal(np.stack(samples.values), values)


def test_what_aeon_does_not_have(aeon: Any) -> None:
    with pytest.raises(ValueError, match=r"aeon:NoSuchSet: it is not in aeon's package.*BasicMotions.*JapaneseVowels"):
        collection("aeon:NoSuchSet")
    with pytest.raises(ValueError, match="found the split 'valid'; expected aeon:GunPoint:train or aeon:GunPoint:test"):
        collection("aeon:GunPoint:valid")


TS = "@problemName made\n@univariate false\n@equalLength false\n{label}\n@data\n{data}"


def test_ts_files(tmp_path: Path, aeon: Any) -> None:
    """Channels are parted by colons, values by commas; ? is a missing value; lengths differ."""
    text = TS.format(label="@classLabel true left right", data="1,2,?:4,5,6:right\n7,8:9,10:left\n")
    samples = collection(write(tmp_path / "made.ts", text))
    np.testing.assert_array_equal(samples.values[0], [[1, 2, NAN], [4, 5, 6]])
    np.testing.assert_array_equal(samples.values[1], [[7, 8], [9, 10]])
    assert samples.labels is not None and samples.labels.tolist() == [1, 0] and samples.classes == ["left", "right"]
    text = TS.format(label="@targetLabel true", data="1,2:4,5:0.5\n7,8:9,10:-2\n")
    assert (labels := collection(write(tmp_path / "two.ts", text)).labels) is not None and labels.tolist() == [0.5, -2]
    text = TS.format(label="@classLabel false", data="1,2:4,5\n7,8:9,10\n")
    assert collection(write(tmp_path / "three.ts", text)).labels is None


@pytest.mark.parametrize(
    "text",
    ["", "no header\n", TS.format(label="@classLabel true a", data="1,two:3,4:a\n"), "@classLabel true\n@data\n"],
)
def test_malformed_ts_files(tmp_path: Path, aeon: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"made\.ts: not a readable \.ts file.*expected a header that ends in @data"):
        read_collection(str(write(tmp_path / "made.ts", text)), TableForm(), NAMES)


# Wide tables

WIDE = "date,left,right\n2020-01-01,1,4\n2020-01-02,,5\n2020-01-03,3,6\n"
EXPECTED = [[1, NAN, 3], [4, 5, 6]]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_wide_table_is_one_series(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table.{suffix}"
    table = pd.read_csv(io.StringIO(WIDE))
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    samples = collection(path)
    assert len(samples) == 1 and samples.name(0) == str(path) and samples.labels is None
    np.testing.assert_array_equal(samples.values[0], EXPECTED)
    np.testing.assert_array_equal(read_series(path, TableForm(), NAMES), EXPECTED)
    np.testing.assert_array_equal(read_series(path.read_bytes(), TableForm(), NAMES), EXPECTED)
    chosen = collection(path, TableForm(values=["right"])).values[0]
    np.testing.assert_array_equal(chosen, [[4, 5, 6]])
    assert len(load_samples(DataArguments(source=str(path)), TimeSeries(patch_length=2))) == 1


def test_tables_in_other_clothes(tmp_path: Path) -> None:
    """Semicolons, tabs, a byte order mark, no header, row numbers as pandas writes them, dates in the index."""
    for number, text in enumerate(
        [
            "date;left;right\n2020-01-01;1;4\n2020-01-02;;5\n2020-01-03;3;6\n",
            "\ufeffleft\tright\n1\t4\n\t5\n3\t6\n",
            "1,4\n,5\n3,6\n",
            "1.0,4.0\r\nnan,5.0\r\n3e0,6.0\r\n",
            ",left,right\n0,1,4\n1,,5\n2,3,6\n",
        ]
    ):
        found = collection(write(tmp_path / f"{number}.csv", text)).values[0]
        np.testing.assert_array_equal(found, EXPECTED, err_msg=text)
    dated = pd.read_csv(io.StringIO(WIDE), index_col="date", parse_dates=True)
    dated.to_parquet(tmp_path / "dated.parquet")
    np.testing.assert_array_equal(collection(tmp_path / "dated.parquet").values[0], EXPECTED)
    np.testing.assert_array_equal(read_series(dated, TableForm(), NAMES), EXPECTED)
    # The first column of this one is no numbering of the rows.
    assert collection(write(tmp_path / "n.csv", ",left\n5,1\n7,2\n")).values[0].tolist() == [[5, 7], [1, 2]]


def test_tables_with_a_series_in_each_row_are_left_to_others(tmp_path: Path) -> None:
    """Lists in cells, whatever their column is called; paths under a usual name. Numbers called x are a channel."""
    lists = pd.DataFrame({"signal": [[1.0, 2.0, 3.0], [4.0, 5.0]], "label": [0, 1]})
    lists.to_parquet(tmp_path / "lists.parquet")
    assert read_collection(str(tmp_path / "lists.parquet"), TableForm(), NAMES) is None
    pd.DataFrame({"x": ["a.npy", "b.npy"]}).to_parquet(tmp_path / "paths.parquet")
    assert read_collection(str(tmp_path / "paths.parquet"), TableForm(), NAMES) is None
    assert read_collection(str(write(tmp_path / "paths.csv", "x,label\na.npy,0\n")), TableForm(), NAMES) is None
    assert collection(write(tmp_path / "xy.csv", "x,y\n1,2\n3,4\n")).values[0].tolist() == [[1, 3], [2, 4]]
    long = write(tmp_path / "long.csv", "series,v\na,1\nb,2\na,3\n")  # one series in each row, unless it is said
    assert read_collection(str(long), TableForm(), NAMES) is None
    found = {tuple(each[0]) for each in collection(long, TableForm(series="series")).values}
    assert found == {(1, 3), (2,)}
    samples = load_samples(
        DataArguments(source=str(tmp_path / "lists.parquet"), column="signal"), TimeSeries(patch_length=2)
    )
    prepared = [TimeSeries(patch_length=2).prepare(value)["series"][:, 0].tolist() for value in samples.values]
    assert prepared == [[1, 2, 3], [4, 5]]
    assert samples.labels is not None and samples.labels.tolist() == [0, 1]


def test_other_sources_are_left_to_others(tmp_path: Path) -> None:
    write(tmp_path / "broken.parquet", "this is no table")
    for source in ("somebody/data", str(tmp_path), str(tmp_path / "*.csv"), str(tmp_path / "broken.parquet")):
        assert read_collection(source, TableForm(), NAMES) is None
    with pytest.raises(ValueError, match=r"cannot load.*broken\.parquet"):
        load_samples(DataArguments(source=str(tmp_path / "broken.parquet")), TimeSeries())


# Time


def test_rows_are_sorted_in_time(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "date,v\n2020-01-03,3\n2020-01-01,1\n2020-01-02,2\n2020-01-04,4\n")
    with pytest.warns(
        UserWarning, match=r"t\.csv: 1 time stamps are earlier than the one before; the rows were sorted"
    ):
        assert collection(path).values[0].tolist() == [[1, 2, 3, 4]]


def test_steps_that_were_left_out_are_missing(tmp_path: Path) -> None:
    """Two hours are left out of nine."""
    times = pd.date_range("2020-02-28 20:00", periods=9, freq="h", tz="Europe/Vienna").delete([2, 6])
    path = tmp_path / "t.parquet"
    pd.DataFrame({"when": times, "v": np.arange(7)}).to_parquet(path)
    with pytest.warns(UserWarning, match="2 of 9 steps are missing; they became NaN"):
        found = collection(path).values[0]
    np.testing.assert_array_equal(found, [[0, 1, NAN, 2, 3, 4, NAN, 5, 6]])


@pytest.mark.parametrize(("first", "step"), [(0.0, 0.1), (1e6, 3.0), (1_600_000_000, 60)])
def test_time_in_numbers(tmp_path: Path, first: float, step: float) -> None:
    rows = "".join(f"{first + step * k},{k}\n" for k in range(20) if k != 7)
    path = write(tmp_path / "t.csv", f"Time,v\n{rows}")
    with pytest.warns(UserWarning, match="1 of 20 steps are missing"):
        found = collection(path).values[0]
    np.testing.assert_array_equal(found, [[k if k != 7 else NAN for k in range(20)]])


def test_months_are_even_enough_and_irregular_times_are_not(tmp_path: Path) -> None:
    months = pd.DataFrame({"date": pd.date_range("2020-01-01", periods=14, freq="MS"), "v": range(14)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_series(months, TableForm(), NAMES).tolist() == [list(range(14))]
    uneven = pd.DataFrame({"time": [0.0, 1.0, 2.0, 3.4, 9.1], "v": range(5)})
    with pytest.warns(UserWarning, match="time stamps are not evenly spaced; they are read as if they were"):
        assert read_series(uneven, TableForm(), NAMES).tolist() == [list(range(5))]


# Tables of several series, and long tables


def test_several_series_in_one_table(tmp_path: Path) -> None:
    text = "who,time,a,b\nx,0,1,2\ny,0,3,4\nx,1,5,6\ny,1,7,8\ny,2,9,10\n"
    samples = collection(path := write(tmp_path / "t.csv", text), TableForm(series="who"))
    found = {samples.name(i): value.tolist() for i, value in enumerate(samples.values)}
    assert found == {f"{path}, series x": [[1, 5], [2, 6]], f"{path}, series y": [[3, 7, 9], [4, 8, 10]]}
    with pytest.raises(ValueError, match="found a table of 2 series; expected one in a sample"):
        read_series(path, TableForm(series="who"), NAMES)


def test_long_tables() -> None:
    """Against pandas' own pivot: rows in any order, a value that is not there, a time that no row has."""
    generator = np.random.default_rng(0)
    rows = [(who, t, sensor) for who in ("u", "w") for t in (0, 1, 2, 3, 5, 6) for sensor in ("p", "q", "r")]
    rows.remove(("w", 2, "q"))
    table = pd.DataFrame(rows, columns=["who", "time", "sensor"])
    table["value"] = generator.normal(size=len(table))
    form = TableForm(series="who", channel="sensor", values=["value"])
    path = io.BytesIO()
    table.sample(frac=1, random_state=0).to_parquet(path)
    for who in ("u", "w"):
        part = table[table.who == who]
        wide = part.pivot(index="time", columns="sensor", values="value").reindex(range(7)).to_numpy().T
        with pytest.warns(UserWarning, match="1 of 7 steps are missing"):
            found = read_series(part.sample(frac=1, random_state=1), form, NAMES)
        np.testing.assert_array_equal(found, wide)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="found a table of 2 series"):
        read_series(path.getvalue(), form, NAMES)


# What cannot be used

MALFORMED: dict[str, tuple[str, TableForm, str]] = {
    "doubles": (
        "date,v\n2020-01-01,1\n2020-01-02,2\n2020-01-02,3\n",
        TableForm(),
        "1 time stamps are there twice, the",
    ),
    "no stamp": ("date,v\n2020-01-01,1\nsoon,2\n", TableForm(), "column date, row 1: found 'soon'; expected a time st"),
    "empty stamp": (
        "date,v\n2020-01-01,1\n,2\n",
        TableForm(),
        "column date, row 1: found 'nan'; expected a time stamp",
    ),
    "hole": ("time,v\n0,1\n1,2\n2,3\n900,4\n", TableForm(), "897 of 901 steps are missing.*cut it into several"),
    "text": ("a,b\n1,2\n3,n/k\n", TableForm(), "column b, row 1: found 'n/k'; expected a number.*value_columns"),
    "names": ("a,b\n1,ann\n3,bob\n", TableForm(), "column b, row 0: found 'ann'.*value_columns"),
    "two times": ("date,time,v\n1,2,3\n", TableForm(), "found the time columns date, time; choose one"),
    "no column": ("a,b\n1,2\n", TableForm(time="when"), "found no column when; the table has a, b"),
    "no values": ("date\n2020-01-01\n", TableForm(), "found 1 rows and the columns date; expected numbers"),
    "no rows": ("a,b\n", TableForm(), "found 0 rows"),
    "empty": ("", TableForm(), "not a readable table"),
    "ragged": ("a,b\n1,2\n3,4,5\n", TableForm(), "not a readable table"),
    "no series": ("who,v\nx,1\n,2\n", TableForm(series="who"), "who: 1 rows belong to no series"),
    "long without time": ("sensor,v\np,1\nq,2\n", TableForm(channel="sensor"), "needs time stamps and one column"),
    "long with two": (
        "time,sensor,v,w\n0,p,1,2\n",
        TableForm(channel="sensor"),
        "found time and v, w: set time_column",
    ),
    "long doubles": ("time,sensor,v\n0,p,1\n0,p,2\n", TableForm(channel="sensor"), "two values of one channel at one"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tables(tmp_path: Path, name: str) -> None:
    text, form, message = MALFORMED[name]
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(ValueError, match=message):
        read_series(path, form, NAMES)
    with pytest.raises(ValueError, match=message):
        read_collection(str(path), form, NAMES)


# Arrays


def saved(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def test_ways_to_hand_an_array_over(tmp_path: Path) -> None:
    import torch

    array = np.array(EXPECTED)
    data = saved(np.save, array)
    (tmp_path / "a.npy").write_bytes(data)
    ways: list[Any] = [
        array,
        array.astype(np.float32),
        array.astype(">f4"),
        torch.from_numpy(array),
        torch.from_numpy(array).bfloat16().requires_grad_(),
        EXPECTED,
        [[1, None, 3], [4, 5, 6]],
        {"x": array},
        {"x": None, "series": EXPECTED, "label": 3},
        data,
        tmp_path / "a.npy",
        str(tmp_path / "a.npy"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.npy")},
        saved(np.savez, array),
        saved(np.savez_compressed, label=3, series=array),
        pd.DataFrame(array.T, columns=["left", "right"]),
        pd.DataFrame(array.T),
    ]
    for way in ways:
        found = read_series(way, TableForm(), NAMES)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, EXPECTED)
    one: list[Any] = [[1, 2], (True, 2), np.array([1, 2], dtype=np.uint8), pd.Series([1, 2])]
    for way in one:
        assert read_series(way, TableForm(), NAMES).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([[1, 2], [3]], r"found list .*expected \(T,\) or \(channels, T\)"),
        ([1, "two"], "found <U.*expected"),
        ([1, None, "two"], "found list.*could not convert"),
        (np.array([1 + 2j]), "found complex128; expected"),
        (None, "found NoneType"),
        ({"y": [1, 2]}, "found a record of y that holds no file"),
        (saved(np.savez, a=np.zeros(3), b=np.zeros(3)), "found the arrays a, b; expected one, or one called x, series"),
        (saved(np.save, np.array(["a"])), "not a readable array.*found <U1"),
        (saved(np.save, np.array([{}])), "not a readable array.*pickle"),
        (saved(np.save, np.zeros(9))[:-20], "not a readable array"),
        (saved(np.savez, a=np.zeros(99))[:-60], "not a readable array"),
    ],
)
def test_malformed_arrays(sample: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_series(sample, TableForm(), NAMES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere\.npy"):
        read_series(tmp_path / "nowhere.npy", TableForm(), NAMES)


# The collected data sets


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "channels", "least", "most"),
    [("BasicMotions", 80, 6, 100, 100), ("JapaneseVowels", 640, 12, 7, 29), ("GunPoint", 200, 1, 150, 150)],
)
def test_archives_of_many_series(name: str, count: int, channels: int, least: int, most: int) -> None:
    """Rows of X, padded with NaN, with classes; the padding is cut off."""
    modality = TimeSeries(patch_length=4)
    arguments = DataArguments(source=str(DATA / "classification" / f"{name}.npz"), label_column="y")
    samples = load_samples(arguments, modality)
    shapes = [modality.prepare(value)["series"].shape for value in samples.values]
    assert len(samples) == count and {shape[1] for shape in shapes} == {channels}
    assert (min(shape[0] for shape in shapes), max(shape[0] for shape in shapes)) == (least, most)
    assert samples.labels is not None and len(samples.classes) == len(np.unique(samples.labels))


@needs_data
def test_a_long_record_for_forecasting() -> None:
    path = DATA / "forecasting" / "ETTh1.parquet"
    samples = load_samples(DataArguments(source=str(path)), TimeSeries())
    table = pd.read_parquet(path)
    assert len(samples) == 1
    np.testing.assert_array_equal(samples.values[0], table.drop(columns="date").to_numpy(np.float64).T)
