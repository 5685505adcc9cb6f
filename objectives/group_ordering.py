"""Group ordering contrastive learning, GroCo: Shvetsova et al., "Learning by sorting", ICCV 2023.

Sort the similarities of an anchor's positives and of its hardest negatives by a differentiable network (Petersen et
al., "Monotonic differentiable sorting networks", ICLR 2022), and ask that the positives end in the top ranks. With the
soft permutation P, of which P_ir says how far element i of n lies at rank r, k negatives and the positives behind them:

    p_i  = sum over ranks r > k of P_ir              how far element i is among the positives
    loss = mean over i of cross-entropy(p_i, 1 where i is a positive, else 0)

So what counts is the order of two groups and not by how much they differ, and the positives' order does not count.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.collectives import gather_batch, rank, world_size
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, represent, views_of
from mmssl.objectives.contrastive import head, similarity, unit


class GroupOrdering(Objective):
    """Sort views of the same sample above the most similar views of other samples.

    Each view of each sample is an anchor. Its positives are the other views of the sample, its negatives the same view
    of the other samples of the global batch; both without gradient. What is compared is a projection of the mean of the
    valid tokens, for the paper's average pool.

    Args:
        model: the model to train.
        num_views: views of each sample, at least 2.
        num_negatives: how many of the negatives are sorted, those most similar to the anchor.
        steepness: of the comparison of two similarities; the higher, the harder the order.
        projector_layers: linear layers between the representation and what is compared (GroCo: 3).
        projector_hidden_size: width between the layers of the projector (GroCo: 2048).
        projector_size: width of what is compared (GroCo: 2048).
    """

    references: ClassVar = (
        'Shvetsova et al., "Learning by sorting: self-supervised learning with group ordering constraints", ICCV 2023',
        'Petersen et al., "Monotonic differentiable sorting networks", ICLR 2022',
    )

    def __init__(
        self,
        model: MMSSLModel,
        num_views: int = 2,
        num_negatives: int = 10,
        steepness: float = 1.0,
        projector_layers: int = 3,
        projector_hidden_size: int = 512,
        projector_size: int = 512,
    ):
        super().__init__(model)
        for name, number, least in (
            ("num_views", num_views, 2),
            ("num_negatives", num_negatives, 1),
            ("projector_layers", projector_layers, 1),
            ("projector_hidden_size", projector_hidden_size, 1),
            ("projector_size", projector_size, 1),
        ):
            if number < least:
                raise ValueError(f"{name}: found {number}; expected at least {least}")
        if steepness <= 0:
            raise ValueError(f"steepness: found {steepness}; expected a number above 0")
        self.require("view", "views of each sample", "a modality with views, or an objective that needs none")
        self.num_views, self.num_negatives, self.steepness = num_views, num_negatives, steepness
        self.projector_layers, self.projector_hidden_size = projector_layers, projector_hidden_size
        self.projector_size = projector_size

        hidden = [projector_hidden_size] * (projector_layers - 1)
        self.projector = head([model.config.hidden_size, *hidden, projector_size], batch_norm=True)
        self.init_heads(model.config)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        views = views_of(modality, batch, generator, self.num_views)
        represented = [represent(self.model, modality, view) for view in views]
        projected = [unit(self.projector(each)) for each in represented]
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for number, anchor in enumerate(projected):
            others = torch.stack([each for other, each in enumerate(projected) if other != number], dim=1)
            positive = (anchor[:, None] * others.detach()).sum(dim=-1)  # (B, V - 1)
            negative = self.negatives(anchor)
            losses.append(ordering_loss(positive, negative, self.steepness))
            metrics = metrics or {  # of the first view's anchors
                "positive_similarity": positive.detach().mean(),
                "hard_negative_similarity": negative.detach().mean(),
                "accuracy": (positive.detach().amin(dim=1) > negative.detach().amax(dim=1)).float().mean(),
            }
        return ObjectiveOutput(torch.stack(losses).mean(), metrics, represented[0].detach())

    def negatives(self, anchor: Tensor) -> Tensor:
        """(B, k) the greatest similarities to the same view of other samples of the global batch."""
        everyone, count = gather_batch(anchor.detach()), len(anchor)
        if len(everyone) <= self.num_negatives:
            raise ValueError(
                f"GroupOrdering: found a batch of {len(everyone)} samples over {world_size()} processes; num_negatives="
                f"{self.num_negatives} needs at least {self.num_negatives + 1}: make the batch larger, or it smaller"
            )
        own = rank() * count + torch.arange(count, device=anchor.device)
        scores = similarity(anchor, everyone)
        scores = scores.masked_fill(own[:, None] == torch.arange(len(everyone), device=anchor.device), -torch.inf)
        return scores.topk(self.num_negatives, dim=1).values


def ordering_loss(positive: Tensor, negative: Tensor, steepness: float) -> Tensor:
    """Mean over anchors and elements, of similarities (B, P) of positives and (B, k) of negatives."""
    with torch.autocast(positive.device.type, enabled=False):
        # Each group in ascending order: where the groups are in order already, nothing has to move.
        values = torch.cat([negative.sort(dim=1).values, positive.sort(dim=1).values], dim=1).float()
        count = negative.shape[1]
        among_positives = soft_permutation(values, steepness)[:, :, count:].sum(dim=2).clamp(0, 1)
        wanted = (torch.arange(values.shape[1], device=values.device) >= count).float().expand_as(among_positives)
        return nn.functional.binary_cross_entropy(among_positives, wanted)


def soft_permutation(values: Tensor, steepness: float) -> Tensor:
    """How far each of the values (B, n) lies at each rank, lowest first: (B, n, n), rows and columns sum to 1.

    An odd-even transposition network: n layers that compare neighbours, (1, 2), (3, 4), ... and (2, 3), (4, 5), ... in
    turn. Two values a, b exchange with the share 1/2 - atan(steepness * (b - a)) / pi.
    """
    length = values.shape[1]
    # The first row are the values themselves, which are mixed as the elements that they consist of.
    start = torch.eye(length, device=values.device, dtype=values.dtype).expand(len(values), -1, -1)
    rows = torch.cat([values[:, None], start], dim=1)
    for layer in range(length):
        first = layer % 2
        last = first + (length - first) // 2 * 2
        low, high = rows[..., first:last:2], rows[..., first + 1 : last : 2]
        stay = 0.5 + torch.atan(steepness * (high[:, :1] - low[:, :1])) / math.pi
        mixed = torch.stack([stay * low + (1 - stay) * high, (1 - stay) * low + stay * high], dim=-1).flatten(-2)
        rows = torch.cat([rows[..., :first], mixed, rows[..., last:]], dim=-1)
    return rows[:, 1:]
