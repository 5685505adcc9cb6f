"""Self-distillation: BYOL, DINO and iBOT as one objective.

Predict, from one view, what a teacher says of another view; the teacher is an exponential moving average of the encoder
and its head. With s_v and t_v what student and teacher say of view v:

    loss = mean over pairs of different views u, v of d(t_u, s_v)

* Grill et al., "BYOL", NeurIPS 2020: ``prototypes=0``. What is said is a projection, a predictor of the student's own
  stands behind it, and d is the squared error of vectors of length 1, which is 2 - 2 cos.
* Caron et al., "DINO", ICCV 2021: ``prototypes=K``. What is said is a distribution over K prototypes: the softmax of
  the cosines of the projection with each, over a temperature, and d is the cross-entropy. The teacher's is sharper, and
  a moving average of its scores, the centre, is taken off: together these keep it from saying the same of all samples.
  Further ``local_views``, small pieces of a view, are read by the student alone.
* Zhou et al., "iBOT", ICLR 2022: ``token_weight=1``. Part of the student's tokens is hidden by a mask token, and at
  each hidden one it predicts what the teacher, which reads them all, says of the same token with the same head:

    loss += token_weight * mean over hidden tokens i of CE(t(x)_i, s(x with hidden tokens)_i)
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.collectives import sum_over_processes, world_size
from mmssl.heads import mlp
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.monitors import spread
from mmssl.objectives.base import Objective, ObjectiveOutput, global_mean, piece_of, represent, views_of
from mmssl.teacher import Teacher
from mmssl.tokens import Tokens, gather


class SelfDistillation(Objective):
    """Predict from one view of a sample what a moving-average teacher says of another one.

    What is projected is the mean of a view's tokens, in place of the papers' average pool or class token. As in the
    papers, a run with prototypes saves the teacher as its model, and one without, the student.

    Args:
        model: the model to train.
        prototypes: number K of prototypes (DINO: 65536). 0: projections are compared as they are (BYOL).
        projector_layers: linear layers of the projector (BYOL: 2; DINO: 3). Between them are batch normalisation and
            ReLU without prototypes, and GELU with them.
        projector_hidden_size: width of the hidden layers of projector and predictor (BYOL: 4096; DINO: 2048).
        projector_size: width of the projection (BYOL, DINO: 256).
        momentum: of the teacher, at the first step and at the last one, along half a period of a cosine.
        local_views: further views, of which the student reads a piece and the teacher nothing (DINO: 8 or 10).
        local_scale: least and greatest share of a view's tokens in such a piece; drawn once for each view of a batch.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, at the beginning and after the warm-up.
        teacher_temperature_warmup: share of training in which it grows, in a straight line (DINO: 0.3).
        centre_momentum: share of the centre that a step keeps. 1: nothing is taken off the teacher's scores.
        freeze_prototypes: share of training, at the beginning, in which prototypes stay as they are (DINO: 0.01).
        token_weight: of the loss of hidden tokens (iBOT: 1). 0: no tokens are hidden.
        mask_ratio: share of hidden tokens in the student's views, local ones excepted.
        mask_style: how hidden tokens are chosen, one of the modality's ("random", "block", ...).
    """

    references: ClassVar = (
        'Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning" (BYOL), NeurIPS 2020',
        'Caron et al., "Emerging properties in self-supervised vision transformers" (DINO), ICCV 2021',
        'Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022',
    )

    progress: Tensor

    def __init__(
        self,
        model: MMSSLModel,
        prototypes: int = 0,
        projector_layers: int = 2,
        projector_hidden_size: int = 2048,
        projector_size: int = 256,
        momentum: tuple[float, float] = (0.996, 1.0),
        local_views: int = 0,
        local_scale: tuple[float, float] = (0.05, 0.4),
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        teacher_temperature_warmup: float = 0.3,
        centre_momentum: float = 0.9,
        freeze_prototypes: float = 0.01,
        token_weight: float = 0.0,
        mask_ratio: float = 0.3,
        mask_style: str = "random",
    ):
        super().__init__(model)
        if min(projector_layers, projector_hidden_size, projector_size) < 1:
            raise ValueError(
                f"found projector_layers {projector_layers}, projector_hidden_size {projector_hidden_size} and "
                f"projector_size {projector_size}; expected at least 1 of each"
            )
        if prototypes < 0 or prototypes == 1:
            raise ValueError(f"prototypes: found {prototypes}; expected 0, or 2 and more")
        if local_views < 0:
            raise ValueError(f"local_views: found {local_views}; expected 0 or more")
        if len(local_scale) != 2 or not 0 < local_scale[0] <= local_scale[1] <= 1:
            raise ValueError(
                f"local_scale: found {list(local_scale)}; expected least and greatest share, above 0, at most 1"
            )
        if len(teacher_temperature) != 2 or min(student_temperature, *teacher_temperature) <= 0:
            raise ValueError(
                f"student_temperature and teacher_temperature: found {student_temperature} and "
                f"{list(teacher_temperature)}; expected a number above 0, and two of them"
            )
        for name, share, least in (
            ("teacher_temperature_warmup", teacher_temperature_warmup, "above 0"),
            ("centre_momentum", centre_momentum, "from 0"),
            ("freeze_prototypes", freeze_prototypes, "from 0"),
        ):
            if not 0 <= share <= 1 or (share == 0 and least == "above 0"):
                raise ValueError(f"{name}: found {share}; expected a number {least} to 1")
        if token_weight < 0 or (token_weight and not prototypes):
            raise ValueError(
                f"token_weight: found {token_weight} with prototypes={prototypes}; expected 0, or a weight above 0 and "
                "prototypes, of which hidden tokens are told by their distribution"
            )
        if token_weight and not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio: found {mask_ratio}; expected a share between 0 and 1, both excluded")
        self.require("view", "two views of each sample", "a modality with views, or an objective that needs none")
        for modality in model.adapters.values():
            if token_weight and mask_style not in modality.mask_styles:
                offered = ", ".join(modality.mask_styles)
                raise ValueError(f"{modality.name} has no mask style {mask_style!r}; it offers: {offered}")
        self.prototypes, self.projector_layers = prototypes, projector_layers
        self.projector_hidden_size, self.projector_size = projector_hidden_size, projector_size
        self.momentum = (momentum[0], momentum[1])
        self.local_views, self.local_scale = local_views, (local_scale[0], local_scale[1])
        self.student_temperature = student_temperature
        self.teacher_temperature = (teacher_temperature[0], teacher_temperature[1])
        self.teacher_temperature_warmup, self.centre_momentum = teacher_temperature_warmup, centre_momentum
        self.freeze_prototypes, self.token_weight = freeze_prototypes, token_weight
        self.mask_ratio, self.mask_style = mask_ratio, mask_style

        hidden = [projector_hidden_size] * (projector_layers - 1)
        widths = [model.config.hidden_size, *hidden, projector_size]
        self.head = PrototypeHead(widths, prototypes) if prototypes else mlp(widths)
        if isinstance(self.head, PrototypeHead):
            self.head.frozen.fill_(freeze_prototypes > 0)
            self.centre = Centre(prototypes, centre_momentum)
        else:
            self.predictor = mlp([projector_size, projector_hidden_size, projector_size])
        if token_weight:
            self.token_centre = Centre(prototypes, centre_momentum)
            self.mask_token = nn.Parameter(torch.empty(model.config.hidden_size))
            nn.init.normal_(self.mask_token, std=model.config.initializer_range)
        self.init_heads(model.config)
        self.register_buffer("progress", torch.zeros(()))
        self.teacher = Teacher(model, self.momentum, schedule="cosine")
        self.teacher_head = Teacher(self.head, self.momentum, schedule="cosine")

    @property
    def trained(self) -> MMSSLModel:
        return self.teacher.module if self.prototypes else self.model

    def after_step(self, progress: float) -> None:
        self.teacher.follow(self.model, progress)
        self.teacher_head.follow(self.head, progress)
        self.progress.fill_(progress)
        for module in self.children():
            if isinstance(module, Centre):
                module.move()
            elif isinstance(module, PrototypeHead):
                module.frozen.fill_(progress < self.freeze_prototypes)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        views = views_of(modality, batch, generator)
        targets, predictions, embeddings, of_tokens = [], [], [], []
        for view in views:
            known = self.teacher_reads(modality, view)
            targets.append(self.teacher_says(view.pool(known)))
            if not self.token_weight:
                embeddings.append(represent(self.model, modality, view))
            else:
                mask = modality.mask(view, self.mask_ratio, generator, self.mask_style)
                content = modality.embed(view)
                content = torch.where(mask.hidden[..., None], self.mask_token.to(content.dtype), content)
                read = self.model.encode(modality, view, content).tokens
                embeddings.append(view.pool(read))
                target = self.teacher_says(gather(known, mask.hidden_index), mask.hidden_valid)
                prediction = self.student_says(gather(read, mask.hidden_index))
                of_tokens.append(global_mean(self.distance(target, prediction), mask.hidden_valid.float()))
            predictions.append(self.student_says(embeddings[-1]))
        for view in views_of(modality, batch, generator, self.local_views):
            piece = piece_of(modality, view, self.local_scale, generator)
            predictions.append(self.student_says(represent(self.model, modality, piece)))

        pairs = [(target, said) for u, target in enumerate(targets) for v, said in enumerate(predictions) if u != v]
        loss = torch.stack([self.distance(target, said).mean() for target, said in pairs]).mean()
        metrics = self.metrics(torch.cat(targets))
        if self.token_weight:
            tokens = torch.stack(of_tokens).mean()
            metrics |= {"views": loss.detach(), "tokens": tokens.detach()}
            loss = loss + self.token_weight * tokens
        return ObjectiveOutput(loss, metrics, embeddings[0].detach())

    def student_says(self, features: Tensor) -> Tensor:
        """Of (..., D): logarithms of a distribution over prototypes, or predictions of length 1."""
        said = self.head(features)
        if self.prototypes:
            return (said.float() / self.student_temperature).log_softmax(dim=-1)
        return nn.functional.normalize(self.predictor(said).float(), dim=-1)

    @torch.no_grad()
    def teacher_reads(self, modality: Modality, tokens: Tokens) -> Tensor:
        """(B, N, D) the teacher's outputs."""
        teacher = self.teacher.module
        return teacher.encode(teacher.adapters[modality.name], tokens).tokens

    @torch.no_grad()
    def teacher_says(self, features: Tensor, counts: Tensor | None = None) -> Tensor:
        """Of samples (B, D), or of tokens (B, M, D) of which those in ``counts`` (B, M) count.

        Returns:
            A distribution over prototypes, or projections of length 1.
        """
        said = self.teacher_head.module(features).float()
        if not self.prototypes:
            return nn.functional.normalize(said, dim=-1)
        centre = self.centre if counts is None else self.token_centre
        start, end = self.teacher_temperature
        temperature = start + (end - start) * (self.progress / self.teacher_temperature_warmup).clamp(max=1)
        if self.training:
            centre.see(said, torch.ones_like(said[:, 0], dtype=torch.bool) if counts is None else counts)
        return ((said - centre.mean) / temperature).softmax(dim=-1)

    def distance(self, target: Tensor, said: Tensor) -> Tensor:
        """(...) of each sample or token: cross-entropy, or squared error."""
        return -(target * said).sum(dim=-1) if self.prototypes else (target - said).square().sum(dim=-1)

    def metrics(self, target: Tensor) -> dict[str, Tensor]:
        """Whether the teacher says the same of all samples. Entropies are relative to that of a uniform choice."""
        if not self.prototypes:
            return {"projection_spread": spread(target) * target.shape[1] ** 0.5}
        most, mean = math.log(self.prototypes), sum_over_processes(target.mean(dim=0)) / world_size()
        return {
            "entropy_of_mean": torch.special.entr(mean).sum() / most,
            "entropy": torch.special.entr(target).sum(dim=1).mean() / most,
        }


