"""Prepared samples: what a DataLoader's workers do with unreadable ones, and with samples too large to read whole."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.data import DataArguments, PreparedSamples, Samples, load_samples
from mmssl.data.prepared import TENSOR_BYTES
from mmssl.modalities.base import Modality
from mmssl.modalities.graph import Graph
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
        assert set(batch) == {"inputs", "failed", "reasons", "indices"} and set(batch["inputs"]) == {"pixel_values"}
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
    sample, failed, _ = PreparedSamples(samples, Speech(), "skip")[0]
    assert failed == [0] and len(sample["input_values"]) == 400


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_workers_may_be_spawned(source: str, tmp_path: Path) -> None:
    """Where processes are not forked (macOS, Windows, Python 3.14) a data set travels to them by pickle."""
    samples = load_samples(DataArguments(source="digits"), IMAGE) if source == "digits" else folder(tmp_path, 3, ())
    data = PreparedSamples(samples.select(np.array([2, 0])), IMAGE)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[0][0]["pixel_values"], data[0][0]["pixel_values"])
    assert copy.samples.name(1) == data.samples.name(1)


# Excerpts


class Lottery(Modality):
    """Samples are numbers; what is read of one at a time is three random numbers."""

    prepared = 0

    def prepare(self, sample: int) -> dict[str, Tensor]:
        self.prepared += 1
        return {"number": torch.tensor(sample)}

    def excerpt(self, sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        if sample["number"] == 13:
            raise ValueError("found 13; expected a lucky number")
        draw = torch.zeros(3) if generator is None else torch.rand(3, generator=generator)
        return {"number": sample["number"], "draw": draw}

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def lottery(count: int = 6, seed: int | None = 0, on_error: Literal["raise", "skip"] = "raise") -> PreparedSamples:
    return PreparedSamples(Samples(list(range(10, 10 + count)), "number {}".format), Lottery(), on_error, seed)


def draws(data: PreparedSamples, epoch: int) -> list[tuple[float, ...]]:
    data.set_epoch(epoch)
    return [tuple(data[i][0]["draw"].tolist()) for i in range(len(data))]


def test_each_sample_epoch_and_seed_has_its_own_draw_and_keeps_it() -> None:
    data = lottery(3)
    seen = [draws(data, epoch) for epoch in (0, 1, 2)] + [draws(lottery(3, seed=1), 0)]
    assert len({draw for epoch in seen for draw in epoch}) == 4 * 3
    assert draws(data, 1) == seen[1] == draws(lottery(3), 1)
    backwards = [tuple(data[i][0]["draw"].tolist()) for i in (2, 1, 0)]
    assert backwards == seen[1][::-1]


def test_without_a_seed_modalities_get_no_generator() -> None:
    assert draws(lottery(3, seed=None), 0) == draws(lottery(3, seed=None), 7) == [(0.0, 0.0, 0.0)] * 3


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}], ids=["fresh", "persistent"])
@pytest.mark.parametrize("workers", [1, 2])
def test_excerpts_do_not_depend_on_workers(workers: int, options: dict[str, Any]) -> None:
    """Also where workers live on from one epoch to the next."""
    data = lottery(3)
    loader = DataLoader(data, 2, num_workers=workers, collate_fn=data.collate, **options)
    for epoch in (0, 1, 5):
        data.set_epoch(epoch)
        found = torch.cat([batch["inputs"]["draw"] for batch in loader])
        assert [tuple(draw) for draw in found.tolist()] == draws(lottery(3), epoch)


def test_loaders_of_accelerate_move_the_epoch_on() -> None:
    data = lottery(3)
    loader = DataLoaderShard(data, batch_size=3, collate_fn=data.collate)
    seen = [[tuple(draw) for draw in batch["inputs"]["draw"].tolist()] for _ in range(3) for batch in loader]
    assert seen == [draws(lottery(3), epoch) for epoch in range(3)]


def test_no_global_randomness_is_read_or_changed() -> None:
    data = lottery(2)
    torch.manual_seed(0)
    before = torch.get_rng_state(), str(np.random.get_state())
    first = draws(data, 0)
    assert torch.equal(torch.get_rng_state(), before[0]) and str(np.random.get_state()) == before[1]
    torch.manual_seed(1)
    assert draws(lottery(2), 0) == first


def test_one_large_sample_is_prepared_once() -> None:
    data = lottery(2)
    for epoch in range(3):
        data.set_epoch(epoch)
        assert data[0][0]["number"] == 10
    assert data.modality.prepared == 1
    assert [int(data[i][0]["number"]) for i in (1, 0, 1)] == [11, 10, 11]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_samples_that_fit_into_the_cache_are_prepared_once(kept: int) -> None:
    """A tensor of one int64 is counted with what it takes besides; excerpts are new ones in each epoch all the same."""
    plain = lottery(3)
    data = PreparedSamples(plain.samples, Lottery(), seed=0, cache_bytes=kept * (TENSOR_BYTES + 8))
    for epoch in range(3):
        assert draws(data, epoch) == draws(plain, epoch)
    assert data.modality.prepared == 3 + 2 * (3 - kept) and plain.modality.prepared == 9


def test_a_view_takes_as_much_of_the_cache_as_what_it_is_a_view_of() -> None:
    class Windows(Lottery):
        def prepare(self, sample: int) -> dict[str, Tensor]:
            self.prepared += 1
            return {"number": torch.arange(1000)[sample]}

    data = PreparedSamples(lottery(3).samples, Windows(), cache_bytes=2 * TENSOR_BYTES + 8000)
    assert [draws(data, epoch) for epoch in range(2)] and data.modality.prepared == 3 + 2


def test_what_cannot_be_read_is_tried_in_each_epoch() -> None:
    class Unlucky(Lottery):
        def prepare(self, sample: int) -> dict[str, Tensor]:
            self.prepared += 1
            raise ValueError("found nothing")

    data = PreparedSamples(lottery(2).samples, Unlucky(), "skip", cache_bytes=1e6)
    for count in (2, 4):
        with pytest.raises(ValueError, match="none of 2 samples could be read"):
            data[0]
        assert data.modality.prepared == count


def test_an_error_of_an_excerpt_names_the_sample_or_skips_it() -> None:
    with pytest.raises(ValueError, match=r"number 3: found 13; expected a lucky number"):
        lottery()[3]
    sample, failed, _ = lottery(on_error="skip")[3]
    assert int(sample["number"]) == 14 and failed == [3]


def test_the_epoch_travels_by_pickle() -> None:
    data = lottery(2)
    data.set_epoch(4)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[1][0]["draw"], data[1][0]["draw"])
    assert tuple(copy[1][0]["draw"].tolist()) == draws(lottery(2), 4)[1]


def test_repeated_samples_have_excerpts_of_their_own() -> None:
    """One large graph fills a batch with different parts of it, the same ones at each reading of an epoch."""
    edges = np.stack([np.arange(99), np.arange(1, 100)])
    samples = Samples([{"edge_index": edges, "x": np.arange(100.0)[:, None]}], str)
    modality = Graph(num_features=1, normalize_features=False, max_nodes=5, num_neighbors=(2,))
    data = PreparedSamples(samples, modality, seed=0, repeat=6)
    assert len(data) == 6
    parts = [tuple(data[index][0]["node_features"].flatten().tolist()) for index in range(6)]
    assert len(set(parts)) > 4
    assert parts == [tuple(data[index][0]["node_features"].flatten().tolist()) for index in range(6)]
    with pytest.raises(ValueError, match=r"data\.repeat: found 0"):
        PreparedSamples(samples, modality, repeat=0)
