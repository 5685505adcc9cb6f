"""OBoW: predict, from a piece of a sample, which words of a vocabulary a teacher finds in the whole of it.

Gidaris et al., "OBoW: online bag-of-visual-words generation for self-supervised learning", CVPR 2021. The teacher, a
moving average of the encoder, reads a view and returns tokens t_i. With a vocabulary of K words v_k, tokens of earlier
batches, and f what the student represents a piece of another view by:

    q_ik = softmax over k of -(inv_delta / mu) * |t_i - v_k|^2       how far token i is word k
    y_k  = max over i of q_ik, over their sum over k                 the bag of words of the view
    loss = mean over samples and pieces of KL(y || softmax over k of kappa * f . G(v_k))

mu is a running mean of the squared distance of a token to the nearest word, so that codes stay as sharp while features
grow. Words come and go, so there are no weights for each of them; a network G makes them out of the words. After each
step one random token of each sample takes the place of the oldest words.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from mmssl.collectives import sum_over_processes, world_size
from mmssl.feature_queue import FeatureQueue
from mmssl.heads import BatchNorm
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, piece_of, represent, views_of
from mmssl.objectives.contrastive import similarity, unit
from mmssl.teacher import Teacher
from mmssl.tokens import Tokens

MU_MOMENTUM, MU_WARMUP = 0.99, 10


class BagOfWords(Objective):
    """Predict the bag of words of one view of a sample, by a moving-average teacher, from pieces of other views.

    What is represented is a piece's mean over its valid tokens, for the paper's average pool. As in the paper, a run
    saves the student as its model.

    Args:
        model: the model to train.
        words: number of words K in each vocabulary (OBoW: 8192).
        layers: blocks of the teacher (from 1) whose outputs are put into words, each with a vocabulary of its own; the
            loss is their mean (OBoW: the last two stages of a ResNet). Empty: the teacher's output alone.
        crops: pieces that the student reads, each of a view of its own (OBoW: 2 large and 5 small ones).
        crop_scale: least and greatest share of a view's tokens in a piece; drawn once for each view of a batch.
        inv_delta: sharpness of a token's choice of words (OBoW: 10 with one vocabulary, 15 with two).
        kappa: what the student's scores are multiplied by (OBoW: 5 with one vocabulary, 8 with two).
        momentum: of the teacher, at the first step and at the last one, along half a period of a cosine.
    """

    references: ClassVar = (
        'Gidaris et al., "OBoW: online bag-of-visual-words generation for self-supervised learning", CVPR 2021',
    )

    def __init__(
        self,
        model: MMSSLModel,
        words: int = 2048,
        layers: Sequence[int] = (),
        crops: int = 2,
        crop_scale: tuple[float, float] = (0.08, 0.6),
        inv_delta: float = 10.0,
        kappa: float = 5.0,
        momentum: tuple[float, float] = (0.99, 1.0),
    ):
        super().__init__(model)
        for name, number, least in (("words", words, 2), ("crops", crops, 1)):
            if number < least:
                raise ValueError(f"{name}: found {number}; expected at least {least}")
        depth = model.config.num_hidden_layers
        if len(set(layers)) < len(layers) or any(not 1 <= number <= depth for number in layers):
            raise ValueError(f"layers: found {list(layers)}; expected different ones of blocks 1 to {depth}")
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale: found {list(crop_scale)}; expected least and greatest share, above 0, at most 1"
            )
        for name, value in (("inv_delta", inv_delta), ("kappa", kappa)):
            if value <= 0:
                raise ValueError(f"{name}: found {value}; expected a number above 0")
        self.require("view", "views of each sample", "a modality with views, or an objective that needs none")
        self.words, self.layers, self.crops = words, tuple(layers), crops
        self.crop_scale, self.momentum = (crop_scale[0], crop_scale[1]), (momentum[0], momentum[1])
        self.inv_delta, self.kappa = inv_delta, kappa

        width = model.config.hidden_size
        self.vocabularies = nn.ModuleList(Vocabulary(words, width, inv_delta) for _ in layers or (depth,))
        self.init_heads(model.config)
        self.teacher = Teacher(model, self.momentum, "cosine")

    @property
    def levels(self) -> list["Vocabulary"]:
        """The vocabulary of each of the ``layers``."""
        return cast(list[Vocabulary], list(self.vocabularies))

    def after_step(self, progress: float) -> None:
        self.teacher.follow(self.model, progress)
        for vocabulary in self.levels:
            vocabulary.move()

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        whole, *others = views_of(modality, batch, generator, 1 + self.crops)
        pieces = [
            represent(self.model, modality, piece_of(modality, view, self.crop_scale, generator)) for view in others
        ]
        # Of a sample with several rows, all tokens are one bag.
        samples = len(pieces[0])
        valid = whole.valid.reshape(samples, -1)
        noise = torch.rand(valid.shape, generator=generator, device=valid.device)
        chosen = noise.masked_fill(~valid, -1.0).argmax(dim=1)

        losses: list[Tensor] = []
        metrics: list[dict[str, Tensor]] = []
        for read, vocabulary in zip(self.teacher_reads(modality, whole), self.levels, strict=True):
            tokens = read.float().reshape(samples, valid.shape[1], -1)
            bag, mu = vocabulary(tokens, valid)
            if self.training:
                vocabulary.see(tokens[torch.arange(samples, device=chosen.device), chosen], mu)
            weights = vocabulary.weights()
            losses += [divergence(bag, self.kappa * similarity(piece, weights)).mean() for piece in pieces]
            mean = sum_over_processes(bag.mean(dim=0)) / world_size()
            perplexities = {"perplexity_of_mean": perplexity(mean), "perplexity": perplexity(bag).mean()}
            metrics.append({**perplexities, "mu": mu})
        means = {name: torch.stack([each[name] for each in metrics]).mean() for name in metrics[0]}
        return ObjectiveOutput(torch.stack(losses).mean(), means, pieces[0].detach())

    @torch.no_grad()
    def teacher_reads(self, modality: Modality, tokens: Tokens) -> list[Tensor]:
        """(B, N, D) outputs of the teacher's ``layers``, in order of depth, or of the whole of it."""
        teacher = self.teacher.module
        out = teacher.encode(teacher.adapters[modality.name], tokens, keep_layers=self.layers)
        return out.layers if self.layers else [out.tokens]


