"""Contrastive learning: SimCLR, MoCo v2 and v3, with MoCHi's negatives and transformed features, as one objective.

A view of a sample should be nearer to another view of it than to other samples. Of unit vectors, with the query q of
one view, the key k of the other one and negatives n, in both directions:

    loss = -log( exp(q.k / t) / (exp(q.k / t) + sum over n of exp(q.n / t)) )

* Chen et al., "SimCLR", ICML 2020: keys are the other view, with gradient; negatives are all other views of the batch.
  ``momentum=None``.
* He et al., "MoCo", CVPR 2020, and Chen et al., "MoCo v2", 2020: keys are of a moving average of model and projector,
  negatives of a queue of earlier keys. ``momentum=(0.999, 0.999)``, ``queue_size=65536``, ``batch_norm=False``.
* Chen et al., "MoCo v3", ICCV 2021, and Atito et al., "SiT", 2021: such keys, negatives are those of the batch's other
  view. ``momentum=(0.99, 1.0)``, ``scale_by_temperature=True``; MoCo v3 has a predictor, and SiT ``alter_queries``.
* Kalantidis et al., "MoCHi", NeurIPS 2020: more negatives, mixed from those of the queue that are nearest to the query.
  ``hard_negatives``, ``mixed_negatives``, ``query_mixed_negatives``.
* Zhu et al., "Improving contrastive learning by visualizing feature transformation", ICCV 2021: positives are pushed
  apart, q' = l q + (1 - l) k and k' = l k + (1 - l) q with l > 1, and negatives mixed. ``extrapolation`` and
  ``interpolation``.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.collectives import from_first_process, gather_batch, rank, world_size
from mmssl.feature_queue import FeatureQueue
from mmssl.heads import BatchNorm, mlp
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, represent, views_of
from mmssl.teacher import Teacher
from mmssl.tokens import Tokens


class Contrastive(Objective):
    """Tell which of many representations is that of another view of the same sample (InfoNCE).

    What is compared is a projection of the mean of the valid tokens, for the papers' class token or average pool.

    Args:
        model: the model to train.
        temperature: what scores are divided by (SimCLR: 0.1; MoCo v2 and v3, SiT: 0.2).
        projector_layers: linear layers between the representation and what is compared (SimCLR: 2; MoCo v3: 3).
        projector_hidden_size: width between the layers of the projector and of the predictor (SimCLR: 2048).
        projector_size: width of what is compared (SimCLR: 128; MoCo v3: 256).
        batch_norm: batch normalisation after each of these layers, the last one's without scale (MoCo v2: without any).
        predictor_layers: linear layers that queries have more than keys (MoCo v3: 2). 0: none.
        momentum: of the moving average of model and projector that keys are from, at the first step and at the last
            one, along a cosine. None: keys are from the model itself, with gradient (SimCLR).
        queue_size: number of keys of earlier steps that are the negatives, of both views. 0: the batch's are.
        alter_queries: queries are read from altered tokens, as the modality alters them, keys from clean ones (SiT).
        scale_by_temperature: the loss is the sum of both directions times 2 * temperature (MoCo v3), not their mean.
        hard_negatives: how many negatives of the queue, those nearest to a query, are mixed (MoCHi: 1024 of 16384).
        mixed_negatives: so many mixtures of two of them for each query (MoCHi: 1024).
        query_mixed_negatives: so many mixtures of one of them with the query (MoCHi: 128).
        extrapolation: query and key are pushed apart by 1 + a number from a Beta distribution with this parameter, one
            for a batch (Zhu et al.: 2.0). None: they are not.
        interpolation: negatives of the queue are mixed in pairs by a number from such a distribution (Zhu et al.: 1.6).
            None: they are not.
    """

    references: ClassVar = (
        'Chen et al., "A simple framework for contrastive learning of visual representations" (SimCLR), ICML 2020',
        'He et al., "Momentum contrast for unsupervised visual representation learning" (MoCo), CVPR 2020',
        'Chen et al., "Improved baselines with momentum contrastive learning" (MoCo v2), arXiv 2020',
        'Chen et al., "An empirical study of training self-supervised vision transformers" (MoCo v3), ICCV 2021',
        'Atito et al., "SiT: self-supervised vision transformer", arXiv 2021',
        'Kalantidis et al., "Hard negative mixing for contrastive learning" (MoCHi), NeurIPS 2020',
        'Zhu et al., "Improving contrastive learning by visualizing feature transformation", ICCV 2021',
    )

    def __init__(
        self,
        model: MMSSLModel,
        temperature: float = 0.1,
        projector_layers: int = 2,
        projector_hidden_size: int = 512,
        projector_size: int = 128,
        batch_norm: bool = True,
        predictor_layers: int = 0,
        momentum: tuple[float, float] | None = None,
        queue_size: int = 0,
        alter_queries: bool = False,
        scale_by_temperature: bool = False,
        hard_negatives: int = 0,
        mixed_negatives: int = 0,
        query_mixed_negatives: int = 0,
        extrapolation: float | None = None,
        interpolation: float | None = None,
    ):
        super().__init__(model)
        for name, number, least in (
            ("projector_layers", projector_layers, 1),
            ("projector_hidden_size", projector_hidden_size, 1),
            ("projector_size", projector_size, 1),
            ("predictor_layers", predictor_layers, 0),
            ("queue_size", queue_size, 0),
            ("hard_negatives", hard_negatives, 0),
            ("mixed_negatives", mixed_negatives, 0),
            ("query_mixed_negatives", query_mixed_negatives, 0),
        ):
            if number < least:
                raise ValueError(f"{name}: found {number}; expected at least {least}")
        for name, value in (
            ("temperature", temperature),
            ("extrapolation", extrapolation),
            ("interpolation", interpolation),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name}: found {value}; expected a number above 0")
        if momentum is None and (queue_size or predictor_layers or alter_queries):
            raise ValueError(
                f"found queue_size {queue_size}, predictor_layers {predictor_layers} and alter_queries {alter_queries} "
                "with momentum=None; expected none of them: they are of keys from a moving average, so set momentum, "
                "for example to [0.99, 1.0]"
            )
        if not queue_size and (hard_negatives or extrapolation is not None or interpolation is not None):
            raise ValueError(
                "hard_negatives, extrapolation and interpolation: expected a queue, found queue_size 0; set it, for "
                "example to 4096, or leave them out"
            )
        least = 2 if mixed_negatives else 1 if query_mixed_negatives else 0
        if not least <= hard_negatives <= queue_size:
            raise ValueError(
                f"hard_negatives: found {hard_negatives} with mixed_negatives {mixed_negatives}, query_mixed_negatives "
                f"{query_mixed_negatives} and queue_size {queue_size}; expected {least} to the size of the queue"
            )
        self.require("view", "views of each sample", "a modality with views, or an objective that needs none")
        if alter_queries:
            self.require("alter", "alter_queries=True", "alter_queries=False")
        self.temperature, self.projector_layers = temperature, projector_layers
        self.projector_hidden_size, self.projector_size = projector_hidden_size, projector_size
        self.batch_norm, self.predictor_layers = batch_norm, predictor_layers
        self.momentum = None if momentum is None else (momentum[0], momentum[1])
        self.queue_size, self.alter_queries, self.scale_by_temperature = queue_size, alter_queries, scale_by_temperature
        self.hard_negatives, self.mixed_negatives = hard_negatives, mixed_negatives
        self.query_mixed_negatives = query_mixed_negatives
        self.extrapolation, self.interpolation = extrapolation, interpolation

        hidden, out = projector_hidden_size, projector_size
        self.projector = head([model.config.hidden_size, *[hidden] * (projector_layers - 1), out], batch_norm)
        if predictor_layers:
            self.predictor = head([out, *[hidden] * (predictor_layers - 1), out], batch_norm)
        self.init_heads(model.config)
        if self.momentum is not None:
            self.teacher = Teacher(model, self.momentum, "cosine")
            self.teacher_projector = Teacher(self.projector, self.momentum, "cosine")
        if queue_size:
            self.queue = FeatureQueue(queue_size, out)
        self.waiting: list[Tensor] = []  # keys of this step, which enter the queue after it

    def after_step(self, progress: float) -> None:
        if self.momentum is not None:
            self.teacher.follow(self.model, progress)
            self.teacher_projector.follow(self.projector, progress)
        if self.waiting:
            self.queue.put(torch.cat(self.waiting))
            self.waiting = []

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        views = views_of(modality, batch, generator)
        read = [modality.alter(view, generator)[0] for view in views] if self.alter_queries else views
        represented = [represent(self.model, modality, each) for each in read]
        queries = [self.query(each) for each in represented]
        keys = queries if self.momentum is None else self.keys(modality, views)
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for number, (query, key) in enumerate(zip(queries, reversed(keys), strict=True)):
            negatives, excluded = self.negatives(keys, number)
            metrics = metrics or score_metrics(query, key, negatives, excluded)  # of the first view's queries
            extra = None
            if self.hard_negatives:
                extra = mixtures(
                    query, negatives, self.hard_negatives, self.mixed_negatives, self.query_mixed_negatives, generator
                )
            if self.extrapolation is not None:
                query, key = extrapolate(query, key, 1 + beta(self.extrapolation, generator))
            if self.interpolation is not None:
                order = torch.randperm(self.queue_size, generator=generator, device=query.device)
                negatives = interpolate(negatives, beta(self.interpolation, generator), from_first_process(order))
            losses.append(info_nce(query, key, negatives, self.temperature, excluded, extra).mean())
        loss = torch.stack(losses).mean()
        if self.scale_by_temperature:
            loss = loss * 2 * 2 * self.temperature
        if self.queue_size and self.training:
            self.waiting = [torch.cat([*self.waiting, *keys])[-self.queue_size :]]
        return ObjectiveOutput(loss, metrics, represented[0].detach())

    def query(self, represented: Tensor) -> Tensor:
        """(B, d) unit vectors that look for their keys."""
        projected = self.projector(represented)
        return unit(self.predictor(projected) if self.predictor_layers else projected)

    @torch.no_grad()
    def keys(self, modality: Modality, views: list[Tokens]) -> list[Tensor]:
        """(B, d) unit vectors of each view, as the moving averages of model and projector see it."""
        model, projector = self.teacher.module, self.teacher_projector.module
        return [unit(projector(represent(model, modality, view))) for view in views]

    def negatives(self, keys: list[Tensor], number: int) -> tuple[Tensor, Tensor | None]:
        """What queries of this view (0 or 1) are told apart from, (K, d), and which of it not, (B, K) bool.

        Without a queue it is what the global batch has: the other view's keys, or in SimCLR both views. What is of a
        query's own sample, its key among it, is no negative.
        """
        if self.queue_size:
            return self.queue.features, None
        count = len(keys[0])
        if count * world_size() < 2:
            raise ValueError(
                "Contrastive: found a batch of 1 sample; expected at least 2, as negatives are other samples of the "
                "batch: make it larger, or set momentum and queue_size"
            )
        of_views = keys if self.momentum is None else [keys[1 - number]]
        negatives = torch.cat([gather_batch(key) for key in of_views])
        own = rank() * count + torch.arange(count, device=negatives.device)
        sample = torch.arange(len(negatives), device=negatives.device) % (count * world_size())
        return negatives, own[:, None] == sample


def head(widths: list[int], batch_norm: bool) -> nn.Sequential:
    """A projector or predictor, normalised at its end too if at all: batch normalisation without scale and shift."""
    return nn.Sequential(mlp(widths, batch_norm), *([BatchNorm(widths[-1], affine=False)] if batch_norm else []))


def unit(values: Tensor) -> Tensor:
    """Divided by their lengths, in full precision."""
    return nn.functional.normalize(values.float(), dim=-1)


def similarity(query: Tensor, others: Tensor) -> Tensor:
    """(B, d) and (K, d) to inner products (B, K), in full precision."""
    with torch.autocast(query.device.type, enabled=False):
        return query.float() @ others.float().T


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    excluded: Tensor | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of finding the positive among all candidates by inner products (van den Oord et al., 2018).

    Args:
        query: (B, d).
        positive: (B, d), one for each query.
        negatives: (K, d), shared by all queries.
        temperature: what the inner products are divided by.
        excluded: (B, K) bool, which of these are no negatives of a query. None: all are.
        extra: (B, S, d), further negatives of each query. None: there are none.

    Returns:
        (B,) loss of each query.
    """
    scores = similarity(query, negatives)
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    columns = [(query * positive).sum(dim=-1, keepdim=True), scores]
    if extra is not None:
        columns.append((query[:, None] * extra).sum(dim=-1))
    scores = torch.cat(columns, dim=1) / temperature
    return nn.functional.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long), reduction="none")


