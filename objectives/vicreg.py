"""VICReg: two views' features agree, while each channel keeps a spread and no two channels say the same.

Bardes et al., "VICReg: variance-invariance-covariance regularization for self-supervised learning", ICLR 2022. With z
the projection of a view, (B, d), and its variances and covariances over the batch, divided by B - 1:

    invariance = mean over samples and channels of (z1 - z2)^2
    variance   = mean over views and channels i of max(0, 1 - sqrt(Var_i + 0.0001))
    covariance = sum over views of the sum over i != j of Cov_ij^2, divided by d
    loss       = 25 * invariance + 25 * variance + 1 * covariance

These are the means of the released code. The paper's equations sum the variance term over the two views, so that their
25 is 50 here, and the invariance over channels.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mmssl.collectives import sum_over_processes, world_size
from mmssl.heads import projector
from mmssl.modeling import MMSSLModel
from mmssl.monitors import effective_rank
from mmssl.objectives.base import Batch, Objective, ObjectiveOutput, represent, views_of


class VICReg(Objective):
    """Make two views' features equal, their variances 1 and their covariances 0.

    What is projected is the mean of a view's tokens, in place of the paper's average pool.

    Args:
        model: the model to train.
        projector_layers: linear layers of the projector, which the paper calls expander.
        projector_hidden_size: width of its hidden layers (paper: 8192).
        projector_size: number of channels d of its output (paper: 8192).
        invariance_weight: of the distance of two views.
        variance_weight: of channels whose standard deviation is below 1.
        covariance_weight: of what two channels have in common.
    """

    references: ClassVar = (
        'Bardes et al., "VICReg: variance-invariance-covariance regularization for self-supervised '
        'learning", ICLR 2022',
    )

    def __init__(
        self,
        model: MMSSLModel,
        projector_layers: int = 3,
        projector_hidden_size: int = 2048,
        projector_size: int = 2048,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
    ):
        super().__init__(model)
        weights = {"invariance": invariance_weight, "variance": variance_weight, "covariance": covariance_weight}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name}_weight: found {weight}; expected 0 or more")
        if not any(weights.values()):
            raise ValueError("invariance_weight, variance_weight and covariance_weight: found 0; expected one above 0")
        self.require("view", "two views of each sample", "a modality with views, or an objective that needs none")
        self.projector_layers, self.projector_hidden_size = projector_layers, projector_hidden_size
        self.projector_size = projector_size
        self.invariance_weight, self.variance_weight = invariance_weight, variance_weight
        self.covariance_weight = covariance_weight

        width = model.config.hidden_size
        self.projector = projector(width, projector_layers, projector_hidden_size, projector_size)
        self.init_heads(model.config)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        embeddings = [represent(self.model, modality, tokens) for tokens in views_of(modality, batch, generator)]
        one, two = (self.projector(embedding).float() for embedding in embeddings)

        invariance = (one - two).square().mean()  # the mean over processes, which DDP takes, is that of the batch
        deviations, covariances = zip(*(deviation_and_covariance(each) for each in (one, two)), strict=True)
        variance = torch.stack(deviations).neg().add(1).relu().mean()
        covariance = torch.stack(covariances).sum()
        loss = (
            self.invariance_weight * invariance + self.variance_weight * variance + self.covariance_weight * covariance
        )
        metrics = {
            "invariance": invariance.detach(),
            "variance": variance.detach(),
            "covariance": covariance.detach(),
            "projection_std": deviations[0].mean().detach(),
            "projection_rank": effective_rank(one.detach()),
        }
        return ObjectiveOutput(loss, metrics, embeddings[0].detach())


def deviation_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, d) over the global batch, in full precision: standard deviation (d,), and the sum of squared covariances.

    The deviation is ``sqrt(variance + 0.0001)``; the sum is of pairs of different channels, divided by d.

    Raises:
        ValueError: a global batch of one sample, which has no variance.
    """
    count = len(features) * world_size()
    if count < 2:
        raise ValueError("variance over the batch: found a batch of 1 sample; expected at least 2: make it larger")
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        centred = features - sum_over_processes(features.sum(dim=0)) / count
        matrix = sum_over_processes(centred.T @ centred) / (count - 1)
    return (matrix.diagonal() + 1e-4).sqrt(), 2 * matrix.triu(1).square().sum() / len(matrix)
