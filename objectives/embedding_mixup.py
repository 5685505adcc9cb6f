"""e-Mix: say which two samples a mixture is of, and how much of each. No views are needed.

Tamkin et al., "DABS: a domain-agnostic benchmark for self-supervised learning", NeurIPS Datasets and Benchmarks 2021,
after Lee et al., "i-Mix: a domain-agnostic strategy for contrastive representation learning", ICLR 2021. Draw for
each sample i of the batch a partner p(i) and a share a_i, and mix their embedded contents token by token. With z_i the
projection of sample i, of length 1, and z~_i that of its mixture ``a_i x_i + (1 - a_i) x_p(i)``:

    loss = -mean over i of  a_i log s_i(i) + (1 - a_i) log s_i(p(i)),    s_i = softmax over all j of z~_i . z_j / t

a_i is drawn from Beta(alpha, alpha), and if it is below 1/2, 1 - a_i is taken, so that i is always the greater part.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.collectives import gather_batch, rank, world_size
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel
from mmssl.monitors import effective_rank
from mmssl.objectives.base import Objective, ObjectiveOutput, mix, represent
from mmssl.objectives.contrastive import similarity, unit


class EmbeddingMixup(Objective):
    """Find, among all samples of the global batch, those that a mixture was made of.

    What is projected, by one linear layer, is the mean of the valid tokens, as in DABS. Partners are of the same
    process, by a random permutation, in which a sample may be its own partner.

    Args:
        model: the model to train.
        alpha: parameter of the Beta distribution that shares are drawn from, one for each sample (DABS: 1).
        temperature: what scores are divided by (DABS: 0.2).
        projector_size: width of what is compared (DABS: 128).
    """

    references: ClassVar = (
        'Tamkin et al., "DABS: a domain-agnostic benchmark for self-supervised learning", NeurIPS Datasets '
        "and Benchmarks 2021",
        'Lee et al., "i-Mix: a domain-agnostic strategy for contrastive representation learning", ICLR 2021',
    )

    def __init__(self, model: MMSSLModel, alpha: float = 1.0, temperature: float = 0.2, projector_size: int = 128):
        super().__init__(model)
        for name, value in (("alpha", alpha), ("temperature", temperature)):
            if value <= 0:
                raise ValueError(f"{name}: found {value}; expected a number above 0")
        if projector_size < 1:
            raise ValueError(f"projector_size: found {projector_size}; expected at least 1")
        self.require_aligned("mixtures of two samples", "ShuffledEmbeddingDetection, which mixes none")
        self.alpha, self.temperature, self.projector_size = alpha, temperature, projector_size
        self.projector = nn.Linear(model.config.hidden_size, projector_size)
        self.init_heads(model.config)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        tokens = modality.tokenize(batch)
        embedding = represent(self.model, modality, tokens)
        count, device = len(embedding), embedding.device
        if count * world_size() < 2:
            raise ValueError(
                "EmbeddingMixup: found a batch of 1 sample; expected at least 2, as a mixture is told from the "
                "batch's other samples: make it larger"
            )
        share = shares(self.alpha, count, generator)
        partner = torch.randperm(count, generator=generator, device=device)
        content = mix(self.model, modality, tokens, tokens, partner, share)
        mixed = unit(self.projector(represent(self.model, modality, tokens, content)))
        candidates = gather_batch(unit(self.projector(embedding)))

        first = rank() * count
        own = first + torch.arange(count, device=device)
        target = wanted(own, first + partner, share, len(candidates))
        scores = similarity(mixed, candidates) / self.temperature
        loss = nn.functional.cross_entropy(scores, target)
        metrics = {
            "accuracy": (scores.argmax(dim=1) == own).float().mean(),  # its own sample before its partner
            "chance": loss.new_tensor(1 / len(candidates)),
            "least_loss": torch.special.entr(target).sum(dim=1).mean(),
            "projection_rank": effective_rank(candidates.detach()),
        }
        return ObjectiveOutput(loss, metrics, embedding.detach())


def shares(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers from 1/2 to 1: of Beta(alpha, alpha) and 1 less it, the greater one."""
    gammas = torch._standard_gamma(torch.full((count, 2), alpha, device=generator.device), generator=generator)
    return (gammas / gammas.sum(dim=1, keepdim=True)).amax(dim=1)


def wanted(own: Tensor, partner: Tensor, share: Tensor, candidates: int) -> Tensor:
    """(B, candidates) how much of each a mixture is made of: ``share`` of its own sample, the rest of its partner."""
    target = torch.zeros(len(own), candidates, device=own.device).scatter(1, own[:, None], share[:, None])
    return target.scatter_add(1, partner[:, None], 1 - share[:, None])
