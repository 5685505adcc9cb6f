"""Images of any size and any number of channels as patches on a rectangular grid (Dosovitskiy et al., ViT, 2021)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from mmssl.drawings import Drawing, Frames
from mmssl.modalities.base import Batch, Modality, View, bin_of, block_order, rectangle
from mmssl.pixels import (
    IMAGE_ENDINGS,
    beside,
    channel_statistics,
    covering,
    crop_and_flip,
    kornia_augmentation,
    middle,
    pair,
    patch_grid,
    quarter_turns,
    read_image,
    recolor,
    size_of,
    transform,
)
from mmssl.positions import GridPositions, SinCosPositions
from mmssl.scattering import check_scattering, number_of_coefficients, scatter, scattering_2d
from mmssl.tokens import Tokens, gather

PUZZLES = tuple(itertools.permutations(range(4)))  # of four pieces; number 0 leaves them as they are


class Image(Modality):
    """Images as patches.

    Args:
        image_size: height and width that samples are resized (shorter side, bicubic) and centre-cropped to. One number
            means a square. The model itself takes any multiple of the patch size: places on another grid are stretched
            over the one of this size.
        patch_size: height and width of a patch. One number means a square.
        num_channels: channels of an image. Files are converted to grey (1), RGB (3) or RGBA (4); arrays may have any.
        image_mean: mean of each channel, subtracted; pixels lie between 0 and 1. One number is used for all channels.
            None: that of ImageNet for 3 channels, else 0.5.
        image_std: standard deviation of each channel, divided by. As image_mean.
        position_embedding: "sincos", sines and cosines of a patch's row and column (MAE); or "learned", a vector for
            each place on the grid of ``image_size`` (ViT), interpolated linearly for other grids.
        scattering_scales: J, of wavelets whose scattering coefficients tokens contain in place of pixels, one set for
            each 2**J x 2**J of them (Kinakh et al., ScatSimCLR, 2021: 2). 0: pixels.
        scattering_directions: L, of these wavelets (ScatSimCLR: 16).
        normalize_target: reconstruct patches normalised by their own mean and variance (He et al., MAE, 2022).
        distance: "l2", the squared error (MAE), or "l1", the absolute one (SimMIM, GMML), of a pixel or coefficient.
        alteration: what altered patches are filled with: standard normal "noise", "zeros", or the "patches" of another
            image of the batch at the same place.
        alteration_ratio: least and greatest share of altered patches; drawn for each image.
        swap_probability: share of images that get another image's patches in place of ``alteration`` (GMML: 0.5).
        swap_ratio: share of patches that are altered in those images (GMML: 0.3).
        max_block: longest side of a block of hidden or altered patches, as a share of the side of the grid.
        region_ratio: least and greatest height over width of a region that is predicted at once (I-JEPA).
        crop_scale: least and greatest share of the area that a view keeps, resized to the size of the image.
        crop_ratio: least and greatest width over height of a view's crop.
        horizontal_flip: probability that a view is mirrored.
        color_jitter: strength of a view's changes of brightness, contrast and saturation, and four times that of hue.
        gaussian_blur: probability that a view is blurred, with a standard deviation of 0.1 to 2 pixels.
        rotation: greatest angle that a view is turned by, in degrees.
    """

    inputs: ClassVar = ("pixel_values",)
    extensions: ClassVar = IMAGE_ENDINGS
    columns: ClassVar = ("image", "img", "pixel_values")
    mask_styles: ClassVar = ("random", "block")
    affine: ClassVar = True

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_channels: int = 3,
        image_mean: float | tuple[float, ...] | None = None,
        image_std: float | tuple[float, ...] | None = None,
        position_embedding: Literal["sincos", "learned"] = "sincos",
        scattering_scales: int = 0,
        scattering_directions: int = 8,
        normalize_target: bool = True,
        distance: Literal["l1", "l2"] = "l2",
        alteration: Literal["noise", "zeros", "patches"] = "noise",
        alteration_ratio: tuple[float, float] = (0.5, 0.75),
        swap_probability: float = 0.0,
        swap_ratio: float = 0.3,
        max_block: float = 0.3,
        region_ratio: tuple[float, float] = (0.75, 1.5),
        crop_scale: tuple[float, float] = (1.0, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.0,
        color_jitter: float = 0.0,
        gaussian_blur: float = 0.0,
        rotation: float = 0.0,
    ):
        super().__init__()
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        self.num_channels = num_channels
        self.image_mean, self.image_std = channel_statistics(image_mean, image_std, num_channels)
        self.position_embedding = position_embedding
        self.scattering_scales, self.scattering_directions = scattering_scales, scattering_directions
        self.normalize_target, self.distance = normalize_target, distance
        self.alteration, self.alteration_ratio = alteration, pair(alteration_ratio)
        self.swap_probability, self.swap_ratio, self.max_block = swap_probability, swap_ratio, max_block
        self.region_ratio = pair(region_ratio)
        self.crop_scale, self.crop_ratio = pair(crop_scale), pair(crop_ratio)
        self.horizontal_flip, self.color_jitter = horizontal_flip, color_jitter
        self.gaussian_blur, self.rotation = gaussian_blur, rotation
        if position_embedding not in ("sincos", "learned"):  # a config file is not checked against the types
            raise ValueError(f"position_embedding: found {position_embedding!r}; expected one of sincos, learned")
        patch_grid(*self.image_size, self.patch_size)
        check_scattering(scattering_scales, scattering_directions, self.patch_size)
        if color_jitter and num_channels != 3:
            raise ValueError(f"color_jitter needs 3 channels; found num_channels={num_channels}: set color_jitter to 0")

    @property
    def content_shape(self) -> tuple[int, ...]:
        return (math.prod(self.cells) * self.num_channels * self.num_coefficients,)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns, inside a patch, of places with coefficients; without scattering, of pixels."""
        return self.patch_size[0] >> self.scattering_scales, self.patch_size[1] >> self.scattering_scales

    @property
    def num_coefficients(self) -> int:
        """Of one channel at one place; without scattering, the pixel alone."""
        return number_of_coefficients(self.scattering_scales, self.scattering_directions)

    def build(self, width: int) -> Self:
        if self.scattering_scales:
            scattering_2d()  # if it is missing, say so before the first batch
        self.projection = nn.Linear(math.prod(self.content_shape), width)
        return super().build(width)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """Decode a path, bytes, a ``{"bytes", "path"}`` record, a PIL image or an array (H, W), (H, W, C), (C, H, W).

        Arrays of uint8 and uint16 are divided by the greatest value of their type; floats lie between 0 and 1.
        """
        pixels = read_image(sample, self.image_size, self.num_channels, self.patch_size)
        mean, std = self.statistics(pixels)
        return {"pixel_values": (pixels - mean) / std}

    def labelled(self, sample: Any, labels: np.ndarray) -> dict[str, Tensor]:
        """Labels (H, W) of an image of this size are resized with it (the nearest one) and cut to its centre."""
        prepared = self.prepare(sample)
        size = size_of(sample, self.num_channels)
        if labels.shape != size:
            raise ValueError(
                f"found an image of {size[0]}x{size[1]} pixels and labels of shape {labels.shape}; expected a label "
                "for each pixel"
            )
        height, width = covering(*size, self.image_size)
        rows, columns = middle(height, width, self.image_size)
        y, x = (
            torch.arange(side.start, side.stop).add(0.5).mul(old / new).long()
            for side, old, new in ((rows, size[0], height), (columns, size[1], width))
        )
        return {**prepared, "labels": torch.from_numpy(labels.astype(np.int64))[y[:, None], x]}

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return beside(self.image_mean, like, axes=2), beside(self.image_std, like, axes=2)

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}

    def tokenize(self, batch: Batch) -> Tokens:
        """(B, C, H, W) to contents (B, N, patch height * patch width * C), rows first, channels last inside a patch.

        With scattering (B, N, rows * columns * K * C) of the places in a patch, and coefficients before channels.
        """
        pixels = batch["pixel_values"]
        if pixels.dim() != 4 or pixels.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values: found shape {tuple(pixels.shape)}; expected (batch, {self.num_channels}, height, width)"
            )
        rows, columns = patch_grid(pixels.shape[2], pixels.shape[3], self.patch_size)
        if self.scattering_scales:
            pixels = scatter(pixels, self.scattering_scales, self.scattering_directions)
        content = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", h=rows, w=columns)
        # Places are those of the grid of image_size; a finer or coarser grid is stretched over it.
        own_rows, own_columns = patch_grid(*self.image_size, self.patch_size)
        y = (torch.arange(rows, device=pixels.device) + 0.5) * (own_rows / rows) - 0.5
        x = (torch.arange(columns, device=pixels.device) + 0.5) * (own_columns / columns) - 0.5
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        valid = torch.ones(content.shape[:2], dtype=torch.bool, device=pixels.device)
        return Tokens(content=content, coords=coords.expand(len(pixels), -1, -1), valid=valid)

    def embed(self, tokens: Tokens) -> Tensor:
        return self.projection(tokens.content.to(self.projection.weight.dtype))

    def positions(self, width: int) -> nn.Module:
        if self.position_embedding == "learned":
            return GridPositions(width, patch_grid(*self.image_size, self.patch_size))
        return SinCosPositions(width, axes=2, order=(1, 0))

    def raw_features(self, batch: Batch) -> Tensor:
        """The pixels; or the scattering coefficients, as means over the places of a patch."""
        if not self.scattering_scales:
            return batch["pixel_values"].flatten(1)
        return self.tokenize(batch).content.unflatten(-1, (math.prod(self.cells), -1)).mean(dim=2).flatten(1)

    def elements(self, batch: Batch) -> list[Tensor]:
        """(H, W, C) the pixels."""
        return list(batch["pixel_values"].movedim(1, -1))

    def spread(self, features: Tensor, tokens: Tokens, batch: Batch) -> list[Tensor]:
        """(H, W, F) bilinear between the centres of patches; outside of them those of the outermost ones."""
        height, width = batch["pixel_values"].shape[2:]
        rows, columns = patch_grid(height, width, self.patch_size)
        grid = rearrange(features, "b (h w) f -> b f h w", h=rows, w=columns)
        return list(nn.functional.interpolate(grid, (height, width), mode="bilinear").movedim(1, -1))

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        if style == "random":
            return super().hiding_order(tokens, generator, style)
        rows, columns = patch_grid(*self.image_size, self.patch_size)
        longest = [max(1, int(self.max_block * rows)), max(1, int(self.max_block * columns))]
        return block_order(tokens, longest, generator)

    def region(
        self, tokens: Tokens, share: float | Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> Tensor:
        """A rectangle of patches of about this share, height over width from ``region_ratio`` (Assran et al., I-JEPA).

        Its size is drawn once for the batch, its place for each sample.
        """
        return rectangle(tokens, share, self.region_ratio, generator, allowed)

    def alter(self, tokens: Tokens, generator: torch.Generator) -> tuple[Tokens, Tensor]:
        """Fill blocks of whole patches (Atito et al., GMML, 2022); returns which tokens (B, N) were altered."""
        content = tokens.content
        batch, device = len(content), content.device

        def uniform() -> Tensor:
            return torch.rand(batch, generator=generator, device=device)

        copies = 1 if tokens.sample is None else int((tokens.sample == tokens.sample[0]).sum())
        if batch == copies and (self.alteration == "patches" or self.swap_probability):
            raise ValueError("found a batch of one image; patches of another image need at least two")
        least, greatest = self.alteration_ratio
        swapped = uniform() < self.swap_probability
        ratio = torch.where(swapped, self.swap_ratio, least + (greatest - least) * uniform())
        where = self.mask(tokens, ratio, generator, style="block").hidden
        # Copies of one image for several masks lie one after the other; another image is at least so many rows away.
        shift = copies * torch.randint(1, max(batch // copies, 2), (), generator=generator, device=device)
        others = content[(torch.arange(batch, device=device) + shift) % batch]
        if self.alteration == "noise":
            filling = torch.randn(content.shape, generator=generator, device=device, dtype=content.dtype)
        elif self.alteration == "zeros":
            filling = torch.zeros_like(content)
        else:
            filling = others
        filling = torch.where(swapped[:, None, None], others, filling)
        altered = torch.where(where[..., None], filling, content)
        return replace(tokens, content=altered), where

    @property
    def num_places(self) -> int:
        return math.prod(patch_grid(*self.image_size, self.patch_size))

    def places(self, tokens: Tokens) -> Tensor:
        """Number of the patch, rows first, on the grid of ``image_size``, over which others are stretched."""
        rows, columns = patch_grid(*self.image_size, self.patch_size)
        y, x = (bin_of(at, side, side) for at, side in zip(tokens.coords.unbind(-1), (rows, columns), strict=True))
        return y * columns + x

    @property
    def pretexts(self) -> dict[str, int]:
        """Quarter turns of squares, and the orders of four pieces where a grid can be cut in half both ways."""
        rows, columns = patch_grid(*self.image_size, self.patch_size)
        offered = {"rotation": 4} if self.image_size[0] == self.image_size[1] else {}
        return offered | ({"jigsaw": len(PUZZLES)} if not rows % 2 and not columns % 2 else {})

    def transform(self, batch: Batch, pretext: str, number: Tensor) -> Batch:
        """Turn to the left by right angles (Gidaris et al., RotNet, 2018); or cut in 2 x 2 pieces between patches, and
        put them in one of 24 orders (Noroozi and Favaro, 2016, with 3 x 3 pieces). Both without interpolation."""
        pixels = batch["pixel_values"]
        if pretext == "rotation":
            return {**batch, "pixel_values": quarter_turns(pixels, number)}
        if pretext == "jigsaw":
            rows, columns = patch_grid(pixels.shape[2], pixels.shape[3], self.patch_size)
            if rows % 2 or columns % 2:
                raise ValueError(f"found {rows}x{columns} patches; a jigsaw of 2x2 pieces needs even numbers of them")
            pieces = rearrange(pixels, "b c (r h) (s w) -> b (r s) c h w", r=2, s=2)
            pieces = gather(pieces, torch.tensor(PUZZLES, device=number.device)[number])
            return {**batch, "pixel_values": rearrange(pieces, "b (r s) c h w -> b c (r h) (s w)", r=2)}
        return super().transform(batch, pretext, number)

    def target(self, tokens: Tokens) -> Tensor:
        """The content of a patch, as it is or normalised by the patch's mean and unbiased variance."""
        content = tokens.content.detach().float()
        if not self.normalize_target:
            return content
        variance, mean = torch.var_mean(content, dim=-1, keepdim=True)
        return (content - mean) / (variance + 1e-6).sqrt()

    def content_of(self, prediction: Tensor, tokens: Tokens) -> Tensor:
        if not self.normalize_target:
            return prediction
        variance, mean = torch.var_mean(tokens.content.float(), dim=-1, keepdim=True)
        return prediction * (variance + 1e-6).sqrt() + mean

    def picture(self, tokens: Tokens) -> Tensor:
        """The first three channels, or the first one as grey; with scattering the blurred picture, its order 0."""
        rows, columns = (len(tokens.coords[0, :, axis].unique()) for axis in range(2))
        height, width = self.cells
        pixels = rearrange(
            tokens.content.float(), "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=height, q=width
        )[:, : self.num_channels]
        mean, std = self.statistics(pixels)
        pixels = (pixels * std + mean).clamp(0, 1)[:, : 3 if self.num_channels >= 3 else 1]
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """Still pictures, as ``picture`` shows them."""
        return [Frames(pixels[None]) for pixels in self.picture(tokens).numpy(force=True)]

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """Crop, mirror, turn, change colours and blur, with kornia on the whole batch at once."""
        pixels = batch["pixel_values"].float()
        size = (pixels.shape[2], pixels.shape[3])
        steps = crop_and_flip(size, self.crop_scale, self.crop_ratio, self.horizontal_flip)
        if self.rotation:
            steps["rotation"] = kornia_augmentation().RandomRotation(self.rotation, p=1.0)
        steps |= recolor(self.color_jitter)
        if self.gaussian_blur:
            kernel = max(3, min(size) // 10 | 1)  # a tenth of the side, odd (Chen et al., SimCLR, 2020)
            steps["blur"] = kornia_augmentation().RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=self.gaussian_blur)
        if not steps:
            return View(batch)
        mean, std = self.statistics(pixels)
        pixels, parameters = transform(pixels * std + mean, steps, generator)
        return View({**batch, "pixel_values": (pixels - mean) / std}, parameters)
