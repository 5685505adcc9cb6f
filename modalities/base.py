"""Modality: from raw samples to Tokens, and whatever else depends on what the data are."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.discovery import options_of
from mmssl.drawings import Drawing
from mmssl.samples import Samples
from mmssl.tokens import Mask, Tokens, gather

Batch = dict[str, Tensor]


@dataclass
class View:
    """One stochastic view of a batch and the parameters of its transform, one row per sample."""

    batch: Batch
    parameters: dict[str, Tensor] = field(default_factory=dict)


class Modality(nn.Module):
    """What is particular to one kind of data. A subclass lives in a file of its own and gives the file its name.

    The arguments of ``__init__`` are the options that a checkpoint's config stores; they are kept as attributes of the
    same name. A new modality has no parameters: it can prepare, collate and tokenize, which is all that data workers
    and processors need. ``build`` adds the trained part.

    Class attributes:
        inputs: names of the tensors in a batch, the main one first; no two modalities share a main input.
        extensions: endings of the files that hold one sample each.
        columns: names under which data sets usually keep the samples. Empty: a sample is a whole row of a table.
        mask_styles: what ``mask`` offers.
        aligned: whether token i of any two samples lies at the same place, so that tokens have an order and contents
            of two samples can be mixed. Not so for the groups of a point cloud and the nodes of a graph.
        affine: whether ``embed`` is one affine map of contents, the same for all tokens: then what replaces contents
            may as well replace their embeddings, which are smaller.
    """

    inputs: ClassVar[tuple[str, ...]]
    extensions: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[str, ...]]
    mask_styles: ClassVar[tuple[str, ...]] = ("random",)
    aligned: ClassVar[bool] = True
    affine: ClassVar[bool] = False

    distance: Literal["l1", "l2"] = "l2"
    views_compared: bool = False  # whether it is known if this modality's views change anything

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def content_shape(self) -> tuple[int, ...]:
        """Shape V of the content of one token."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The arguments this modality was made with, as the config stores them."""
        return options_of(self)

    def offers(self, method: str) -> bool:
        """Whether this modality has the optional ``view``, ``alter``, ``places`` or ``spread``."""
        return getattr(type(self), method) is not getattr(Modality, method)

    def build(self, width: int) -> Self:
        """Add the trained modules for an encoder of this width; the subclass adds what ``embed`` needs."""
        self.position = self.positions(width)
        return self

    # Data side: runs in the workers and inside the processor.

    def collection(self, source: str) -> Samples | None:
        """The samples of a source that only this modality knows how to read. None: it is no such source.

        Folders with one sample in each file, tables and data sets on the Hub are read for all modalities alike.
        """
        return None

    def fit(self, samples: Samples) -> None:
        """Fill in, once before training, options left open that follow from the training samples alone.

        What is found (columns, statistics) becomes options like others, so that the config stores it. Does nothing by
        default, and nothing where the options are set.
        """

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """Decode and normalise one raw sample.

        Raises:
            ValueError: the sample is malformed; says what was found and what was expected.
        """
        raise NotImplementedError

    def excerpt(self, sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """What is read of a prepared sample at one time: all of it by default, or a part of one that is too large.

        Args:
            sample: what ``prepare`` returned; it is left as it is.
            generator: source of randomness in training. None: the same part at each call, for evaluation.
        """
        return sample

    def labelled(self, sample: Any, labels: np.ndarray) -> dict[str, Tensor]:
        """What ``prepare`` makes of a raw sample, and beside it the "labels" of its elements (pixels, points).

        They go where ``prepare`` and ``excerpt`` put the elements; ``collate`` drops them. Offered with ``spread``.

        Args:
            sample: the raw sample.
            labels: int, one for each element of it, -1 where an element has none.

        Raises:
            ValueError: as ``prepare``; or there are not as many labels as elements.
        """
        raise NotImplementedError(f"{self.name} has no elements with labels")

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        """Put prepared samples into one batch, padded where they differ in length."""
        raise NotImplementedError

    # Device side.

    def tokenize(self, batch: Batch) -> Tokens:
        """Cut a batch into tokens; has no parameters."""
        raise NotImplementedError

    def embed(self, tokens: Tokens) -> Tensor:
        """Contents to vectors, token by token: (B, N, width)."""
        raise NotImplementedError

    def positions(self, width: int) -> nn.Module:
        """A new module that maps coords (B, N, P) to (B, N, width): for the encoder, a decoder or a predictor."""
        raise NotImplementedError

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, F) what a probe reads without any model: the baseline beside every claim of learning."""
        raise NotImplementedError

    def elements(self, batch: Batch) -> list[Tensor]:
        """The values of each element (pixel, point) of each sample, (*E, F) each. Offered with ``spread``."""
        raise NotImplementedError(f"{self.name} has no elements that features of tokens could be spread over")

    def spread(self, features: Tensor, tokens: Tokens, batch: Batch) -> list[Tensor]:
        """Features of tokens interpolated at each element (pixel, point) of each sample. Optional.

        Linear in the features, so that those of one token alone tell its share of each element.

        Args:
            features: (B, N, F), of all tokens, padding too.
            tokens: the tokens of the batch.
            batch: the batch they were cut from.

        Returns:
            (*E, F) for each sample, in the order of its elements in the batch; padding is left out.
        """
        raise NotImplementedError(f"{self.name} has no elements that features of tokens could be spread over")

    def mask(self, tokens: Tokens, ratio: float | Tensor, generator: torch.Generator, style: str = "random") -> Mask:
        """Choose the tokens to hide.

        Of n valid tokens in a row ``int(n * (1 - ratio))`` stay visible, and at least one stays and one goes.

        Args:
            tokens: the tokens to choose from; only their places and validity matter.
            ratio: share of hidden tokens; one for all, or (B,).
            generator: source of randomness, on the device of the tokens.
            style: one of ``mask_styles``.
        """
        if style not in self.mask_styles:
            raise ValueError(f"{self.name} has no mask style {style!r}; it offers: {', '.join(self.mask_styles)}")
        order = self.hiding_order(tokens, generator, style).masked_fill(~tokens.valid, torch.inf)
        count = tokens.valid.sum(dim=1)
        exact = torch.float32 if count.device.type == "mps" else torch.float64  # MPS has no other
        visible = (count.to(exact) * (1 - ratio)).long().clamp(min=1).minimum((count - 1).clamp(min=1))
        rank = order.argsort(dim=1).argsort(dim=1)
        return Mask.from_hidden(rank < (count - visible)[:, None], tokens.valid)

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        """(B, N) tokens with lower values are hidden first. The base class knows the style "random"."""
        return torch.rand(tokens.valid.shape, generator=generator, device=tokens.valid.device)

    def region(
        self, tokens: Tokens, share: float | Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> Tensor:
        """One connected piece of each row, (B, N) bool: what is read or predicted together.

        By default the tokens nearest to a random one; of n valid tokens ``round(n * share)``, at least one, as far as
        there are allowed ones.

        Args:
            tokens: the tokens to choose from; only their places, validity and edges matter.
            share: share of the valid tokens, a number or a scalar tensor.
            generator: source of randomness, on the device of the tokens.
            allowed: (B, N) bool, tokens that may be chosen. None: all valid ones.
        """
        return around_one(tokens, share, generator, tokens.valid if allowed is None else allowed & tokens.valid)

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """One stochastic view of each sample. Optional."""
        raise NotImplementedError(f"{self.name} offers no views")

    def alter(self, tokens: Tokens, generator: torch.Generator) -> tuple[Tokens, Tensor]:
        """Corrupt contents in place of hiding them. Optional.

        Returns:
            New tokens, the given ones stay as they are; and what was altered: (B, N) tokens or (B, N, *V) elements.
        """
        raise NotImplementedError(f"{self.name} offers no alteration")

    @property
    def pretexts(self) -> dict[str, int]:
        """What ``transform`` offers with these options, and the number of transforms of each."""
        return {}

    def transform(self, batch: Batch, pretext: str, number: Tensor) -> Batch:
        """Apply to each sample one of the transforms of a pretext, so that an objective can ask which one it was.

        The result gives no hint but its content: number and validity of tokens do not tell which one it was, and
        padding stays where it is.

        Args:
            batch: the batch; it is left as it is.
            pretext: one of ``pretexts``.
            number: (B,) long, which transform; 0 changes nothing but what all of a pretext change, and all others can
                be undone up to that.

        Raises:
            ValueError: a pretext that is not offered.
        """
        offered = ", ".join(self.pretexts) or "none"
        raise ValueError(f"{self.name} has no pretext {pretext!r} with these options; it offers: {offered}")

    def places(self, tokens: Tokens) -> Tensor:
        """(B, N) long from 0 to below ``num_places``: the place of each token as a class. Optional.

        Only of coords and validity. Where samples differ in length, these are bins of the place relative to the length
        of the row's own valid part, so that padding does not tell them.
        """
        raise NotImplementedError(f"{self.name} offers no places that its tokens could be asked for")

    @property
    def num_places(self) -> int:
        """Number of classes that ``places`` returns."""
        raise NotImplementedError(f"{self.name} offers no places that its tokens could be asked for")

    def target(self, tokens: Tokens) -> Tensor:
        """What reconstruction predicts, (B, N, *V); by default the content."""
        return tokens.content.detach()

    def content_of(self, prediction: Tensor, tokens: Tokens) -> Tensor:
        """From what the head predicts back to content, for pictures; ``tokens`` are the clean ones it belongs to."""
        return prediction

    def picture(self, tokens: Tokens) -> Tensor:
        """Contents as pictures for people, (B, height, width, 3) between 0 and 1; NaN content is left blank."""
        raise NotImplementedError

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """Contents in the form that people look at them in, one for each sample; NaN content is left blank.

        Padding is left out. Drawings of tokens that differ in content alone lie on the same axes.
        """
        raise NotImplementedError

    def sounds(self, batch: Batch) -> list[tuple[np.ndarray, int]] | None:
        """Each sample to listen to: (steps,) between -1 and 1, and steps in a second. None: it makes no sound."""
        return None

    def reconstruction_head(self, width: int) -> nn.Module:
        """A new module from (B, N, width) to the shape of the target; by default that of the content."""
        linear = nn.Linear(width, math.prod(self.content_shape))
        if len(self.content_shape) == 1:
            return linear
        return nn.Sequential(linear, nn.Unflatten(-1, self.content_shape))

    def reconstruction_loss(self, prediction: Tensor, target: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token and how much it counts.

        Args:
            prediction: (B, N, *V).
            target: (B, N, *V).
            where: (B, N) tokens or (B, N, *V) elements that count.

        Returns:
            loss (B, N), the mean over the elements that count; weight (B, N), the number of tokens or elements that
            count. The loss of a batch is ``(loss * weight).sum() / weight.sum()``.
        """
        difference = prediction.float() - target.float()
        error = (difference.abs() if self.distance == "l1" else difference.square()).flatten(2)
        if where.dim() == 2:
            return error.mean(dim=-1), where.float()
        counted = where.flatten(2).float()
        weight = counted.sum(dim=-1)
        return (error * counted).sum(dim=-1) / weight.clamp(min=1), weight


