"""Embeddings of samples in a file, for whatever people do with them next.

Samples are read and encoded in parts, so that memory does not grow with their number. A run that was killed goes on
after its last whole part, and comes to the same embeddings, since batches never reach across parts.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from mmssl.data import DataArguments, PreparedSamples, Samples, load_samples
from mmssl.data.builtin import BUILTIN
from mmssl.data.prepared import MOST_IN_A_ROW
from mmssl.data.sources import column_of, find_table, load_table, pick
from mmssl.evaluation.features import Pooling, check_class_token, pool
from mmssl.evaluation.models import AnyModel, load_model, pick_modality
from mmssl.evaluation.parts import Parts
from mmssl.modalities.base import Batch, Modality

ENDINGS = (".parquet", ".npz", ".npy")
BESIDE_SAMPLES = ("shuffle_buffer_size", "repeat", "cache_mb", "guide", "max_failed")  # options of training


def embed(
    checkpoint: str | Path,
    data: DataArguments,
    output: str | Path = "embeddings.npz",
    modality: str | None = None,
    pooling: Pooling | Literal["tokens"] = "mean",
    layers: Sequence[int | Literal["all"]] = (),
    batch_size: int = 64,
    save_steps: int = 16,
    dataloader_num_workers: int = 0,
) -> Path:
    """Write an embedding of each sample to ``output``. A run that was cut short goes on where it was.

    Args:
        checkpoint: folder or Hub name of a pretrained model, of mmssl or another encoder of transformers.
        data: the samples; with ``on_error="skip"``, unreadable ones are left out.
        output: a .parquet or .npz file, with columns or arrays "name", "label" (of the class, or a quantity; where
            there are labels) and "embedding", (n, F) float32; or a .npy file with the embeddings alone, and names and
            labels in a file beside it that ends in .names.parquet.
        modality: which modality of a model that has several.
        pooling: from tokens to samples, as in ``evaluate``; or "tokens", all of them but class and register tokens, of
            each sample as many as it has, (N, F), in a .parquet file.
        layers: hidden layers in place of the output, or "all": 0 is what goes into the first block, 1 its output, and
            so on; the last one is the model's output. Each is a column or an array "layer_4" in place of "embedding";
            in a .npy file they are (n, layers, F).
        batch_size: samples in a batch.
        save_steps: batches in a part. A part is kept in memory, and what is lost when a run is killed.
        dataloader_num_workers: processes that read samples.

    Raises:
        ValueError: another ending, a pooling that does not fit, samples that cannot be read, or parts that another
            model, other data or other flags have left there.
        OSError: the disk is full; parts that are whole are kept.
    """
    output = Path(output)
    check_flags(output, pooling, batch_size, save_steps, dataloader_num_workers)
    model = load_model(checkpoint).eval()
    check_class_token(model, pooling)
    name = pick_modality(model, modality)
    adapter = model.adapters[name]
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    rows = StreamedRows(data, adapter) if data.streaming else SampleRows(load_samples(data, adapter), adapter)
    if data.streaming and dataloader_num_workers > 1:
        raise ValueError("dataloader_num_workers: one process reads a stream, so that its rows keep their order; set 1")
    flags: dict[str, Any] = {"pooling": pooling, "layers": list(layers), "batch_size": batch_size}
    flags |= {"save_steps": save_steps, "modality": name, "device": model.device.type}
    parts = Parts(output.with_name(output.name + ".parts"), flags | about_model(model) | about_data(data, rows, output))
    steps = encoded(rows, parts.read, model, pooling, layers, batch_size, dataloader_num_workers)
    in_a_row, first = 0, ""
    with tqdm(desc="embed", total=rows.total, initial=parts.read, unit="sample", smoothing=0.05) as progress:
        while part := list(islice(steps, save_steps)):
            for step in part:
                if step.failed and data.on_error == "raise":
                    raise ValueError(step.failed[0])
                first = first or next(iter(step.failed), "")
                in_a_row = 0 if step.table is not None else in_a_row + len(step.failed)
                if in_a_row >= MOST_IN_A_ROW:
                    raise ValueError(
                        f"none of {in_a_row} samples in a row could be read; the last is {step.failed[-1]}"
                    )
            read = sum(step.read for step in part)
            parts.add([step.table for step in part if step.table is not None], read, pooling)
            progress.update(read)
    if not parts.rows:
        parts.remove()
        raise ValueError(f"none of {parts.read} samples could be read; the first is {first}")
    parts.join(output)
    if parts.rows < parts.read:
        reason = f", such as {first}" if first else ""
        print(f"{parts.read - parts.rows:,} of {parts.read:,} samples could not be read and are left out{reason}")
    return output


def check_flags(output: Path, pooling: str, batch_size: int, save_steps: int, workers: int) -> None:
    """Refuse before anything is computed."""
    if output.suffix not in ENDINGS:
        raise ValueError(f"output: found {output}; expected a file that ends in {', '.join(ENDINGS)}")
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no folder {output.parent}; make it first")
    if pooling == "tokens" and output.suffix != ".parquet":
        raise ValueError(f"pooling: samples differ in their tokens, which {output.suffix} cannot hold; use .parquet")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("save_steps", save_steps, 1),
        ("dataloader_num_workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: found {value}; expected at least {least}")


# Reading.


@dataclass
class Row:
    """A sample with its name and label; or why it cannot be read."""

    name: str
    label: str | float | None
    sample: dict[str, Tensor] | None
    reason: str = ""


def read_row(name: str, label: str | float | None, read: Callable[[], dict[str, Tensor]]) -> Row:
    try:
        return Row(name, label, read())
    except (ValueError, OSError) as error:
        return Row(name, label, None, f"{name}: {error}")


class SampleRows(Dataset[Row]):
    """Samples one by one; one that cannot be read does not keep others from being read."""

    def __init__(self, samples: Samples, modality: Modality):
        self.samples, self.modality, self.prepared = samples, modality, PreparedSamples(samples, modality)
        self.total: int | None = len(samples)
        kind = "" if samples.labels is None else samples.labels.dtype.kind
        number = pa.float64() if kind == "f" else pa.int64()
        self.label_type = None if samples.labels is None else pa.string() if len(samples.classes) else number

    def __getitem__(self, i: int) -> Row:
        return read_row(self.samples.name(i), self.label(i), lambda: self.prepared.excerpt(i))

    def label(self, i: int) -> str | float | None:
        if self.samples.labels is None:
            return None
        label = self.samples.labels[i].item()
        if not len(self.samples.classes):
            return label
        return self.samples.classes[label] if label >= 0 else None


class StreamedRows(IterableDataset[Row]):
    """Rows of shards in their order, once; those before ``first`` are read past without being prepared."""

    def __init__(self, data: DataArguments, modality: Modality):
        found = find_table(data, modality)
        if found is None or data.source in BUILTIN:
            raise ValueError(f"data.streaming: {data.source} is no table of parquet, CSV or .tar shards; leave it out")
        if data.filter is not None:
            raise ValueError("data.filter: a stream has no such choice; leave it or data.streaming out")
        self.source, self.modality, self.most = str(data.source), modality, data.max_samples
        self.table = load_table(data, found, streaming=True)
        self.column = column_of(self.table, data, modality)
        names = self.table.column_names
        self.label_column = pick(names, data.label_column, ("label", "labels", "cls"), "label_column", optional=True)
        feature = self.table.features[self.label_column] if self.label_column else None
        kind = str(getattr(feature, "dtype", ""))
        self.names = getattr(feature, "names", None)
        self.label_type = pa.float64() if "float" in kind else pa.string()
        if not kind.startswith(("int", "uint", "float", "bool", "string", "large_string")):
            self.label_column = self.label_type = None
        self.total = self.most
        self.first = 0

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(islice(self.table, self.most)):
            if number >= self.first:
                label = self.label(row[self.label_column]) if self.label_column else None
                value = row[self.column] if self.column else row
                yield read_row(f"{self.source}, row {number}", label, partial(self.prepare, value))

    def prepare(self, value: Any) -> dict[str, Tensor]:
        return self.modality.excerpt(self.modality.prepare(value), None)

    def label(self, value: Any) -> str | float | None:
        if self.label_type == pa.float64() or value is None:
            return value
        return self.names[value] if self.names and value >= 0 else str(value)


@dataclass
class Collate:
    """Rows to a batch: their number, names and labels and inputs of those that could be read, why others could not."""

    modality: Modality
    label_type: pa.DataType | None

    def __call__(self, rows: Sequence[Row]) -> tuple[int, dict[str, pa.Array], Batch | None, list[str]]:
        whole = [row for row in rows if row.sample is not None]
        columns = {"name": pa.array([row.name for row in whole], pa.string())}
        if self.label_type is not None:
            columns["label"] = pa.array([row.label for row in whole], self.label_type)
        inputs = self.modality.collate([row.sample for row in whole if row.sample is not None]) if whole else None
        return len(rows), columns, inputs, [row.reason for row in rows if row.sample is None]


# Encoding.


@dataclass
class Step:
    """What became of a batch: how many samples were read, their embeddings, and why some could not be read."""

    read: int
    table: pa.Table | None
    failed: list[str]


@torch.inference_mode()
def encoded(
    rows: SampleRows | StreamedRows,
    first: int,
    model: AnyModel,
    pooling: str,
    layers: Sequence[int | str],
    batch_size: int,
    workers: int,
) -> Iterator[Step]:
    """Batches of samples from number ``first`` on, in their order."""
    order = None
    if isinstance(rows, StreamedRows):
        rows.first = first
    else:
        order = range(first, len(rows.samples))
    collate = Collate(rows.modality, rows.label_type)
    for read, columns, inputs, failed in DataLoader(
        rows, batch_size, sampler=order, collate_fn=collate, num_workers=workers
    ):
        if inputs is None:
            yield Step(read, None, failed)
            continue
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        embeddings = {
            name: column_of_arrays(each) for name, each in embeddings_of(model, inputs, pooling, layers).items()
        }
        if any(len(each) != len(columns["name"]) for each in embeddings.values()):
            raise ValueError(f"found {len(columns['name'])} samples, and a modality that makes one of them in a batch")
        yield Step(read, pa.table(columns | embeddings), failed)


def embeddings_of(
    model: AnyModel, inputs: Batch, pooling: str, layers: Sequence[int | str]
) -> dict[str, Tensor | list[Tensor]]:
    """(B, F) for each wanted layer by the name of its column; or of all tokens (N, D) for each sample."""
    if not layers and pooling == "mean":
        return {"embedding": model(**inputs).pooler_output}
    out = model(**inputs, output_hidden_states=bool(layers))
    states = {"embedding": out.last_hidden_state}
    if layers:
        hidden = [*out.hidden_states[:-1], out.last_hidden_state]
        wanted = range(len(hidden)) if "all" in layers else layers
        if unknown := [number for number in wanted if number not in range(len(hidden))]:
            raise ValueError(f"layers: found {unknown[0]}; expected some of 0 to {len(hidden) - 1}, or all")
        states = {f"layer_{number}": hidden[int(number)] for number in wanted}
    samples, first = len(out.pooler_output), model.encoder.num_prefix_tokens
    if any(state.shape[1] != out.token_mask.shape[1] for state in states.values()):
        raise ValueError("layers: this encoder's hidden layers have other tokens than its output; leave layers out")
    if pooling != "tokens":
        return {name: pool(each, out.token_mask, samples, first, pooling) for name, each in states.items()}  # type: ignore[arg-type]
    valid = out.token_mask[:, first:].reshape(samples, -1)
    return {
        name: [
            each[where]
            for each, where in zip(state[:, first:].reshape(samples, valid.shape[1], -1), valid, strict=True)
        ]
        for name, state in states.items()
    }


def column_of_arrays(values: Tensor | list[Tensor]) -> pa.Array:
    """(B, F) as a column of lists of F; of arrays (N, F) that differ in N, of lists of such lists."""
    flat = torch.cat(values) if isinstance(values, list) else values
    array = pa.FixedSizeListArray.from_arrays(flat.float().cpu().flatten().numpy(), flat.shape[1])
    if isinstance(values, list):
        array = pa.ListArray.from_arrays(np.cumsum([0, *map(len, values)], dtype=np.int32), array)
    return array


# What parts must agree in.


def about_model(model: AnyModel) -> dict[str, str]:
    """Digests of the weights, and of the configuration."""
    weights = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    return {"the model's weights": weights.hexdigest(), "the model's config": digest([config])}


def about_data(data: DataArguments, rows: SampleRows | StreamedRows, output: Path) -> dict[str, Any]:
    """The options, and digests of names and labels of all samples and of sizes and dates of local files."""
    options = {f"data.{name}": value for name, value in asdict(data).items() if name not in BESIDE_SAMPLES}
    if isinstance(rows, SampleRows):
        options["samples"] = rows.total
        options["names or labels of samples"] = digest(
            (rows.samples.name(i), rows.label(i)) for i in range(len(rows.samples))
        )
    files = ((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(data, output))
    return options | {"sizes or dates of files": digest(files)}


def files_of(data: DataArguments, output: Path) -> list[Path]:
    """Local files that the data are in; what is written here is none of them."""
    source = Path(str(data.source)).expanduser()
    if source.is_dir():
        found = [Path(root, file) for root, _, files in os.walk(source, followlinks=True) for file in files]
    else:
        found = list(source.parent.glob(source.name)) if "*" in source.name else [source]
    own = str(output.with_suffix("").absolute()) + "."
    return sorted(path for path in found if path.is_file() and not str(path.absolute()).startswith(own))


def digest(values: Any) -> str:
    """Of anything that can be written as JSON, one after the other."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        found.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return found.hexdigest()