class PrototypeHead(nn.Module):
    """Cosines of a projection with prototypes (Caron et al., 2021): (..., D) to (..., K).

    Prototypes have length 1, as those of the released code with its weight norm of fixed length.
    """

    frozen: Tensor

    def __init__(self, widths: Sequence[int], prototypes: int):
        super().__init__()
        self.projector = mlp(widths, batch_norm=False, activation=nn.GELU)
        self.prototypes = nn.Linear(widths[-1], prototypes, bias=False)
        self.register_buffer("frozen", torch.tensor(False))

    def forward(self, features: Tensor) -> Tensor:
        projection = nn.functional.normalize(self.projector(features), dim=-1)
        weight = torch.where(self.frozen, self.prototypes.weight.detach(), self.prototypes.weight)  # or a gradient of 0
        return nn.functional.linear(projection, nn.functional.normalize(weight, dim=1))


class Centre(nn.Module):
    """A moving average of what the teacher scores prototypes with, over the global batches of steps.

    Args:
        width: number of prototypes K.
        momentum: share that a step keeps.
    """

    mean: Tensor

    def __init__(self, width: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.seen: list[tuple[Tensor, Tensor]] = []  # since the last step: sums of scores, and of how many they are

    def see(self, scores: Tensor, counts: Tensor) -> None:
        """Remember scores (..., K) of this process, where ``counts`` (...), until the step is done."""
        total = scores.masked_fill(~counts[..., None], 0.0).flatten(0, -2).sum(dim=0)
        self.seen.append((total, counts.sum().float()))

    @torch.no_grad()
    def move(self) -> None:
        """Once after each optimiser step, on all processes."""
        if self.seen:
            total, count = (sum_over_processes(torch.stack(each).sum(dim=0)) for each in zip(*self.seen, strict=True))
            self.mean.lerp_(total / count.clamp(min=1), 1 - self.momentum)
            self.seen.clear()
