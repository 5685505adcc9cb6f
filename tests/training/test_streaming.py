"""Runs on streamed shards resume to the bit, and say what a stream needs."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, pretrain
from tests.data.test_streaming import write_shards
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics


@pytest.fixture(autouse=True)
def no_wait_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that are given up in the middle of a pass sleep for seconds, lest their threads be cut off."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def run(source: Path, output_dir: Path, **train: Any) -> list[dict[str, float]]:
    flags = {"max_train_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, **train}
    pretrain(
        Image(image_size=4, patch_size=2, num_channels=1, normalize_target=False, crop_scale=(0.5, 1.0)),
        partial(MaskedReconstruction, decoder_layers=1, decoder_hidden_size=16),
        EncoderConfig(16, 2, 2),
        DataArguments(str(source), streaming=True, shuffle_buffer_size=5),
        TrainArguments(str(output_dir), **flags),
    )
    return metrics(output_dir)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_run_resumes_to_the_bit(tmp_path: Path, workers: int) -> None:
    """Two passes and a half over 20 rows, with a checkpoint in the middle of the second."""
    write_shards(tmp_path / "shards", 4, rows=5)
    flags = {"checkpointing_steps": 7, "dataloader_num_workers": workers}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lines = run(tmp_path / "shards", whole, **flags)
    assert lines[-1]["epoch"] is None
    shutil.copytree(whole, cut)
    (cut / "model.safetensors").unlink()
    resumed = run(tmp_path / "shards", cut, **flags, resume_from_checkpoint="latest")
    assert exact(resumed) == exact(lines)
    assert_same_weights(whole, cut)


def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 4, rows=5)
    run(tmp_path / "shards", tmp_path / "run", checkpointing_steps=7)
    with pytest.raises(ValueError, match="dataloader_num_workers: found 2 readers where the checkpoint had 1"):
        run(tmp_path / "shards", tmp_path / "run", dataloader_num_workers=2, resume_from_checkpoint="latest")


def test_a_stream_needs_a_number_of_steps(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 1, rows=5)
    with pytest.raises(ValueError, match="max_train_steps is not set; expected a number of steps, as a stream has no"):
        run(tmp_path / "shards", tmp_path / "run", max_train_steps=None)
