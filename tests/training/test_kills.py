"""Runs that are killed again and again, at any point and while they save, end as the undisturbed run, to the bit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModel

from mmssl.training.checkpoint import step_folders
from mmssl.training.stopping import PREEMPTED
from tests.training.test_processes import two_processes
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics, run

STEPS = 60


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Processes that have imported torch before they start: a hundred times faster than new ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.tiny"])
    return context


def start(context: ForkServerContext, folder: Path, variables: dict[str, str], train: dict[str, Any]) -> BaseProcess:
    latest = {"resume_from_checkpoint": "latest"} if step_folders(folder) else {"overwrite_output_dir": True}
    process = context.Process(target=in_a_process, args=(folder, variables, train | latest))
    process.start()
    return process


def in_a_process(folder: Path, variables: dict[str, str], train: dict[str, Any]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a run of its own
    os.environ.update(variables)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    run(folder, **train)


def lines_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(condition: Any, process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "variables", "train"),
    [
        (8, {}, {}),
        (4, {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"gradient_accumulation_steps": 2}),
        (4, {}, {"dataloader_num_workers": 2}),
        (6, {}, {"queue": True}),
    ],
    ids=["plain", "bf16 and accumulation", "workers", "teacher and queue"],
)
def test_killed_runs_end_as_the_undisturbed_one(
    tmp_path: Path, context: ForkServerContext, kills: int, variables: dict[str, str], train: dict[str, Any]
) -> None:
    train = {"max_train_steps": STEPS, "checkpointing_steps": 2, **train}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(context, whole, variables, train)
    process.join()
    assert process.exitcode == 0

    chance = random.Random(0)
    during_a_save = 0
    for kill in range(kills):
        process = start(context, killed, variables, train)
        before = 2 * (lines_in(killed) // 2)  # a checkpoint every other step; what came after it is done anew
        goal = before + chance.randint(1, 6)
        wait_until(lambda goal=goal: lines_in(killed) >= goal, process)
        if kill % 2:
            wait_until(lambda: list(killed.glob(".step_*.tmp")), process)
        time.sleep(chance.uniform(0, 0.02))
        during_a_save += bool(list(killed.glob(".step_*.tmp")))
        assert process.is_alive()
        process.kill()
        process.join()
        assert not (killed / "model.safetensors").exists()
    assert during_a_save >= kills // 4
    assert step_folders(killed)
    process = start(context, killed, variables, train)
    process.join()
    assert process.exitcode == 0
    assert exact(metrics(killed)) == exact(metrics(whole))
    assert_same_weights(whole, killed)
    assert not list(killed.glob(".*"))


@pytest.mark.slow
def test_kills_while_the_model_is_written_leave_no_part_of_it(tmp_path: Path, context: ForkServerContext) -> None:
    train = {"max_train_steps": 4, "checkpointing_steps": 2}
    chance = random.Random(1)
    for _ in range(4):
        process = start(context, tmp_path, {}, train)
        wait_until(lambda: list(tmp_path.glob("..model.tmp")), process)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        if (tmp_path / "model.safetensors").exists():
            AutoModel.from_pretrained(tmp_path)  # whole
    process = start(context, tmp_path, {}, train)
    process.join()
    AutoModel.from_pretrained(tmp_path)
    assert (tmp_path / "objective.safetensors").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_save_and_exit_with_a_code_of_their_own(
    tmp_path: Path, context: ForkServerContext, number: signal.Signals, workers: int
) -> None:
    """Sent to the loader's workers too, as schedulers do; no checkpoints but the one that the signal asks for."""
    train = {"max_train_steps": STEPS, "dataloader_num_workers": workers}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(context, whole, {}, train)
    process.join()
    process = start(context, stopped, {}, train)
    wait_until(lambda: lines_in(stopped) >= 5, process)
    for child in (*psutil.Process(process.pid).children(), psutil.Process(process.pid)):
        child.send_signal(number)
    process.join()
    assert process.exitcode == PREEMPTED
    (checkpoint,) = step_folders(stopped)
    assert 5 <= int(checkpoint.name[5:]) < STEPS
    process = start(context, stopped, {}, train)
    process.join()
    assert exact(metrics(stopped)) == exact(metrics(whole))
    assert_same_weights(whole, stopped)


@pytest.mark.slow
def test_second_interrupt_aborts(tmp_path: Path, context: ForkServerContext) -> None:
    """While the step lasts, here for ever: the first Ctrl-C waits for its end, the second one does not."""
    process = context.Process(target=hang, args=(tmp_path,))
    process.start()
    wait_until(lambda: (tmp_path / "hangs").exists(), process)
    os.kill(process.pid or 0, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(30)
    assert process.exitcode not in (None, 0, PREEMPTED)
    assert not step_folders(tmp_path)


def hang(folder: Path) -> None:
    from mmssl.objectives.masked_reconstruction import MaskedReconstruction

    def forward(self: Any, batch: Any, generator: Any) -> None:
        (folder / "hangs").touch()
        while True:
            time.sleep(0.01)

    MaskedReconstruction.forward = forward  # type: ignore[method-assign, assignment]
    in_a_process(folder, {}, {"overwrite_output_dir": True})


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(tmp_path: Path) -> None:
    train = {"max_train_steps": 30, "checkpointing_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert two_processes("tests.training.tiny", str(whole), json.dumps(train)).wait() == 0
    assert json.loads((whole / "run.json").read_text())["processes"] == 2
    chance = random.Random(2)
    for number in (signal.SIGKILL, signal.SIGTERM):
        latest = {"resume_from_checkpoint": "latest"} if step_folders(killed) else {}
        launcher = two_processes("tests.training.tiny", str(killed), json.dumps(train | latest))
        goal = lines_in(killed) + chance.randint(3, 8)
        while lines_in(killed) < goal:
            assert launcher.poll() is None
            time.sleep(0.005)
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        # A scheduler's SIGTERM reaches all; what kills at once is of one process.
        for rank in ranks[: 1 if number == signal.SIGKILL else 2]:
            rank.send_signal(number)
        assert launcher.wait(timeout=120) != 0
        assert step_folders(killed) and not (killed / "model.safetensors").exists()
    last = two_processes("tests.training.tiny", str(killed), json.dumps(train | {"resume_from_checkpoint": "latest"}))
    assert last.wait() == 0
    assert exact(metrics(killed)) == exact(metrics(whole))
    assert_same_weights(whole, killed)


def test_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: real writes fail in the middle."""
    train: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 4}
    flags = json.dumps(train | {"checkpointing_steps": 2})
    run(tmp_path, **(train | {"max_train_steps": 2, "checkpointing_steps": 2}))
    for file in ("model.safetensors", "objective.safetensors"):
        (tmp_path / file).unlink()
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code += "from tests.training.tiny import run; from pathlib import Path; import json; "
    code += "run(Path(sys.argv[1]), **json.loads(sys.argv[2]), resume_from_checkpoint='latest')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), flags],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"could not write {tmp_path / 'step_4'}" in done.stderr and "free some space" in done.stderr
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_2"]
    lines = run(tmp_path, **train, resume_from_checkpoint="latest")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
