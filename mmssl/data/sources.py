"""Where samples come from: a folder, parquet or .npz files, a data set on the Hub, or one that the packages bring."""

import io
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage

from mmssl.data.builtin import BUILTIN
from mmssl.modalities.base import Modality
from mmssl.samples import Rows, Samples, Selected, file_of, number_array


@dataclass
class DataArguments:
    """Which samples to read.

    Attributes:
        source: a folder of files (labels: names of its sub-folders), a .parquet or .csv file or a pattern of several, a
            .npz file (a table whose columns are its arrays), the name of a data set on the Hugging Face Hub, or one
            that the packages bring (`mmssl list` shows them).
        config_name: configuration of a data set on the Hub.
        split: split of a data set on the Hub or of one that the packages bring.
        column: column of a table that holds the samples. None: the first of the modality's usual names.
        label_column: column of a table that holds the labels, for probes and for objectives that need labels; no label
            is ever part of what the encoder reads. Text and integers are classes, floats are quantities to be
            regressed. None: "label" or "labels", if any. Of a .npz file, rows with a negative label are left out if the
            column is named here: they are in no class. Cells of a column named here may also hold a label for each
            element of a sample, an image of a mask or an array, for dense protocols.
        filter: keep only the rows of a table with "COLUMN=VALUE" or "COLUMN!=VALUE".
        max_samples: keep only the first so many. None: all.
        streaming: train on rows of parquet, CSV, .tar (WebDataset) or Hub shards as they are read, without a copy on
            disk and without end: more data than memory or disk hold. Set train.max_train_steps.
        shuffle_buffer_size: of a stream, how many rows are kept to draw the next one from; shards come in random order.
        repeat: how many times an epoch of training reads each sample; of a scene or a graph that is too large, another
            part each time, so that one such sample fills batches and keeps several processes busy.
        cache_mb: memory for samples that training keeps prepared (decoded, resized) from one epoch to the next, of each
            process, divided among its workers; what does not fit is prepared each time. 0: nothing is kept.
        guide: for training, a file that `mmssl embed` has written of these samples: batches are then laid out without
            two samples of one cluster of their embeddings, as long as clusters last (G-SimCLR).
        on_error: what to do with an unreadable sample: "raise", or "skip" it, take the next one, and write it down in
            failed_samples.jsonl of the run.
        max_failed: share of the samples read in training that may be unreadable; more stop a run that skips them.
    """

    source: str | None = None
    config_name: str | None = None
    split: str = "train"
    column: str | None = None
    label_column: str | None = None
    filter: str | None = None
    max_samples: int | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 1000
    repeat: int = 1
    cache_mb: float = 256.0
    guide: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    max_failed: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"data.max_failed: found {self.max_failed}; expected a share from 0 to 1")
        if self.cache_mb < 0:
            raise ValueError(f"data.cache_mb: found {self.cache_mb}; expected megabytes, or 0 to keep nothing")


def load_samples(arguments: DataArguments, modality: Modality) -> Samples:
    """Find the samples that the arguments name.

    Raises:
        ValueError: nothing there that this modality could read; says what was found.
    """
    source = arguments.source
    if source is None:
        raise ValueError(
            "data.source is not set; expected a folder, parquet files, a .npz file, a Hub data set, "
            f"{', '.join(BUILTIN)}"
        )
    path = Path(source).expanduser()
    if source in BUILTIN:
        samples = BUILTIN[source](arguments.split)
    elif (own := modality.collection(source)) is not None:
        unused = ("config_name", "split", "column", "label_column", "filter")
        if given := [name for name in unused if getattr(arguments, name) != getattr(DataArguments(), name)]:
            raise ValueError(f"data.{given[0]}: {source} is no table and has no such choice; leave it out")
        samples = own
    elif (table := find_table(arguments, modality)) is not None:
        samples = from_table(arguments, modality, table)
    elif path.is_dir() and not modality.columns:
        raise ValueError(f"data.source: found no table in {path}; expected .parquet or .csv files")
    elif path.is_dir():
        samples = from_folder(path, modality)
    elif path.suffix == ".npz":
        if not modality.columns:
            raise ValueError(f"data.source: found {source}; expected a table of whole rows: .parquet or .csv")
        if not path.is_file():
            raise ValueError(f"data.source: no file {source}; expected an existing .npz file")
        samples = from_arrays(arguments, modality, path)
    else:
        found = "a file" if path.is_file() else "nothing"
        raise ValueError(
            f"data.source: found {found} at {source}; expected a folder, a .parquet, .csv, .tar or .npz file, or a Hub "
            "name"
        )
    if arguments.max_samples is not None:
        samples = samples.select(np.arange(min(arguments.max_samples, len(samples))))
    if not len(samples):
        raise ValueError(f"data.source {source}: found no samples; check the filter {arguments.filter!r} and the split")
    return samples


