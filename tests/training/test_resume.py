"""A resumed run is the undisturbed run, to the bit; nothing half-written is ever picked up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mmssl.training.checkpoint import find_checkpoint, step_folders
from tests.training.tiny import run

EXACT = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def exact(lines: list[dict[str, float]]) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in EXACT) for line in lines]


def assert_same_weights(first: Path, second: Path) -> None:
    for file in ("model.safetensors", "objective.safetensors"):
        one, two = load_file(first / file), load_file(second / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "train",
    [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 2}, {"activation_checkpointing": True}],
    ids=["plain", "accumulation", "workers", "activation checkpointing"],
)
def test_resumed_run_is_equal_to_the_bit(tmp_path: Path, train: dict[str, Any]) -> None:
    """From the middle of an epoch; 60 samples in batches of 8 leave some over at the end of each."""
    whole = run(tmp_path / "whole", checkpointing_steps=5, checkpoints_total_limit=None, **train)
    assert [path.name for path in step_folders(tmp_path / "whole")] == ["step_5", "step_10"]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step_10")
    for file in ("model.safetensors", "objective.safetensors"):
        (tmp_path / "cut" / file).unlink()
    resumed = run(tmp_path / "cut", checkpointing_steps=5, resume_from_checkpoint="latest", **train)
    assert exact(resumed) == exact(whole)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_order_of_the_data_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    assert exact(run(tmp_path / "none")) == exact(run(tmp_path / "two", dataloader_num_workers=2))


def test_the_seed_matters(tmp_path: Path) -> None:
    assert exact(run(tmp_path / "a", max_train_steps=2)) != exact(run(tmp_path / "b", max_train_steps=2, seed=1))


@pytest.mark.slow
def test_killed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_train_steps=40)
    killed = tmp_path / "killed"
    flags = '{"max_train_steps": 40, "checkpointing_steps": 3}'
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.tiny", str(killed), flags],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "metrics.jsonl").exists() or len((killed / "metrics.jsonl").read_text().splitlines()) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = int(step_folders(killed)[-1].name[5:])
    assert 3 <= done < 40 and not (killed / "model.safetensors").exists()
    resumed = run(killed, max_train_steps=40, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert exact(resumed) == exact(whole)
    assert_same_weights(tmp_path / "whole", killed)


def test_half_written_checkpoints_are_not_picked_up(tmp_path: Path) -> None:
    run(tmp_path, checkpointing_steps=5, max_train_steps=5)
    shutil.copytree(tmp_path / "step_5", tmp_path / ".step_9.tmp")
    shutil.copytree(tmp_path / "step_5", tmp_path / "step_11")
    (tmp_path / "step_11" / "run.json").unlink()
    assert find_checkpoint("latest", tmp_path) == tmp_path / "step_5"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, checkpointing_steps=2, checkpoints_total_limit=2, max_train_steps=9)
    assert [path.name for path in step_folders(tmp_path)] == ["step_6", "step_8"]


def test_full_disk_names_the_folder_and_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state = Accelerator.save_state

    def full(self: Accelerator, folder: str) -> None:
        save_state(self, folder)
        if "step_10" in folder:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"step_10.*No space left.*resume_from_checkpoint latest"):
        run(tmp_path, checkpointing_steps=5)
    assert [path.name for path in tmp_path.glob("*step_*")] == ["step_5"]
    monkeypatch.undo()
    assert len(run(tmp_path, checkpointing_steps=5, resume_from_checkpoint="latest")) == 12


def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(tmp_path, checkpointing_steps=5, max_train_steps=5)
    with pytest.raises(ValueError, match=r"another configuration") as error:
        run(tmp_path, mask_ratio=0.75, resume_from_checkpoint="latest", learning_rate=0.5)
    text = str(error.value)
    assert "objective.MaskedReconstruction.mask_ratio: 0.5 in the checkpoint, 0.75 now" in text
    assert "train.learning_rate: 0.01 in the checkpoint, 0.5 now" in text
    assert "logging_steps" not in text


@pytest.mark.parametrize("resume", ["latest", "nowhere/step_3"])
def test_resume_from_what_is_no_checkpoint(tmp_path: Path, resume: str) -> None:
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*checkpoint"):
        run(tmp_path, resume_from_checkpoint=resume)
