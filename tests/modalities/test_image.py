"""Tests of images: patches, decoding, targets, views and GMML's alterations."""

import io
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn
from transformers import AutoModel, ViTMAEConfig, ViTMAEForPreTraining

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.modalities.base import View
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.pixels import read_image
from mmssl.tokens import Tokens
from mmssl.training import TrainArguments
from mmssl.training.setup import make_optimizer

VIEWS: dict[str, Any] = {
    "crop_scale": (0.2, 1.0),
    "horizontal_flip": 0.5,
    "rotation": 20.0,
    "gaussian_blur": 0.5,
    "color_jitter": 0.4,
}


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(image_size: Any = 8, patch_size: Any = 4, num_channels: int = 3, **options: Any) -> Image:
    return Image(image_size, patch_size, num_channels, **options)


def plain(*args: Any, **options: Any) -> Image:
    """Images whose pixels stay between 0 and 1."""
    return make(*args, image_mean=0.0, image_std=1.0, **options)


def tokens_of(content: Tensor) -> Tokens:
    batch, length = content.shape[:2]
    return Tokens(content, torch.zeros(batch, length, 2), torch.ones(batch, length, dtype=torch.bool))


def bytes_of(image: PILImage.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A colour picture without edges, (height, width, 3) bytes."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = [np.sin(3 * y + 2 * x), np.cos(4 * x - y), np.sin(2 * x * y + 1)]
    return ((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8)


# Tokens


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size, patch", [((8, 8), (4, 4)), ((6, 12), (3, 2)), ((4, 10), (4, 5))], ids=str)
def test_patches_equal_a_loop(size: tuple[int, int], patch: tuple[int, int], channels: int) -> None:
    pixels = torch.arange(2 * channels * size[0] * size[1]).float().view(2, channels, *size)
    modality = make(size, patch, channels)
    tokens = modality.tokenize({"pixel_values": pixels})
    (height, width), columns = patch, size[1] // patch[1]
    assert tokens.valid.all() and tokens.valid.shape == tokens.content.shape[:2]
    for y, x, c in itertools.product(range(size[0]), range(size[1]), range(channels)):
        token, row, column = (y // height) * columns + x // width, y % height, x % width
        element = (row * width + column) * channels + c
        assert torch.equal(tokens.content[:, token, element], pixels[:, c, y, x])
        assert tokens.coords[:, token].tolist() == [[y // height, x // width]] * 2
    assert torch.equal(modality.raw_features({"pixel_values": pixels}), pixels.reshape(2, -1))


def test_patches_equal_those_of_transformers() -> None:
    config = ViTMAEConfig(image_size=12, patch_size=4, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    config.update({"decoder_hidden_size": 4, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1})
    pixels = torch.randn(2, 3, 12, 12, generator=key(0))
    theirs = ViTMAEForPreTraining(config).patchify(pixels)
    assert torch.equal(make(12, 4).tokenize({"pixel_values": pixels}).content, theirs)


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (4, 24), (28, 20)], ids=str)
def test_places_of_another_size_are_stretched_over_the_own_grid(size: tuple[int, int]) -> None:
    """The middle of each patch lies at the same share of the image's height and width as its place does of the grid."""
    tokens = make(8, 4).tokenize({"pixel_values": torch.zeros(1, 3, *size)})
    rows, columns = size[0] // 4, size[1] // 4
    for token, (y, x) in enumerate(tokens.coords[0].tolist()):
        assert (y + 0.5) / 2 == pytest.approx((token // columns + 0.5) / rows)
        assert (x + 0.5) / 2 == pytest.approx((token % columns + 0.5) / columns)


@pytest.mark.parametrize("patch, channels", [((4, 4), 3), ((2, 4), 1)], ids=str)
def test_embedding_is_the_convolution_of_a_vision_transformer(patch: tuple[int, int], channels: int) -> None:
    torch.manual_seed(0)
    modality = make((8, 16), patch, channels).build(8)
    pixels = torch.randn(2, channels, 8, 16)
    kernel = modality.projection.weight.view(8, *patch, channels).permute(0, 3, 1, 2)
    expected = nn.functional.conv2d(pixels, kernel, modality.projection.bias, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(modality.embed(modality.tokenize({"pixel_values": pixels})), expected)


def test_embedding_takes_single_precision_pixels_in_a_half_precision_model() -> None:
    modality = make().build(8).bfloat16()
    tokens = modality.tokenize({"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert modality.embed(tokens).dtype == torch.bfloat16


def test_places_are_embedded_column_before_row() -> None:
    """As in MAE: going to the right changes the first half of the embedding alone, going down the second."""
    origin, right, down = make().positions(8)(torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]))[0]
    assert torch.equal(right[4:], origin[4:]) and not torch.equal(right[:4], origin[:4])
    assert torch.equal(down[:4], origin[:4]) and torch.equal(down[4:], right[:4])


@torch.no_grad()
def test_learned_places_are_a_table_that_another_size_is_stretched_over() -> None:
    """As torch resizes a picture; a new module, for a decoder say, has a table of its own."""
    modality: Any = make((8, 24), 4, position_embedding="learned").build(6)
    table = modality.position.grid_tokens
    assert table.shape == (2, 6, 6)
    for height, width in ((8, 24), (16, 16), (4, 60)):
        tokens = modality.tokenize({"pixel_values": torch.zeros(2, 3, height, width)})
        expected = nn.functional.interpolate(table.movedim(-1, 0)[None], (height // 4, width // 4), mode="bilinear")
        torch.testing.assert_close(modality.position(tokens.coords), expected.flatten(2).mT.expand(2, -1, -1))
    other = modality.positions(4)
    assert other.grid_tokens.shape == (2, 6, 4)
    assert not make((8, 24), 4).build(8).position.state_dict()
    with pytest.raises(ValueError, match="position_embedding: found 'rope'; expected one of sincos, learned"):
        make(position_embedding="rope")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_places_are_kept_in_a_checkpoint_and_do_not_decay(tmp_path: Path, dtype: torch.dtype) -> None:
    """Those of the encoder and those of a decoder; both learn."""
    torch.manual_seed(0)
    options = {"image": {"image_size": (8, 12), "patch_size": 4, "position_embedding": "learned"}}
    model: Any = MMSSLModel(MMSSLConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, modalities=options))
    objective = MaskedReconstruction(model, views=False, decoder_layers=1, decoder_hidden_size=4)
    batch = {"pixel_values": torch.randn(4, 3, 8, 12)}
    objective(batch, key(0)).loss.backward()
    tables = {name: each for name, each in objective.named_parameters() if name.endswith("grid_tokens")}
    assert [tuple(each.shape) for each in tables.values()] == [(2, 3, 8), (2, 3, 4)]
    decayed = {id(each) for each in make_optimizer(objective, TrainArguments("run")).param_groups[0]["params"]}
    for each in tables.values():
        assert each.grad is not None and each.grad.abs().sum() > 0
        assert id(each) not in decayed
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    own, kept = model.adapters["image"].position.grid_tokens, loaded.adapters["image"].position.grid_tokens
    assert torch.equal(kept, own.to(dtype))
    with torch.no_grad():
        found, expected = (each.eval()(**batch).last_hidden_state for each in (loaded, model))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0 if dtype == torch.float32 else 0.1, rtol=0)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 12), (16, 6)], ids=str)
def test_picture_undoes_patches_and_normalisation(size: tuple[int, int], channels: int) -> None:
    modality = make((8, 12), (4, 3), channels, image_mean=0.4, image_std=0.3)
    pixels = torch.rand(2, channels, *size, generator=key(0))
    tokens = modality.tokenize({"pixel_values": (pixels - 0.4) / 0.3})
    shown = pixels[:, [0, 1, 2] if channels >= 3 else [0, 0, 0]].permute(0, 2, 3, 1)
    torch.testing.assert_close(modality.picture(tokens), shown)
    tokens.content = tokens.content * 10  # beyond what can be shown
    tokens.content[:, 1] = torch.nan
    picture, columns = modality.picture(tokens), size[1] // 3
    blank = torch.zeros(size, dtype=torch.bool)
    row, column = divmod(1, columns)
    blank[4 * row : 4 * row + 4, 3 * column : 3 * column + 3] = True
    assert torch.equal(picture[0].isnan().all(dim=-1), blank)
    assert picture[0][~blank].min() >= 0 and picture[0][~blank].max() <= 1


# From raw samples to pixels


@pytest.mark.parametrize("kind", ["path", "string", "bytes", "record of bytes", "record of a path", "PIL", "array"])
def test_all_forms_of_a_sample_give_the_same_pixels(kind: str, tmp_path: Path) -> None:
    values = noise(8, 12, 3)
    picture = PILImage.fromarray(values)
    path = tmp_path / "picture.png"
    picture.save(path)
    forms: dict[str, Any] = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "record of bytes": {"bytes": path.read_bytes(), "path": "gone.png"},
        "record of a path": {"bytes": None, "path": str(path)},
        "PIL": picture,
        "array": values,
    }
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((values / 255 - mean) / std).transpose(2, 0, 1)
    found = make((8, 12)).prepare(forms[kind])
    assert list(found) == ["pixel_values"] and found["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(found["pixel_values"].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_modes_of_files_become_the_channels_of_the_model(mode: str, channels: int) -> None:
    colour, grey, deep = noise(8, 12, 4), noise(8, 12), np.arange(96, dtype=np.uint16).reshape(8, 12) * 680
    palette = PILImage.fromarray(noise(8, 12) % 6, "L")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160, 170, 180])
    pictures = {
        "L": (PILImage.fromarray(grey), np.repeat(grey[..., None], 3, axis=2) / 255),
        "RGB": (PILImage.fromarray(colour[..., :3]), colour[..., :3] / 255),
        "RGBA": (PILImage.fromarray(colour), colour / 255),
        "P": (palette, (np.array([10, 20, 30]) + 30 * (noise(8, 12)[..., None] % 6)) / 255),
        "1": (PILImage.fromarray(grey > 127), np.repeat(grey[..., None] > 127, 3, axis=2)),
        "I;16": (PILImage.fromarray(deep), np.repeat(deep[..., None], 3, axis=2) / 65535),
    }
    picture, rgb = pictures[mode]
    assert picture.mode == mode
    if channels == 1:  # ITU-R BT.601
        expected = rgb[..., :3] @ np.array([[0.299], [0.587], [0.114]])
    elif channels == 3:
        expected = rgb[..., :3]
    else:  # grey without a file's alpha is opaque; 16 bits are spread over all channels as arrays are
        alpha = rgb[..., -1:] if mode in ("RGBA", "I;16") else np.ones((8, 12, 1))
        expected = np.concatenate([rgb[..., :3], alpha], axis=2)
    for sample in (picture, bytes_of(picture)):
        found = plain((8, 12), num_channels=channels).prepare(sample)["pixel_values"]
        np.testing.assert_allclose(
            found.permute(1, 2, 0).numpy(), expected, atol=1 / 255 if channels == 1 and mode != "I;16" else 1e-6
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_arrays_of_any_layout_and_type(channels: int, dtype: type) -> None:
    values = noise(8, 12, channels) / 255
    scale = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    array: np.ndarray = (values * scale).round(0 if scale > 1 else 9).astype(dtype)
    modality = plain((8, 12), num_channels=channels)
    forms = [array, array.transpose(2, 0, 1), torch.from_numpy(array)] + [array[..., 0]] * (channels == 1)
    for sample in forms:
        found = modality.prepare(sample)["pixel_values"]
        np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), values, atol=1e-3)
    grey = modality.prepare(array[..., 0])["pixel_values"]  # (H, W) is spread over all channels
    assert torch.equal(grey, modality.prepare(array)["pixel_values"][:1].expand(channels, -1, -1))


def test_files_of_floats_are_read_like_arrays_of_floats() -> None:
    values = noise(8, 12).astype(np.float32) / 255
    found = plain((8, 12), num_channels=1).prepare(bytes_of(PILImage.fromarray(values), "TIFF"))["pixel_values"]
    assert torch.equal(found[0], torch.from_numpy(values))


def test_arrays_of_booleans_are_black_and_white() -> None:
    values = noise(8, 12) > 127
    found = plain((8, 12), num_channels=1).prepare(values)["pixel_values"]
    assert torch.equal(found[0], torch.from_numpy(values).float())


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("shape, window", [((8, 28), (0, 8)), ((20, 12), (6, 0))], ids=str)
def test_what_fits_one_side_is_cropped_in_the_middle(
    shape: tuple[int, int], window: tuple[int, int], as_file: bool
) -> None:
    values, (top, left) = noise(*shape, 3), window
    found = plain((8, 12)).prepare(bytes_of(PILImage.fromarray(values)) if as_file else values)["pixel_values"]
    expected = values[top : top + 8, left : left + 12].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (47, 33), (9, 100), (4, 6), (5, 4), (200, 13), (4, 997)], ids=str)