def from_folder(folder: Path, modality: Modality) -> Samples:
    """All files below a folder that have one of the modality's endings, in the order of their names."""
    paths = sorted(
        os.path.join(root, file)
        for root, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(modality.extensions)
        and not any(part.startswith(".") for part in Path(root, file).relative_to(folder).parts)
    )
    if not paths:
        raise ValueError(
            f"data.source: found no {modality.name} file in {folder}; expected files ending in "
            f"{', '.join(modality.extensions)}, in the folder or below it"
        )
    top = [Path(path).relative_to(folder).parts for path in paths]
    if any(len(parts) == 1 for parts in top):
        return Samples(values=paths, name=paths.__getitem__)
    classes, labels = np.unique([parts[0] for parts in top], return_inverse=True)
    return Samples(values=paths, name=paths.__getitem__, labels=labels, classes=classes.tolist())


@dataclass
class Table:
    """Something that ``datasets.load_dataset`` reads: its loader, or a name on the Hub, and what to read with it."""

    loader: str
    split: str
    options: dict[str, Any]


LOADERS = {".parquet": "parquet", ".csv": "csv", ".tar": "webdataset"}


def find_table(arguments: DataArguments, modality: Modality) -> Table | None:
    """The table that the arguments name: files, files of a folder, or a data set on the Hub. None: no table.

    Raises:
        ValueError: no such file.
    """
    source = str(arguments.source)
    path = Path(source).expanduser()
    if path.is_dir():
        for suffix, loader in LOADERS.items():
            # CSV files may lie beside files of samples, and say something of them.
            if any(path.glob(f"*{suffix}")) and (suffix != ".csv" or not modality.columns):
                return Table(loader, "train", {"data_files": str(path / f"*{suffix}")})
        return None
    if path.suffix in LOADERS:
        if not (any(path.parent.glob(path.name)) if "*" in path.name else path.is_file()):
            raise ValueError(
                f"data.source: no file {source}; expected an existing {path.suffix[1:]} file or a pattern of some"
            )
        return Table(LOADERS[path.suffix], "train", {"data_files": str(path)})
    if path.is_file() or path.suffix == ".npz" or path.is_absolute() or source.startswith(("./", "../", "~")):
        return None
    return Table(source, arguments.split, {"name": arguments.config_name})


def load_table(arguments: DataArguments, table: Table, streaming: bool) -> Any:
    """A ``datasets.Dataset``, or with streaming an ``IterableDataset``, whose files are left undecoded.

    Raises:
        ValueError: it cannot be read.
    """
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    options = dict(table.options)
    if streaming and table.loader == "parquet":  # shuffling has ten shards open, each of which would be buffered whole
        options["fragment_scan_options"] = ParquetFragmentScanOptions(pre_buffer=False)
    try:
        loaded: Any = datasets.load_dataset(table.loader, split=table.split, streaming=streaming, **options)
        if streaming and loaded.features is None:
            loaded = loaded._resolve_features()
    except Exception as error:  # datasets raises many kinds; each becomes the one error that names the source
        raise ValueError(
            f"data.source: cannot load {arguments.source} ({type(error).__name__}: {error}); expected an intact "
            "parquet, csv or tar file, a folder that exists here, or the name of a data set on the Hub"
        ) from error
    for name, feature in loaded.features.items():
        if hasattr(feature, "decode") and isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            loaded = loaded.cast_column(name, type(feature)(decode=False))
    return loaded


def column_of(table: Any, arguments: DataArguments, modality: Modality) -> str | None:
    """The column that holds the samples, in a .tar the ending of their files. None: a sample is a whole row.

    Raises:
        ValueError: no such column.
    """
    if not modality.columns:
        if arguments.column is not None:
            raise ValueError(f"data.column: found {arguments.column}; a sample of {modality.name} is a whole row")
        return None
    usual = modality.columns
    if "__key__" in table.column_names:  # of .tar files
        usual += tuple(ending.removeprefix(".") for ending in modality.extensions)
    return pick(table.column_names, arguments.column, usual, "column")


