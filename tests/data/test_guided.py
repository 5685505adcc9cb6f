"""Tests of guided batches: distinct clusters, every sample once, and errors that say what is wrong with the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler

from mmssl.data import DataArguments, load_samples
from mmssl.data.guided import GuidedSampler, clusters_of, guided_order
from mmssl.modalities.image import Image
from mmssl.training import TrainArguments
from mmssl.training.arguments import Source
from mmssl.training.streams import open_stream
from tests.training.tiny import run

SIZES = [9, 4, 7, 5, 12, 4]
CLUSTERS = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))[
    torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(5))
]


def order(seed: int) -> list[int]:
    return guided_order(CLUSTERS, torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_first_blocks_have_one_sample_of_each_cluster_and_each_sample_comes_once(seed: int) -> None:
    found = order(seed)
    assert sorted(found) == list(range(sum(SIZES)))
    for start in range(0, min(SIZES) * len(SIZES), len(SIZES)):
        assert sorted(CLUSTERS[found[start : start + len(SIZES)]].tolist()) == list(range(len(SIZES)))


def test_later_blocks_have_those_that_last() -> None:
    """The k-th sample of a cluster comes after the (k-1)-th of every cluster."""
    found, seen, turns = order(0), dict.fromkeys(range(len(SIZES)), 0), []
    for index in found:
        cluster = int(CLUSTERS[index])
        turns.append(seen[cluster])
        seen[cluster] += 1
    assert turns == sorted(turns)


def test_order_is_another_one_for_each_seed_and_epoch_and_within_clusters() -> None:
    assert order(0) == order(0) != order(1)
    assert CLUSTERS[order(0)[:6]].tolist() != CLUSTERS[order(1)[:6]].tolist()
    sampler = GuidedSampler(CLUSTERS, 1, seed=3)
    first = list(sampler)
    assert first == list(sampler) and len(first) == len(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)


def test_one_cluster_is_a_random_order_of_all() -> None:
    """Any sample may come first: with 6 samples and 300 draws, each does so about 50 times."""
    generator = torch.Generator().manual_seed(0)
    first = [int(guided_order(torch.zeros(6, dtype=torch.long), generator)[0]) for _ in range(300)]
    assert min(first.count(index) for index in range(6)) > 25


def test_repeats_are_further_positions() -> None:
    assert sorted(GuidedSampler(CLUSTERS, 3, seed=0)) == list(range(3 * len(CLUSTERS)))


def test_two_processes_share_a_block() -> None:
    """Their two batches together have one sample of each of the clusters, as many as the samples of both."""
    batches = BatchSampler(GuidedSampler(CLUSTERS, 1, seed=0), len(SIZES) // 2, drop_last=True)
    shares = [list(BatchSamplerShard(batches, 2, rank)) for rank in (0, 1)]
    for one, other in list(zip(*shares, strict=True))[: min(SIZES)]:
        assert len(set(CLUSTERS[one + other].tolist())) == len(SIZES)


def write(path: Path, count: int = 60) -> Path:
    """The pixels of the digits as embeddings of themselves."""
    images = Image(image_size=8, patch_size=2, num_channels=1)
    pixels = np.stack(list(load_samples(DataArguments("digits", max_samples=count), images).values)).reshape(count, -1)
    np.savez(path, embedding=pixels)
    return path


def test_batches_of_a_run_have_distinct_clusters(tmp_path: Path) -> None:
    data = DataArguments("digits", max_samples=60, guide=str(write(tmp_path / "e.npz")))
    source = Source(Image(image_size=8, patch_size=2, num_channels=1), data)
    accelerator = Accelerator()
    stream = open_stream(source, TrainArguments(str(tmp_path), per_device_train_batch_size=6), accelerator)
    stream.loader = accelerator.prepare(stream.loader)
    assert stream.sampler is not None
    clusters = clusters_of(str(tmp_path / "e.npz"), 60, 6, seed=0)
    whole = int(clusters.bincount().min())
    assert whole >= 1
    pixels = torch.stack([stream.dataset[i][0]["pixel_values"] for i in range(60)])
    for number in range(whole):
        rows = stream.next_inputs()["pixel_values"]
        found = [(pixels == row).flatten(1).all(dim=1).nonzero().item() for row in rows]
        assert len(set(clusters[found].tolist())) == 6, number


def test_a_guided_run_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = str(write(tmp_path / "e.npz"))
    monkeypatch.setattr(
        "tests.training.tiny.DataArguments",
        lambda source, max_samples: DataArguments(source, max_samples=max_samples, guide=guide),
    )
    flags: dict[str, Any] = {"checkpointing_steps": 9, "checkpoints_total_limit": None}
    whole = run(tmp_path / "whole", **flags)
    again = run(tmp_path / "whole", resume_from_checkpoint="latest", **flags)
    losses = [[line["loss"] for line in lines] for lines in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["data"]["guide"] == guide


def test_parquet_files_are_read_too(tmp_path: Path) -> None:
    import pandas

    pixels = load_digits().data[:30]
    pandas.DataFrame({"embedding": list(pixels)}).to_parquet(tmp_path / "e.parquet")
    np.savez(tmp_path / "e.npz", embedding=pixels)
    one, other = (clusters_of(str(tmp_path / name), 30, 4, seed=0) for name in ("e.parquet", "e.npz"))
    assert torch.equal(one, other) and set(one.tolist()) == set(range(4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"embedding": np.ones((59, 2))}, r"59 embeddings for 60 samples.*mmssl embed"),
        ({"features": np.ones((60, 2))}, r"no array or column .* 'embedding'"),
        ({"embedding": np.ones(60)}, r"no array or column .* 'embedding'"),
        ({"embedding": np.full((60, 2), np.nan)}, r"NaN or infinity"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "e.npz", allow_pickle=False, **arrays)
    with pytest.raises(ValueError, match=message):
        clusters_of(str(tmp_path / "e.npz"), 60, 8, seed=0)


@pytest.mark.parametrize("name", ["none.npz", "e.csv"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"data\.guide: found .*mmssl embed"):
        clusters_of(str(tmp_path / name), 60, 8, seed=0)
