"""Pixels, of images and of the frames of videos: decoding, resizing, statistics of channels, and views."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage
from torch import Tensor, nn

from mmssl.samples import file_of, number_array

T = TypeVar("T", int, float)
Size = tuple[int, int]  # height and width

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def pair(value: T | Sequence[T]) -> tuple[T, T]:
    first, second = value if isinstance(value, Sequence) else (value, value)
    return first, second


# Decoding and resizing.


def read_image(sample: Any, size: Size, channels: int, least: Size) -> Tensor:
    """A path, bytes, a ``{"bytes", "path"}`` record, a PIL image or an array to (channels, *size) from 0 to 1.

    The shorter side is resized (bicubic) and the centre cropped.

    Args:
        sample: the image; arrays are (H, W), (H, W, channels) or (channels, H, W), as ``from_array`` takes them.
        size: height and width of the result.
        channels: of files: 1 (grey), 3 (RGB) or 4 (RGBA).
        least: height and width that the sample must have at least.

    Raises:
        ValueError: no readable image, of another number of channels, too small, or with NaN in it.
    """
    if isinstance(sample, dict):
        sample = file_of(sample)
    if isinstance(sample, bytes):
        sample = io.BytesIO(sample)
    if isinstance(sample, str | Path | io.BytesIO):
        try:
            sample = PILImage.open(sample)
            if sample.format == "JPEG":  # decode at a fraction of the size where that is enough
                turned = sample.getexif().get(ExifTags.Base.Orientation, 1) > 4  # stored lying on its side
                height, width = reversed(size) if turned else size
                sample.draft(None, (2 * width, 2 * height))
            sample.load()
        except Exception as error:  # PIL's decoders raise nearly anything at a corrupt file
            raise ValueError(f"not a readable image ({error}); expected an intact image file") from error
    read = from_pil if isinstance(sample, PILImage.Image) else from_array
    pixels = read(sample, size, channels, least)
    if not pixels.isfinite().all():
        raise ValueError("found NaN or infinite pixels; expected finite values")
    return pixels


def size_of(sample: Any, channels: int) -> Size:
    """Height and width of an image that ``read_image`` reads, before it is resized."""
    if isinstance(sample, dict):
        sample = file_of(sample)
    if isinstance(sample, bytes):
        sample = io.BytesIO(sample)
    if isinstance(sample, str | Path | io.BytesIO):
        sample = PILImage.open(sample)
    if isinstance(sample, PILImage.Image):
        sample = ImageOps.exif_transpose(sample)
        return sample.height, sample.width
    height, width = channels_first(torch.from_numpy(number_array(sample)), channels).shape[1:]
    return height, width


def from_pil(image: PILImage.Image, size: Size, channels: int, least: Size) -> Tensor:
    check_channels_of_file(channels, "an image", "(H, W, C)")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return from_array(np.asarray(image), size, channels, least)
    if image.mode.startswith("I"):  # 16 bits of grey; PIL would cut them off at 255
        return from_array(np.asarray(image).astype(np.float32) / 65535, size, channels, least)
    check_size(image.height, image.width, least)
    image = image.convert(PIL_MODES[channels])
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=PILImage.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.reshape(height, width, channels).permute(2, 0, 1)


def from_array(array: Any, size: Size, channels: int, least: Size) -> Tensor:
    """Arrays of uint8 and uint16 are divided by the greatest value of their type; floats lie between 0 and 1."""
    values = number_array(array)
    if values.dtype.kind in "iu":
        if values.dtype.itemsize > 2:  # of such types the greatest value says nothing about white
            raise ValueError(f"found an array of {values.dtype}; expected uint8, uint16, or floats from 0 to 1")
        values = values.astype(np.float32) / np.iinfo(values.dtype).max
    pixels = channels_first(torch.from_numpy(values), channels)
    check_size(pixels.shape[1], pixels.shape[2], least)
    return resize_and_crop(pixels.float().expand(channels, -1, -1)[None], size)[0]


def channels_first(pixels: Tensor, channels: int, before: str = "") -> Tensor:
    """(H, W), (H, W, channels), (channels, H, W) or (1, H, W) to (channels or 1, H, W).

    ``before`` names axes that stand before these, such as "T, ".
    """
    first = len(before.split())
    if pixels.dim() == first + 2:
        pixels = pixels.unsqueeze(first)
    elif pixels.dim() == first + 3 and pixels.shape[-1] == channels:
        pixels = pixels.movedim(-1, first)
    if pixels.dim() != first + 3 or pixels.shape[first] not in (1, channels):
        raise ValueError(
            f"found an array of shape {tuple(pixels.shape)}; expected ({before}H, W), ({before}H, W, {channels}) or "
            f"({before}{channels}, H, W)"
        )
    return pixels


def covering(height: int, width: int, size: Size) -> Size:
    """Height and width of the same shape, of which at least one is that of ``size`` and none is smaller."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def middle(height: int, width: int, size: Size) -> tuple[slice, slice]:
    """The rows and columns of the centre."""
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return slice(top, top + size[0]), slice(left, left + size[1])