@torch.no_grad()
def mixtures(
    query: Tensor, negatives: Tensor, hard: int, mixed: int, query_mixed: int, generator: torch.Generator
) -> Tensor:
    """MoCHi's negatives (B, mixed + query_mixed, d) of unit length, from the ``hard`` nearest to each query (B, d).

    a n_i + (1 - a) n_j of two different ones, a from 0 to 1; and b q + (1 - b) n_j with the query, b from 0 to 0.5, so
    that the query is never the greater part.
    """
    rows, device = len(query), query.device
    hardest = similarity(query, negatives).topk(hard, dim=1).indices

    def draw(low: int, count: int) -> Tensor:
        return torch.randint(low, hard, (rows, count), generator=generator, device=device)

    def uniform(count: int) -> Tensor:
        return torch.rand(rows, count, generator=generator, device=device)[..., None]

    made: list[Tensor] = []
    if mixed:
        one, share = draw(0, mixed), uniform(mixed)
        other = (one + draw(1, mixed)) % hard
        one, other = (hardest.gather(1, index) for index in (one, other))
        made.append(share * negatives[one] + (1 - share) * negatives[other])
    if query_mixed:
        other, share = hardest.gather(1, draw(0, query_mixed)), uniform(query_mixed) / 2
        made.append(share * query[:, None] + (1 - share) * negatives[other])
    return unit(torch.cat(made, dim=1)) if made else query.new_empty(rows, 0, query.shape[1])