def from_table(arguments: DataArguments, modality: Modality, found: Table) -> Samples:
    """A column of files or of a data set on the Hub, undecoded: decoding is the modality's; or its whole rows.

    Of a stream, the first rows alone, as many as its buffer holds: what has to see samples before training sees these.
    """
    import datasets

    table = load_table(arguments, found, arguments.streaming)
    if arguments.streaming:
        table = datasets.Dataset.from_list(list(table.take(arguments.shuffle_buffer_size)), features=table.features)
    rows = np.arange(len(table))
    if arguments.filter:
        rows = rows_where(arguments.filter, table.column_names, partial(texts_of, table))
        table = table.select(rows)
    column = column_of(table, arguments, modality)
    usual = ("label", "labels", "cls")  # the last of .tar files
    label_column = pick(table.column_names, arguments.label_column, usual, "label_column", optional=True)
    labels: np.ndarray | None = None
    classes: list[str] = []
    dense_labels: Masks | None = None
    if label_column is not None and holds_many(table.features[label_column]):
        if arguments.label_column is not None:  # "label" may be anything; labels are for probes only
            dense_labels = Masks(table[label_column], partial(row_name, str(arguments.source), rows))
    elif label_column is not None:
        labels, classes = labels_of(table, label_column, arguments, rows)
    values: Any = table[column] if column is not None else None
    if column is None:
        frame = table.to_pandas()
        values = Rows({name: frame[name].to_numpy() for name in table.column_names if name != label_column})
    name = partial(row_name, str(arguments.source), rows)
    return Samples(values=values, name=name, labels=labels, classes=classes, dense_labels=dense_labels)


def holds_many(feature: Any) -> bool:
    """Whether cells of a column hold more than one value: files such as the image of a mask, or arrays."""
    return (
        isinstance(feature, dict)
        or getattr(feature, "dtype", None) in ("binary", "large_binary")
        or (not hasattr(feature, "dtype") or hasattr(feature, "decode") or hasattr(feature, "shape"))
    )


@dataclass
class Masks(Sequence):
    """Cells that hold a label for each element of a sample, read when they are indexed.

    Attributes:
        cells: arrays, or files of images, as bytes, paths or records, whose pixels are the labels.
        name: how an error names a cell.
    """

    cells: Sequence[Any]
    name: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, i):
        try:
            return mask_of(self.cells[i])
        except (ValueError, OSError) as error:
            raise ValueError(f"data.label_column: {self.name(i)}: {error}") from error


def mask_of(cell: Any) -> np.ndarray:
    """The labels in a cell, int64; of 8 bits, which have no -1, 255 stands for none, as in PASCAL VOC."""
    if isinstance(cell, dict):
        cell = file_of(cell)
    if isinstance(cell, bytes | str):
        with PILImage.open(io.BytesIO(cell) if isinstance(cell, bytes) else cell) as image:
            cell = np.asarray(image)  # of a palette, the numbers of its colours
    labels = number_array(cell)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"found labels of type {labels.dtype}; expected integers, one for each pixel or point")
    none = labels == 255 if labels.dtype == np.uint8 else labels < 0
    return np.where(none, -1, labels.astype(np.int64))


def labels_of(table, column: str, arguments: DataArguments, rows: np.ndarray) -> tuple[np.ndarray | None, list[str]]:
    """The labels of all rows, and the names of their classes; floats are quantities, and have none.

    Raises:
        ValueError: a quantity is missing.
    """
    values = table[column][:]
    if "float" in str(getattr(table.features[column], "dtype", "")):
        quantities = np.array(values, dtype=np.float64)
        if not np.isfinite(quantities).all():
            if arguments.label_column is None:  # "label" may be anything; labels are for probes only
                return None, []
            row = int(np.flatnonzero(~np.isfinite(quantities))[0])
            raise ValueError(f"data.label_column: row {rows[row]} of {column} is {values[row]}; expected a number")
        return quantities, []
    names = getattr(table.features[column], "names", None)
    # A missing label is a class of its own; -1 is how data sets mark one in a column of class labels.
    found = sorted(set(values), key=lambda value: (value is None, value))
    number = {value: position for position, value in enumerate(found)}
    classes = [names[value] if names and value is not None and value >= 0 else str(value) for value in found]
    return np.array([number[value] for value in values]), classes


def row_name(source: str, rows: np.ndarray, i: int) -> str:
    return f"{source}, row {rows[i]}"


def texts_of(table, column: str) -> list[str]:
    """A column as text; values of a class label go by their name."""
    names = getattr(table.features[column], "names", None)
    return [str(names[value] if names else value) for value in table[column]]


