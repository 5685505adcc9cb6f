"""Videos of any length and frame rate as tubelets on a grid of time, rows and columns (Tong et al., VideoMAE, 2022)."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from mmssl.drawings import Drawing, Frames
from mmssl.modalities.base import ORDERS, Batch, Modality, View, bin_of, block_order, rectangle, segment_orders
from mmssl.pixels import (
    beside,
    channel_statistics,
    channels_first,
    check_channels_of_file,
    check_size,
    crop_and_flip,
    pair,
    patch_grid,
    quarter_turns,
    read_image,
    recolor,
    resize_and_crop,
    transform,
)
from mmssl.positions import GridPositions, RasterPositions, SinCosPositions
from mmssl.samples import Samples, file_of, number_array
from mmssl.tokens import Mask, Tokens, gather
from mmssl.video_files import VIDEO_ENDINGS, frame_files, index_frames, read_collection, read_frames

MOST_RAW_FEATURES = 32_768
SPEEDS = (1, 2, 4)  # frames from one frame to the next
SHOWN_RATE = 8.0  # frames in a second of a clip whose own rate nobody knows


class Video(Modality):
    """Clips of videos as tubelets: patches that reach through a few frames.

    Args:
        num_frames: frames T of a clip.
        frame_stride: frames from one frame of the clip to the next. None: 4, or as ``frame_rate`` says.
        frame_rate: frames of the clip per second, by the video's time stamps, in place of ``frame_stride``.
        image_size: height and width that frames are resized (shorter side, bicubic) and centre-cropped to. One number
            means a square. The model itself takes any multiple of the patch size: places on another grid are stretched
            over the one of this size.
        patch_size: height and width of a tubelet. One number means a square.
        tubelet_size: frames of a tubelet.
        num_channels: channels of a frame. Files are converted to grey (1), RGB (3) or RGBA (4); arrays may have any.
        image_mean: mean of each channel, subtracted; pixels lie between 0 and 1. One number is used for all channels.
            None: that of ImageNet for 3 channels, else 0.5.
        image_std: standard deviation of each channel, divided by. As image_mean.
        position_embedding: "sincos", sines and cosines of a tubelet's time, row and column (V-JEPA); "index", of its
            number alone, by time, rows, columns (VideoMAE); or "learned", a vector for each place on the grid of
            ``num_frames`` and ``image_size`` (ViViT), interpolated linearly for other grids. In a longer clip "learned"
            stays what it is at its last time; the others go on.
        normalize_target: reconstruct tubelets whose channels are each normalised by their own mean and deviation.
        distance: "l2", the squared error (VideoMAE), or "l1", the absolute one, of a pixel.
        max_block: longest side of a hidden block, as a share of each side of the grid, time's too.
        region_ratio: least and greatest height over width of a region that is predicted at once (V-JEPA).
        crop_scale: least and greatest share of the area that a view keeps, resized to the size of the frames.
        crop_ratio: least and greatest width over height of a view's crop.
        horizontal_flip: probability that a view is mirrored.
        color_jitter: strength of a view's changes of brightness, contrast and saturation, and four times that of hue.
    """

    inputs: ClassVar = ("pixel_values_videos",)
    extensions: ClassVar = VIDEO_ENDINGS
    columns: ClassVar = ("video", "clip", "pixel_values_videos")
    mask_styles: ClassVar = ("random", "tube", "block")
    affine: ClassVar = True

    def __init__(
        self,
        num_frames: int = 16,
        frame_stride: int | None = None,
        frame_rate: float | None = None,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        tubelet_size: int = 2,
        num_channels: int = 3,
        image_mean: float | tuple[float, ...] | None = None,
        image_std: float | tuple[float, ...] | None = None,
        position_embedding: Literal["sincos", "index", "learned"] = "sincos",
        normalize_target: bool = True,
        distance: Literal["l1", "l2"] = "l2",
        max_block: float = 0.3,
        region_ratio: tuple[float, float] = (0.75, 1.5),
        crop_scale: tuple[float, float] = (1.0, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.0,
        color_jitter: float = 0.0,
    ):
        super().__init__()
        if frame_stride is not None and frame_rate is not None:
            raise ValueError(
                f"found frame_stride={frame_stride} and frame_rate={frame_rate}; expected one of them: a clip's frames "
                "are counted or timed"
            )
        if frame_stride is None and frame_rate is None:
            frame_stride = 4
        self.num_frames, self.frame_stride, self.frame_rate = num_frames, frame_stride, frame_rate
        self.image_size, self.patch_size, self.tubelet_size = pair(image_size), pair(patch_size), tubelet_size
        self.num_channels = num_channels
        self.image_mean, self.image_std = channel_statistics(image_mean, image_std, num_channels)
        self.position_embedding = position_embedding
        self.normalize_target, self.distance, self.max_block = normalize_target, distance, max_block
        self.region_ratio = pair(region_ratio)
        self.crop_scale, self.crop_ratio = pair(crop_scale), pair(crop_ratio)
        self.horizontal_flip, self.color_jitter = horizontal_flip, color_jitter
        if min(num_frames, tubelet_size) < 1 or num_frames % tubelet_size:
            raise ValueError(
                f"num_frames: found {num_frames}; expected a multiple of tubelet_size, {tubelet_size}, both at least 1"
            )
        if (frame_stride is not None and frame_stride < 1) or (frame_rate is not None and not frame_rate > 0):
            raise ValueError(
                f"found frame_stride={frame_stride} and frame_rate={frame_rate}; expected a stride of at least 1, or a "
                "rate above 0"
            )
        if distance not in ("l1", "l2"):  # a config file is not checked against the types
            raise ValueError(f"distance: found {distance!r}; expected one of l1, l2")
        if position_embedding not in (known := ("sincos", "index", "learned")):
            raise ValueError(f"position_embedding: found {position_embedding!r}; expected one of {', '.join(known)}")
        patch_grid(*self.image_size, self.patch_size)
        if color_jitter and num_channels != 3:
            raise ValueError(f"color_jitter needs 3 channels; found num_channels={num_channels}: set color_jitter to 0")
        if normalize_target and math.prod(self.content_shape) == num_channels:
            raise ValueError("normalize_target needs tubelets of at least two pixels; set it to false")

    @property
    def content_shape(self) -> tuple[int, ...]:
        return (self.tubelet_size * self.patch_size[0] * self.patch_size[1] * self.num_channels,)

    def build(self, width: int) -> Self:
        self.projection = nn.Linear(math.prod(self.content_shape), width)
        return super().build(width)

    # Data side.

    def collection(self, source: str) -> Samples | None:
        return read_collection(source)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """Find the frames of a path or bytes of a video file, a ``{"bytes", "path"}`` record, a folder of images, or an
        array (T, H, W), (T, H, W, C), (T, C, H, W) of uint8 or of floats from 0 to 1.

        Nothing is decoded yet: ``excerpt`` decodes what a clip needs. Frames in a folder are taken in natural order.
        """
        if isinstance(sample, dict):
            sample = file_of(sample)
        if not isinstance(sample, str | Path | bytes):
            return {"frames": self.from_array(sample)}
        if not isinstance(sample, bytes) and Path(sample).is_dir():
            return {"frame_files": as_tensor(os.fsencode("\0".join(frame_files(Path(sample)))))}
        check_channels_of_file(self.num_channels, "a video", "(T, H, W, C)")
        kind, file = ("file", sample) if isinstance(sample, bytes) else ("path", os.fsencode(sample))
        index = index_frames(sample if isinstance(sample, bytes) else str(sample))
        return {
            kind: as_tensor(file),
            "stamps": torch.from_numpy(index.stamps),
            "keys": torch.from_numpy(index.keys),
            "unit": torch.tensor(index.unit, dtype=torch.float64),
        }

    def from_array(self, array: Any) -> Tensor:
        """(T, C, H, W) as it is stored."""
        values = number_array(array)
        if values.dtype.kind in "iu" and values.dtype != np.uint8:
            raise ValueError(f"found an array of {values.dtype}; expected uint8, or floats from 0 to 1")
        frames = channels_first(torch.from_numpy(values), self.num_channels, before="T, ")
        if not len(frames):
            raise ValueError("found a video without frames; expected at least one")
        check_size(frames.shape[2], frames.shape[3], self.patch_size)
        if frames.is_floating_point() and not frames.isfinite().all():
            raise ValueError("found NaN or infinite pixels; expected finite values")
        return frames

    def excerpt(self, sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """Decode one clip (C, T, H, W), normalised: at a random time, or without a generator from the middle.

        After the end of a video that is too short its last frame is repeated.
        """
        size, channels, least = self.image_size, self.num_channels, self.patch_size
        if "frames" in sample:
            frames = sample["frames"]
            frames = frames[self.frame_numbers(len(frames), None, generator)]
            pixels = frames.float() / (1 if frames.is_floating_point() else 255)
            pixels = resize_and_crop(pixels.expand(-1, channels, -1, -1), size)
        elif "frame_files" in sample:
            files = os.fsdecode(sample["frame_files"].numpy().tobytes()).split("\0")
            numbers = self.frame_numbers(len(files), None, generator).tolist()
            read = {number: self.read_frame(files[number]) for number in set(numbers)}
            pixels = torch.stack([read[number] for number in numbers])
        else:
            stamps, keys = sample["stamps"], sample["keys"].numpy()
            seconds = (stamps - stamps[0]) * sample["unit"]
            wanted = stamps[self.frame_numbers(len(stamps), seconds, generator)].numpy()
            file = sample["file" if "file" in sample else "path"].numpy().tobytes()
            decoded = read_frames(file if "file" in sample else os.fsdecode(file), wanted, keys, size, channels, least)
            pixels = torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 255
        mean, std = self.statistics(pixels)
        return {"pixel_values_videos": (pixels.transpose(0, 1) - mean) / std}

    def read_frame(self, file: str) -> Tensor:
        try:
            return read_image(file, self.image_size, self.num_channels, self.patch_size)
        except ValueError as error:
            raise ValueError(f"{os.path.basename(file)}: {error}") from error

    def frame_numbers(self, count: int, seconds: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Which of ``count`` frames make up the clip, (T,) long; ``seconds`` (count,) is when they are shown."""
        clip = torch.arange(self.num_frames)
        share = 0.5 if generator is None else torch.rand((), generator=generator, dtype=torch.float64).item()
        if self.frame_stride is not None:
            room = max(count - 1 - self.frame_stride * (self.num_frames - 1), 0)
            first = min(int(share * (room + 1)), room)
            return (first + self.frame_stride * clip).clamp(max=count - 1)
        if seconds is None or self.frame_rate is None:
            raise ValueError(
                f"frame_rate={self.frame_rate}: arrays and folders of frames have no time stamps; set frame_stride"
            )
        last = (self.num_frames - 1) / self.frame_rate
        start = share * max(float(seconds[-1]) - last, 0.0)
        due = start + clip / self.frame_rate + 1e-6  # stamps are rounded
        return torch.searchsorted(seconds, due.double(), right=True) - 1

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return beside(self.image_mean, like, axes=3), beside(self.image_std, like, axes=3)

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        return {"pixel_values_videos": torch.stack([sample["pixel_values_videos"] for sample in samples])}

    # Device side.

    def tokenize(self, batch: Batch) -> Tokens:
        """(B, C, T, H, W) to contents (B, N, tubelet_size * patch height * patch width * C).

        Tokens are ordered by time, then rows, then columns; so are the pixels inside one, channels last. Places are
        (t, y, x), in tubelets; a clip of more frames goes on in time, on a larger frame the grid is stretched.
        """
        pixels = batch["pixel_values_videos"]
        if pixels.dim() != 5 or pixels.shape[1] != self.num_channels or pixels.shape[2] % self.tubelet_size:
            raise ValueError(
                f"pixel_values_videos: found shape {tuple(pixels.shape)}; expected (batch, {self.num_channels}, "
                f"frames, height, width), frames a multiple of tubelet_size, {self.tubelet_size}"
            )
        slices = pixels.shape[2] // self.tubelet_size
        rows, columns = patch_grid(pixels.shape[3], pixels.shape[4], self.patch_size)
        content = rearrange(
            pixels, "b c (t r) (h p) (w q) -> b (t h w) (r p q c)", r=self.tubelet_size, h=rows, w=columns
        )
        own_rows, own_columns = patch_grid(*self.image_size, self.patch_size)
        t = torch.arange(slices, device=pixels.device, dtype=torch.float32)
        y = (torch.arange(rows, device=pixels.device) + 0.5) * (own_rows / rows) - 0.5
        x = (torch.arange(columns, device=pixels.device) + 0.5) * (own_columns / columns) - 0.5
        coords = torch.stack(torch.meshgrid(t, y, x, indexing="ij"), dim=-1).flatten(0, 2)
        valid = torch.ones(content.shape[:2], dtype=torch.bool, device=pixels.device)
        return Tokens(content=content, coords=coords.expand(len(pixels), -1, -1), valid=valid)

    def embed(self, tokens: Tokens) -> Tensor:
        return self.projection(tokens.content.to(self.projection.weight.dtype))

    def positions(self, width: int) -> nn.Module:
        if self.position_embedding == "index":
            return RasterPositions(width, self.own_grid)
        if self.position_embedding == "learned":
            return GridPositions(width, self.own_grid)
        return SinCosPositions(width, axes=3)

    def raw_features(self, batch: Batch) -> Tensor:
        """The pixels where a clip has at most 32,768; else each frame in grey, averaged to at most 16 x 16 pixels."""
        pixels = batch["pixel_values_videos"]
        if pixels[0].numel() > MOST_RAW_FEATURES:
            height, width = (min(side, 16) for side in pixels.shape[3:])
            pixels = nn.functional.adaptive_avg_pool2d(pixels.mean(dim=1), (height, width))
        return pixels.flatten(1)

    def grid(self, tokens: Tokens) -> tuple[int, int, int]:
        """Number of tokens along time, rows and columns."""
        t, y, x = (len(axis.unique()) for axis in tokens.coords[0].unbind(dim=1))
        return t, y, x

    def mask(self, tokens: Tokens, ratio: float | Tensor, generator: torch.Generator, style: str = "random") -> Mask:
        """As for all modalities; style "tube" hides the same ``int(places * ratio)`` places at all times (VideoMAE)."""
        if style != "tube":
            return super().mask(tokens, ratio, generator, style)
        slices, rows, columns = self.grid(tokens)
        places = rows * columns
        if places < 2:
            raise ValueError("mask style 'tube' needs frames of at least two patches; use style 'random'")
        order = torch.rand(len(tokens.valid), places, generator=generator, device=tokens.valid.device)
        exact = torch.float32 if order.device.type == "mps" else torch.float64  # MPS has no other
        share = torch.as_tensor(ratio, dtype=exact, device=order.device).view(-1, 1)
        count = (places * share).long().clamp(min=1, max=places - 1)
        hidden = order.argsort(dim=1).argsort(dim=1) < count
        return Mask.from_hidden(hidden.repeat(1, slices), tokens.valid)

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        """Style "block": boxes in time and space."""
        if style == "random":
            return super().hiding_order(tokens, generator, style)
        longest = [max(1, int(self.max_block * side)) for side in self.grid(tokens)]
        return block_order(tokens, longest, generator)

    def region(
        self, tokens: Tokens, share: float | Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> Tensor:
        """A rectangle of patches of about this share of a frame, at all times (Bardes et al., V-JEPA, 2024).

        Its size is drawn once for the batch, its place for each sample.
        """
        return rectangle(tokens, share, self.region_ratio, generator, allowed)

    @property
    def own_grid(self) -> tuple[int, int, int]:
        """Tubelets along time, rows and columns of a clip with the options' frames and size."""
        return self.num_frames // self.tubelet_size, *patch_grid(*self.image_size, self.patch_size)

    @property
    def num_places(self) -> int:
        return math.prod(self.own_grid)

    def places(self, tokens: Tokens) -> Tensor:
        """Number of the tubelet, by time, rows, columns, of a clip with the options' frames and size.

        Over its grid others are stretched, in time too.
        """
        own = self.own_grid
        time, row, column = tokens.coords.unbind(-1)
        t = bin_of(time, time.amax() + 1, own[0])
        y, x = bin_of(row, own[1], own[1]), bin_of(column, own[2], own[2])
        return (t * own[1] + y) * own[2] + x

    @property
    def pretexts(self) -> dict[str, int]:
        """Quarter turns of squares, orders of clips of three tubelets or more, speeds where a quarter of the frames is
        at least one tubelet and two frames."""
        offered = {"rotation": 4} if self.image_size[0] == self.image_size[1] else {}
        offered |= {"order": len(ORDERS)} if self.num_frames >= 3 * self.tubelet_size else {}
        return offered | ({"speed": len(SPEEDS)} if self.slow_frames(self.num_frames) >= 2 else {})

    def slow_frames(self, frames: int) -> int:
        """Frames of a clip that can be shown at any of the speeds: a quarter, in whole tubelets."""
        return frames // (SPEEDS[-1] * self.tubelet_size) * self.tubelet_size

    def transform(self, batch: Batch, pretext: str, number: Tensor) -> Batch:
        """Turn all frames to the left by right angles (Jing et al., 3DRotNet, 2018); put three segments of the clip in
        one of six orders (Xu et al., VCOP, 2019), cut between tubelets; or of the middle of the clip show a quarter of
        the frames, every one, every second or every fourth (Yao et al., PRP, 2020)."""
        pixels, name = batch["pixel_values_videos"], "pixel_values_videos"
        frames = pixels.shape[2]
        if pretext == "rotation":
            return {**batch, name: quarter_turns(pixels, number)}
        if pretext == "order" and frames >= 3 * self.tubelet_size:
            index, _ = segment_orders(torch.full_like(number, frames), frames, number, self.tubelet_size)
        elif pretext == "speed" and (shown := self.slow_frames(frames)) >= 2:
            stride = torch.tensor(SPEEDS, device=number.device)[number][:, None]
            first = (frames - 1 - stride * (shown - 1)) // 2
            index = first + stride * torch.arange(shown, device=number.device)
        elif pretext in self.pretexts:
            raise ValueError(f"pretext {pretext!r}: found clips of {frames} frames; expected more")
        else:
            return super().transform(batch, pretext, number)
        return {**batch, name: gather(pixels.transpose(1, 2), index).transpose(1, 2)}

    def channels_of(self, content: Tensor) -> Tensor:
        """Contents (B, N, V) as pixels from 0 to 1, (B, N, V / C, C)."""
        pixels = content.float().unflatten(-1, (-1, self.num_channels))
        return pixels * beside(self.image_std, pixels, axes=0) + beside(self.image_mean, pixels, axes=0)

    def target(self, tokens: Tokens) -> Tensor:
        """Pixels of a tubelet as they are or, from 0 to 1, each channel by its mean and unbiased deviation."""
        content = tokens.content.detach().float()
        if not self.normalize_target:
            return content
        pixels = self.channels_of(content)
        std, mean = torch.std_mean(pixels, dim=2, keepdim=True)
        return ((pixels - mean) / (std + 1e-6)).flatten(2)

    def content_of(self, prediction: Tensor, tokens: Tokens) -> Tensor:
        if not self.normalize_target:
            return prediction
        std, mean = torch.std_mean(self.channels_of(tokens.content), dim=2, keepdim=True)
        pixels = prediction.unflatten(-1, (-1, self.num_channels)) * (std + 1e-6) + mean
        return ((pixels - beside(self.image_mean, pixels, axes=0)) / beside(self.image_std, pixels, axes=0)).flatten(2)

    def frames(self, tokens: Tokens) -> Tensor:
        """(B, T, H, W, 3) pixels from 0 to 1: the first three channels, or the first one as grey."""
        (slices, rows, _), (height, width) = self.grid(tokens), self.patch_size
        pixels = rearrange(
            self.channels_of(tokens.content),
            "b (t h w) (r p q) c -> b (t r) (h p) (w q) c",
            t=slices,
            h=rows,
            r=self.tubelet_size,
            p=height,
            q=width,
        )
        return pixels[..., : 3 if self.num_channels >= 3 else 1].clamp(0, 1).expand(-1, -1, -1, -1, 3)

    def picture(self, tokens: Tokens) -> Tensor:
        """Up to four frames of a clip, evenly spaced: side by side, or four in two rows."""
        slices = self.grid(tokens)[0]
        shown = min(slices, 4)
        index = torch.linspace(0, slices - 1, shown).round().long() * self.tubelet_size
        return rearrange(self.frames(tokens)[:, index], "b (s t) h w c -> b (s h) (t w) c", s=2 if shown == 4 else 1)

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """All frames of a clip, at ``frame_rate``; without one, 8 in a second, whatever the stride."""
        return [Frames(clip, self.frame_rate or SHOWN_RATE) for clip in self.frames(tokens).numpy(force=True)]

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """Crop, mirror and change colours with kornia, on the whole batch at once, all frames of a clip alike."""
        pixels = batch["pixel_values_videos"].float()
        frames, size = pixels.shape[2], (pixels.shape[3], pixels.shape[4])
        geometry = crop_and_flip(size, self.crop_scale, self.crop_ratio, self.horizontal_flip)
        colors = recolor(self.color_jitter)
        if not geometry and not colors:
            return View(batch)
        mean, std = self.statistics(pixels)
        # Frames are more channels to what moves pixels, and more rows to what changes each for itself.
        moved, parameters = transform(rearrange(pixels * std + mean, "b c t h w -> b (c t) h w"), geometry, generator)
        pixels, drawn = transform(rearrange(moved, "b (c t) h w -> b c (t h) w", t=frames), colors, generator)
        pixels = rearrange(pixels, "b c (t h) w -> b c t h w", t=frames)
        return View({**batch, "pixel_values_videos": (pixels - mean) / std}, parameters | drawn)


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