def extrapolate(query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Push both (B, d) apart along the line through them, by a weight of at least 1; their lengths grow.

    Of unit vectors with inner product s the new one is s + 2 weight (1 - weight) (1 - s), at most s.
    """
    return weight * query + (1 - weight) * key, weight * key + (1 - weight) * query


def interpolate(negatives: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """Each of the negatives (K, d) mixed with the one that it meets in ``order`` (K,); not normalised again."""
    return weight * negatives + (1 - weight) * negatives[order]


def beta(parameter: float, generator: torch.Generator) -> Tensor:
    """A number from a Beta distribution whose parameters are equal, the same one on all processes."""
    gammas = torch._standard_gamma(torch.full((2,), parameter, device=generator.device), generator=generator)
    return from_first_process(gammas[0] / gammas.sum())


@torch.no_grad()
def score_metrics(query: Tensor, key: Tensor, negatives: Tensor, excluded: Tensor | None) -> dict[str, Tensor]:
    """What the loss is made of, before negatives are mixed, positives pushed apart and scores divided by anything."""
    positive, scores = (query * key).sum(dim=-1), similarity(query, negatives)
    kept = torch.ones_like(scores) if excluded is None else (~excluded).float()
    mean = (scores * kept).sum() / kept.sum()
    hardest = scores.masked_fill(kept == 0, -torch.inf).amax(dim=1)
    return {
        "positive_similarity": positive.mean(),
        "positive_similarity_std": positive.std(correction=0),
        "negative_similarity": mean,
        "negative_similarity_std": ((scores - mean).square() * kept).sum().div(kept.sum()).sqrt(),
        "accuracy": (positive > hardest).float().mean(),
        "uniformity": uniformity(query),
    }


def uniformity(features: Tensor) -> Tensor:
    """log of the mean of exp(-2 |z - z'|^2) over pairs of unit vectors (Wang and Isola, 2020), 0 if all are equal."""
    count = len(features)
    if count < 2:
        return features.new_zeros(())
    exponent = 4 * similarity(features, features) - 4
    exponent = exponent.masked_fill(torch.eye(count, dtype=torch.bool, device=features.device), -torch.inf)
    return exponent.flatten().logsumexp(dim=0) - torch.tensor(count * (count - 1.0)).log()
