"""A first-in first-out queue of features: the negatives of MoCo, the vocabulary of OBoW."""

import torch
from torch import Tensor, nn

from mmssl.collectives import gather_batch


class FeatureQueue(nn.Module):
    """The last features that were put in, in buffers, so that checkpoints have them.

    Args:
        size: number of features K that are kept.
        width: of a feature, d.
    """

    features: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"queue: found a size of {size}; expected at least 1")
        features = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("features", nn.functional.normalize(features, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # the row that is overwritten next

    @torch.no_grad()
    def put(self, features: Tensor) -> None:
        """Overwrite the oldest rows by those of all processes, (B, d) each, in the order of rank."""
        features = gather_batch(features.detach()).to(self.features.dtype)[-len(self.features) :]
        row = (self.pointer + torch.arange(len(features), device=features.device)) % len(self.features)
        # A new tensor: the loss of this step may still need the old one for its gradient.
        self.features = self.features.index_copy(0, row, features)
        self.pointer = (self.pointer + len(features)) % len(self.features)