def test_resizing_keeps_the_aspect_and_agrees_with_pil(shape: tuple[int, int]) -> None:
    """PIL resizes to the size whose shorter side fits, rounded; what is left over goes on both sides alike."""
    values, modality = smooth(*shape), plain((8, 12))
    scale = max(8 / shape[0], 12 / shape[1])
    height, width = max(8, round(shape[0] * scale)), max(12, round(shape[1] * scale))
    resized = np.array(PILImage.fromarray(values).resize((width, height), PILImage.Resampling.BICUBIC)) / 255
    top, left = (height - 8) // 2, (width - 12) // 2
    expected = resized[top : top + 8, left : left + 12].transpose(2, 0, 1)
    found = modality.prepare(values)["pixel_values"].clip(0, 1)  # PIL clips where a spline overshoots
    np.testing.assert_allclose(found.numpy(), expected, atol=0.01)
    # A file is cropped to fractions of a pixel before it is resized: up to half a pixel of the result away.
    slope = max(np.abs(np.diff(resized, axis=axis)).max() for axis in (0, 1))
    found = modality.prepare(bytes_of(PILImage.fromarray(values)))["pixel_values"]
    np.testing.assert_allclose(found.numpy(), expected, atol=0.02 + slope)


@pytest.mark.parametrize("shape", [(256, 384), (40, 60)], ids=str)
def test_large_jpegs_decode_to_what_pil_makes_of_them(shape: tuple[int, int]) -> None:
    """They are decoded at a fraction of their size, which must still be more than what is asked for."""
    picture = PILImage.fromarray(smooth(*shape)[:, ::-1] // 2 + smooth(*shape) // 2)
    expected = np.array(picture.resize((12, 8), PILImage.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    found = plain((8, 12)).prepare(bytes_of(picture, "JPEG", quality=100, subsampling=0))["pixel_values"]
    np.testing.assert_allclose(found.numpy(), expected, atol=0.02)


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_a_file_is_turned_as_its_orientation_tag_says(mode: str) -> None:
    values = noise(12, 8).astype(np.uint16) * 257 if mode == "I;16" else noise(12, 8)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the first row is the right-hand side
    found = plain((8, 12), num_channels=1).prepare(bytes_of(PILImage.fromarray(values), exif=exif))["pixel_values"]
    np.testing.assert_allclose(found[0].numpy(), np.rot90(noise(12, 8), -1) / 255, atol=1e-6)


@pytest.mark.parametrize("mean, std", [(0.2, 0.1), ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))], ids=str)
def test_pixels_are_normalised_by_the_given_mean_and_deviation(mean: Any, std: Any) -> None:
    values = noise(8, 8, 3)
    found = make(image_mean=mean, image_std=std).prepare(values)["pixel_values"]
    np.testing.assert_allclose(
        found.permute(1, 2, 0).numpy(), (values / 255 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6
    )


def test_collate_stacks() -> None:
    modality = make()
    samples = [modality.prepare(noise(8, 8, 3, seed=seed)) for seed in range(3)]
    pixels = modality.collate(samples)["pixel_values"]
    assert all(torch.equal(pixels[i], sample["pixel_values"]) for i, sample in enumerate(samples))


PICTURE = PILImage.fromarray(noise(16, 16, 3))
NAN = np.where(np.arange(64).reshape(8, 8) == 5, np.nan, 0.5).astype(np.float32)


MALFORMED: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "text": (b"not an image at all", {}, ["not a readable image", "expected an intact image file"]),
    "cut jpeg": (bytes_of(PICTURE, "JPEG")[:-60], {}, ["truncated", "expected an intact image file"]),
    "cut png": (bytes_of(PICTURE, "PNG")[:-60], {}, ["truncated", "expected an intact image file"]),
    "no bytes": (b"", {}, ["not a readable image"]),
    "no such file": ("no/such/file.png", {}, ["no/such/file.png"]),
    "NaN": (NAN, {"num_channels": 1}, ["NaN", "expected finite"]),
    "infinity": (np.where(np.isnan(NAN), np.inf, NAN), {"num_channels": 1}, ["infinite", "expected finite"]),
    "small array": (noise(3, 8, 3), {}, ["3x8", "4x4"]),
    "small file": (bytes_of(PILImage.fromarray(noise(8, 2, 3))), {}, ["8x2", "4x4"]),
    "4 channels for 3": (noise(8, 8, 4), {}, ["(8, 8, 4)", "(H, W, 3)", "(3, H, W)"]),
    "3 channels for 1": (noise(8, 8, 3), {"num_channels": 1}, ["(8, 8, 3)", "(H, W, 1)"]),
    "1 axis": (noise(8), {}, ["(8,)", "(H, W)"]),
    "4 axes": (noise(1, 8, 8, 3), {}, ["(1, 8, 8, 3)", "(H, W, 3)"]),
    "file for 5 channels": (bytes_of(PICTURE), {"num_channels": 5}, ["num_channels=5", "1, 3 or 4"]),
    "PIL for 2 channels": (PICTURE, {"num_channels": 2}, ["num_channels=2", "1, 3 or 4"]),
    "int64": (np.zeros((8, 8, 3), np.int64), {}, ["int64", "expected uint8"]),
    "None": (None, {}, ["expected"]),
    "strings": (["a", "b"], {}, ["expected"]),
    "empty record": ({"bytes": None, "path": None}, {}, ["expected"]),
    "other record": ({"picture": b""}, {}, ["picture", "expected"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_samples_are_refused_and_say_why(case: str) -> None:
    sample, options, fragments = MALFORMED[case]
    with pytest.raises(ValueError) as error:
        make(**options).prepare(sample)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_text_named_jpg_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("these are notes\n" * 100)
    with pytest.raises(ValueError, match=r"not a readable image \(.*notes\.jpg.*expected an intact image file"):
        make().prepare(path)


def test_image_that_pil_takes_for_a_bomb_is_refused_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)  # an error from twice as many
    with pytest.raises(ValueError, match="256 pixels"):
        make().prepare(bytes_of(PICTURE))


@pytest.mark.parametrize(
    "options, fragments",
    [
        ({"image_size": 10}, ["10x10", "4x4", "multiple of patch_size"]),
        ({"image_size": (8, 10)}, ["8x10", "4x4", "multiple of patch_size"]),
        ({"image_size": 2}, ["2x2", "smaller than one patch of 4x4"]),
        ({"image_mean": (0.5, 0.5)}, ["image_mean", "found 2 values", "3"]),
        ({"image_std": (0.5,) * 4}, ["image_std", "found 4 values", "3"]),
        ({"num_channels": 1, "color_jitter": 0.4}, ["color_jitter", "3 channels", "num_channels=1"]),
        ({"num_channels": 4, "color_jitter": 0.4}, ["color_jitter", "3 channels", "num_channels=4"]),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make(**options)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


@pytest.mark.parametrize(
    "shape, fragments",
    [
        ((2, 1, 8, 8), ["(2, 1, 8, 8)", "(batch, 3, height, width)"]),
        ((3, 8, 8), ["(3, 8, 8)", "(batch, 3, height, width)"]),
        ((2, 3, 8, 10), ["8x10", "4x4"]),
        ((2, 3, 2, 8), ["2x8", "4x4"]),
    ],
    ids=str,
)
def test_batches_that_cannot_be_cut_are_refused(shape: tuple[int, ...], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make().tokenize({"pixel_values": torch.zeros(shape)})
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


# Targets


def test_target_is_normalised_by_the_unbiased_variance_of_the_whole_patch() -> None:
    """Patches of common and of tiny spread: the latter tell where the epsilon stands."""
    spread = torch.tensor([1.0, 1e-3, 0.0])[:, None]
    content = (0.3 + spread * torch.randn(2, 3, 12, generator=key(0))).requires_grad_()
    target = make().target(tokens_of(content))
    x = content.detach().numpy().astype(np.float64)
    expected = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert not target.requires_grad
    assert target[:, 2].abs().max() < 1e-3


@pytest.mark.parametrize("normalize", [True, False])
def test_content_of_undoes_the_target(normalize: bool) -> None:
    modality, tokens = make(normalize_target=normalize), tokens_of(torch.randn(2, 3, 12, generator=key(0)))
    target = modality.target(tokens)
    assert torch.equal(target, tokens.content) is not normalize
    torch.testing.assert_close(modality.content_of(target, tokens), tokens.content)


# Views


def view(modality: Image, pixels: Tensor, seed: int = 0) -> View:
    return modality.view({"pixel_values": pixels}, key(seed))


def random_pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=key(99))


def ramps(batch: int, height: int, width: int) -> Tensor:
    """Images whose first channel is the column, whose second is the row: they tell where each pixel came from."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([x, y]).expand(batch, -1, -1, -1)


def test_view_depends_on_its_key_alone_and_leaves_the_global_state() -> None:
    modality, pixels = make(16, **VIEWS), random_pixels(3, 3, 16, 16)
    before, views = pixels.clone(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"], random.getstate()
        views.append(view(modality, pixels, seed=7))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (
            np.array_equal(np.random.get_state(legacy=False)["state"]["key"], states[1])
            and random.getstate() == states[2]
        )
    first, second = views
    assert torch.equal(first.batch["pixel_values"], second.batch["pixel_values"])
    assert all(torch.equal(value, second.parameters[name]) for name, value in first.parameters.items())
    assert torch.equal(pixels, before)
    generator = key(7)
    both = [modality.view({"pixel_values": pixels}, generator).batch["pixel_values"] for _ in range(2)]
    assert torch.equal(both[0], first.batch["pixel_values"])
    assert not torch.equal(both[1], both[0]), "the key does not move on"
    assert not torch.equal(view(modality, pixels, seed=8).batch["pixel_values"], both[0])


@pytest.mark.parametrize(
    "options, channels",
    [({name: value}, c) for name, value in VIEWS.items() for c in (1, 3) if c == 3 or name != "color_jitter"]
    + [(VIEWS, 3)],
    ids=str,
)
def test_each_transform_changes_samples_differently(options: dict[str, Any], channels: int) -> None:
    options = {name: 1.0 if name in ("horizontal_flip", "gaussian_blur") else v for name, v in options.items()}
    pixels = random_pixels(1, channels, 16, 24).expand(4, -1, -1, -1)
    out = view(make((16, 24), 8, channels, **options), pixels).batch["pixel_values"]
    assert out.shape == pixels.shape and out.isfinite().all()
    assert all(not torch.equal(one, pixels[0]) for one in out)
    if list(options) != ["horizontal_flip"]:
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(out, 2))


@pytest.mark.parametrize("batch", [2, 4])
def test_parameters_have_one_row_per_sample_whatever_the_batch(batch: int) -> None:
    modality = make(16, **VIEWS)
    expected = view(modality, random_pixels(3, 3, 16, 16)).parameters
    found = view(modality, random_pixels(batch, 3, 16, 16)).parameters
    assert set(found) == set(expected)
    assert all(len(value) == batch for value in found.values())


@pytest.mark.parametrize("options", [{}, {"crop_scale": (1, 1), "crop_ratio": (0.5, 2.0)}], ids=str)
def test_view_with_all_off_is_the_sample(options: dict[str, Any]) -> None:
    pixels = random_pixels(2, 3, 8, 8)
    found = view(make(**options), pixels)
    assert torch.equal(found.batch["pixel_values"], pixels) and not found.parameters


def test_recorded_flips_reproduce_the_view() -> None:
    pixels = random_pixels(400, 1, 4, 8)
    found = view(plain((4, 8), num_channels=1, horizontal_flip=0.3), pixels)
    flipped = found.parameters["flip_batch_prob"] > 0.5
    assert torch.equal(found.batch["pixel_values"], torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels))
    assert abs(flipped.float().mean().item() - 0.3) < 5 * (0.3 * 0.7 / 400) ** 0.5


def test_recorded_crops_reproduce_the_view() -> None:
    """On ramps a crop shows where it begins and ends; its area and aspect are what the options say."""
    batch, height, width = 300, 64, 96
    modality = plain((height, width), 8, 2, crop_scale=(0.25, 0.5), crop_ratio=(0.8, 1.6))
    found = view(modality, ramps(batch, height, width))
    out, corners = found.batch["pixel_values"], found.parameters["crop_src"]
    low, high = corners[:, 0], corners[:, 2]  # (x, y) of the first and the last pixel
    for channel, length in ((0, width), (1, height)):
        line = torch.linspace(0, 1, length)
        expected = low[:, channel, None] + (high - low)[:, channel, None] * line
        shown = out[:, 0] if channel == 0 else out[:, 1].transpose(1, 2)
        torch.testing.assert_close(shown, expected[:, None].expand_as(shown), atol=1e-2, rtol=0)
    sides = high - low + 1
    area, aspect = sides.prod(dim=1) / (height * width), sides[:, 0] / sides[:, 1]
    assert 0.25 - 0.02 < area.min() < 0.3 and 0.45 < area.max() < 0.5 + 0.02
    assert 0.8 - 0.04 < aspect.min() < 0.9 and 1.4 < aspect.max() < 1.6 + 0.06
    assert low.min() >= 0 and (high <= torch.tensor([width - 1, height - 1])).all()
    assert (low.min(dim=0).values <= 2).all() and (high.max(dim=0).values >= torch.tensor([width, height]) - 3).all()


def test_recorded_angles_reproduce_the_view() -> None:
    """Turning a ramp turns its slope, and turning about the middle keeps the value there."""
    pixels = ramps(50, 33, 33)
    found = view(plain(33, 3, 2, rotation=30.0), pixels)
    out, angle = found.batch["pixel_values"][:, 0], found.parameters["rotation_degrees"] * math.pi / 180
    right, down = (out[:, 16, 18] - out[:, 16, 14]) / 4, (out[:, 18, 16] - out[:, 14, 16]) / 4
    torch.testing.assert_close(right, angle.cos(), atol=1e-3, rtol=0)
    torch.testing.assert_close(down.abs(), angle.sin().abs(), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[:, 16, 16], torch.full((50,), 16.0), atol=1e-3, rtol=0)
    assert len(set((down * angle).sign().tolist())) == 1, "not all turned the way that their angle says"
    assert 25 < angle.abs().max() * 180 / math.pi <= 30 and angle.min() < 0 < angle.max()


def test_blur_smooths_and_keeps_the_mean() -> None:
    pixels = torch.cat([random_pixels(200, 1, 40, 40), torch.full((1, 1, 40, 40), 0.3)])
    found = view(plain(40, 8, 1, gaussian_blur=0.5), pixels)
    out, blurred = found.batch["pixel_values"], found.parameters["blur_batch_prob"] > 0.5
    assert 60 < blurred.sum() < 140
    assert torch.equal(out[~blurred], pixels[~blurred])
    inner = [image[:-1, :, 8:-8, 8:-8].flatten(1) for image in (out, pixels)]
    rough = [image.std(dim=1) for image in inner]
    on = blurred[:-1]
    assert (rough[0][on] <= rough[1][on]).all() and (rough[0][on] < 0.5 * rough[1][on]).float().mean() > 0.7
    torch.testing.assert_close(inner[0].mean(dim=1), inner[1].mean(dim=1), atol=0.03, rtol=0)
    torch.testing.assert_close(out[-1], pixels[-1])


def test_colours_change_within_bounds_and_grey_stays_grey() -> None:
    grey = random_pixels(100, 1, 8, 8).expand(-1, 3, -1, -1)
    out = view(plain(color_jitter=0.4), grey).batch["pixel_values"]
    torch.testing.assert_close(out[:, 0], out[:, 1])
    torch.testing.assert_close(out[:, 0], out[:, 2])
    assert out.min() >= 0 and out.max() <= 1
    changed = (out - grey).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert abs(changed.float().mean().item() - 0.8) < 5 * (0.8 * 0.2 / 100) ** 0.5


# Alterations (Atito et al., GMML, 2022)


def labelled(batch: int, length: int) -> Tokens:
    """Contents that tell which image (thousands) and which place (units) they came from."""
    number = torch.arange(batch)[:, None] * 1000 + torch.arange(length) + 5000
    return tokens_of(number[..., None].expand(-1, -1, 48).float())


def altered(batch: int = 256, seed: int = 0, **options: Any) -> tuple[Tokens, Tokens, Tensor]:
    """Clean and altered tokens of images of 8x8 patches, and where they were altered."""
    modality = make(32, **options)
    clean = labelled(batch, 64)
    clean.coords = modality.tokenize({"pixel_values": torch.zeros(batch, 3, 32, 32)}).coords
    content = clean.content.clone()
    result, where = modality.alter(clean, key(seed))
    assert torch.equal(clean.content, content), "the clean tokens have changed"
    assert torch.equal(result.content[~where], content[~where])
    result.content += 1  # a probe for shared memory
    assert torch.equal(clean.content, content), "the altered tokens share memory with the clean ones"
    result.content -= 1
    return clean, result, where


def test_share_of_altered_patches_is_uniform_between_its_bounds() -> None:
    share = altered()[2].double().mean(dim=1)
    assert 0.5 <= share.min() < 0.52 and 0.73 < share.max() <= 0.75 + 1 / 64
    # The mean of U(0.5, 0.75), rounded up to whole patches.
    assert abs(share.mean().item() - 0.625 - 0.5 / 64) < 5 * 0.25 / 12**0.5 / 16


@pytest.mark.parametrize("bounds", [(0.2, 0.2), (0.75, 1.0)], ids=str)
def test_bounds_of_the_share_are_options(bounds: tuple[float, float]) -> None:
    share = altered(alteration_ratio=bounds)[2].double().mean(dim=1)
    assert bounds[0] <= share.min() and share.max() <= min(bounds[1] + 1 / 64, 63 / 64)


def test_noise_is_standard_normal_and_new_everywhere() -> None:
    _, result, where = altered()
    values = result.content[where]
    assert values.mean().abs() < 5 / values.numel() ** 0.5
    assert abs(values.std().item() - 1) < 5 / (2 * values.numel()) ** 0.5
    assert abs(values.abs().lt(1).double().mean().item() - 0.6827) < 0.005
    assert len(values[:, 0].unique()) > 0.99 * len(values)


def test_zeros_are_zero() -> None:
    _, result, where = altered(alteration="zeros")
    assert (result.content[where] == 0).all()


def assert_foreign(clean: Tokens, result: Tokens, where: Tensor) -> None:
    """What was altered is now what another image has at the same place, one image for all of a sample's places."""
    number = result.content[..., 0] - 5000
    assert torch.equal(result.content, result.content[..., :1].expand_as(result.content))
    image, place = number.div(1000, rounding_mode="floor"), number % 1000
    own = torch.arange(len(number))[:, None].expand_as(where)
    assert (place == torch.arange(64)).all()
    assert (image[where] != own[where]).all()
    assert all(len(image[row][where[row]].unique()) == 1 for row in range(len(image)))


@pytest.mark.parametrize("batch", [2, 3, 16])
@pytest.mark.parametrize("seed", range(5))
def test_patches_come_from_another_image_at_the_same_place(seed: int, batch: int) -> None:
    assert_foreign(*altered(batch, seed, alteration="patches"))


def test_all_samples_may_be_swapped_at_their_own_share() -> None:
    clean, result, where = altered(swap_probability=1.0, swap_ratio=0.3)
    assert_foreign(clean, result, where)
    assert (where.sum(dim=1) == math.ceil(64 * 0.3)).all()


def test_share_of_swapped_samples() -> None:
    _, result, where = altered(swap_probability=0.5, swap_ratio=0.3)
    swapped = where.sum(dim=1) == math.ceil(64 * 0.3)
    assert abs(swapped.double().mean().item() - 0.5) < 5 * 0.5 / 16
    assert (where[~swapped].double().mean(dim=1) >= 0.5).all()
    assert (result.content[swapped] > 100).all()
    assert (result.content[~swapped][where[~swapped]].abs() < 10).all()


@pytest.mark.parametrize("options", [{"alteration": "patches"}, {"swap_probability": 0.5}], ids=str)
def test_patches_of_another_image_need_another_image(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"batch of one.*at least two"):
        altered(batch=1, **options)
    altered(batch=1)  # noise needs none


def test_alteration_follows_from_the_key_alone() -> None:
    (_, first, where), (_, again, same), (_, _, other) = (altered(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.content, again.content) and torch.equal(where, same)
    assert not torch.equal(where, other)


@pytest.mark.parametrize("max_block, longest", [(0.1, (1, 1)), (0.3, (2, 4)), (0.5, (4, 8))], ids=str)
def test_longest_side_of_a_block_is_a_share_of_the_grid(max_block: float, longest: tuple[int, int]) -> None:
    """GMML: sides from 1 to 0.3 of the image's, here of a grid of 8 rows and 16 columns."""
    modality = make((32, 64), max_block=max_block)
    tokens = modality.tokenize({"pixel_values": torch.zeros(300, 3, 32, 64)})
    first = (modality.hiding_order(tokens, key(0), "block").floor() == 0).view(-1, 8, 16)
    assert (first.any(dim=2).sum(dim=1).max(), first.any(dim=1).sum(dim=1).max()) == longest


# Labels of pixels, and features at pixels.


@pytest.mark.parametrize(("size", "patch"), [((8, 12), 4), ((6, 4), (3, 2)), ((4, 4), 4)])
def test_features_are_spread_by_bilinear_interpolation(size: tuple[int, int], patch: Any) -> None:
    """Against scipy, between the centres of the patches; beyond the outermost ones nothing changes."""
    images = make(size, patch)
    batch = images.collate([images.prepare(noise(*size, 3, seed=seed)) for seed in range(2)])
    tokens = images.tokenize(batch)
    features = torch.randn(2, tokens.content.shape[1], 5, generator=key(0))
    grid = [np.arange(side // edge) * edge + (edge - 1) / 2 for side, edge in zip(size, images.patch_size, strict=True)]
    for number, found in enumerate(images.spread(features, tokens, batch)):
        values = features[number].reshape(len(grid[0]), len(grid[1]), 5).numpy()
        clamped = [np.clip(np.arange(side), centres[0], centres[-1]) for side, centres in zip(size, grid, strict=True)]
        axes = [centres if len(centres) > 1 else np.append(centres, centres + 1) for centres in grid]
        for axis in range(2):
            if len(grid[axis]) == 1:
                values = np.repeat(values, 2, axis=axis)
        expected = RegularGridInterpolator(axes, values)(np.stack(np.meshgrid(*clamped, indexing="ij"), axis=-1))
        assert found.shape == (*size, 5)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_token_of_greatest_share_is_the_pixels_own() -> None:
    images = make((8, 12), 4)
    batch = images.collate([images.prepare(noise(8, 12, 3))])
    tokens = images.tokenize(batch)
    (shares,) = images.spread(torch.eye(6)[None], tokens, batch)
    own = [[3 * (y // 4) + x // 4 for x in range(12)] for y in range(8)]
    assert shares.argmax(dim=-1).tolist() == own
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(8, 12))


def test_elements_are_pixels() -> None:
    images = plain(8, 4)
    array = noise(8, 8, 3)
    (found,) = images.elements(images.collate([images.prepare(array)]))
    np.testing.assert_allclose(found, array / 255, atol=1e-6)


@pytest.mark.parametrize("form", ["array", "file"])
@pytest.mark.parametrize("size", [(8, 12), (16, 24), (40, 24), (24, 41)])
def test_labels_are_resized_and_cut_as_the_image_is(size: tuple[int, int], form: str) -> None:
    """A picture that shows its labels, in large areas: away from their borders it still does."""
    labels = np.zeros(size, dtype=np.int64)
    labels[2 * size[0] // 5 :, : size[1] // 2] = 1
    labels[: size[0] // 2, size[1] // 2 + 1 :] = 2
    grey = (labels * 100).astype(np.uint8)
    images = plain((8, 12), 4, num_channels=1)
    prepared = images.labelled(grey if form == "array" else bytes_of(PILImage.fromarray(grey)), labels)
    found = prepared["labels"]
    assert found.shape == (8, 12) and found.dtype == torch.long and set(found.unique().tolist()) == {0, 1, 2}
    shown = prepared["pixel_values"][0] * 2.55
    inside = torch.ones(8, 12, dtype=torch.bool)  # all neighbours have the same label
    for y, x in itertools.product(range(8), range(12)):
        around = found[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        inside[y, x] = bool((around == found[y, x]).all())
    assert inside.sum() > 30
    assert (shown - found)[inside].abs().max() < 0.25
    if size == (8, 12):
        assert found.tolist() == labels.tolist()
    if size == (16, 24):  # of an even number of pixels the one behind the middle
        assert found.tolist() == labels[1::2, 1::2].tolist()


def test_labels_of_a_picture_that_is_turned_by_its_record() -> None:
    """The size that counts is that of the picture as it is seen."""
    exif = PILImage.Exif()
    exif[0x0112] = 6
    file = bytes_of(PILImage.fromarray(noise(8, 12)), exif=exif)
    images = plain((12, 8), 4, num_channels=1)
    assert images.labelled(file, np.zeros((12, 8)))["labels"].shape == (12, 8)
    with pytest.raises(ValueError, match=r"an image of 12x8 pixels and labels of shape \(8, 12\)"):
        images.labelled(file, np.zeros((8, 12)))


@pytest.mark.parametrize("shape", [(8, 8, 1), (8,), (4, 4), (8, 9)])
def test_labels_that_are_not_of_the_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="an image of 8x8 pixels and labels of shape"):
        make().labelled(noise(8, 8, 3), np.zeros(shape, dtype=np.int64))


def test_a_large_photo_that_lies_on_its_side_is_decoded_large_enough(tmp_path: Path) -> None:
    """A fraction of the size is decoded where that is enough for the picture as it is turned, not as it is stored."""
    waves = torch.linspace(0, 1300, 2688).sin()[None, :] * torch.linspace(0, 800, 896).cos()[:, None]  # fine ones
    stored = PILImage.fromarray(((waves + 1) * 127).byte().numpy())
    for orientation in (1, 6, 8):
        exif = PILImage.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        stored.save(tmp_path / "photo.jpg", quality=95, exif=exif)
        with PILImage.open(tmp_path / "photo.jpg") as whole:
            turned = np.asarray(ImageOps.exif_transpose(whole))
        size = (224, 672) if orientation == 1 else (672, 224)
        for wanted in (size, size[::-1]):
            found = read_image(tmp_path / "photo.jpg", wanted, 1, (1, 1))
            assert (found - read_image(turned, wanted, 1, (1, 1))).abs().mean() < 0.01