class Vocabulary(nn.Module):
    """Words, which are the last tokens that were put in; mu, how far tokens are from the nearest one; and G.

    Args:
        size: number of words K.
        width: D of a token.
        inv_delta: sharpness of the choice of words.
    """

    mu: Tensor
    steps: Tensor

    def __init__(self, size: int, width: int, inv_delta: float):
        super().__init__()
        self.inv_delta = inv_delta
        self.queue = FeatureQueue(size, width)
        self.queue.features.mul_(width**0.5)  # random words to start with, as long as layer-normalised tokens are
        self.register_buffer("mu", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        # All processes have the same words, so the statistics of the global batch of words are those of each process.
        self.weight_maker = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False), BatchNorm(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.seen: list[tuple[Tensor, Tensor]] = []  # since the last step

    @torch.no_grad()
    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens (B, N, D) the bags of words (B, K) of the valid ones, each with sum 1; and mu with this batch."""
        distance = squared_distance(tokens, self.queue.features)
        least = torch.stack([distance.amin(dim=-1).masked_fill(~valid, 0.0).sum(), valid.sum().float()])
        total, count = sum_over_processes(least).unbind()
        # The first words are random and far from all tokens: a mean that remembers them makes all codes alike for long.
        momentum = (self.steps / (self.steps + MU_WARMUP)).clamp(max=MU_MOMENTUM)
        mu = (momentum * self.mu + (1 - momentum) * total / count).clamp(min=1e-12)
        codes = (-self.inv_delta / mu * distance).softmax(dim=-1)
        bag = codes.masked_fill(~valid[..., None], 0.0).amax(dim=1)
        return bag / bag.sum(dim=1, keepdim=True), mu

    def weights(self) -> Tensor:
        """(K, D) what G makes of the words, whatever their length: vectors of length 1, for the student's scores."""
        return unit(self.weight_maker(unit(self.queue.features)))

    def see(self, tokens: Tensor, mu: Tensor) -> None:
        """Remember new words (B, D) and the new mu until the step is done: all of a step is told by the same words."""
        self.seen.append((tokens, mu))

    def move(self) -> None:
        """Once after each optimiser step, on all processes."""
        if self.seen:
            tokens, mu = zip(*self.seen, strict=True)
            self.queue.put(torch.cat(tokens))
            self.mu.copy_(torch.stack(mu).mean())
            self.steps += 1
            self.seen.clear()


def squared_distance(tokens: Tensor, words: Tensor) -> Tensor:
    """(..., D) and (K, D) to (..., K), in full precision."""
    centre = words.mean(dim=0)  # the nearer to 0 all are, the fewer digits the difference below loses
    tokens, words = tokens - centre, words - centre
    with torch.autocast(tokens.device.type, enabled=False):
        product = tokens @ words.T
    return (tokens.square().sum(dim=-1, keepdim=True) + words.square().sum(dim=-1) - 2 * product).clamp(min=0)


def divergence(bag: Tensor, scores: Tensor) -> Tensor:
    """KL(bag || softmax(scores)) of each row of (B, K): cross-entropy less the bag's entropy, so that 0 is best."""
    return (torch.xlogy(bag, bag) - bag * scores.log_softmax(dim=-1)).sum(dim=-1)


def perplexity(distribution: Tensor) -> Tensor:
    """How many of K words (..., K) are in use: from 1 to K."""
    return torch.special.entr(distribution).sum(dim=-1).exp()
