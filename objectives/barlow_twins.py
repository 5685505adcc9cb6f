"""Barlow Twins: two views' features agree channel by channel, and no two channels say the same.

Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction", ICML 2021. With z the projection of a
view, (B, d), each channel of which is brought to mean 0 and variance 1 over the batch, and C = z1' z2 / B:

    loss = sum over i of (1 - C_ii)^2 + redundancy_weight * sum over i != j of C_ij^2

Bandara et al., "Guarding Barlow Twins against overfitting with mixed samples", 2023, add, with ``mix_weight`` above 0,
that what is read of a mixture is the mixture of what is read. With zm of the mixture ``a x1 + (1 - a) x2[p]``, where a
is drawn from Beta(1, 1) and p is a permutation of the batch:

    difference = zm - (a z1 + (1 - a) z2[p])
    loss += mix_weight * redundancy_weight * (|difference' z1 / B|^2 + |difference' z2 / B|^2)
"""

from typing import ClassVar

import torch
from torch import Tensor

from mmssl.collectives import from_first_process, sum_over_processes, world_size
from mmssl.heads import BatchNorm, projector
from mmssl.modeling import MMSSLModel
from mmssl.monitors import effective_rank
from mmssl.objectives.base import Batch, Objective, ObjectiveOutput, mix, represent, views_of


class BarlowTwins(Objective):
    """Make the correlation of two views' features the identity.

    What is projected is the mean of a view's tokens, in place of the papers' average pool.

    Args:
        model: the model to train.
        projector_layers: linear layers of the projector.
        projector_hidden_size: width of its hidden layers (paper: 8192).
        projector_size: number of channels d of its output (paper: 8192).
        redundancy_weight: of what two channels have in common (paper: 0.0051; with few channels, 1 / d).
        mix_weight: of the loss of mixed samples, times ``redundancy_weight`` (paper: 2 or 4). 0: no samples are mixed.
    """

    references: ClassVar = (
        'Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction", ICML 2021',
        'Bandara et al., "Guarding Barlow Twins against overfitting with mixed samples", arXiv 2023',
    )

    def __init__(
        self,
        model: MMSSLModel,
        projector_layers: int = 3,
        projector_hidden_size: int = 2048,
        projector_size: int = 2048,
        redundancy_weight: float = 0.0051,
        mix_weight: float = 0.0,
    ):
        super().__init__(model)
        for name, weight in (("redundancy_weight", redundancy_weight), ("mix_weight", mix_weight)):
            if weight < 0:
                raise ValueError(f"{name}: found {weight}; expected 0 or more")
        if mix_weight and not redundancy_weight:
            raise ValueError("mix_weight: it is times redundancy_weight, which is 0; expected both to be above 0")
        self.require("view", "two views of each sample", "a modality with views, or an objective that needs none")
        if mix_weight:
            self.require_aligned("mix_weight above 0", "mix_weight=0")
        self.projector_layers, self.projector_hidden_size = projector_layers, projector_hidden_size
        self.projector_size, self.redundancy_weight, self.mix_weight = projector_size, redundancy_weight, mix_weight

        width = model.config.hidden_size
        self.projector = projector(width, projector_layers, projector_hidden_size, projector_size)
        self.standardize = BatchNorm(projector_size, affine=False)
        self.init_heads(model.config)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        first, second = views_of(modality, batch, generator)
        embedding = represent(self.model, modality, first)
        one = self.standardize(self.projector(embedding))
        two = self.standardize(self.projector(represent(self.model, modality, second)))

        correlation, channels = cross_correlation(one, two), self.projector_size
        same = (1 - correlation.diagonal()).square().sum()
        other = correlation.triu(1).square().sum() + correlation.tril(-1).square().sum()
        loss = same + self.redundancy_weight * other
        metrics = {
            "on_diagonal": (same / channels).detach(),
            "off_diagonal": (other / max(channels * (channels - 1), 1)).detach(),
            "projection_rank": effective_rank(one.detach()),
        }
        if self.mix_weight:
            share = from_first_process(torch.rand((), generator=generator, device=one.device))  # Beta(1, 1)
            partner = torch.randperm(len(one), generator=generator, device=one.device)
            content = mix(self.model, modality, first, second, partner, share)
            mixed = self.standardize(self.projector(represent(self.model, modality, first, content)))
            difference = mixed - (share * one + (1 - share) * two[partner])
            mixing = (
                cross_correlation(difference, one).square().sum() + cross_correlation(difference, two).square().sum()
            )
            loss = loss + self.mix_weight * self.redundancy_weight * mixing
            metrics["mixed"] = (mixing / channels**2).detach()
        return ObjectiveOutput(loss, metrics, embedding.detach())


def cross_correlation(one: Tensor, two: Tensor) -> Tensor:
    """(d, e) mean over the global batch of the products of channels of (B, d) and (B, e), in full precision."""
    with torch.autocast(one.device.type, enabled=False):
        return sum_over_processes(one.float().T @ two.float()) / (len(one) * world_size())
