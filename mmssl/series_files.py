"""Reads time series: aeon's data sets, .ts files, tables in wide or long form, .npy and .npz files, arrays.

A series is an array (channels, T) of float64, with NaN where a value is missing.
"""

import csv
import io
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.samples import Samples, file_of

TIME_NAMES = ("date", "datetime", "time", "timestamp")


@dataclass
class TableForm:
    """What the columns of a table mean. With nothing set: time runs down the rows, each column is a channel.

    Attributes:
        time: column of the time stamps. None: the one of a date type, or called date, datetime, time or timestamp.
        series: column that says which series a row belongs to. None: all rows are one series.
        channel: column that says which channel a row's value is of. None: each column of values is a channel.
        values: the columns of values. Empty: all others.
    """

    time: str | None = None
    series: str | None = None
    channel: str | None = None
    values: Sequence[str] = ()


def read_collection(source: str, form: TableForm, names: Sequence[str]) -> Samples | None:
    """The series of ``aeon:NAME``, of a .ts file or of a table of numbers. None: the source is none of these.

    A table with lists in its cells, or with paths under one of ``names``, holds a series in each row; it is not read
    here.

    Raises:
        ValueError: it is, and is malformed.
    """
    if source.startswith("aeon:"):
        return read_aeon(source)
    path = Path(source).expanduser()
    if not path.is_file():
        return None
    if path.suffix.lower() == ".ts":
        return read_ts(path)
    given = {form.time, form.series, form.channel, *form.values}
    if path.suffix.lower() not in (".csv", ".parquet") or not is_table_of_numbers(path, set(names) - given):
        return None
    found = series_of(decode_table(path.read_bytes()), form, source)
    return Samples(list(found.values()), partial(series_name, source, list(found)))


def read_series(sample: Any, form: TableForm, names: Sequence[str]) -> np.ndarray:
    """One series as an array, from an array (T,) or (channels, T), a DataFrame, a dict, a path, bytes or a record.

    Raises:
        ValueError: none of these, or malformed.
    """
    if isinstance(sample, dict):
        held = [name for name in names if sample.get(name) is not None]
        sample = sample[held[0]] if held else file_of(sample)
    if isinstance(sample, str | Path):
        sample = Path(sample).read_bytes()
    if isinstance(sample, bytes):
        if sample.startswith((b"\x93NUMPY", b"PK")):
            return decode_numpy(sample, names)
        return only_series(decode_table(sample), form)
    if hasattr(sample, "columns") and hasattr(sample, "reset_index"):
        return only_series(sample, form)
    return as_numbers(sample)


def read_aeon(source: str) -> Samples:
    """``aeon:NAME``, or ``aeon:NAME:train`` and ``aeon:NAME:test`` for the parts of the published split."""
    name, _, split = source.removeprefix("aeon:").partition(":")
    if split not in ("", "train", "test"):
        raise ValueError(f"{source}: found the split {split!r}; expected aeon:{name}:train or aeon:{name}:test")
    datasets = aeon_datasets()
    failures = []
    for load in (datasets.load_classification, datasets.load_regression):
        try:
            series, targets = load(name, split=split or None)
            return labelled(source, series, targets)
        except Exception as error:  # not of this kind, unknown, no network: each has an error of its own
            failures.append(str(error))
    folder = Path(datasets.__file__).parent / "data"
    bundled = sorted(file.name.removesuffix("_TEST.ts") for file in folder.glob("*/*_TEST.ts"))
    raise ValueError(
        f"{source}: it is not in aeon's package and cannot be downloaded ({' / '.join(failures)}); in the package are "
        f"{', '.join(name for name in bundled if (folder / name).is_dir())}"
    )


def read_ts(path: Path) -> Samples:
    """The series of a .ts file of the UCR and UEA archives, with their classes or quantities as labels."""
    try:
        series, targets = aeon_datasets().load_from_ts_file(str(path))
        if not len(series):
            raise ValueError("found no series")
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path}: not a readable .ts file ({error}); expected a header that ends in @data, then one series a line: "
            "values parted by commas, channels by colons, without time stamps"
        ) from error
    return labelled(str(path), series, targets)


def labelled(source: str, series: Any, targets: np.ndarray) -> Samples:
    """Text are classes, floats are quantities."""
    name = partial(series_name, source, range(len(series)))
    if len(targets) != len(series):
        return Samples(list(series), name)
    if targets.dtype.kind == "f":
        return Samples(list(series), name, labels=targets)
    classes, labels = np.unique(targets, return_inverse=True)
    return Samples(list(series), name, labels=labels, classes=classes.tolist())


def series_name(source: str, names: Sequence[Any], i: int) -> str:
    return source if names[i] is None else f"{source}, series {names[i]}"


