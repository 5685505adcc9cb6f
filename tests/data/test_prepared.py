"""Prepared samples: what a DataLoader's workers do with unreadable ones."""

import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from mmssl.data import DataArguments, PreparedSamples, Samples, load_samples
from mmssl.modalities.image import Image
from mmssl.modalities.speech import Speech

IMAGE = Image(image_size=4, patch_size=2, num_channels=1, image_mean=0.0, image_std=1.0)


def folder(root: Path, count: int, broken: tuple[int, ...]) -> Samples:
    """Images whose grey is their number; some files hold text, some are cut, some are empty."""
    for number in range(count):
        file = io.BytesIO()
        PILImage.new("L", (4, 4), number).save(file, format="PNG")
        damage = [b"this is no image", file.getvalue()[:40], b""]
        (root / f"{number:02}.png").write_bytes(damage[number % 3] if number in broken else file.getvalue())
    return load_samples(DataArguments(source=str(root)), IMAGE)


def read(
    samples: Samples, on_error: Literal["raise", "skip"], batch_size: int = 4, workers: int = 0, **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """The greys and the failed positions of each batch."""
    data = PreparedSamples(samples, IMAGE, on_error)
    loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=data.collate, **options)
    greys, failed = [], []
    for batch in loader:
        assert set(batch) == {"inputs", "failed"} and set(batch["inputs"]) == {"pixel_values"}
        assert isinstance(batch["failed"], list)
        greys.append((255 * batch["inputs"]["pixel_values"].mean(dim=(1, 2, 3))).round().int().tolist())
        failed.append(batch["failed"])
    return greys, failed


@pytest.mark.parametrize("number", [6, 7, 8], ids=["text", "cut", "empty"])
def test_raise_names_the_file(number: int, tmp_path: Path) -> None:
    samples = folder(tmp_path, 10, broken=(number,))
    data = PreparedSamples(samples, IMAGE)
    assert len(data) == 10 and data[5][1] == []
    with pytest.raises(ValueError, match=rf"{number:02}\.png: .+"):
        data[number]


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    samples = folder(tmp_path, 3, broken=())
    (tmp_path / "01.png").unlink()
    with pytest.raises(ValueError, match=r"01.png: .*No such file"):
        PreparedSamples(samples, IMAGE)[1]
    assert read(samples, "skip", 3) == ([[0, 2, 2]], [[1]])


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_takes_the_next_readable_one(workers: int, tmp_path: Path) -> None:
    """Batches keep their size, begin again after the last sample, and tell which samples could not be read."""
    broken = (1, 5, 6, 7, 11)
    greys, failed = read(folder(tmp_path, 12, broken), "skip", workers=workers)
    assert greys == [[0, 2, 2, 3], [4, 8, 8, 8], [8, 9, 10, 0]]
    assert [set(positions) for positions in failed] == [{1}, {5, 6, 7}, {11}]


def test_rows_of_null_are_skipped(tmp_path: Path) -> None:
    """Tables have nulls where a download failed."""
    file = io.BytesIO()
    PILImage.new("L", (4, 4), 9).save(file, format="PNG")
    values: list[Any] = [None, {"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": None}]
    greys, failed = read(Samples(values, lambda i: f"row {i}"), "skip", 3)
    assert greys == [[9, 9, 9]] and set(failed[0]) == {0, 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable(workers: int, tmp_path: Path) -> None:
    samples = folder(tmp_path, 3, broken=(0, 1, 2))
    with pytest.raises(ValueError, match=r"none of 3 samples could be read; the last was .*png"):
        read(samples, "skip", workers=workers)


def test_order_and_content_do_not_depend_on_workers(tmp_path: Path) -> None:
    samples = folder(tmp_path, 20, broken=(3, 4)).select(np.random.default_rng(0).permutation(20))
    alone = read(samples, "skip", 3)
    assert [grey for batch in alone[0] for grey in batch if grey not in (3, 4)] != list(range(20))
    for workers in (1, 2):
        assert read(samples, "skip", 3, workers) == alone


def test_failed_positions_are_those_of_the_samples(tmp_path: Path) -> None:
    """Not of the batch, nor of the sampler's order, nor of the sample that was asked for."""
    samples = folder(tmp_path, 6, broken=(3, 4))
    assert read(samples, "skip", 6, sampler=[5, 2, 1, 3, 0]) == ([[5, 2, 1, 5, 0]], [[3, 4]])


def test_errors_of_the_file_system_are_skipped_too(tmp_path: Path) -> None:
    pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    values: list[Any] = [tmp_path / "gone.wav", np.ones(400, np.float32)]
    samples = Samples(values, lambda i: str(values[i]))
    with pytest.raises(ValueError, match=r"gone\.wav: .*No such file"):
        PreparedSamples(samples, Speech())[0]
    sample, failed = PreparedSamples(samples, Speech(), "skip")[0]
    assert failed == [0] and len(sample["input_values"]) == 400


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_workers_may_be_spawned(source: str, tmp_path: Path) -> None:
    """Where processes are not forked (macOS, Windows, Python 3.14) a data set travels to them by pickle."""
    samples = load_samples(DataArguments(source="digits"), IMAGE) if source == "digits" else folder(tmp_path, 3, ())
    data = PreparedSamples(samples.select(np.array([2, 0])), IMAGE)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[0][0]["pixel_values"], data[0][0]["pixel_values"])
    assert copy.samples.name(1) == data.samples.name(1)
