"""Columns of tables: what they hold, found out from their cells, and how a cell becomes a number."""

import math
import numbers
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from hashlib import blake2b
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from mmssl.samples import Rows

EXACT = 2**24  # whole numbers up to here are exact in single precision
PLAIN = frozenset({float, int, bool, np.float64, np.float32, np.int64, np.int32, np.bool_})
TIMES = (datetime, date, np.datetime64)
MANY_LINES = 60  # columns that the printed table shows at most


class Number:
    """A column of numbers: how a cell becomes a scaled number."""

    outputs = 1

    def __init__(self, record: dict[str, Any], scaling: str, clip: float):
        self.name, self.clip = record["name"], clip
        self.knots: list[float] = []
        self.shift, self.scale = 0.0, 1.0
        if scaling == "quantile":
            quantiles = statistics(record, "quantiles", scaling)
            knots, tie = np.unique(quantiles, return_inverse=True)  # a value may fill several quantiles
            rank = np.linspace(0, 1, len(quantiles)).clip(0.5 / len(quantiles), 1 - 0.5 / len(quantiles))
            mean = np.bincount(tie, weights=rank) / np.bincount(tie)
            self.knots, self.scores = knots.tolist(), [NormalDist().inv_cdf(share) for share in mean]
        elif scaling == "standard":
            self.shift, self.scale = statistics(record, "mean", scaling), statistics(record, "std", scaling)
        else:
            self.shift = statistics(record, "min", scaling)
            self.scale = statistics(record, "max", scaling) - self.shift
        if self.scale <= 0:  # a column that is one number or missing
            self.scale = 1.0

    def read(self, value: Any) -> float:
        number = float(value) if type(value) in PLAIN else self.number_of(value)
        if not math.isfinite(number):
            if number != number:
                return math.nan
            raise ValueError(f"column {self.name}: found {number}; expected a finite number, or None if it is unknown")
        if self.knots:
            return self.score(number)
        scaled = (number - self.shift) / self.scale
        return self.clip if scaled > self.clip else -self.clip if scaled < -self.clip else scaled

    def number_of(self, value: Any) -> float:
        if is_missing(value):
            return math.nan
        if isinstance(value, TIMES):
            return seconds(value)
        if isinstance(value, numbers.Real | Decimal):
            return float(value)
        kind = "the text" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"column {self.name}: found {kind} {repr(value)[:80]}; expected a number")

    def score(self, number: float) -> float:
        """The normal distribution's quantile of the number's rank among the training samples, linear in between."""
        knots, scores, above = self.knots, self.scores, bisect_right(self.knots, number)
        if above in (0, len(knots)):
            return scores[max(above - 1, 0)]
        low, high = knots[above - 1], knots[above]
        return scores[above - 1] + (scores[above] - scores[above - 1]) * (number - low) / (high - low)


class Category:
    """A column of categories: how a cell becomes a code from 1 on, or 0 where the category is unknown."""

    def __init__(self, record: dict[str, Any]):
        self.name, self.buckets = record["name"], record.get("buckets")
        self.codes: dict[Any, float] = {None: math.nan, "": math.nan}
        if (self.buckets is None) == (record.get("categories") is None):
            raise ValueError(f"schema: column {self.name}: expected either categories or buckets; found {record}")
        for code, category in enumerate(record.get("categories") or (), start=1):
            self.codes[category] = float(code)
        self.outputs = self.buckets or len(record["categories"])
        repeated = self.buckets is None and len(self.codes) < self.outputs + 2
        if not 1 <= self.outputs < EXACT or repeated:
            raise ValueError(
                f"schema: column {self.name}: found {record}; expected 1 to {EXACT - 1} different categories or buckets"
            )

    def read(self, value: Any) -> float:
        try:
            code = self.codes.get(value)
        except TypeError as error:
            raise ValueError(
                f"column {self.name}: found {type(value).__name__} {repr(value)[:80]}; expected text or a number"
            ) from error
        if code is not None:
            return code
        if is_missing(value):
            return math.nan
        return 0.0 if self.buckets is None else 1.0 + bucket(value, self.buckets)


def reader_of(record: dict[str, Any], scaling: str, clip: float) -> Number | Category:
    """Raises: ValueError: a record that is incomplete."""
    kind = record.get("kind")
    if "name" not in record or kind not in ("numerical", "categorical"):
        raise ValueError(f"schema: found {record}; expected a name, and the kind numerical or categorical")
    return Category(record) if kind == "categorical" else Number(record, scaling, clip)