def aeon_datasets() -> Any:
    try:
        import aeon.datasets
    except ImportError as error:
        raise ImportError('.ts files and aeon\'s data sets need aeon: pip install "mmssl[time_series]"') from error
    return aeon.datasets


def as_numbers(values: Any) -> np.ndarray:
    """Anything like an array of numbers as float64; None becomes NaN."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    try:
        array = np.array(values)
        if array.dtype.kind == "O":
            array = array.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"found {type(values).__name__} ({error}); expected (T,) or (channels, T) numbers") from error
    if array.dtype.kind not in "fiub" or not array.ndim:
        found = array.dtype if array.ndim else type(values).__name__
        raise ValueError(f"found {found}; expected (T,) or (channels, T) numbers, NaN where one is missing")
    return array.astype(np.float64)


def decode_numpy(data: bytes, names: Sequence[str]) -> np.ndarray:
    """A .npy file, or the array of an .npz file that is the only one or has one of these names."""
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return as_numbers(loaded)
        files = loaded.files
        held = [name for name in names if name in files] or (files if len(files) == 1 else [])
        if held:
            return as_numbers(loaded[held[0]])
    except Exception as error:  # numpy, zipfile and zlib fail in ways of their own at a corrupt file
        raise ValueError(f"not a readable array ({error}); expected an intact .npy or .npz file of numbers") from error
    raise ValueError(f"found the arrays {', '.join(files)}; expected one, or one called {', '.join(names)}")


# Tables.


def is_table_of_numbers(path: Path, names: Collection[str | None]) -> bool:
    """Whether series run down its rows; a file that cannot be read is left to those that read tables."""
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet
        from pyarrow import types

        try:
            schema = pyarrow.parquet.read_schema(path)
        except (pyarrow.ArrowException, OSError):
            return False
        text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        return not any(
            types.is_nested(field.type) or (field.name in names and any(is_kind(field.type) for is_kind in text))
            for field in schema
        )
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header, first = cells(file.readline()), cells(file.readline())
    return all(is_number(cell) for name, cell in zip(header, first, strict=False) if name in names)


def cells(line: str) -> list[str]:
    """The cells of one line, whichever of comma, semicolon and tab parts them."""
    return [cell.strip() for cell in next(csv.reader([line.strip("\r\n")], delimiter=separator(line)), [])]


def separator(line: str) -> str:
    return max(",", ";", "\t", key=line.count)


def decode_table(data: bytes) -> Any:
    """A DataFrame of the bytes of a parquet or csv file; a csv file of nothing but numbers has no header."""
    import pandas

    try:
        if data.startswith(b"PAR1"):
            return pandas.read_parquet(io.BytesIO(data))
        first = data.split(b"\n", 1)[0].decode("utf-8-sig")
        header = 0 if any(not is_number(cell) for cell in cells(first)) else None
        table = pandas.read_csv(
            io.BytesIO(data), sep=separator(first), header=header, encoding="utf-8-sig", low_memory=False
        )
    except Exception as error:  # pandas and pyarrow fail in ways of their own at a corrupt file
        raise ValueError(f"not a readable table ({error}); expected an intact csv or parquet file") from error
    unnamed = str(table.columns[0]).startswith("Unnamed") and np.array_equal(table.iloc[:, 0], np.arange(len(table)))
    return table.iloc[:, int(unnamed) :]  # numbers of the rows, as pandas writes them, are no channel


def is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def only_series(table: Any, form: TableForm) -> np.ndarray:
    found = series_of(table, form, "the table")
    if len(found) != 1:
        raise ValueError(
            f"found a table of {len(found)} series; expected one in a sample: give the file itself as data.source"
        )
    return next(iter(found.values()))


def series_of(table: Any, form: TableForm, source: str) -> dict[Any, np.ndarray]:
    """The series of a table by their names in ``form.series``, or one that is called None.

    The index of a table is its time if it is of dates.

    Raises:
        ValueError: a column that is not there, text among numbers, no or unreadable or repeated time stamps.
    """
    if table.index.dtype.kind == "M":
        table = table.rename_axis(index=table.index.name or "date").reset_index()
    table = table.rename(columns=str)
    names = list(table.columns)
    if len(set(names)) < len(names):
        raise ValueError(f"found the columns {', '.join(names)}; expected each name once")
    given = [name for name in (form.time, form.series, form.channel, *form.values) if name is not None]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"found no column {', '.join(unknown)}; the table has {', '.join(names)}")
    time = form.time or time_column(table, exclude=given)
    roles = (time, form.series, form.channel)
    values = list(form.values) or [name for name in names if name not in roles]
    if not values or not len(table):
        raise ValueError(f"found {len(table)} rows and the columns {', '.join(names)}; expected numbers in columns")
    matrix = np.stack([column_of_numbers(table[name], name) for name in values], axis=1)
    stamps = None if time is None else column_of_stamps(table[time], time)
    groups: dict[Any, Any] = {None: np.arange(len(table))}
    if form.series is not None:
        if table[form.series].isna().any():
            raise ValueError(f"{form.series}: {int(table[form.series].isna().sum())} rows belong to no series")
        groups = table.groupby(form.series, sort=False).indices
    if form.channel is None:
        return {
            key: in_steps(None if stamps is None else stamps[rows], matrix[rows], series_name(source, [key], 0))
            for key, rows in groups.items()
        }
    if stamps is None or len(values) != 1:
        raise ValueError(
            f"a table with a channel in each row needs time stamps and one column of values; found {time or 'none'} "
            f"and {', '.join(values)}: set time_column and value_columns"
        )
    channels, channel = np.unique(table[form.channel].astype(str), return_inverse=True)
    found = {}
    for key, rows in groups.items():
        times, step = np.unique(stamps[rows], return_inverse=True)
        place = step * len(channels) + channel[rows]
        wide = np.full((len(times), len(channels)), np.nan)
        if len(np.unique(place)) < len(place):
            raise ValueError(f"{series_name(source, [key], 0)}: found two values of one channel at one time")
        wide.flat[place] = matrix[rows, 0]
        found[key] = in_steps(times, wide, series_name(source, [key], 0))
    return found


def time_column(table: Any, exclude: Sequence[str]) -> str | None:
    """The column of time stamps, by its type or else by its name."""
    names = [name for name in table.columns if name not in exclude]
    dated = [name for name in names if table[name].dtype.kind == "M"]
    found = dated or [name for name in names if name.lower() in TIME_NAMES]
    if len(found) > 1:
        raise ValueError(f"found the time columns {', '.join(found)}; choose one: set time_column")
    return found[0] if found else None


def column_of_numbers(column: Any, name: str) -> np.ndarray:
    import pandas

    if column.dtype.kind in "fiub":
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    text = column.astype(str).where(column.notna())  # of a date, it is no number
    numbers = pandas.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(np.isnan(numbers) & ~column.isna().to_numpy())
    if len(bad):
        raise ValueError(
            f"column {name}, row {bad[0]}: found {str(column.iloc[bad[0]])[:40]!r}; expected a number or nothing: "
            "mend it, or name the columns that are channels in value_columns"
        )
    return numbers


def column_of_stamps(column: Any, name: str) -> np.ndarray:
    """Time stamps as numbers that grow with time."""
    import pandas

    stamps = column
    if column.dtype.kind not in "fiuM":
        stamps = pandas.to_datetime(column, errors="coerce", utc=True)
    missing = np.flatnonzero(stamps.isna().to_numpy())
    if len(missing):
        raise ValueError(
            f"column {name}, row {missing[0]}: found {str(column.iloc[missing[0]])[:40]!r}; expected a time stamp"
        )
    return stamps.to_numpy(dtype=np.float64) if stamps.dtype.kind in "fiu" else stamps.astype("int64").to_numpy()


def in_steps(stamps: np.ndarray | None, values: np.ndarray, name: str) -> np.ndarray:
    """Values (rows, channels) in the order of time, a step of NaN for each one left out: (channels, T).

    Steps that are no multiples of the usual one (months, irregular records) are read one after the other.
    """
    if stamps is None or len(stamps) == 1:
        return values.T
    order = np.argsort(stamps, kind="stable")
    stamps, late = stamps[order], int((np.diff(stamps) < 0).sum())
    if late:
        warnings.warn(f"{name}: {late} time stamps are earlier than the one before; the rows were sorted", stacklevel=2)
        values = values[order]
    steps = np.diff(stamps)
    if not steps.all():
        row = int(np.flatnonzero(steps == 0)[0])
        raise ValueError(
            f"{name}: {int((steps == 0).sum())} time stamps are there twice, the first in row {order[row + 1]}; "
            "expected each once: remove doubles, or set series_column if the table holds several series"
        )
    usual = np.sort(steps)[(len(steps) - 1) // 2]
    counts = np.rint(steps / usual)
    if np.abs(steps / usual - counts).max() > 1e-3 or not counts.all():
        if steps.max() > 1.5 * usual:
            warnings.warn(f"{name}: time stamps are not evenly spaced; they are read as if they were", stacklevel=2)
        return values.T
    place = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    length, rows = int(place[-1]) + 1, len(values)
    if length > 2 * rows:
        raise ValueError(
            f"{name}: {length - rows:,} of {length:,} steps are missing, going by the usual distance of time stamps; "
            "expected at most half: cut it into several series (series_column), or remove outliers in time"
        )
    if length > rows:
        warnings.warn(f"{name}: {length - rows} of {length} steps are missing; they became NaN", stacklevel=2)
        values, known = np.full((length, values.shape[1]), np.nan), values
        values[place] = known
    return values.T