def rows_where(condition: str, columns: Sequence[str], texts: Callable[[str], Sequence[str]]) -> np.ndarray:
    """Positions of the rows that fulfil "COLUMN=VALUE" or "COLUMN!=VALUE"; ``texts`` gives a column as text."""
    compare, symbol = (operator.ne, "!=") if "!=" in condition else (operator.eq, "=")
    column, found, value = (part.strip() for part in condition.partition(symbol))
    if not found or column not in columns:
        raise ValueError(
            f"data.filter: found {condition!r}; expected COLUMN=VALUE or COLUMN!=VALUE with a column of "
            f"{', '.join(columns)}"
        )
    values = np.asarray(texts(column))
    if value not in values:
        raise ValueError(f"data.filter: no row has {column}={value}; found {', '.join(np.unique(values)[:20])}")
    return np.flatnonzero(compare(values, value))


def from_arrays(arguments: DataArguments, modality: Modality, path: Path) -> Samples:
    """Arrays of a .npz file as the columns of a table, a row for each sample; only those that are asked for are read.

    Labels are integers or text. Integers go by the names in the array COLUMN_names or, where there is none, "names".

    Raises:
        ValueError: no readable file; or an array that is not there, needs pickle, or is not as long as the samples.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        names = archive.files
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise ValueError(f"data.source: cannot read {path} ({error}); expected an intact .npz file") from error
    with archive:
        column = str(pick(names, arguments.column, modality.columns, "column"))
        values: Any = array_of(archive, column)
        if not values.ndim:
            raise ValueError(f"data.column: the array {column} of {path} is one value; expected a row for each sample")
        rows = np.arange(len(values))
        label_column = pick(names, arguments.label_column, ("label", "labels"), "label_column", optional=True)
        if label_column is not None and arguments.label_column is None:
            found = array_of(archive, label_column)  # "label" may be anything; labels are for probes only
            label_column = label_column if found.shape == rows.shape and found.dtype.kind in "biuU" else None
        dense: Any = None
        if label_column is not None and (found := array_of(archive, label_column)).ndim > 1:
            if len(found) != len(values):
                raise ValueError(
                    f"data.label_column: the array {label_column} of {path} has {len(found):,} rows; expected one for "
                    f"each of the {len(values):,} samples"
                )
            dense, label_column = found, None
        if label_column is not None:
            entries = entries_of(archive, label_column, len(values), "label_column")
            texts = [str(entry) for entry in entries]
            known = next((array_of(archive, name) for name in (f"{label_column}_names", "names") if name in names), ())
            if entries.dtype.kind in "iu" and len(entries) and entries.max() < len(known):
                texts = [str(known[entry]) if entry >= 0 else str(entry) for entry in entries]
            if arguments.label_column is not None and entries.dtype.kind == "i":
                rows = np.flatnonzero(entries >= 0)
        if arguments.filter:

            def texts_of_column(name: str) -> list[str]:
                if name == label_column:
                    return texts
                return [str(entry) for entry in entries_of(archive, name, len(values), "filter")]

            rows = np.intersect1d(rows, rows_where(arguments.filter, names, texts_of_column))
    samples = Samples(Selected(values, rows), partial(row_name, str(arguments.source), rows))
    if dense is not None:
        samples.dense_labels = Masks(Selected(dense, rows), samples.name)
    if label_column is not None:
        _, first, samples.labels = np.unique(entries[rows], return_index=True, return_inverse=True)
        samples.classes = [texts[row] for row in rows[first]]
    return samples


def array_of(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return archive[name]
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise ValueError(f"data.source: cannot read the array {name} ({error}); expected numbers or text") from error


def entries_of(archive: np.lib.npyio.NpzFile, name: str, length: int, flag: str) -> np.ndarray:
    array = array_of(archive, name)
    if array.shape != (length,) or array.dtype.kind not in "biuU":
        raise ValueError(
            f"data.{flag}: the array {name} is {array.dtype} of shape {array.shape}; expected an integer or a text for "
            f"each of the {length:,} samples"
        )
    return array


def pick(
    columns: list[str], wanted: str | None, usual: tuple[str, ...], flag: str, optional: bool = False
) -> str | None:
    for name in usual if wanted is None else (wanted,):
        if name in columns:
            return name
    if optional and wanted is None:
        return None
    expected = f"one of {', '.join(usual)}" if wanted is None else wanted
    raise ValueError(f"data.{flag}: expected {expected}; found the columns {', '.join(columns)}")
