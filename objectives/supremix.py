"""SupReMix: supervised contrast for labels that are quantities, with mixtures that know their own label.

Wu, Dong et al., "Mixup your own pairs", 2023. With z_i the projection of sample i, of length 1, and y_i its label:

    hard positive  z+ = unit(a z_l + (1 - a) z_h),  y_l < y_i < y_h,  a = (y_h - y_i) / (y_h - y_l): its label is y_i
    hard negative  z- = unit(b z_i + (1 - b) z_j),  y_j not y_i,      b from Beta:  its label is b y_i + (1 - b) y_j
    loss = mean over i, and over i's positives p, of  -log e(p) / (e(p) + sum over i's negatives n of w_n e(n))
    e(x) = exp(z_i . x / t),  w_n = 1 + m |y_n - y_i| / (greatest label - least)

Positives are the samples of i's label and hard positives, negatives all other samples and hard negatives. No views.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.collectives import gather_batch, rank
from mmssl.heads import projector
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel
from mmssl.monitors import effective_rank
from mmssl.objectives.base import Objective, ObjectiveOutput, global_mean, represent, split_labels
from mmssl.objectives.contrastive import similarity, unit


class SupReMix(Objective):
    """Find mixtures that have the label of a sample among samples and mixtures that have others. Needs labels.

    What is mixed and compared is a projection of the mean of the valid tokens. A sample that has no positive, for
    example that of the least label, is compared with by others and has no loss of its own.

    Args:
        model: the model to train.
        temperature: what scores are divided by.
        mixed_positives: hard positives of each sample that has labels on both sides of its own.
        mixed_negatives: hard negatives of each sample.
        window: how far from a sample's label those that its hard positives are mixed of may lie, in units of the label.
            None: anywhere.
        tolerance: labels that are no further apart than this count as the same, in units of the label.
        beta: parameters of the Beta distribution that a sample's own share of its hard negatives is drawn from.
        magnify: how much more a negative weighs at the greatest distance of labels than at none. 0: all weigh the same.
        detach_mix: mixtures get no gradient; the sample that is compared with them does.
        projector_layers: linear layers between the representation and what is compared.
        projector_hidden_size: width between the layers of the projector.
        projector_size: width of what is compared.
    """

    references: ClassVar = ('Wu, Dong et al., "Mixup your own pairs" (SupReMix), arXiv 2023',)

    needs_labels = True

    def __init__(
        self,
        model: MMSSLModel,
        temperature: float = 0.1,
        mixed_positives: int = 8,
        mixed_negatives: int = 8,
        window: float | None = None,
        tolerance: float = 0.0,
        beta: tuple[float, float] = (2.0, 8.0),
        magnify: float = 1.0,
        detach_mix: bool = False,
        projector_layers: int = 2,
        projector_hidden_size: int = 512,
        projector_size: int = 128,
    ):
        super().__init__(model)
        if temperature <= 0:
            raise ValueError(f"temperature: found {temperature}; expected a number above 0")
        for name, value in (
            ("mixed_positives", mixed_positives),
            ("mixed_negatives", mixed_negatives),
            ("tolerance", tolerance),
            ("magnify", magnify),
        ):
            if value < 0:
                raise ValueError(f"{name}: found {value}; expected at least 0")
        if window is not None and window <= tolerance:
            raise ValueError(f"window: found {window} with tolerance {tolerance}; expected more than that, or None")
        if len(beta) != 2 or min(beta) <= 0:
            raise ValueError(f"beta: found {beta}; expected two numbers above 0")
        self.temperature, self.mixed_positives, self.mixed_negatives = temperature, mixed_positives, mixed_negatives
        self.window, self.tolerance, self.beta, self.magnify = window, tolerance, (beta[0], beta[1]), magnify
        self.detach_mix, self.projector_layers = detach_mix, projector_layers
        self.projector_hidden_size, self.projector_size = projector_hidden_size, projector_size
        self.projector = projector(model.config.hidden_size, projector_layers, projector_hidden_size, projector_size)
        self.init_heads(model.config)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        inputs, own = split_labels(batch)
        if own is None:
            raise ValueError("SupReMix: found a batch without labels; expected labels, (B,) float, beside its inputs")
        modality = self.model.modality_of(inputs)
        embedding = represent(self.model, modality, modality.tokenize(inputs))
        anchor: Tensor = unit(self.projector(embedding))
        everyone, labels = gather_batch(anchor), gather_batch(own)
        if len(labels) < 3:
            raise ValueError(
                f"SupReMix: found a batch of {len(labels)} samples; expected at least 3, as positives and negatives of "
                "a sample are others of the batch: make it larger"
            )
        distance = (own[:, None] - labels).abs()  # (B, N)
        itself = torch.arange(len(own), device=own.device)[:, None] + rank() * len(own)
        itself = itself == torch.arange(len(labels), device=own.device)
        positive, same = [similarity(anchor, everyone)], distance <= self.tolerance
        is_positive = [same & ~itself]

        ranks = labels.argsort(stable=True)
        if self.mixed_positives:
            low, high, share, enclosed = self.enclosing(own, labels[ranks], generator)
            positive.append(self.mixed(anchor, everyone[ranks[low]], everyone[ranks[high]], share))
            is_positive.append(enclosed[:, None].expand_as(share))
        negative = [positive[0]]
        distances = [distance]
        if self.mixed_negatives:
            other, apart = self.others(own, labels[ranks], generator)
            gammas = torch.tensor(self.beta, device=own.device).expand(*other.shape, 2)
            gammas = torch._standard_gamma(gammas, generator=generator)
            share = gammas[..., 0] / gammas.sum(dim=-1)
            negative.append(self.mixed(anchor, anchor[:, None], everyone[ranks[other]], share))
            distances.append((1 - share) * apart)

        pulled, counted = torch.cat(positive, dim=1), torch.cat(is_positive, dim=1)
        pushed, gaps = torch.cat(negative, dim=1), torch.cat(distances, dim=1)
        is_negative = gaps > self.tolerance
        weight = 1 + self.magnify * gaps / (labels.max() - labels.min()).clamp(min=torch.finfo(gaps.dtype).tiny)
        losses = contrast(pulled / self.temperature, counted, pushed / self.temperature + weight.log(), is_negative)
        metrics = {
            "anchors": counted.any(dim=1).float().mean(),
            "positive_similarity": mean_where(pulled.detach(), counted),
            "negative_similarity": mean_where(pushed.detach(), is_negative),
            "label_correlation": correlation(distance, -positive[0].detach(), ~itself),
            "projection_rank": effective_rank(everyone.detach()),
        }
        return ObjectiveOutput(global_mean(losses, counted.any(dim=1).float()), metrics, embedding.detach())

    def mixed(self, anchor: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        """(B, M) similarities of anchors (B, d) to ``share * first + (1 - share) * second`` (B, M, d), made unit."""
        mixture = unit(share[..., None] * first + (1 - share[..., None]) * second)
        return (anchor[:, None] * (mixture.detach() if self.detach_mix else mixture)).sum(dim=-1)

    def enclosing(
        self, own: Tensor, ordered: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs of labels, one below and one above each of ``own`` (B,), drawn from ``ordered`` (N,), which ascends.

        Returns:
            Where in ``ordered`` the lower and the upper ones stand, (B, mixed_positives) long; the share of the lower
            ones that makes the mixtures' label that of ``own``; and which of ``own`` have such pairs, (B,) bool.
        """
        window = math.inf if self.window is None else self.window
        lowest, lower = torch.searchsorted(ordered, own - window), torch.searchsorted(ordered, own - self.tolerance)
        upper = torch.searchsorted(ordered, own + self.tolerance, right=True)
        highest = torch.searchsorted(ordered, own + window, right=True)
        enclosed = (lowest < lower) & (upper < highest)
        draw = torch.rand(len(own), 2 * self.mixed_positives, generator=generator, device=own.device)
        below, above = draw.chunk(2, dim=1)
        low = (lowest[:, None] + (below * (lower - lowest)[:, None]).long()).clamp(max=len(ordered) - 1)
        high = (upper[:, None] + (above * (highest - upper)[:, None]).long()).clamp(max=len(ordered) - 1)
        share = (ordered[high] - own[:, None]) / (ordered[high] - ordered[low])
        return low, high, torch.where(enclosed[:, None], share, 0.5), enclosed  # where there is none, any finite number

    def others(self, own: Tensor, ordered: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Labels that are not each of ``own`` (B,), drawn from ``ordered`` (N,), which ascends.

        Returns:
            Where in ``ordered`` they stand, (B, mixed_negatives) long; and how far they lie from ``own``, which is not
            above the tolerance where there are no others.
        """
        first = torch.searchsorted(ordered, own - self.tolerance)[:, None]
        same = torch.searchsorted(ordered, own + self.tolerance, right=True)[:, None] - first
        draw = torch.rand(len(own), self.mixed_negatives, generator=generator, device=own.device)
        other = (draw * (len(ordered) - same)).long()
        other = (other + same * (other >= first)).clamp(max=len(ordered) - 1)  # leaps over those of the same label
        return other, (ordered[other] - own[:, None]).abs()


def contrast(positive: Tensor, is_positive: Tensor, negative: Tensor, is_negative: Tensor) -> Tensor:
    """(B,) mean over positives p of -log exp(p) / (exp(p) + sum over negatives of exp(n)); 0 where there are none.

    Args:
        positive: (B, P) scores.
        is_positive: (B, P) bool, which of them are.
        negative: (B, N) scores.
        is_negative: (B, N) bool, which of them are.
    """
    # A large number and not infinity: the gradient of a row without negatives would be NaN on its way to 0.
    total = negative.masked_fill(~is_negative, torch.finfo(negative.dtype).min).logsumexp(dim=1, keepdim=True)
    loss = nn.functional.softplus(total - positive)
    return (loss * is_positive).sum(dim=1) / is_positive.sum(dim=1).clamp(min=1)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values that count, 0 where none does."""
    return (values * where).sum() / where.sum().clamp(min=1)


def correlation(first: Tensor, second: Tensor, where: Tensor) -> Tensor:
    """Pearson's, of the pairs of numbers that count; 0 where one of them is the same for all."""
    first, second = ((each - mean_where(each, where)) * where for each in (first, second))
    return (first * second).sum() / (first.square().sum() * second.square().sum()).sqrt().clamp(min=1e-12)