def bin_of(number: Tensor, count: Tensor | int, bins: int) -> Tensor:
    """Which of so many equal bins the middle of each ``number`` from 0 to below ``count`` lies in, long."""
    return ((number + 0.5) * bins / count).long().clamp(0, bins - 1)


ORDERS = tuple(itertools.permutations(range(3)))  # of three segments; number 0 leaves them as they are


def segment_orders(length: Tensor, steps: int, number: Tensor, unit: int = 1) -> tuple[Tensor, Tensor]:
    """Cut rows in three equal segments and put these in one of six orders (Xu et al., VCOP, 2019).

    Segments are whole multiples of ``unit`` steps, if a row has three units. What is left over stays in front, at most
    ``3 * unit - 1`` steps.

    Args:
        length: (B,) steps of each row that are no padding.
        steps: steps of the batch, padding too.
        number: (B,) long, which of ``ORDERS``.
        unit: steps that are not to be torn apart.

    Returns:
        (B, steps) which step comes to stand at each place; and its distance to the nearer end of its segment, from 0,
        ``steps`` where it belongs to none.
    """
    step = torch.arange(steps, device=length.device)
    size = torch.where(length >= 3 * unit, length // (3 * unit) * unit, length // 3)[:, None]
    first, last = length[:, None] - 3 * size, length[:, None]
    segment, inside = (step - first).div(size.clamp(min=1), rounding_mode="floor"), (step - first) % size.clamp(min=1)
    moved = (step >= first) & (step < last)
    source = torch.tensor(ORDERS, device=length.device)[number].gather(1, segment.clamp(0, 2))
    index = torch.where(moved, first + source * size + inside, step)
    return index, torch.where(moved, inside.minimum(size - 1 - inside), steps)


def reversed_rows(length: Tensor, steps: int, turned: Tensor) -> Tensor:
    """(B, steps) which step comes to stand at each place of rows of which those ``turned`` (B,) go backwards."""
    step = torch.arange(steps, device=length.device).expand(len(length), -1)
    return torch.where(turned[:, None] & (step < length[:, None]), length[:, None] - 1 - step, step)


def nearest(distance: Tensor, valid: Tensor, share: float | Tensor, allowed: Tensor) -> Tensor:
    """(B, N) bool: of n valid tokens the ``round(n * share)`` allowed ones of least distance, at least one."""
    count = (valid.sum(dim=1, keepdim=True) * share).round().clamp(min=1)
    rank = distance.masked_fill(~allowed, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count) & allowed


def around_one(tokens: Tokens, share: float | Tensor, generator: torch.Generator, allowed: Tensor) -> Tensor:
    """(B, N) bool: the allowed tokens nearest to a random one of them."""
    noise = torch.rand(allowed.shape, generator=generator, device=allowed.device)
    centre = noise.masked_fill(~allowed, -1.0).argmax(dim=1, keepdim=True)
    distance = (tokens.coords - gather(tokens.coords, centre)).square().sum(dim=-1)
    return nearest(distance, tokens.valid, share, allowed)


def rectangle(
    tokens: Tokens,
    share: float | Tensor,
    ratio: tuple[float, float],
    generator: torch.Generator,
    allowed: Tensor | None = None,
) -> Tensor:
    """(B, N) bool: a rectangle on the last two axes of a grid of tokens, along the whole of the axes before them.

    Height over width is drawn from ``ratio``, evenly on the logarithm's scale, once for the batch; a side that the grid
    cuts off is made up for by the other one. The place is drawn for each row. Only ``allowed`` tokens count; where
    there are none of them in it, those around a random one take its place.
    """
    device, (low, high) = tokens.coords.device, (math.log(side) for side in ratio)
    axes = tokens.coords[..., -2:].unbind(-1)
    place = torch.stack([axis.unique(return_inverse=True)[1] for axis in axes], dim=-1)  # row and column, from 0
    rows, columns = (place.flatten(0, 1).amax(dim=0) + 1.0).unbind()
    aspect = torch.exp(low + (high - low) * torch.rand((), generator=generator, device=device))
    area = share * rows * columns
    height = (area * aspect).sqrt().clamp(max=rows)
    width = (area / height.clamp(min=1)).round().clamp(min=1).minimum(columns)
    height = (area / width).round().clamp(min=1).minimum(rows)
    corner = torch.rand(len(place), 1, 2, generator=generator, device=device)
    first = (corner * (torch.stack([rows - height, columns - width]) + 1)).floor()
    inside = ((place >= first) & (place < first + torch.stack([height, width]))).all(dim=-1) & tokens.valid
    if allowed is None:
        return inside
    inside = inside & allowed
    return torch.where(
        inside.any(dim=1, keepdim=True), inside, around_one(tokens, share, generator, allowed & tokens.valid)
    )


def block_order(tokens: Tokens, longest: Sequence[int], generator: torch.Generator) -> Tensor:
    """Hiding order (B, N) by blocks: random boxes are laid one after the other and hide what they cover.

    Each box begins at a random place of the row's extent and has sides drawn from 1 to ``longest`` (one per axis),
    cut at the border (Atito et al., GMML, 2022). What one box covers is hidden before what the next one covers.
    """
    coords, valid = tokens.coords, tokens.valid[..., None]
    # Enough to cover nearly everything: as many boxes as it takes to lay out the row four times.
    blocks = max(32, round(4 * coords.shape[1] / math.prod((1 + side) / 2 for side in longest)))
    low = coords.masked_fill(~valid, torch.inf).amin(dim=1)[:, None]  # (B, 1, P)
    extent = coords.masked_fill(~valid, -torch.inf).amax(dim=1)[:, None] - low + 1

    def uniform() -> Tensor:
        return torch.rand(len(coords), blocks, coords.shape[-1], generator=generator, device=coords.device)

    start = low + (uniform() * extent).floor()
    side = 1 + (uniform() * torch.tensor(longest, device=coords.device)).floor()
    first = torch.full(tokens.valid.shape, blocks, device=coords.device)
    for number in reversed(range(blocks)):  # over blocks, not samples: memory stays (B, N)
        offset = coords - start[:, number, None]
        covered = ((offset >= 0) & (offset < side[:, number, None])).all(dim=-1)
        first = first.masked_fill(covered, number)
    # Within a block the order is random, so that the last one is cut at the wanted share.
    return first + torch.rand(first.shape, generator=generator, device=first.device)
