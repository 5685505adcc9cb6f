"""Steps that are not finite: the samples are named, nothing bad is saved, and a skipped step leaves no trace."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from mmssl import MMSSLModel
from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.monitors import effective_rank
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, pretrain
from mmssl.training.checkpoint import step_folders
from mmssl.training.nonfinite import MOST_IN_A_ROW
from tests.training.test_failures import failed, folder_of_images
from tests.training.test_processes import launch
from tests.training.test_resume import exact
from tests.training.tiny import metrics, run

IMAGE = Image(image_size=8, patch_size=2, num_channels=1)


class Poisoned(Contrastive):
    """With a teacher, a queue and statistics; from call ``first`` to ``last`` a NaN comes in.

    Attributes:
        calls: forward passes so far, over all runs.
        where: "loss", or the "gradient" of a loss that is finite.
    """

    centre: Tensor
    count: Tensor
    calls = 0
    first = last = 3
    where = "loss"

    def __init__(self, model: MMSSLModel, projector_hidden_size: int, projector_size: int, queue_size: int):
        super().__init__(
            model,
            projector_hidden_size=projector_hidden_size,
            projector_size=projector_size,
            momentum=(0.9, 0.9),
            queue_size=queue_size,
        )
        self.register_buffer("centre", torch.zeros(16))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Any:
        out = super().forward(batch, generator)
        assert out.embedding is not None
        self.centre.lerp_(out.embedding.mean(dim=0), 0.5)
        self.count = self.count + 1  # a new tensor
        Poisoned.calls += 1
        if self.first <= self.calls <= self.last and self.where == "loss":
            out.loss = out.loss * torch.nan
        elif self.first <= self.calls <= self.last:
            out.loss = (
                out.loss + (next(self.model.encoder.parameters()).sum() * 0).sqrt()
            )  # a slope of infinity, times 0
        return out


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> type[Poisoned]:
    for name, value in {"calls": 0, "first": 3, "last": 3, "where": "loss"}.items():
        monkeypatch.setattr(Poisoned, name, value)
    return Poisoned


def train(
    folder: Path, objective: Any = None, source: str = "digits", column: str | None = None, **flags: Any
) -> list[dict[str, Any]]:
    """Six steps of 8 images, each with a checkpoint."""
    shape = {"projector_hidden_size": 16, "projector_size": 8, "queue_size": 20}
    pretrain(
        IMAGE,
        partial(MaskedReconstruction, decoder_layers=1, decoder_hidden_size=16)
        if objective is None
        else partial(objective, **shape),
        EncoderConfig(16, 1, 2),
        DataArguments(source, column=column, max_samples=60),
        TrainArguments(
            str(folder),
            **{
                "max_train_steps": 6,
                "per_device_train_batch_size": 8,
                "logging_steps": 1,
                "checkpointing_steps": 1,
                "checkpoints_total_limit": None,
                **flags,
            },
        ),
    )
    return metrics(folder)


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in step_folders(folder)]


def state(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of the module and of the optimiser in a checkpoint."""
    found = dict(load_file(checkpoint / "model.safetensors"))
    moments = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return found | {f"{index}.{name}": value for index, all_ in moments.items() for name, value in all_.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_sample_that_overflows_is_named_and_nothing_is_saved_after_it(tmp_path: Path, logging_steps: int) -> None:
    """Pixels up to 1e30 are finite, so they can be prepared; their squares are not."""
    images = load_digits().images[:56].astype(np.float32) / 16
    images[17] *= 1e30
    np.savez(tmp_path / "images.npz", images=images)
    source, out = str(tmp_path / "images.npz"), tmp_path / "run"
    every = 1 if logging_steps == 1 else None
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d; look first at .*row 17,") as error:
        train(out, None, source, "images", max_train_steps=8, logging_steps=logging_steps, checkpointing_steps=every)
    (path,) = (out / "nonfinite").glob("*.json")
    assert str(path) in str(error.value)
    report = json.loads(path.read_text())
    step, (batch,) = report["step"], report["batches"]
    assert path.name == f"step_{step}.json" and f"at step {step};" in str(error.value)
    assert batch["epoch"] == 0 and batch["batch"] == step and batch["process"] == 0
    by_name = {sample["name"]: sample for sample in batch["samples"]}
    assert len(by_name) == 8
    bad = by_name.pop(f"{source}, row 17")
    assert bad["index"] == 17 and bad["finite_input"] and not bad["finite_representation"]
    assert all(sample["finite_representation"] and sample["largest_input"] < 10 for sample in by_name.values())
    assert bad["largest_input"] > 1e29

    data = PreparedSamples(load_samples(DataArguments(source, column="images"), IMAGE), IMAGE)
    inputs = load_file(out / "nonfinite" / batch["inputs"])["0.pixel_values"]
    indices = [sample["index"] for sample in batch["samples"]]
    assert torch.equal(inputs, torch.stack([data[index][0]["pixel_values"] for index in indices]))

    assert saved_steps(out) == (list(range(1, step)) if every else [])
    lines = metrics(out) if (out / "metrics.jsonl").exists() else []
    assert [line["step"] for line in lines] == (list(range(1, step)) if every else [])
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_to_the_bit(
    tmp_path: Path, poisoned: type[Poisoned], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(poisoned, "where", where)
    lines = train(tmp_path, poisoned, on_nonfinite="skip")
    assert saved_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    states = [state(tmp_path / f"step_{step}") for step in range(1, 7)]
    # The teacher and the queue move on with each step but the third one, and so do the weights and the moments.
    for part in ("teacher.", "queue.features", "model.encoder", "exp_avg"):
        parts = [{name: value for name, value in each.items() if part in name} for each in states]
        assert all(parts) and [same(*pair) for pair in pairwise(parts)] == [False, True, False, False, False], part
    seen = [
        each["queue.features"] for each in states
    ]  # 8 rows of each of two views at a time, none of the skipped step
    assert [int((one != two).any(dim=1).sum()) for one, two in pairwise(seen)] == [16, 0, 16, 16, 16]
    assert all(each.isfinite().all() for each in seen)
    assert [same(*pair) for pair in pairwise(states)] == [False, True, False, False, False]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
    number = "loss" if where == "loss" else "grad_norm"
    assert [line[number] is None for line in lines] == [False, False, True, False, False, False]
    assert [int(each["count"]) for each in states] == [1, 2, 2, 3, 4, 5]
    report = json.loads((tmp_path / "nonfinite" / "step_3.json").read_text())
    assert report["batches"][0]["batch"] == 3
    assert (report["grad_norm"], report["batches"][0]["loss"] == "nan") == ("nan", where == "loss")
    resumed = torch.load(tmp_path / "step_3" / "custom_checkpoint_2.pkl", weights_only=True)
    assert resumed == {"skipped": 1, "in_a_row": 1}


def test_skipping_does_not_change_what_is_finite(tmp_path: Path) -> None:
    whole = run(tmp_path / "stop", queue=True, max_train_steps=4)
    assert exact(run(tmp_path / "skip", queue=True, max_train_steps=4, on_nonfinite="skip")) == exact(whole)


def test_a_gradient_that_is_not_finite_stops(
    tmp_path: Path, poisoned: type[Poisoned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poisoned, "where", "gradient")
    with pytest.raises(FloatingPointError, match=r"norm of the gradient is nan and the loss finite at step 3; lower"):
        train(tmp_path, poisoned)
    assert saved_steps(tmp_path) == [1, 2]


def test_skipped_steps_in_a_row_stop_in_the_end(
    tmp_path: Path, poisoned: type[Poisoned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poisoned, "last", 3 + MOST_IN_A_ROW)
    with pytest.raises(FloatingPointError, match=rf"{MOST_IN_A_ROW + 1} steps in a row had .*: the loss is nan"):
        train(tmp_path, poisoned, on_nonfinite="skip", max_train_steps=20, checkpointing_steps=None)


def test_as_many_as_may_be_skipped_in_a_row_do_not_stop(
    tmp_path: Path, poisoned: type[Poisoned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poisoned, "last", 2 + MOST_IN_A_ROW)
    lines = train(tmp_path, poisoned, on_nonfinite="skip", max_train_steps=14, checkpointing_steps=None)
    assert lines[-1]["skipped_steps"] == MOST_IN_A_ROW


def test_of_several_batches_the_one_that_is_not_finite_is_reported(tmp_path: Path, poisoned: type[Poisoned]) -> None:
    """Call 3 is the third of four batches of the first step."""
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1; lower train.learning_rate"):
        train(tmp_path, poisoned, gradient_accumulation_steps=4)
    report = json.loads((tmp_path / "nonfinite" / "step_1.json").read_text())
    (batch,) = report["batches"]
    assert (batch["part"], batch["batch"], len(batch["samples"])) == (2, 3, 8)
    assert set(load_file(tmp_path / "nonfinite" / "step_1.safetensors")) == {"2.pixel_values"}
    assert not saved_steps(tmp_path)


def test_a_monitor_does_not_raise_before_the_loop_can() -> None:
    assert effective_rank(torch.full((5, 3), torch.nan)).isnan()
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert (
        effective_rank(values).isfinite() and effective_rank(values.index_fill(0, torch.tensor(2), torch.inf)).isnan()
    )


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    """The loss of the second one alone is NaN, at its third batch. Health and unreadable samples: see the others."""
    folder_of_images(tmp_path / "images", 64, dict.fromkeys((7, 30, 31), b"no"))
    launch("tests.training.two_processes_faults", str(tmp_path))
    names = sorted(Path(line["sample"]).name for line in failed(tmp_path / "failures"))
    assert names == ["007.png", "030.png", "031.png"]
    assert metrics(tmp_path / "failures")[-1]["failed_samples"] == 3
    lines = metrics(tmp_path / "health")
    assert [line["step"] for line in lines if "health/knn" in line] == [2, 4]
    assert [line["step"] for line in lines] == [2, 3, 4]
    assert saved_steps(tmp_path / "stop") == [1, 2] and saved_steps(tmp_path / "skip") == [1, 2, 3, 4]
    for kind in ("stop", "skip"):
        report = json.loads((tmp_path / kind / "nonfinite" / "step_3.json").read_text())
        (batch,) = report["batches"]
        assert (batch["process"], batch["loss"], batch["inputs"]) == (1, "nan", "step_3_process_1.safetensors")
        assert len(load_file(tmp_path / kind / "nonfinite" / batch["inputs"])["0.pixel_values"]) == 8
        assert [path.name for path in (tmp_path / kind / "nonfinite").glob("*.safetensors")] == [batch["inputs"]]
    states = [state(tmp_path / "skip" / f"step_{step}") for step in range(1, 5)]
    assert [same(one, two) for one, two in pairwise(states)] == [False, True, False]
    assert [line["skipped_steps"] for line in metrics(tmp_path / "skip")] == [0, 0, 1, 1]