def statistics(record: dict[str, Any], name: str, scaling: str) -> Any:
    if record.get(name) is None or not np.isfinite(record[name]).all():
        raise ValueError(
            f"schema: column {record['name']}: found {name} {record.get(name)}; numerical_scaling={scaling!r} expects "
            "a finite one, as a schema has that was found out with this scaling"
        )
    return record[name]


def is_missing(value: Any) -> bool:
    """Whether a cell is None, empty text, NaN, NaT or pandas' NA."""
    try:
        return value is None or value == "" or bool(value != value)
    except (TypeError, ValueError):  # NA is neither equal nor unequal to itself
        return type(value).__name__ == "NAType"


def seconds(value: Any) -> float:
    """Since 1970; a time without a zone is taken as UTC, on every machine."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(np.datetime64(value, "us").astype(np.int64)) / 1e6


def bucket(value: Any, buckets: int) -> int:
    """The same for a value in every process, and for 1 and 1.0."""
    if isinstance(value, float | np.floating) and value.is_integer():
        value = int(value)
    return int.from_bytes(blake2b(str(value).encode(), digest_size=8).digest(), "little") % buckets


def columns_of(rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """The table by column; the names are those of the first row."""
    if isinstance(rows, Rows):
        return {name: np.asarray(cells) for name, cells in rows.columns.items()}
    table: dict[str, list[Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number}: found {type(row).__name__}; expected a dict of a value for each column")
        table = table or {name: [] for name in row}
        if missing := table.keys() - row.keys():
            raise ValueError(f"row {number}: found no column {missing.pop()}; set it to None where it is unknown")
        for name, cells in table.items():
            cells.append(row[name])
    result = {}
    for name, cells in table.items():
        result[name] = np.empty(len(cells), dtype=object)
        result[name][:] = cells
    return result


def typed(cells: np.ndarray) -> tuple[str, np.ndarray]:
    """What a column holds: "number", "time" (floats, NaN where missing), "text", "bool" (objects, None where missing).

    Text wins where numbers and text are mixed. Of anything else, only what it is.
    """
    import pandas as pd

    if cells.dtype.kind in "iuf":
        return "number", cells.astype(np.float64)
    if cells.dtype.kind not in "bMOTU":
        return f"values of type {cells.dtype}", cells
    if cells.dtype.kind == "M":
        return "time", np.where(np.isnat(cells), np.nan, cells.astype("datetime64[us]").astype(np.int64) / 1e6)
    cells = cells.astype(object)
    kinds = {kind_of(each) for each in set(map(type, cells))}
    if other := kinds - {"number", "time", "text", "bool", "missing"}:
        return other.pop(), cells
    cells[pd.isna(cells)] = None  # of a copy
    cells[cells == ""] = None
    kinds = {kind_of(each) for each in set(map(type, cells))} - {"missing"}  # NaN was a number
    if not kinds or (kinds <= {"number", "bool"} and "number" in kinds):
        return "number", cells.astype(np.float64)
    if kinds == {"time"}:
        return "time", np.array([np.nan if cell is None else seconds(cell) for cell in cells])
    if "time" in kinds:
        return "times among other values", cells
    return ("bool" if kinds == {"bool"} else "text"), cells


def kind_of(kind: type) -> str:
    if issubclass(kind, str | bool | np.bool_):
        return "text" if issubclass(kind, str) else "bool"
    if kind.__name__ in ("NoneType", "NAType", "NaTType"):
        return "missing"
    if issubclass(kind, TIMES):
        return "time"
    return "number" if issubclass(kind, numbers.Real | Decimal) else f"values of type {kind.__name__}"


def examine(
    name: str, cells: np.ndarray, forced: bool, max_categories: int, scaling: str
) -> str | tuple[dict[str, Any], tuple[str, ...], np.ndarray]:
    """A column's record, its line in the printed table, and its numbers or codes (NaN: missing); or why it is left out.

    Infinite numbers do not count; reading them is an error that names the row.
    """
    import pandas as pd

    holds, cells = typed(cells)
    if holds not in ("number", "time", "text", "bool"):
        return f"holds {holds}; read are numbers, text, times and bools"
    gaps = pd.isna(cells)
    known = np.isfinite(cells) if holds in ("number", "time") else ~gaps
    share = float(gaps.mean())
    if not known.any():
        return "is always missing"
    record = {"name": name, "kind": "numerical", "missing": share}
    if holds == "time" or (holds == "number" and not forced):
        values = cells[known]
        distinct = len(pd.unique(values))
        if distinct == 1 and not share:
            return f"never changes: {values[0]:g}"
        record |= {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        record = {key: float(value) if isinstance(value, np.floating) else value for key, value in record.items()}
        if scaling == "quantile":
            record["quantiles"] = np.quantile(values, np.linspace(0, 1, 101)).tolist()
        shown = f"{values.min():.5g} to {values.max():.5g}" + (", seconds since 1970" if holds == "time" else "")
        if distinct == len(values) > 2 and np.ptp(values) == distinct - 1 and (values % 1 == 0).all():
            shown += " (the row's number? then put it in ignore_columns)"
        return record, (holds, f"{distinct:,}", f"{share:.1%}", shown), np.where(known, cells, np.nan)

    cells = cells.astype(object)
    cells[~known] = None
    codes, found = pd.factorize(cells)
    categories = [plain(category) for category in found]
    if len(categories) == 1 and not share:
        return f"never changes: {categories[0]!r}"
    if len(categories) == known.sum() and holds == "text" and not forced:
        return "differs in every row, as an identifier does"
    counts = np.bincount(codes[codes >= 0])
    order = counts.argsort(kind="stable")[::-1]
    shown = ", ".join(f"{categories[code]} {counts[code] / len(cells):.0%}" for code in order[:3])
    shown += ", ..." if len(categories) > 3 else ""
    shown += remark(categories) if holds == "text" else ""
    record["kind"] = "categorical"
    if len(categories) > max_categories:
        record["buckets"] = max_categories
    else:
        record["categories"] = sorted(categories, key=lambda category: (str(category), type(category).__name__))
    kind = "category" + (f", hashed to {max_categories}" if "buckets" in record else "")
    line = (kind, f"{len(categories):,}", f"{share:.1%}", shown)
    return record, line, np.where(codes < 0, np.nan, codes.astype(np.float64))


def plain(category: Any) -> Any:
    """As JSON keeps it: codes that were read as floats because some are missing are whole numbers again."""
    if isinstance(category, str):
        return str(category)
    if isinstance(category, bool | np.bool_):
        return bool(category)
    number = float(category)
    return int(number) if number.is_integer() else number


def remark(categories: Sequence[Any]) -> str:
    """A hint where text is mostly numbers, as a "?" among them makes it."""
    import pandas as pd

    some = [category for category in categories[:1000] if isinstance(category, str)]
    is_number = pd.to_numeric(pd.Series(some, dtype=object), errors="coerce").notna().to_numpy()
    if is_number.sum() <= len(some) / 2:
        return ""
    odd = [category for category, number in zip(some, is_number, strict=True) if not number]
    return " (numbers, but read as text" + (f" because of {odd[0]!r}" if odd else "") + ")"


def tells(values: np.ndarray, labels: np.ndarray) -> bool:
    """Whether a column of numbers or codes (NaN: missing) alone gives the labels, classes or quantities, away.

    Each of its few values goes with one label; or each class is an interval of it; or it has the labels' order.
    """
    import pandas as pd

    quantities = labels.dtype.kind == "f"
    label, _ = pd.factorize(labels)
    if not quantities:  # of a rare class anything may hold by chance
        frequent = np.bincount(label)[label] >= 5
        values, labels = values[frequent], labels[frequent]
        label, _ = pd.factorize(labels)
    if not len(label) or not label.max():
        return False
    code, distinct = pd.factorize(values, use_na_sentinel=False)
    pairs = len(pd.unique(code.astype(np.int64) * (label.max() + 1) + label))
    if pairs == len(distinct) <= len(values) / 10:
        return True
    known = np.isfinite(values)
    values, labels, label = values[known], labels[known], label[known]
    if len(values) < 20 or len(values) < len(known) / 2 or values.min() == values.max() or not np.ptp(labels):
        return False
    if quantities:
        ranks = [pd.Series(each).rank().to_numpy() for each in (values, labels)]
        return any(abs(np.corrcoef(x, y)[0, 1]) > 0.9999 for x, y in ((values, labels), ranks))
    order = values.argsort(kind="stable")
    change = np.flatnonzero(np.diff(label[order]))
    return len(change) == len(pd.unique(label)) - 1 and bool((np.diff(values[order])[change] > 0).all())


def is_main_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def print_columns(lines: Sequence[tuple[str, ...]], rows: int, read: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "column",
        "kind",
        "distinct",
        "missing",
        "values",
        title=f"{rows:,} rows: {read:,} columns are read, {len(lines) - read:,} left out",
    )
    if len(lines) > MANY_LINES:
        lines = sorted(lines, key=lambda line: line[1] != "left out")
    for line in lines[:MANY_LINES]:
        table.add_row(*line)
    if len(lines) > MANY_LINES:
        table.add_row("...", f"and {len(lines) - MANY_LINES:,} more")
    Console(markup=False, emoji=False, highlight=False).print(table)
