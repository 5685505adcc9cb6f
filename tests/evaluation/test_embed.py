"""Tests of ``mmssl embed``: what is in the file is what the model says of each sample, under its own name."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from mmssl.cli import COMMANDS
from mmssl.data import DataArguments
from mmssl.evaluation import embed
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor

IMAGES: dict[str, dict[str, Any]] = {"image": {"image_size": 8, "patch_size": 4, "num_channels": 1}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MMSSLModel(MMSSLConfig(modalities=IMAGES, **shape)).save_pretrained(tmp_path / "run")
    MMSSLProcessor(MMSSLFeatureExtractor(IMAGES)).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images, and one that cannot be read."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, kind in enumerate(("cat", "cat", "dog", "dog")):
        (tmp_path / "images" / kind).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{number}.png")
    (tmp_path / "images" / "cat" / "0b.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_each_embedding_is_the_models_of_the_sample_of_that_name(
    checkpoint: Path, folder: Path, tmp_path: Path, ending: str
) -> None:
    """Beside transformers' own way; the unreadable image is left out, and no other one stands under its name."""
    output = tmp_path / f"found.{ending}"
    flags = ["--data", str(folder), "--data.on_error", "skip", "--output", str(output)]
    COMMANDS["embed"]([str(checkpoint), *flags])
    found = np.load(output) if ending == "npz" else datasets.Dataset.from_parquet(str(output)).to_dict()
    assert [Path(name).name for name in found["name"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert list(found["label"]) == ["cat", "cat", "dog", "dog"]
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(**processor([str(name) for name in found["name"]])).pooler_output
    np.testing.assert_allclose(np.array(found["embedding"]), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("found.csv", r"output: found .*found\.csv; expected a file that ends in \.npz or \.parquet"),
        ("none/found.npz", "output: there is no folder .*none; make it first"),
    ],
)
def test_bad_outputs_are_refused_before_anything_is_computed(tmp_path: Path, output: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed("no-such-checkpoint", DataArguments("digits"), tmp_path / output)
