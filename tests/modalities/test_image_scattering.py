"""Tests of images whose tokens contain scattering coefficients."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.scattering import number_of_coefficients, scatter
from tests.matrix import cases
from tests.matrix import test_matrix as matrix

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_channels": 3, "scattering_scales": 2}


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=key(0))


def make(**options: Any) -> Image:
    return Image(**SMALL | options)


def gain(order: int) -> float:
    return 10.0**order


def patches(modality: Image, pixels: Tensor) -> np.ndarray:
    """Contents by kymatio's transform in numpy, one channel of one image at a time."""
    from kymatio import Scattering2D

    channels, height, width = pixels.shape[1:]
    patch = modality.patch_size
    scales, directions = modality.scattering_scales, modality.scattering_directions
    transform = Scattering2D(J=scales, shape=(height, width), L=directions, frontend="numpy", out_type="list")
    step, contents = 2**scales, []
    for image in pixels.numpy():
        planes = [transform(channel) for channel in image]
        rows = []
        for top in range(0, height, patch[0]):
            for left in range(0, width, patch[1]):
                rows.append(
                    [
                        planes[channel][path]["coef"][y // step, x // step] * gain(len(planes[channel][path]["j"]))
                        for y in range(top, top + patch[0], step)
                        for x in range(left, left + patch[1], step)
                        for path in range(len(planes[0]))
                        for channel in range(channels)
                    ]
                )
        contents.append(rows)
    return np.array(contents)


# What a token contains


@pytest.mark.parametrize(("scales", "directions"), [(0, 8), (1, 8), (2, 1), (2, 8), (2, 16), (3, 8), (4, 3)])
def test_number_of_coefficients(scales: int, directions: int) -> None:
    """Paths counted one by one: none, one wavelet, or two of which the second has the coarser scale."""
    wavelets = [(scale, direction) for scale in range(scales) for direction in range(directions)]
    paths = 1 + len(wavelets) + sum(first[0] < second[0] for first in wavelets for second in wavelets)
    assert number_of_coefficients(scales, directions) == paths


def test_numbers_of_the_paper() -> None:
    """ScatSimCLR: two scales, 16 directions, three channels: 867 numbers at each place of 1/4 of the size."""
    modality = Image(96, 4, 3, scattering_scales=2, scattering_directions=16)
    assert modality.content_shape == (867,) and modality.num_places == 24**2


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (16, 16)),
        ({"patch_size": 4, "scattering_directions": 4}, (16, 24)),
        ({"image_size": 8, "patch_size": (8, 4), "num_channels": 1, "scattering_directions": 3}, (8, 8)),
        ({"image_size": 8, "patch_size": 2, "num_channels": 2, "scattering_scales": 1}, (8, 12)),
        ({"image_size": 8, "patch_size": 8, "num_channels": 1, "scattering_scales": 3}, (8, 8)),  # one place
    ],
)
def test_tokens_equal_kymatio_image_by_image(options: dict[str, Any], size: tuple[int, int]) -> None:
    modality = make(**options)
    pixels = noise(2, modality.num_channels, *size)
    tokens = modality.tokenize({"pixel_values": pixels})
    np.testing.assert_allclose(tokens.content.numpy(), patches(modality, pixels), rtol=1e-4, atol=1e-4)
    assert tokens.content.shape[2:] == modality.content_shape
    plain = make(**options | {"scattering_scales": 0}).tokenize({"pixel_values": pixels})
    assert torch.equal(tokens.coords, plain.coords) and torch.equal(tokens.valid, plain.valid)
    alone = modality.tokenize({"pixel_values": pixels[1:]})
    torch.testing.assert_close(alone.content, tokens.content[1:], rtol=1e-4, atol=1e-5)


def test_wavelets_see_no_constant_and_scale_with_the_contrast() -> None:
    """Order 0 of a constant is the constant, all others are 0; twice the contrast is twice all coefficients."""
    pixels = torch.full((1, 1, 16, 16), 0.7)
    flat = scatter(pixels, 2, 8)[0]
    torch.testing.assert_close(flat[0], torch.full((4, 4), 0.7), rtol=1e-3, atol=0)
    assert flat[1:].abs().max() < 1e-3
    first, second = (scatter(noise(1, 1, 16, 16) * factor, 2, 8) for factor in (1, 2))
    torch.testing.assert_close(second, 2 * first, rtol=1e-4, atol=1e-5)


