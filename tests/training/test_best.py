"""The model whose probe was best is kept, whatever became of it later."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, load_objective, pretrain
from tests.training.tiny import metrics, run


def test_the_best_model_is_the_one_of_that_step(tmp_path: Path) -> None:
    """Against the checkpoint of the step whose line in metrics.jsonl has the highest score; later ones are worse."""
    pretrain(
        Image(image_size=8, patch_size=2, num_channels=1, normalize_target=False),
        partial(MaskedReconstruction, decoder_layers=1, decoder_hidden_size=16),
        EncoderConfig(16, 2, 2),
        DataArguments("digits", max_samples=300),
        TrainArguments(
            str(tmp_path),
            max_train_steps=60,
            per_device_train_batch_size=32,
            learning_rate=5e-3,
            health_steps=5,
            metric_for_best_model="knn",
            checkpointing_steps=5,
            checkpoints_total_limit=None,
        ),
    )
    lines = [line for line in metrics(tmp_path) if "health/knn" in line]
    scores = {line["step"]: line["health/knn"] for line in lines}
    best = max(scores, key=scores.__getitem__)  # the first one that has it
    assert scores[best] > lines[0]["health/knn_start"] and best < 60
    assert json.loads((tmp_path / "best" / "run.json").read_text())["steps"] == best
    kept = load_file(tmp_path / "best" / "model.safetensors")
    there = load_file(tmp_path / f"step_{best}" / "model.safetensors")
    assert all(torch.equal(value, there[f"model.{name}"]) for name, value in kept.items())
    load_objective(tmp_path / "best")


def test_without_looks_at_health_there_is_no_best(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric_for_best_model knn: found health_steps None; expected a number"):
        run(tmp_path, health_steps=None, metric_for_best_model="knn")


def test_without_labels_there_is_no_best_probe(tmp_path: Path) -> None:
    """Sixty digits are too few of each class."""
    with pytest.raises(ValueError, match=r"found knn, which needs image samples with labels.*measured are std, rank"):
        run(tmp_path, health_steps=2, metric_for_best_model="knn")
