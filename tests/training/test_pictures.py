"""Tests of the pictures that trackers get: which ones, when, of what, and that a run does not notice."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmssl.figures import PALETTE
from mmssl.modalities.image import Image
from mmssl.training.health import takes_pictures
from mmssl.training.pictures import draw_pictures
from tests.training.tiny import run


def tokens_of(images: np.ndarray) -> tuple[Image, Any]:
    modality = Image(image_size=8, patch_size=2, num_channels=1, image_mean=0.0, image_std=1.0)
    return modality, modality.tokenize(modality.collate([modality.prepare(image) for image in images]))


def test_tensorboard_gets_pictures_at_each_look_and_the_run_does_not_notice(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain = run(tmp_path / "plain", max_train_steps=4, health_steps=2)
    lines = run(tmp_path / "tracked", max_train_steps=4, health_steps=2, report_to="tensorboard")
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "tracked")]
    assert weights[0] == weights[1]
    events = accumulators.EventAccumulator(str(next((tmp_path / "tracked").rglob("events.out*")).parent)).Reload()
    tags = ["map", "samples", "similarities"]
    assert sorted(tag.split("/")[0] for tag in events.Tags()["images"]) == tags
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [0, 2, 4]
        pictures = [np.asarray(PILImage.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)]
        assert all(picture.std() > 5 for picture in pictures) and not np.array_equal(pictures[0], pictures[-1])


def test_trackio_gets_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    logged: dict[int, set[str]] = {}
    log = trackio.Run.log

    def watched(self: Any, values: dict[str, Any], step: int | None = None) -> None:
        found = {name for name, value in values.items() if isinstance(value, trackio.Image)}
        if found and step is not None:
            logged[step] = found
        log(self, values, step=step)

    monkeypatch.setattr(trackio.Run, "log", watched)
    run(tmp_path / "run", max_train_steps=2, health_steps=2, report_to="trackio")
    assert logged == {step: {"samples", "map", "similarities"} for step in (0, 2)}


def test_features_that_are_not_finite_are_not_drawn() -> None:
    modality, tokens = tokens_of(np.random.default_rng(0).random((3, 8, 8)).astype(np.float32))
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    labels = np.arange(20) % 2
    assert list(draw_pictures(modality, {"original": tokens}, features, labels, None)) == [
        "samples",
        "map",
        "similarities",
    ]
    assert list(draw_pictures(modality, {"original": tokens}, features, None, None)) == ["samples", "map"]
    features[3, 1] = torch.nan
    assert list(draw_pictures(modality, {"original": tokens}, features, labels, None)) == ["samples"]


def test_the_colours_of_a_map_are_those_of_the_classes() -> None:
    """Two classes far from each other: each side has the colour of its own."""
    modality, tokens = tokens_of(np.zeros((1, 8, 8), np.float32))
    labels = np.arange(40) % 2
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[torch.from_numpy(labels)]
    features += 0.01 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    picture = draw_pictures(modality, {"original": tokens}, features, labels, None)["map"].astype(int)[:-40]
    sides = []
    for color in PALETTE[:2]:
        wanted = 0.8 * np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) + 0.2 * 255  # a dot on white
        near = np.abs(picture - wanted).sum(axis=2) < 30
        assert near.sum() > 20
        sides.append(np.nonzero(near)[1])
    assert sides[0].max() < sides[1].min() or sides[1].max() < sides[0].min()


@pytest.mark.parametrize(
    "report_to, expected",
    [(None, False), ("tensorboard", True), (["aim", "wandb"], True), ("mlflow", False), ([], False)],
)
def test_which_trackers_take_pictures(report_to: Any, expected: bool) -> None:
    assert takes_pictures(report_to) is expected
