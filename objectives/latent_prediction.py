"""Latent prediction: I-JEPA, V-JEPA, T-JEPA and data2vec as one objective.

Encode a part of the tokens, and predict from it what a teacher, an exponential moving average of the encoder that sees
everything, says of other tokens:

    loss = mean over targets k, mean over tokens i of target k, of
           d(predictor(encode(context_k), place of i), teacher(x)_i)

* Assran et al., "I-JEPA", CVPR 2023: the context is a large block less four small ones, which are the targets.
  ``context="shared"``, smooth L1, targets layer-normalised.
* Thimonier et al., "T-JEPA", ICLR 2025: a random part of a table's columns is the context, and random parts of the rest
  are targets. ``context="first"``, squared error, targets as they are.
* Bardes et al., "V-JEPA", TMLR 2024: each target is a union of blocks, and all that is not in it is its context.
  ``context="complement"``, absolute error, targets layer-normalised.
* Baevski et al., "data2vec 2.0", ICML 2023: several random masks share one pass of the teacher, whose last blocks are
  averaged. ``context="complement"``, ``target_style="random"``, ``average_layers``. Its convolutional decoder and its
  noise in hidden places are a transformer and a mask token here.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.modalities.base import Batch, Modality, nearest
from mmssl.modeling import MMSSLModel
from mmssl.monitors import effective_rank, spread
from mmssl.objectives.base import Objective, ObjectiveOutput, global_mean, smaller_config
from mmssl.teacher import Teacher
from mmssl.tokens import Tokens, indices_of

DISTANCES = {
    "l1": nn.functional.l1_loss,
    "l2": nn.functional.mse_loss,
    "smooth_l1": nn.functional.smooth_l1_loss,
}


class LatentPrediction(Objective):
    """Predict a moving-average teacher's representation of some tokens from other tokens.

    A run saves the teacher as its model, which is what the papers evaluate.

    Args:
        model: the model to train.
        num_targets: how many targets there are of each kind (I-JEPA: 4; V-JEPA: 1 1).
        target_blocks: blocks that make up a target of each kind (I-JEPA: 1; V-JEPA: 8 2).
        target_scale: least and greatest share of the tokens in one block, of each kind; drawn once for a batch.
        target_style: a block is a connected "region", as the modality has it, or any "random" tokens.
        context: what the targets are predicted from: a region less all targets, "shared" by them (I-JEPA); a region
            chosen "first", so that targets are of the rest (T-JEPA); or the "complement" of each target (V-JEPA).
        context_scale: least and greatest share of the tokens in the context's region; without effect on "complement".
        distance: of prediction and target, "smooth_l1", "l1" or "l2"; mean over channels.
        normalize_target: layer norm without parameters of each target token.
        average_layers: the target is the mean of these blocks of the teacher, each with mean 0 and variance 1 over the
            tokens of a sample, channel by channel (data2vec: the last 8 to 12). Empty: the teacher's output.
        momentum: of the teacher, at the first step and at the last one.
        views: train on one random view of each sample in place of the sample itself.
        predictor_layers: blocks of the predictor.
        predictor_hidden_size: width of the predictor.
        predictor_attention_heads: attention heads of the predictor.
    """

    references: ClassVar = (
        'Assran et al., "Self-supervised learning from images with a joint-embedding predictive '
        'architecture" (I-JEPA), CVPR 2023',
        'Thimonier et al., "T-JEPA: augmentation-free self-supervised learning for tabular data", ICLR 2025',
        'Bardes et al., "Revisiting feature prediction for learning visual representations from video" '
        "(V-JEPA), TMLR 2024",
        'Baevski et al., "Efficient self-supervised learning with contextualized target representations '
        'for vision, speech and language" (data2vec 2.0), ICML 2023',
    )

    def __init__(
        self,
        model: MMSSLModel,
        num_targets: Sequence[int] = (4,),
        target_blocks: Sequence[int] = (1,),
        target_scale: Sequence[tuple[float, float]] = ((0.15, 0.2),),
        target_style: Literal["region", "random"] = "region",
        context: Literal["shared", "first", "complement"] = "shared",
        context_scale: tuple[float, float] = (0.85, 1.0),
        distance: Literal["smooth_l1", "l1", "l2"] = "smooth_l1",
        normalize_target: bool = True,
        average_layers: Sequence[int] = (),
        momentum: tuple[float, float] = (0.996, 1.0),
        views: bool = True,
        predictor_layers: int = 6,
        predictor_hidden_size: int = 96,
        predictor_attention_heads: int = 4,
    ):
        super().__init__(model)
        if not len(num_targets) == len(target_blocks) == len(target_scale) > 0:
            raise ValueError(
                f"num_targets, target_blocks and target_scale: found {len(num_targets)}, {len(target_blocks)} and "
                f"{len(target_scale)} kinds of targets; expected the same number, at least one"
            )
        if min(*num_targets, *target_blocks, predictor_layers) < 1:
            raise ValueError(
                f"found num_targets {list(num_targets)}, target_blocks {list(target_blocks)} and predictor_layers "
                f"{predictor_layers}; expected at least 1 of each"
            )
        for name, scale in (*(("target_scale", scale) for scale in target_scale), ("context_scale", context_scale)):
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"{name}: found {list(scale)}; expected least and greatest share, above 0, at most 1")
        for name, value, choices in (
            ("target_style", target_style, ("region", "random")),
            ("context", context, ("shared", "first", "complement")),
            ("distance", distance, tuple(DISTANCES)),
        ):
            if value not in choices:
                raise ValueError(f"{name}: found {value!r}; expected one of {', '.join(choices)}")
        if context == "first" and context_scale[1] == 1:
            raise ValueError("context_scale: found 1 with context='first', which leaves nothing to predict; lower it")
        depth = model.config.num_hidden_layers
        if any(not 1 <= number <= depth for number in average_layers):
            raise ValueError(f"average_layers: found {list(average_layers)}; the encoder has blocks 1 to {depth}")
        if views:
            self.require("view", "views=True", "views=False")
        self.num_targets, self.target_blocks = tuple(num_targets), tuple(target_blocks)
        self.target_scale, self.target_style = [(low, high) for low, high in target_scale], target_style
        self.context, self.context_scale = context, (context_scale[0], context_scale[1])
        self.distance, self.normalize_target = distance, normalize_target
        self.average_layers, self.momentum, self.views = tuple(average_layers), (momentum[0], momentum[1]), views
        self.predictor_layers, self.predictor_hidden_size = predictor_layers, predictor_hidden_size
        self.predictor_attention_heads = predictor_attention_heads

        width, inner = model.config.hidden_size, predictor_hidden_size
        self.predictor_input = nn.Linear(width, inner)
        self.predictor = Encoder(smaller_config(model.config, inner, predictor_layers, predictor_attention_heads, 0.0))
        self.predictor_output = nn.Linear(inner, width)
        self.predictor_positions = nn.ModuleDict(
            {name: modality.positions(inner) for name, modality in model.adapters.items()}
        )
        self.mask_tokens = nn.Parameter(torch.empty(len(num_targets), inner))  # one for each kind, as in V-JEPA
        self.init_heads(model.config)
        nn.init.normal_(self.mask_tokens, std=model.config.initializer_range)
        self.teacher = Teacher(model, self.momentum)

    @property
    def trained(self) -> MMSSLModel:
        return self.teacher.module

    def after_step(self, progress: float) -> None:
        self.teacher.follow(self.model, progress)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        if self.views:
            batch = modality.view(batch, generator).batch
        tokens = modality.tokenize(batch)
        wanted = self.target(modality, tokens)
        contexts, targets = self.choose(modality, tokens, generator)
        prediction, target_index, target_valid, encoded, seen = self.predict(modality, tokens, contexts, targets)
        count = targets.shape[1]
        row = torch.arange(len(target_index), device=wanted.device) // count
        target = wanted[row[:, None], target_index]
        loss = DISTANCES[self.distance](prediction.float(), target, reduction="none").mean(dim=-1)
        # The mean over targets of the mean over their tokens, as targets of two kinds differ in size.
        loss, weight = (each.unflatten(0, (-1, count)) for each in (loss, target_valid.float()))
        losses = [global_mean(loss[:, number], weight[:, number]) for number in range(count)]
        outputs = wanted[tokens.valid]
        of_mean = outputs.mean(dim=0).expand_as(target)
        trivial = DISTANCES[self.distance](of_mean, target, reduction="none").mean(dim=-1)
        metrics = {
            "trivial": (trivial * target_valid).sum() / target_valid.sum().clamp(min=1),
            "target_std": spread(outputs),
            "target_rank": effective_rank(outputs),
            "prediction_std": spread(prediction.detach()[target_valid]),
        }
        return ObjectiveOutput(torch.stack(losses).mean(), metrics, seen.pool(encoded.detach()))

    @torch.no_grad()
    def target(self, modality: Modality, tokens: Tokens) -> Tensor:
        """(B, N, D) what the teacher, who reads all tokens, says of each, in full precision."""
        teacher = self.teacher.module
        out = teacher.encode(teacher.adapters[modality.name], tokens, keep_layers=self.average_layers)
        target = out.tokens.float()
        if self.average_layers:
            target = torch.stack([standardized(layer.float(), tokens.valid) for layer in out.layers]).mean(dim=0)
        return nn.functional.layer_norm(target, target.shape[-1:]) if self.normalize_target else target

    def choose(self, modality: Modality, tokens: Tokens, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Contexts (B, 1 or K, N) and targets (B, K, N), bool; no context has a token of a target of its own."""
        valid = tokens.valid[:, None]

        def region(scale: tuple[float, float], copies: int, allowed: Tensor | None = None) -> Tensor:
            """``copies`` pieces (B, copies, N) of one size."""
            least, greatest = scale
            share = least + (greatest - least) * torch.rand((), generator=generator, device=valid.device)
            several = tokens.repeat(copies)
            if allowed is not None:
                allowed = allowed.repeat_interleave(copies, dim=0)
            if self.target_style == "region":
                chosen = modality.region(several, share, generator, allowed)
            else:
                noise = torch.rand(several.valid.shape, generator=generator, device=valid.device)
                chosen = nearest(noise, several.valid, share, several.valid if allowed is None else allowed)
            return chosen.unflatten(0, (-1, copies))

        context = free = None
        if self.context == "first":
            context = region(self.context_scale, 1)
            free = tokens.valid & ~context[:, 0]
        kinds = zip(self.num_targets, self.target_blocks, self.target_scale, strict=True)
        targets = torch.cat(
            [
                region(scale, count * blocks, free).unflatten(1, (count, blocks)).any(dim=2)
                for count, blocks, scale in kinds
            ],
            dim=1,
        )
        if self.context == "shared":
            context = region(self.context_scale, 1) & ~targets.any(dim=1, keepdim=True)
        elif self.context == "complement":
            context = valid & ~targets
        assert context is not None
        # A context that targets have left nothing of gets one token back.
        noise = torch.rand(valid.shape, generator=generator, device=valid.device).masked_fill(~valid, -1.0)
        spare = torch.zeros_like(valid).scatter(2, noise.argmax(dim=2, keepdim=True), True)
        spare = spare & ~context.any(dim=2, keepdim=True)
        return context | spare, targets & ~spare

    def predict(
        self, modality: Modality, tokens: Tokens, contexts: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tokens]:
        """Encode the contexts, and predict each target in a sequence of its own.

        Returns:
            Predictions (B * K, M, D), places (B * K, M) of the tokens that they are of, and which of them count; the
            encoder's outputs for the contexts' tokens, and these tokens.
        """
        count = targets.shape[1]
        context_index, context_valid = indices_of(contexts.flatten(0, 1))
        seen = tokens.repeat(contexts.shape[1]).select(context_index, context_valid)
        out = self.model.encode(modality, seen)
        read = self.predictor_input(out.tokens)
        prefix = self.predictor_input(out.prefix[:, : int(self.model.config.class_token)])
        if contexts.shape[1] < count:
            read, prefix = (each.repeat_interleave(count, dim=0) for each in (read, prefix))
            context_index, context_valid = (
                each.repeat_interleave(count, dim=0) for each in (context_index, context_valid)
            )

        target_index, target_valid = indices_of(targets.flatten(0, 1))
        both = tokens.repeat(count).select(
            torch.cat([context_index, target_index], dim=1), torch.cat([context_valid, target_valid], dim=1)
        )
        kind = torch.repeat_interleave(torch.tensor(self.num_targets, device=read.device))
        mask_token = self.mask_tokens[kind].to(read.dtype).repeat(len(tokens.valid), 1)  # (B * K, width)
        content = torch.cat([read, mask_token[:, None].expand(-1, target_index.shape[1], -1)], dim=1)
        position = self.predictor_positions[modality.name](both.coords)
        predicted = self.predictor(content, position, both.valid, both.edges, prefix=prefix).tokens
        prediction = self.predictor_output(predicted[:, context_index.shape[1] :])
        return prediction, target_index, target_valid, out.tokens, seen


def standardized(values: Tensor, valid: Tensor) -> Tensor:
    """(B, N, D) with mean 0 and variance 1 over the valid tokens of each row, channel by channel."""
    keep, count = valid[..., None].float(), valid.sum(dim=1)[:, None, None].clamp(min=1)
    centred = (values - (values * keep).sum(dim=1, keepdim=True) / count) * keep
    return centred * (centred.square().sum(dim=1, keepdim=True) / count + 1e-5).rsqrt()
