"""Streamed shards: no row is lost or read twice, by any number of processes and workers, and resume is exact."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from mmssl.data import DataArguments, load_samples
from mmssl.data.streaming import StreamedSamples
from mmssl.modalities.image import Image

slow = pytest.mark.slow
IMAGE: dict[str, Any] = {"image_size": 4, "patch_size": 2, "num_channels": 1, "normalize_target": False}


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that are given up in the middle of a pass sleep for seconds, lest their threads be cut off."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def png(value: int) -> bytes:
    """A picture that is one value all over."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write_shards(folder: Path, shards: int, rows: int) -> None:
    """Pictures whose values count up from 0."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        values = range(shard * rows, (shard + 1) * rows)
        table = datasets.Dataset.from_dict({"image": [{"bytes": png(value), "path": None} for value in values]})
        table.cast_column("image", datasets.Image(decode=False)).to_parquet(folder / f"{shard}.parquet")


def stream(source: Path, rank: int = 0, processes: int = 1, workers: int = 0, **options) -> StreamedSamples:
    modality = Image(**IMAGE)
    arguments = DataArguments(str(source), streaming=True, **{"shuffle_buffer_size": 5} | options)
    samples = load_samples(arguments, modality)
    return StreamedSamples(samples, modality, arguments, 0, rank, processes, max(1, workers))


def loader_of(rows: StreamedSamples, batch_size: int, workers: int = 0) -> DataLoader:
    return DataLoader(rows, batch_size=batch_size, drop_last=True, collate_fn=rows.collate, num_workers=workers)


def values_of(batch: dict) -> list[int]:
    """Which pictures a batch holds."""
    mean, std = (Image(**IMAGE).options()[name] for name in ("image_mean", "image_std"))
    pixels = batch["inputs"]["pixel_values"][:, 0, 0, 0] * std[0] + mean[0]
    return (pixels * 255).round().int().tolist()


@pytest.mark.parametrize(
    ("shards", "processes", "workers"),
    [(1, 1, 0), (4, 1, 0), (3, 2, 0), pytest.param(3, 1, 2, marks=slow), pytest.param(5, 2, 2, marks=slow)],
)
def test_each_row_once_in_each_pass(tmp_path: Path, shards: int, processes: int, workers: int) -> None:
    """Of all processes together; where shards do not divide evenly, a process passes more often over its own."""
    write_shards(tmp_path, shards, rows=6)
    total = 6 * shards
    seen: Counter[int] = Counter()
    for rank in range(processes):
        rows = stream(tmp_path, rank, processes, workers)
        own = first_passes(rows, max(1, workers))
        assert own.total() == len(own)
        seen += own
    assert seen == Counter(range(total))


def first_passes(rows: StreamedSamples, readers: int) -> Counter[int]:
    """Values of the rows that each worker reads before it begins anew; batches come from workers in turn."""
    found: list[list[int]] = [[] for _ in range(readers)]
    again = set[int]()
    for number, batch in enumerate(loader_of(rows, 1, 0 if readers == 1 else readers)):
        (value,), reader = values_of(batch), number % readers
        if value in found[reader]:
            again.add(reader)
        elif reader not in again:
            found[reader].append(value)
        if len(again) == readers:
            break
    return Counter(value for values in found for value in values)


def test_orders_differ_from_pass_to_pass_and_follow_from_the_seed(tmp_path: Path) -> None:
    write_shards(tmp_path, 4, rows=6)

    def read() -> list[int]:
        batches = iter(loader_of(stream(tmp_path), 1))
        return [values_of(next(batches))[0] for _ in range(48)]

    values = read()
    assert sorted(values[:24]) == sorted(values[24:]) == list(range(24))
    assert values[:24] != values[24:] and values[:24] != list(range(24))
    assert values == read()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 7])
def test_resume_comes_to_the_same_rows(tmp_path: Path, workers: int, done: int) -> None:
    """In the middle of a shard, a buffer and a pass, and with a row that cannot be read."""
    write_shards(tmp_path, 4, rows=5)
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}] * 2})
    broken.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "9.parquet")
    whole = stream(tmp_path, workers=workers, on_error="skip")
    batches = iter(loader_of(whole, 3, workers))
    rows = [0] * max(1, workers)
    for number in range(done):
        batch = next(batches)
        rows[number % len(rows)] = whole.rows_before(batch["indices"][-1])
    resumed = stream(tmp_path, workers=workers, on_error="skip")
    resumed.resume(rows, done, 3)
    others = iter(loader_of(resumed, 3, workers))
    for _ in range(done):
        assert next(others)["inputs"] is None
    for _ in range(6):
        first, second = next(batches), next(others)
        assert torch.equal(first["inputs"]["pixel_values"], second["inputs"]["pixel_values"])
        assert first["indices"] == second["indices"] and first["failed"] == second["failed"]


def test_tar_shards(tmp_path: Path) -> None:
    """As WebDataset writes them: files of one sample have one name, and their endings say what they are."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(3):
                for ending, content in (("png", png(3 * shard + number)), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{shard}_{number}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    rows = stream(tmp_path)
    batches = iter(loader_of(rows, 2))
    assert sorted(value for _ in range(3) for value in values_of(next(batches))) == list(range(6))
    samples = load_samples(DataArguments(str(tmp_path)), Image(**IMAGE))  # and without streaming
    assert len(samples) == 6 and samples.labels is not None and sorted(samples.labels) == [0, 0, 0, 0, 1, 1]


def test_the_head_is_as_long_as_the_buffer(tmp_path: Path) -> None:
    write_shards(tmp_path, 4, rows=6)
    assert len(stream(tmp_path, shuffle_buffer_size=7).samples) == 7


def test_an_unreadable_row_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, rows=2)
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}]})
    broken.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "9.parquet")
    rows = stream(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}, row \d that worker 0 of process 0 read: "):
        for _, _ in zip(range(4), rows, strict=False):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 3}, "data.max_samples: a stream has no such choice"),
        ({"filter": "a=b"}, "data.filter: .*"),
        ({"repeat": 2}, "data.repeat: a stream"),
        ({"cache_mb": 10}, "data.cache_mb: a stream"),
    ],
)
def test_choices_that_a_stream_does_not_have(tmp_path: Path, options: dict, message: str) -> None:
    write_shards(tmp_path, 1, rows=4)
    with pytest.raises(ValueError, match=message):
        stream(tmp_path, **options)


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0)])
def test_fewer_shards_than_readers(tmp_path: Path, processes: int, workers: int) -> None:
    write_shards(tmp_path, 1, rows=4)
    with pytest.raises(ValueError, match=r"found 1 shards for .* expected at least 2: lower"):
        stream(tmp_path, 0, processes, workers)


def test_a_folder_of_pictures_is_no_stream(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"data.streaming: .* is no table"):
        stream(tmp_path)
