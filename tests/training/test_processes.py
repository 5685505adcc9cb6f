"""Two real processes against one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.training.two_processes", str(tmp_path)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = torch.load(tmp_path / "whole0.pt", weights_only=True)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert found.keys() == whole.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)
