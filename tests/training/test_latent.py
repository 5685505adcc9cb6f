"""Runs with a teacher: what is saved, that all of it comes back, and that resuming is exact."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoProcessor

from mmssl.data import DataArguments, load_samples
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLModel
from mmssl.objectives.latent_prediction import LatentPrediction
from mmssl.samples import Samples
from mmssl.teacher import Teacher
from mmssl.training import TrainArguments, load_objective, pretrain
from tests.training.tiny import metrics

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "crop_scale": (0.5, 1.0)}
TEACHER = "teacher.module."


def run(output_dir: Path, modality: Image | None = None, options: Any = None, **train: Any) -> LatentPrediction:
    """Pretrain on 60 digits for 9 steps, 7.5 batches an epoch, with views, masks and dropout; returns the objective."""
    made: list[LatentPrediction] = []

    def objective(model: MMSSLModel) -> LatentPrediction:
        small = {"predictor_layers": 1, "predictor_hidden_size": 8, "predictor_attention_heads": 2}
        made.append(
            LatentPrediction(model, **{"num_targets": (2,), "momentum": (0.8, 1.0), **small, **(options or {})})
        )
        return made[-1]

    flags = {"max_train_steps": 9, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2, **train}
    pretrain(
        modality or Image(**IMAGE),
        objective,
        EncoderConfig(16, 2, 2, hidden_dropout_prob=0.1, drop_path_rate=0.1, class_token=True),
        DataArguments("digits", max_samples=60),
        TrainArguments(str(output_dir), **flags),
    )
    return made[0]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_run_saves_the_teacher_and_loads_student_teacher_and_heads(tmp_path: Path) -> None:
    objective = run(tmp_path)
    saved, teacher = AutoModel.from_pretrained(tmp_path).state_dict(), objective.teacher.module.state_dict()
    assert_same(saved, teacher)
    student = objective.model.state_dict()
    assert not any(torch.equal(saved[name], student[name]) for name in saved if saved[name].ndim > 1)
    heads = load_file(tmp_path / "objective.safetensors")
    assert not any(name.startswith(TEACHER) for name in heads)  # nothing is there twice
    assert {name for name in heads if name.startswith("model.")} == {f"model.{name}" for name in student}
    loaded = load_objective(tmp_path)
    assert isinstance(loaded, LatentPrediction) and not loaded.training
    assert_same(loaded.state_dict(), objective.state_dict())
    assert all(not parameter.requires_grad for parameter in loaded.teacher.parameters())
    names = {"loss", "target_std", "target_rank", "prediction_std"}
    assert all(names <= set(line) for line in metrics(tmp_path))


@pytest.mark.parametrize("train", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
def test_resumed_run_is_equal_to_the_bit_teacher_included(tmp_path: Path, train: dict[str, Any]) -> None:
    """At step 5 of 9: a teacher that were made anew, or moved by another momentum, would end elsewhere."""
    whole = run(tmp_path / "whole", checkpointing_steps=5, **train)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for file in ("model.safetensors", "objective.safetensors"):
        (tmp_path / "cut" / file).unlink()
    resumed = run(tmp_path / "cut", resume_from_checkpoint="latest", checkpointing_steps=5, **train)
    assert_same(resumed.state_dict(), whole.state_dict())
    for file in ("model.safetensors", "objective.safetensors"):
        assert_same(load_file(tmp_path / "cut" / file), load_file(tmp_path / "whole" / file))
    exact = ("step", "loss", "grad_norm", "target_std", "target_rank", "prediction_std")
    first, second = ([[line[name] for name in exact] for line in metrics(tmp_path / name)] for name in ("whole", "cut"))
    assert first == second and len(first) == 9


def test_teacher_follows_once_after_each_optimiser_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after each of three batches of a step; the student it follows has taken the step."""
    follow, calls = Teacher.follow, []

    def count(teacher: Teacher, student: nn.Module, progress: float) -> None:
        follow(teacher, student, progress)
        calls.append((progress, [parameter.detach().clone() for parameter in student.parameters()]))

    monkeypatch.setattr(Teacher, "follow", count)
    objective = run(tmp_path, max_train_steps=4, gradient_accumulation_steps=3, options={"momentum": (0.0, 0.0)})
    assert [progress for progress, _ in calls] == [0.25, 0.5, 0.75, 1.0]
    for (_, before), (_, after) in pairwise(calls):
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    # With no momentum the teacher is the student.
    assert_same(objective.teacher.module.state_dict(), objective.model.state_dict())
    assert_same(AutoModel.from_pretrained(tmp_path).state_dict(), objective.model.state_dict())


def test_heads_of_another_objective_are_refused(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=1)
    record = json.loads((tmp_path / "run.json").read_text())
    record["objective"]["LatentPrediction"]["predictor_layers"] = 2
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"does not fit run\.json: missing .*predictor\.layers\.1"):
        load_objective(tmp_path)


class Fitted(Image):
    """Finds the mean of its pixels in the training samples."""

    name: ClassVar = "image"

    def fit(self, samples: Samples) -> None:
        self.image_mean = (float(sum(image.mean() for image in samples.values) / len(samples)),)


def test_what_a_modality_finds_in_its_samples_is_an_option_of_the_saved_model(tmp_path: Path) -> None:
    """It is asked before training, with the training samples alone, and the processor has it too."""
    modality = Fitted(**IMAGE, image_mean=0.0)
    run(tmp_path, modality, max_train_steps=1)
    expected = float(np.mean(list(load_samples(DataArguments("digits", max_samples=60), modality).values)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["modalities"]["image"]["image_mean"] == pytest.approx([expected])
    pixels = AutoProcessor.from_pretrained(tmp_path)([np.zeros((8, 8), np.float32)])["pixel_values"]
    assert expected > 0.2 and pixels.mean().item() == pytest.approx(-expected / 0.5)