def resize_and_crop(pixels: Tensor, size: Size) -> Tensor:
    """(N, C, H, W) with the shorter side resized (bicubic) and the centre cropped: (N, C, *size)."""
    if pixels.shape[2:] == size:
        return pixels
    height, width = covering(pixels.shape[2], pixels.shape[3], size)
    pixels = nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    rows, columns = middle(height, width, size)
    return pixels[..., rows, columns]


def check_channels_of_file(channels: int, what: str, instead: str) -> None:
    if channels not in PIL_MODES:
        raise ValueError(
            f"found {what} file, and num_channels={channels}; files are read as 1, 3 or 4 channels: give arrays "
            f"{instead} instead"
        )


def check_size(height: int, width: int, least: Size) -> None:
    if height < least[0] or width < least[1]:
        raise ValueError(f"found {height}x{width} pixels; expected at least one patch, {least[0]}x{least[1]}")


def patch_grid(height: int, width: int, patch: Size) -> Size:
    """Rows and columns of patches in so many pixels.

    Raises:
        ValueError: they cannot be cut into patches.
    """
    if height < patch[0] or width < patch[1]:
        raise ValueError(
            f"{height}x{width} pixels are smaller than one patch of {patch[0]}x{patch[1]}; use a larger image_size or "
            "a smaller patch_size"
        )
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"{height}x{width} pixels cannot be cut into patches of {patch[0]}x{patch[1]}; make image_size a multiple "
            "of patch_size"
        )
    return height // patch[0], width // patch[1]


# Statistics of channels.


def channel_statistics(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; None: those of ImageNet for 3 channels, else 0.5.

    Raises:
        ValueError: as many values as there are channels, or one, were expected; or one deviation is not positive.
    """
    default_mean, default_std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (0.5, 0.5)
    means = per_channel(default_mean if mean is None else mean, channels, "image_mean")
    stds = per_channel(default_std if std is None else std, channels, "image_std")
    if min(stds) <= 0:
        raise ValueError(f"image_std: found {stds}; expected positive values")
    return means, stds


def per_channel(value: float | Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    values = (float(value),) * channels if isinstance(value, int | float) else tuple(value)
    if len(values) != channels:
        raise ValueError(f"{name}: found {len(values)} values; expected one, or {channels}, one for each channel")
    return values


def beside(values: Sequence[float], like: Tensor, axes: int) -> Tensor:
    """A value for each channel, (C, 1, ..., 1) with so many axes after the channels, where ``like`` is."""
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(-1, *[1] * axes)


# Views.


def crop_and_flip(
    size: Size, crop_scale: tuple[float, float], crop_ratio: tuple[float, float], horizontal_flip: float
) -> dict[str, nn.Module]:
    """Steps of ``transform``: a random part resized to ``size``, and a mirror; none that is switched off."""
    steps: dict[str, nn.Module] = {}
    if crop_scale != (1.0, 1.0):
        steps["crop"] = kornia_augmentation().RandomResizedCrop(
            size, scale=crop_scale, ratio=crop_ratio, p=1.0, cropping_mode="resample"
        )
    if horizontal_flip:
        steps["flip"] = kornia_augmentation().RandomHorizontalFlip(p=horizontal_flip)
    return steps


def recolor(strength: float) -> dict[str, nn.Module]:
    """Steps of ``transform`` that change brightness, contrast, saturation and hue of each pixel for itself."""
    if not strength:
        return {}
    return {"color": kornia_augmentation().ColorJiggle(strength, strength, strength, strength / 4, p=0.8)}


def transform(
    pixels: Tensor, steps: dict[str, nn.Module], generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply kornia's random transforms to (B, C, H, W), and record their parameters, one row for each of B."""
    parameters: dict[str, Tensor] = {}
    if not steps:
        return pixels, parameters
    devices = [pixels.device] if pixels.is_cuda else []
    # kornia only knows the global generator, and in bf16 its grids would miss their pixels.
    with torch.random.fork_rng(devices=devices), torch.autocast(pixels.device.type, enabled=False):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=pixels.device)))
        for name, step in steps.items():
            pixels = step(pixels)
            drawn: dict[str, Tensor] = step._params  # type: ignore[assignment]
            parameters |= {
                f"{name}_{key}": value
                for key, value in drawn.items()
                if key not in ("forward_input_shape", "order")  # of the batch, not of its samples
            }
    return pixels, parameters


def kornia_augmentation() -> Any:
    try:
        from kornia import augmentation
    except ImportError as error:
        raise ImportError('views of images and videos need kornia: pip install "mmssl[image]"') from error
    return augmentation


def quarter_turns(pixels: Tensor, number: Tensor) -> Tensor:
    """(B, ..., H, W) with each of B turned to the left by so many right angles, number (B,), without interpolation."""
    if pixels.shape[-2] != pixels.shape[-1]:
        raise ValueError(f"found {pixels.shape[-2]}x{pixels.shape[-1]} pixels; turned, only squares keep their shape")
    turned = pixels
    for turns in (1, 2, 3):
        chosen = (number == turns).view(-1, *[1] * (pixels.dim() - 1))
        turned = torch.where(chosen, pixels.rot90(turns, (-2, -1)), turned)
    return turned