def pictures(kind: str) -> Tensor:
    """Grey parts of a photograph, or drawings, (B, 1, 72, 72) about 0."""
    if kind == "drawings":
        small = torch.from_numpy(load_digits().images[:6]).float()[:, None] / 8 - 1
    else:
        grey = torch.tensor(load_sample_image("china.jpg")).float().mean(dim=-1) / 64 - 2
        corners = [(150, 100), (150, 300), (250, 100), (250, 300)]
        small = torch.stack([grey[None, top : top + 36, left : left + 36] for top, left in corners])
    return torch.nn.functional.interpolate(small, size=(72, 72), mode="bicubic")


kinds = pytest.mark.parametrize("kind", ["photographs", "drawings"])


@kinds
def test_coefficients_of_all_orders_and_scales_are_about_as_large(kind: str) -> None:
    """kymatio's own are a tenth and a hundredth of these, and a linear layer would hardly see them at first."""
    size = scatter(pictures(kind)[..., ::2, ::2][..., 2:-2, 2:-2], 3, 8).square().mean(dim=(0, 2, 3)).sqrt()
    groups = [size[:1], *size[1:25].chunk(3), size[25:]]
    assert all(0.3 < float(group.mean()) < 3 for group in groups)


@kinds
def test_a_small_shift_changes_little(kind: str) -> None:
    """By one pixel, where coefficients are of 32 x 32 of them: under 5 %, and the pixels by more."""
    wide = pictures(kind)
    still, moved = (wide[..., 4:68, left : left + 64] for left in (4, 5))
    modality = Image(64, 32, 1, scattering_scales=5, scattering_directions=4)

    def change(first: Tensor, second: Tensor) -> float:
        return float((first - second).norm() / first.norm())

    first, second, far = (
        modality.tokenize({"pixel_values": each}).content for each in (still, moved, still.roll(32, dims=-1))
    )
    assert change(first, second) < 0.05
    assert change(still, moved) > 2 * change(first, second)
    assert change(first, far) > 0.2  # it is not that nothing changes them


# How it is computed


