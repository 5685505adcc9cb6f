"""Where samples come from: a folder, parquet files, a data set on the Hub, or one that the packages bring."""

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from mmssl.modalities.base import Modality
from mmssl.samples import Samples


@dataclass
class DataArguments:
    """Which samples to read.

    Attributes:
        source: a folder of files (labels: names of its sub-folders), a parquet file or a pattern of several, the name
            of a data set on the Hugging Face Hub, or one that the packages bring: "digits" (images, scikit-learn) or
            "espeak_digits" (synthetic speech, eSpeak NG).
        config_name: configuration of a data set on the Hub.
        split: split of a data set on the Hub or of one that the packages bring.
        column: column of a table that holds the samples. None: the first of the modality's usual names.
        label_column: column of a table that holds the labels, for probes only. None: "label" or "labels", if any.
        filter: keep only the rows of a table with "COLUMN=VALUE" or "COLUMN!=VALUE".
        max_samples: keep only the first so many. None: all.
        on_error: what to do with an unreadable sample: "raise", or "skip" it, take the next one, and count it.
    """

    source: str | None = None
    config_name: str | None = None
    split: str = "train"
    column: str | None = None
    label_column: str | None = None
    filter: str | None = None
    max_samples: int | None = None
    on_error: Literal["raise", "skip"] = "raise"


def load_samples(arguments: DataArguments, modality: Modality) -> Samples:
    """Find the samples that the arguments name.

    Raises:
        ValueError: nothing there that this modality could read; says what was found.
    """
    source = arguments.source
    if source is None:
        raise ValueError(
            "data.source is not set; expected a folder, parquet files, a Hub data set, digits, espeak_digits"
        )
    path = Path(source).expanduser()
    if source in BUILTIN:
        samples = BUILTIN[source](arguments.split)
    elif (own := modality.collection(source)) is not None:
        samples = own
    elif path.is_dir() and not any(path.glob("*.parquet")):
        samples = from_folder(path, modality)
    elif path.is_dir():
        samples = from_table(arguments, modality, "parquet", data_files=str(path / "*.parquet"))
    elif path.suffix == ".parquet":
        if not (any(path.parent.glob(path.name)) if "*" in path.name else path.is_file()):
            raise ValueError(f"data.source: no file {source}; expected an existing parquet file or a pattern of some")
        samples = from_table(arguments, modality, "parquet", data_files=str(path))
    elif path.is_file() or path.is_absolute() or source.startswith(("./", "../", "~")):
        found = "a file" if path.is_file() else "nothing"
        raise ValueError(
            f"data.source: found {found} at {source}; expected a folder, a .parquet file or a Hub data set"
        )
    else:
        samples = from_table(arguments, modality, source, name=arguments.config_name)
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


def from_table(arguments: DataArguments, modality: Modality, loader: str, **options) -> Samples:
    """A column of parquet files or of a data set on the Hub, undecoded; decoding is the modality's."""
    import datasets

    split = "train" if loader == "parquet" else arguments.split
    try:
        table = datasets.load_dataset(loader, split=split, **options)
    except Exception as error:  # datasets raises many kinds; each becomes the one error that names the source
        raise ValueError(
            f"data.source: cannot load {arguments.source} ({type(error).__name__}: {error}); expected an intact "
            "parquet file, a folder that exists here, or the name of a data set on the Hub"
        ) from error
    for name, feature in table.features.items():
        if hasattr(feature, "decode") and isinstance(feature, datasets.Image | datasets.Audio):
            table = table.cast_column(name, type(feature)(decode=False))
    rows = np.arange(len(table))
    if arguments.filter:
        rows = rows_where(table, arguments.filter)
        table = table.select(rows)
    column = pick(table.column_names, arguments.column, modality.columns, "column")
    label_column = pick(table.column_names, arguments.label_column, ("label", "labels"), "label_column", optional=True)
    labels, classes = None, []
    if label_column is not None:
        names = getattr(table.features[label_column], "names", None)
        column_values = table[label_column][:]
        # A missing label is a class of its own; -1 is how data sets mark one in a column of class labels.
        values = sorted(set(column_values), key=lambda value: (value is None, value))
        number = {value: position for position, value in enumerate(values)}
        labels = np.array([number[value] for value in column_values])
        classes = [names[value] if names and value is not None and value >= 0 else str(value) for value in values]
    return Samples(
        values=table[column], name=partial(row_name, str(arguments.source), rows), labels=labels, classes=classes
    )


def row_name(source: str, rows: np.ndarray, i: int) -> str:
    return f"{source}, row {rows[i]}"


def rows_where(table, condition: str) -> np.ndarray:
    """Positions of the rows that fulfil "COLUMN=VALUE" or "COLUMN!=VALUE"; values of a class label go by their name."""
    compare, symbol = (operator.ne, "!=") if "!=" in condition else (operator.eq, "=")
    column, found, value = (part.strip() for part in condition.partition(symbol))
    if not found or column not in table.column_names:
        raise ValueError(
            f"data.filter: found {condition!r}; expected COLUMN=VALUE or COLUMN!=VALUE with a column of "
            f"{', '.join(table.column_names)}"
        )
    names = getattr(table.features[column], "names", None)
    values = np.asarray([str(names[v] if names else v) for v in table[column]])
    if value not in values:
        raise ValueError(f"data.filter: no row has {column}={value}; found {', '.join(np.unique(values)[:20])}")
    return np.flatnonzero(compare(values, value))


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


def digits(split: str) -> Samples:
    """scikit-learn's 1,797 handwritten digits, 8x8 and grey: 1,437 in the split "train", 360 in "test"."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    index = {"train": order[:1437], "test": order[1437:]}[checked(split, "digits")]
    images = (data.images[index] / 16).astype(np.float32)
    return Samples(images, f"digits {split}, image {{}}".format, data.target[index], [str(i) for i in range(10)])


def espeak_digits(split: str) -> Samples:
    """Ten digits spoken by 24 synthetic voices of eSpeak NG; those of the split "test" speak in no other."""
    from mmssl.data.espeak_digits import VOICES, espeak_digits

    data = espeak_digits()
    test = np.isin(data.voices, VOICES[1::4])
    index = np.flatnonzero(test if checked(split, "espeak_digits") == "test" else ~test)
    records = [{"array": data.waveforms[i], "sampling_rate": data.sampling_rate} for i in index]
    return Samples(records, f"espeak_digits {split}, clip {{}}".format, data.digits[index], [str(i) for i in range(10)])


def checked(split: str, source: str) -> str:
    if split not in ("train", "test"):
        raise ValueError(f"data.split: found {split!r}; {source} has the splits train and test")
    return split


BUILTIN: dict[str, Callable[[str], Samples]] = {"digits": digits, "espeak_digits": espeak_digits}
