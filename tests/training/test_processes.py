"""Two real processes against one, and against themselves."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics


def two_processes(module: str, *arguments: str) -> subprocess.Popen:
    """Start a module of the tests in two processes on the CPU."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", module, *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(module: str, *arguments: str) -> None:
    """Run a module of the tests in two processes on the CPU, to its end."""
    process = two_processes(module, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    launch("tests.training.two_processes", str(tmp_path))
    whole = torch.load(tmp_path / "whole0.pt", weights_only=True)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert found.keys() == whole.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_in_bf16_resume_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flags: dict[str, Any] = {"checkpointing_steps": 5, "checkpoints_total_limit": None, "max_train_steps": 8}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch("tests.training.tiny", str(whole), json.dumps(flags))
    record = json.loads((whole / "run.json").read_text())
    assert record["processes"] == 2 and record["mixed_precision"] == "bf16"
    shutil.copytree(whole, cut)
    (cut / "model.safetensors").unlink()
    launch("tests.training.tiny", str(cut), json.dumps(flags | {"resume_from_checkpoint": "latest"}))
    assert len(metrics(cut)) == 8 and exact(metrics(cut)) == exact(metrics(whole))
    assert_same_weights(whole, cut)