def test_nothing_of_it_is_trained_or_saved() -> None:
    plain, modality = make(scattering_scales=0).build(16), make().build(16)
    modality.tokenize({"pixel_values": noise(1, 3, 16, 16)})
    assert {name for name, _ in modality.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert not list(modality.buffers()) and list(modality.state_dict()) == list(plain.state_dict())
    assert modality.projection.weight.shape == (16, 4 * 3 * 81)
    copy.deepcopy(modality)


def test_half_precision_around_it_changes_nothing() -> None:
    modality, pixels = make().build(16), noise(2, 3, 16, 16)
    expected = modality.tokenize({"pixel_values": pixels})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = modality.tokenize({"pixel_values": pixels})
        assert modality.embed(found).dtype == torch.bfloat16
    assert found.content.dtype == torch.float32 and torch.equal(found.content, expected.content)
    rounded = modality.tokenize({"pixel_values": pixels.bfloat16()})
    assert rounded.content.dtype == torch.float32
    assert make().build(16).bfloat16().embed(rounded).dtype == torch.bfloat16


def test_pixels_may_lie_in_memory_as_they_like() -> None:
    pixels = noise(2, 3, 16, 16)
    strided = pixels.to(memory_format=torch.channels_last)
    contents = [make().tokenize({"pixel_values": each}).content for each in (pixels, strided)]
    torch.testing.assert_close(*contents)


def test_wavelets_made_in_evaluation_serve_in_training() -> None:
    modality = make(scattering_directions=5)  # which no other test has made
    with torch.inference_mode():
        modality.tokenize({"pixel_values": noise(1, 3, 16, 16)})
    pixels = noise(1, 3, 16, 16).requires_grad_()
    modality.tokenize({"pixel_values": pixels}).content.sum().backward()
    assert pixels.grad is not None and pixels.grad.isfinite().all()


def test_saved_and_loaded_with_its_processor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MMSSLConfig(
        modalities={"image": SMALL | {"scattering_directions": 6}},
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = MMSSLModel(config).eval()
    model.save_pretrained(tmp_path)
    MMSSLProcessor(MMSSLFeatureExtractor(config.modalities)).save_pretrained(tmp_path)
    again = MMSSLModel.from_pretrained(tmp_path).eval()
    assert again.config.modalities["image"]["scattering_directions"] == 6
    inputs = MMSSLProcessor.from_pretrained(tmp_path)([np.random.default_rng(0).random((16, 16, 3))])
    with torch.no_grad():
        expected, found = (each(**inputs).pooler_output for each in (model, again))
    assert torch.equal(expected, found)


# What goes with it


def test_objectives_read_it_like_patches() -> None:
    """Masks, alterations, transforms and targets are of tokens or of pixels, whatever tokens contain."""
    modality = Image(16, 4, 1, scattering_scales=2, horizontal_flip=0.5).build(8)
    plain = Image(16, 4, 1, horizontal_flip=0.5)
    batch = {"pixel_values": noise(4, 1, 16, 16)}
    tokens, pixels = modality.tokenize(batch), plain.tokenize(batch)
    for style in modality.mask_styles:
        hidden = [each.mask(of, 0.5, key(1), style).hidden for each, of in ((modality, tokens), (plain, pixels))]
        assert torch.equal(*hidden)
    altered, where = modality.alter(tokens, key(2))
    assert torch.equal(altered.content[~where], tokens.content[~where]) and where.any()
    assert modality.pretexts == plain.pretexts and torch.equal(modality.places(tokens), plain.places(pixels))
    views = [each.view(batch, key(3)).batch["pixel_values"] for each in (modality, plain)]
    assert torch.equal(*views)
    target = modality.target(tokens)
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(4, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(modality.content_of(target, tokens), tokens.content, rtol=1e-4, atol=1e-4)
    assert modality.reconstruction_head(8)(modality.embed(tokens)).shape == target.shape


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "number"), [("MaskedReconstruction", 0), ("Contrastive", 0), ("BagOfWords", 0)])
def test_cells_of_the_matrix_hold(objective: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options, samples = cases.MODALITIES["image"]
    monkeypatch.setitem(cases.MODALITIES, "image", (options | {"scattering_scales": 1}, samples))
    cell = ("image", objective, cases.OBJECTIVES[objective][number])
    matrix.test_loss_is_finite_and_every_parameter_gets_a_gradient(*cell)
    matrix.test_same_key_same_loss(*cell)
    matrix.test_inputs_are_left_as_they_are(*cell)
    matrix.test_saved_and_loaded_weights_give_the_same_loss(tmp_path, *cell)
    matrix.test_bf16_autocast_is_close(*cell)
    matrix.test_eight_samples_are_over_fitted(*cell)


def test_raw_features_are_means_over_the_places_of_a_token() -> None:
    modality, batch = make(), {"pixel_values": noise(2, 3, 16, 16)}
    content = modality.tokenize(batch).content.view(2, 4, 4, 81 * 3)
    torch.testing.assert_close(modality.raw_features(batch), content.mean(dim=2).flatten(1))


def test_its_picture_is_the_blurred_image() -> None:
    """A ramp is as it was away from the borders, at every fourth pixel: coefficients are around their first one."""
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    modality = Image(64, 8, 3, image_mean=0.3, image_std=0.2, scattering_scales=2)
    picture = modality.picture(modality.tokenize({"pixel_values": (ramp - 0.3) / 0.2}))
    assert picture.shape == (1, 16, 16, 3)
    torch.testing.assert_close(picture[0, 4, 3:-3, 0], ramp[0, 0, 0, ::4][3:-3], rtol=0, atol=0.01)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4, "scattering_scales": 3}, r"found 3 with patches of 4x4 pixels; .* 2\*\*3 = 8 pixels"),
        ({"image_size": 12, "patch_size": (4, 6)}, r"found 2 with patches of 4x6 pixels; .* = 4 pixels"),
        ({"image_size": 18, "patch_size": 8}, "18x18 pixels cannot be cut into patches of 8x8"),
        ({"patch_size": 32, "scattering_scales": 5}, "16x16 pixels are smaller than one patch of 32x32"),
        ({"scattering_scales": -1}, "found -1 and 8; expected at least 0 scales"),
        ({"scattering_directions": 0}, "found 2 and 0; .* 1 direction"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_images_of_another_size() -> None:
    assert make().tokenize({"pixel_values": noise(1, 3, 24, 8)}).content.shape == (1, 3, 4 * 3 * 81)
    with pytest.raises(ValueError, match="24x12 pixels cannot be cut into patches of 8x8"):
        make().tokenize({"pixel_values": noise(1, 3, 24, 12)})


def test_without_kymatio_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kymatio", None)
    build: list[Callable[[], Any]] = [
        lambda: make().build(16),
        lambda: MMSSLModel(MMSSLConfig(modalities={"image": SMALL}, hidden_size=16, num_attention_heads=2)),
    ]
    for each in build:
        with pytest.raises(ImportError, match=r'needs kymatio: pip install "mmssl\[image\]"'):
            each()
    make(scattering_scales=0).build(16)
    make_modality("image", SMALL).prepare(np.zeros((16, 16, 3)))  # a processor has no need of it
