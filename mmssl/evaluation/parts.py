"""Rows that are written part by part, and joined to one file when all parts are there.

A part is a parquet file that is there as a whole or not at all. What its rows follow from stands in a record beside the
parts, so that none are joined that do not belong together.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RECORD, UNFINISHED = "record.json", "unfinished.tmp"
READ = b"samples read"  # in a part's metadata: how many, those that could not be read too


class Parts:
    """The parts of a run, one after the other, each whole or not there.

    Args:
        folder: where they are; made if it is not there.
        record: what the embeddings follow from.

    Raises:
        ValueError: there are parts with another record; says what differs.
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder = folder
        self.paths: list[Path] = []
        while (path := self.path(len(self.paths))).is_file():
            self.paths.append(path)
        if self.paths:
            self.check(record)
        else:
            self.write("the record", folder / RECORD, lambda path: path.write_text(json.dumps(record, indent=2)))
        schemas = [pq.read_schema(path) for path in self.paths]
        self.read = sum(int(schema.metadata[READ]) for schema in schemas)
        self.rows = sum(pq.read_metadata(path).num_rows for path in self.paths)
        self.schema = next((schema.remove_metadata() for schema in schemas if len(schema)), None)

    def path(self, number: int) -> Path:
        return self.folder / f"part_{number:06d}.parquet"

    def check(self, record: dict[str, Any]) -> None:
        before, now = json.loads((self.folder / RECORD).read_text()), json.loads(json.dumps(record))
        differences = []
        for name in before | now:
            old, new = before.get(name), now.get(name)
            if old != new:
                values = "" if " of " in name or "'s " in name else f": {old!r} in the parts, {new!r} now"
                differences.append(f"{name}{values}")
        if differences:
            raise ValueError(
                f"{self.folder} has {len(self.paths)} parts of embeddings that were cut short, of which differ: "
                f"{'; '.join(differences)}. Give the same model, data and flags to go on, or delete the folder to "
                "begin anew"
            )

    def add(self, tables: list[pa.Table], read: int, pooling: str) -> None:
        """Write the next part; of samples that could not be read it has the number alone."""
        for table in tables:
            if table.schema != (self.schema or tables[0].schema):
                raise ValueError(
                    f"pooling: found {pooling}, and samples of different lengths; use mean, max or mean_max"
                )
        whole = pa.concat_tables(tables) if tables else pa.table({})
        whole = whole.replace_schema_metadata({READ: str(read)})
        path = self.path(len(self.paths))
        self.write(f"samples {self.read:,} to {self.read + read:,}", path, lambda path: pq.write_table(whole, path))
        self.paths.append(path)
        if self.schema is None and tables:
            self.schema = pq.read_schema(path).remove_metadata()  # names fields inside of lists in its own way
        self.read, self.rows = self.read + read, self.rows + whole.num_rows

    def write(self, what: str, path: Path, write: Callable[[Path], Any]) -> None:
        """Write a file under another name, which takes its place when it is whole.

        Raises:
            OSError: what could not be written, and what to do.
        """
        temporary = self.folder / UNFINISHED
        try:
            self.folder.mkdir(exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # the name must not survive a power cut that its content does not
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"could not write {what} to {path} ({error}); free some space there and give the same command again: "
                f"it goes on from the {len(self.paths)} whole parts in {self.folder}"
            ) from error

    def join(self, output: Path) -> None:
        """Write all parts to one file, one after the other, and remove them."""
        assert self.schema is not None
        columns = self.schema.names
        embeddings = [name for name in columns if name not in ("name", "label")]
        if output.suffix == ".parquet":
            self.write("all samples", output, lambda path: self.write_table(path, columns))
        elif output.suffix == ".npz":
            self.write("all samples", output, self.write_archive)
        else:
            names = [name for name in columns if name not in embeddings]
            beside = output.with_suffix(".names.parquet")
            self.write("all names", beside, lambda path: self.write_table(path, names))
            self.write("all samples", output, lambda path: self.write_npy(path, embeddings))
        self.remove()

    def write_table(self, path: Path, names: list[str]) -> None:
        assert self.schema is not None
        with pq.ParquetWriter(path, pa.schema([self.schema.field(name) for name in names])) as writer:
            for table in self.tables(names):
                writer.write_table(table)

    def write_archive(self, path: Path) -> None:
        """As ``np.savez``, an array after the other and block by block."""
        assert self.schema is not None
        with zipfile.ZipFile(path, "w") as archive:
            for name in self.schema.names:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    self.write_array(file, [name])

    def write_npy(self, path: Path, names: list[str]) -> None:
        with path.open("wb") as file:
            self.write_array(file, names)

    def write_array(self, file: IO[bytes], names: list[str]) -> None:
        """Columns as one array, as ``np.save`` writes it; of several, (n, columns, F)."""

        def blocks() -> Iterator[np.ndarray]:
            for table in self.tables(names):
                columns = [numpy_of(table[name]) for name in names]
                yield columns[0] if len(names) == 1 else np.stack(columns, axis=1)

        first = next(blocks())
        dtype = first.dtype if first.dtype.kind != "U" else np.result_type(*{block.dtype for block in blocks()})
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (self.rows, *first.shape[1:]),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks():
            file.write(block.astype(dtype).tobytes())

    def tables(self, names: list[str]) -> Iterator[pa.Table]:
        """These columns of each part that has samples."""
        for path in self.paths:
            if pq.read_metadata(path).num_rows:
                yield pq.read_table(path, columns=names)

    def remove(self) -> None:
        """What has been written here, and nothing else that may lie there."""
        for path in (*self.paths, self.folder / RECORD, self.folder / UNFINISHED):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def numpy_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column as an array: (n,) of text or numbers, (n, F) of lists of F."""
    if pa.types.is_fixed_size_list(column.type):
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        return values.reshape(-1, column.type.list_size)
    if pa.types.is_string(column.type):
        return np.array(["" if value is None else value for value in column.to_pylist()])
    return column.to_numpy()
