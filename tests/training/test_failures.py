"""Samples that cannot be read, and workers that die: named, counted, and too much of it stops a run in one line."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image as PILImage
from torch import Tensor

from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, pretrain
from mmssl.training.checkpoint import whole_or_not
from mmssl.training.failures import deaths_of_workers_explained
from tests.training.tiny import metrics


class Watching(MaskedReconstruction):
    """At each forward pass something else is done first, which is given the folder of the run."""

    doing: Any = None

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Any:
        self.doing()
        return super().forward(batch, generator)


def folder_of_images(folder: Path, count: int, bad: dict[int, bytes | None]) -> Path:
    """Grey images, each of its own shade; the bad ones hold these bytes, or where None the first half of their own."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:03}.png"
        PILImage.new("L", (8, 8), number).save(path)
        if number in bad:
            found = bad[number]
            path.write_bytes(path.read_bytes()[:40] if found is None else found)
    return folder


def train(images: Path, output: Path, doing: Any = None, data: dict[str, Any] | None = None, **flags: Any) -> None:
    objective = MaskedReconstruction if doing is None else type("Now", (Watching,), {"doing": staticmethod(doing)})
    options: dict[str, Any] = {"views": False, "decoder_layers": 1, "decoder_hidden_size": 16}
    pretrain(
        Image(image_size=8, patch_size=4, num_channels=1),
        partial(objective, **options),
        EncoderConfig(16, 1, 2),
        DataArguments(str(images), **{"on_error": "skip", **(data or {})}),
        TrainArguments(str(output), **{"per_device_train_batch_size": 8, "logging_steps": 1, **flags}),
    )


def failed(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "failed_samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_written_down_while_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    bad = {7: b"this is no image", 30: b"", 31: None}
    images, out = folder_of_images(tmp_path / "images", 64, bad), tmp_path / "run"
    seen: list[int] = []

    def look() -> None:
        seen.append(len(failed(out)) if (out / "failed_samples.jsonl").exists() else 0)

    train(images, out, look, num_train_epochs=2, dataloader_num_workers=workers)
    lines = failed(out)
    assert sorted(Path(line["sample"]).name for line in lines) == ["007.png", "030.png", "031.png"]
    assert all("not a readable image" in line["reason"] and line["modality"] == "image" for line in lines)
    assert {line["position"] for line in lines} == set(bad) and all(1 <= line["step"] <= 8 for line in lines)
    assert seen[-1] == 3 and seen == sorted(seen)  # all of them in the first of two epochs
    counts = [line["failed_samples"] for line in metrics(out)]
    assert counts == [sum(line["step"] <= step for line in lines) for step in range(1, len(counts) + 1)]
    printed = capsys.readouterr().out
    assert "3 of 64 samples could not be read and were skipped" in printed and "031.png: not a readable" in printed


def test_too_many_stop_the_run_in_one_line(tmp_path: Path) -> None:
    """A tenth is allowed, of at least a hundred samples: 20 of 64 in batches of 8 is more after five or so."""
    images = folder_of_images(tmp_path / "images", 64, {3 * number: b"no" for number in range(20)})
    with pytest.raises(ValueError, match=r"image: \d+ of \d+ samples could not be read so far") as error:
        train(images, tmp_path / "run", num_train_epochs=5)
    text = str(error.value)
    assert "\n" not in text and "data.max_failed" in text and "not a readable image" in text
    assert text.count(".png: ") == 3 and str(tmp_path / "run" / "failed_samples.jsonl") in text
    unreadable, read = (int(word) for word in text.split(": ")[1].split() if word.isdigit())
    steps = len(metrics(tmp_path / "run")) + 1  # the one at which it stops writes no line
    assert unreadable > 0.1 * max(read, 100) and read == 8 * steps + unreadable
    assert steps < 20 and failed(tmp_path / "run")[-1]["step"] <= steps


def test_more_may_be_allowed(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 64, {3 * number: b"no" for number in range(20)})
    train(images, tmp_path / "run", data={"max_failed": 0.5}, num_train_epochs=5)
    assert metrics(tmp_path / "run")[-1]["failed_samples"] == 20


def test_a_few_bad_ones_in_the_first_batches_are_not_too_many(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 16, {1: b"no"})
    train(images, tmp_path / "run", num_train_epochs=4)
    assert metrics(tmp_path / "run")[-1]["failed_samples"] == 1


def test_a_resumed_run_keeps_what_was_found_up_to_its_checkpoint(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 64, dict.fromkeys((2, 22, 42, 62), b"no"))
    out = tmp_path / "run"
    flags: dict[str, Any] = {"checkpointing_steps": 4, "max_train_steps": 8}
    train(images, out, **flags)
    whole, lines = failed(out), metrics(out)
    for file in ("step_8/run.json", "model.safetensors", "objective.safetensors"):
        (out / file).unlink()
    train(images, out, **flags, resume_from_checkpoint="latest")
    assert failed(out) == whole
    assert [line["failed_samples"] for line in metrics(out)] == [line["failed_samples"] for line in lines]


def test_max_failed_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"data.max_failed: found 5; expected a share from 0 to 1"):
        DataArguments(max_failed=5)


def kill_a_worker(folder: Path) -> None:
    images = folder_of_images(folder / "images", 64, {})

    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)

    train(images, folder / "run", kill, num_train_epochs=50, dataloader_num_workers=1)


def kill_a_worker_that_has_closed_its_connections(folder: Path) -> None:
    def close() -> None:
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.1, os.kill, (worker.pid, signal.SIGKILL)).start()
        raise ConnectionResetError("closed by the worker")

    train(folder_of_images(folder / "images", 64, {}), folder / "run", close, dataloader_num_workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("kill", (kill_a_worker, kill_a_worker_that_has_closed_its_connections))
def test_a_killed_worker_is_explained_in_one_line(kill: Callable[[Path], None], tmp_path: Path) -> None:
    """In a process of its own: torch hears of the death by a signal, and raises wherever its process is then."""
    code = f"from tests.training.test_failures import *; {kill.__name__}(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ChildProcessError: ")]
    assert len(lines) == 1, done.stderr
    death = r"\(pid \d+\) is killed by signal: Killed|\(pid\(s\) \d+\) exited unexpectedly"  # by what torch hears first
    explained = rf"has died: DataLoader worker ({death})\. If it was killed, memory has probably run out: lower train"
    assert re.search(explained, lines[0])


def test_a_death_while_a_checkpoint_is_written_is_no_full_disk(tmp_path: Path) -> None:
    death = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    explained = pytest.raises(ChildProcessError, match=r"has died: DataLoader worker \(pid 7\)")
    with explained, deaths_of_workers_explained(), whole_or_not(Accelerator(), tmp_path / "step_1"):
        raise death


def test_a_closed_connection_alone_is_no_death(tmp_path: Path) -> None:
    def close() -> None:
        raise ConnectionResetError("closed by a server")

    with pytest.raises(ConnectionResetError, match="by a server"):
        train(folder_of_images(tmp_path / "images", 16, {}), tmp_path / "run", close)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 16, {})

    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        train(images, tmp_path / "run", fail)
