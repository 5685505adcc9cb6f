"""Tests of linear CKA: against its definition, by what it does not see, and of the command that shows it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from mmssl.cli import COMMANDS
from mmssl.data import DataArguments, load_samples
from mmssl.evaluation.cka import layer_cka, linear_cka, print_cka, write_cka
from mmssl.modeling import MMSSLConfig, MMSSLModel

RNG = np.random.default_rng(0)
DIGITS = {"image_size": 8, "patch_size": 4, "num_channels": 1}
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def slow_cka(x: np.ndarray, y: np.ndarray) -> float:
    """By the Hilbert-Schmidt independence criterion, tr(K H L H) / (n - 1)^2 with H = 1 - 1/n."""
    n = len(x)
    center = np.eye(n) - 1 / n

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        return np.trace(k @ center @ m @ center) / (n - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def one(x: np.ndarray, y: np.ndarray) -> float:
    """CKA of two layers."""
    (found,) = linear_cka(x[:, None], y[:, None]).ravel()
    return float(found)


@pytest.mark.parametrize("sizes", [(20, 3, 5), (20, 30, 5), (20, 5, 30), (4, 30, 50), (20, 20, 20)])
def test_it_is_normalised_hsic(sizes: tuple[int, int, int]) -> None:
    """In both forms: fewer features than samples, and more."""
    n, width, other = sizes
    x, y = RNG.standard_normal((n, 3, width)) + 2, RNG.standard_normal((n, 2, other)) - 1
    y[:, 0, :3] += x[:, 1, :3]
    found = linear_cka(x, y)
    assert found.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert found[i, j] == pytest.approx(slow_cka(x[:, i], y[:, j]), abs=1e-10)
    assert (found > 0).all() and (found < 1).all()


@pytest.mark.parametrize("n", [5, 50])
def test_what_it_does_not_see(n: int) -> None:
    """Rotation, scale and shift; it does see a stretch of one direction, and what each sample is."""
    x = RNG.standard_normal((n, 8)) * np.arange(1, 9)
    assert one(x, x) == pytest.approx(1)
    assert one(x, x @ ortho_group.rvs(8, random_state=0)) == pytest.approx(1)
    assert one(x, -3 * x) == pytest.approx(1)
    assert one(x, x + 100 * np.arange(8)) == pytest.approx(1)
    assert one(x, x * np.arange(8, 0, -1) ** 2) < 0.99
    assert one(x, np.roll(x, 1, axis=0)) < 0.9


def test_both_forms_agree() -> None:
    """Columns of zeros change nothing but the form."""
    x, y = RNG.standard_normal((10, 2, 4)), RNG.standard_normal((10, 3, 6))
    wide = np.pad(y, ((0, 0), (0, 0), (0, 20)))
    np.testing.assert_allclose(linear_cka(x, y), linear_cka(x, wide), atol=1e-12)


def test_the_layers_of_one_model_are_symmetric() -> None:
    x = RNG.standard_normal((30, 4, 6))
    found = linear_cka(x, x)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(found), 1)


def test_a_layer_that_never_changes_has_no_cka() -> None:
    """Also where single precision leaves a rest of the mean."""
    x = RNG.standard_normal((33, 2, 7)).astype(np.float32)
    x[:, 0] = np.float32(0.1) + np.float32(1e-8) * RNG.standard_normal((33, 7)).astype(np.float32)
    found = linear_cka(x, x)
    assert np.isnan(found[0]).all() and np.isnan(found[:, 0]).all() and found[1, 1] == pytest.approx(1)


def save(folder: Path, seed: int = 0, modality: str = "image", options: dict[str, Any] = DIGITS, **shape: Any) -> Path:
    torch.manual_seed(seed)
    MMSSLModel(MMSSLConfig(modalities={modality: options}, **SHAPE | shape)).save_pretrained(folder)
    return folder


def states(model: MMSSLModel, count: int) -> list[np.ndarray]:
    """Pooled outputs of all layers for the first digits, read by hooks on the blocks."""
    modality = model.adapters["image"]
    samples = load_samples(DataArguments("digits"), modality)
    found: list[torch.Tensor] = []
    hooks = [model.encoder.layers[0].register_forward_pre_hook(lambda module, given: found.append(given[0]))]
    hooks += [
        layer.register_forward_hook(lambda module, given, out: found.append(out)) for layer in model.encoder.layers
    ]
    with torch.no_grad():
        model.eval()(**modality.collate([modality.prepare(samples.values[i]) for i in range(count)]))
        found[-1] = model.encoder.norm(found[-1])
    for hook in hooks:
        hook.remove()
    return [each.mean(dim=1).numpy() for each in found]


def test_checkpoints_are_compared_layer_by_layer(tmp_path: Path) -> None:
    """Two of other depth, width and patches, read by hooks and compared one pair after the other."""
    first = save(tmp_path / "first")
    other = save(tmp_path / "other", 1, options=DIGITS | {"patch_size": 2}, hidden_size=24, num_hidden_layers=3)
    data = DataArguments("digits", max_samples=40)
    rows, columns = (states(MMSSLModel.from_pretrained(each), 40) for each in (first, other))
    expected = [[slow_cka(x, y) for y in columns] for x in rows]
    found = layer_cka(first, other, data)
    assert found.shape == (3, 4)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    itself = layer_cka(first, None, data)
    np.testing.assert_allclose(itself, [[slow_cka(x, y) for y in rows] for x in rows], atol=1e-4)
    np.testing.assert_allclose(itself, itself.T, atol=1e-10)
    np.testing.assert_allclose(np.diag(itself), 1)
    np.testing.assert_allclose(layer_cka(first, first, data), itself, atol=1e-10)
    torch.manual_seed(0)  # the start values of seed 0 are those of the first one
    np.testing.assert_allclose(layer_cka(first, "untrained", data), itself, atol=1e-6)
    assert layer_cka(other, "untrained", data).max() < 1 - 1e-3


def test_of_many_samples_some_are_read_evenly(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run")
    data = DataArguments("digits", max_samples=9)
    x, y, z = (rows[[0, 4, 8]] for rows in states(MMSSLModel.from_pretrained(checkpoint), 9))
    found = layer_cka(checkpoint, None, data, max_samples=3)
    assert found[0, 1] == pytest.approx(slow_cka(x, y), abs=1e-4)
    assert found[1, 2] == pytest.approx(slow_cka(y, z), abs=1e-4)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    image, speech = save(tmp_path / "image"), save(tmp_path / "speech", modality="speech", options={})
    digits = DataArguments("digits")
    with pytest.raises(ValueError, match=r"speech reads speech; expected image, as .*image does"):
        layer_cka(image, speech, digits)
    with pytest.raises(ValueError, match="data: found 1 sample of digits"):
        layer_cka(image, None, DataArguments("digits", max_samples=1))
    with pytest.raises(ValueError, match="max_samples: found 1; expected at least 2"):
        layer_cka(image, None, digits, max_samples=1)
    with pytest.raises(ValueError, match="modality: found speech; the model has image"):
        layer_cka(image, None, digits, modality="speech")


def test_the_command_prints_and_writes(tmp_path: Path, capsys) -> None:
    """By the class token, which is the same for all samples before the first block."""
    checkpoint = str(save(tmp_path / "run", class_token=True))
    outputs = [str(tmp_path / f"cka{ending}") for ending in (".png", ".json")]
    flags = ["--data", "digits", "--pooling", "cls", "--max_samples", "50", "--output", *outputs]
    COMMANDS["cka"]([checkpoint, "untrained", *flags])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layer", "in", "1", "2"] in lines and ["in", "-", "-", "-"] in lines
    found = json.loads(Path(outputs[1]).read_text())
    assert (found["rows"], found["columns"]) == (checkpoint, "untrained")
    assert found["cka"][0] == [None] * 3 and [row[0] for row in found["cka"]] == [None] * 3
    assert ["2", "-", *(f"{value:.2f}" for value in found["cka"][2][1:])] in lines
    assert Path(outputs[0]).read_bytes().startswith(b"\x89PNG")
    for output, message in (
        ("cka.txt", r"found cka.txt; expected a file that ends in .png"),
        ("no/cka.png", "no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            COMMANDS["cka"]([checkpoint, "--data", "digits", "--output", output])


def test_deep_encoders_can_be_drawn(tmp_path: Path, capsys) -> None:
    """Every layer has a row and a column of the table; the picture names some of them."""
    found = linear_cka(*(RNG.standard_normal((9, layers, 4)) for layers in (33, 13)))
    print_cka(found, "rows", "columns")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layer", "in", *map(str, range(1, 13))] in lines
    assert [line[0] for line in lines[-33:]] == ["in", *map(str, range(1, 33))]
    write_cka(found, "rows", "columns", tmp_path / "cka.svg")
    assert "<svg" in (tmp_path / "cka.svg").read_text()
