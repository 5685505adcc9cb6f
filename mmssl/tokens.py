"""Tokens and Mask: the vocabulary that modalities, the encoder and objectives share. Imports nothing of the project."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Tokens:
    """A batch of token sequences: the only thing that passes from a modality to the encoder and the objectives.

    Content and place are separate, so that an objective can hide tokens before they are embedded, replace them, alter
    their content, shuffle them, or ask for the place of a token whose content the model never sees.

    Attributes:
        content: (B, N, *V) what each token contains before it is embedded: the pixels of a patch, a log-mel frame.
        coords: (B, N, P) float, where each token lies: (y, x), (t,), ... Never part of the content.
        valid: (B, N) bool, False for padding, which is never attended to, never hidden and never a target.
        edges: (2, E) long, optional: token ``edges[0]`` may be read by token ``edges[1]``, both as flat indices
            ``row * N + position``. None: all valid tokens of a row read each other.
        sample: (B,) long, optional: the sample each row belongs to, where one has several rows. None: row = sample.
        prior: (B, N, N) float, optional: added to what token j (last axis) scores with token i before the softmax of
            each attention, for what is known beforehand of how much tokens matter to each other.
    """

    content: Tensor
    coords: Tensor
    valid: Tensor
    edges: Tensor | None = None
    sample: Tensor | None = None
    prior: Tensor | None = None

    def select(self, index: Tensor, valid: Tensor) -> "Tokens":
        """The tokens at ``index``, (B, K) long; edges to other tokens are dropped.

        ``valid`` (B, K) says which of them count, as the flags of a ``Mask`` do: of these none comes twice in a row.
        """
        edges, valid = self.edges, valid & gather(self.valid, index)
        if edges is not None:
            batch, length = self.valid.shape
            kept = index.shape[1]
            rows = torch.arange(batch, device=index.device)[:, None]
            new_index = torch.full((batch * length,), -1, device=index.device)
            new_index[(index + rows * length)[valid]] = torch.arange(batch * kept, device=index.device)[valid.flatten()]
            edges = new_index[edges]
            edges = edges[:, (edges >= 0).all(dim=0)]
        return replace(
            self,
            content=gather(self.content, index),
            coords=gather(self.coords, index),
            valid=valid,
            edges=edges,
            prior=None if self.prior is None else gather(gather(self.prior, index).transpose(1, 2), index).mT,
        )

    def repeat(self, times: int) -> "Tokens":
        """Each row ``times`` times, one after the other: (B * times, N, ...), for several masks of one sample.

        ``pool`` brings the copies together again.
        """
        if times == 1:
            return self
        edges, sample = self.edges, self.sample
        if sample is None:
            sample = torch.arange(len(self.valid), device=self.valid.device)
        if edges is not None:
            length = self.valid.shape[1]
            row, position = edges // length, edges % length
            copies = torch.arange(times, device=edges.device)[:, None, None]
            edges = ((row * times + copies) * length + position).transpose(0, 1).flatten(1)
        return replace(
            self,
            content=self.content.repeat_interleave(times, dim=0),
            coords=self.coords.repeat_interleave(times, dim=0),
            valid=self.valid.repeat_interleave(times, dim=0),
            edges=edges,
            sample=sample.repeat_interleave(times, dim=0),
            prior=None if self.prior is None else self.prior.repeat_interleave(times, dim=0),
        )

    def pool(self, hidden: Tensor) -> Tensor:
        """Mean of ``hidden`` (B, N, D) over the valid tokens of each sample: (number of samples, D)."""
        weight = self.valid.float()
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a sum in half precision would lose digits, or overflow
            total, count = torch.einsum("bnd,bn->bd", hidden.float(), weight), weight.sum(dim=1, keepdim=True)
        if self.sample is not None:
            samples = int(self.sample.max()) + 1
            total = total.new_zeros(samples, total.shape[1]).index_add_(0, self.sample, total)
            count = count.new_zeros(samples, 1).index_add_(0, self.sample, count)
        return (total / count.clamp(min=1)).to(hidden.dtype)


@dataclass
class Mask:
    """Which tokens are hidden, as indices, so that work is done on visible or on hidden tokens alone.

    Rectangular: rows with fewer tokens than the longest are filled up with other tokens, marked by the valid flags.

    Attributes:
        hidden: (B, N) bool, True where a token is hidden. Padding is never hidden.
        visible_index: (B, K) long, in order of position; ``visible_valid`` (B, K) is False where it is filling.
        hidden_index: (B, M) long, in order of position; ``hidden_valid`` (B, M) is False where it is filling.
    """

    hidden: Tensor
    visible_index: Tensor
    visible_valid: Tensor
    hidden_index: Tensor
    hidden_valid: Tensor

    @classmethod
    def from_hidden(cls, hidden: Tensor, valid: Tensor) -> "Mask":
        """Build the indices from booleans: ``hidden`` and ``valid`` are (B, N)."""
        hidden = hidden & valid
        return cls(hidden, *indices_of(valid & ~hidden), *indices_of(hidden))


def indices_of(members: Tensor) -> tuple[Tensor, Tensor]:
    """Where (B, N) booleans are True: indices (B, K) in order of position, and validity, False where it is filling."""
    longest = int(members.sum(dim=1).max())
    index = members.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    return index, members.gather(1, index)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """``values`` (B, N, *V) at ``index`` (B, K) long: (B, K, *V)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]
