"""Objective: a self-supervised loss that knows tokens and the encoder, and never asks which modality they came from."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.collectives import sum_over_processes, world_size
from mmssl.encoder import EncoderConfig, init_weights
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.tokens import Tokens, indices_of


@dataclass
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: scalar; the mean over ranks is the loss of the global batch.
        metrics: further scalars to log, detached. One named "trivial" is what this loss would be if the same were
            predicted whatever is read, the mean of what is to be predicted: the loss is logged as a share of it too.
        embedding: (samples, D) pooled output of the encoder, detached, for the monitors.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None


class Objective(nn.Module):
    """One module that owns the model, its own heads and, if it needs one, the teacher; its forward is the loss.

    The arguments of ``__init__`` after ``model`` are its configuration: typed, documented, and turned into flags.

    Attributes:
        needs_labels: whether batches hold, beside what the modality makes of the samples, their ``labels``: (B,) float.
            Only a supervised objective reads them; ``split_labels`` takes them off before a modality sees the batch.

    Class attributes:
        references: the papers, each a line of authors, title, venue and year, for whoever cites a model.
    """

    references: ClassVar[Sequence[str]] = ()
    needs_labels: bool = False

    def __init__(self, model: MMSSLModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        """The loss of one batch; all randomness but dropout's is drawn from ``generator``, on the batch's device."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called once after each optimiser step, with the share of training that is done; moves teachers on."""

    def shown(self, modality: Modality, tokens: Tokens, generator: torch.Generator) -> dict[str, Tokens]:
        """What people may look at of a few samples, by its name: the samples, and what the objective makes of them.

        What is NaN is hidden, and left blank in pictures. In evaluation mode, without gradient.
        """
        return {"original": tokens}

    @property
    def trained(self) -> MMSSLModel:
        """The model that a finished run saves: the student, unless the paper evaluates the teacher."""
        return self.model

    def require(self, method: str, why: str, instead: str) -> None:
        """Refuse, when the objective is built, a modality that does not offer an optional method."""
        for modality in self.model.adapters.values():
            if not modality.offers(method):
                raise ValueError(
                    f"{type(self).__name__} with {why} needs a modality with {method!r}, which {modality.name} does "
                    f"not offer; what works: {instead}"
                )

    def require_aligned(self, why: str, instead: str) -> None:
        """Refuse, when the objective is built, a modality whose samples have no places in common: see ``mix``."""
        for modality in self.model.adapters.values():
            if not modality.aligned:
                raise ValueError(
                    f"{type(self).__name__} with {why} mixes samples token by token, but tokens of two samples of "
                    f"{modality.name} do not lie at the same places; what works: {instead}"
                )

    def init_heads(self, config: EncoderConfig) -> None:
        """Give the objective's own modules start values, as the encoder's were."""
        for name, child in self.named_children():
            if name != "model":
                with torch.no_grad():
                    child.apply(lambda module: init_weights(module, config))


def split_labels(batch: Batch) -> tuple[Batch, Tensor | None]:
    """What the modality made of the samples, which is all that it and the model know; and their labels (B,), if any."""
    return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")


class Shared:
    """What objectives that read one batch in turn make once: random views, and what the model makes of them.

    While it is entered, ``views_of`` gives each objective the same views in the same order, and ``represent`` remembers
    what it has returned for them. Each calls ``begin`` before it reads.
    """

    current: "Shared | None" = None

    def __enter__(self) -> "Shared":
        self.views: list[Tokens] = []
        self.outputs: dict[tuple[int, int, bool], Tensor] = {}
        Shared.current = self
        return self

    def __exit__(self, *error: object) -> None:
        Shared.current = None

    def begin(self) -> None:
        self.taken = 0

    def take(self, count: int, make: Callable[[], Tokens]) -> list[Tokens]:
        """The next views of the objective at hand; those that none before it has asked for are made."""
        end = self.taken + count
        self.views += [make() for _ in range(end - len(self.views))]
        views, self.taken = self.views[self.taken : end], end
        return views


def views_of(modality: Modality, batch: Batch, generator: torch.Generator, count: int = 2) -> list[Tokens]:
    """Tokens of so many random views of each sample; warns where the first two are the same for all samples."""

    def make() -> Tokens:
        return modality.tokenize(modality.view(batch, generator).batch)

    views = Shared.current.take(count, make) if Shared.current else [make() for _ in range(count)]
    if count > 1 and not modality.views_compared:
        modality.views_compared = True  # once: it makes the CPU wait for the device
        if torch.equal(views[0].content.nan_to_num(), views[1].content.nan_to_num()):
            warnings.warn(
                f"{modality.name}: found two views of each sample that are equal, so there is nothing to learn from "
                f"comparing them; set options of its views: `mmssl pretrain --modality.help {type(modality).__name__}`",
                stacklevel=2,
            )
    return views


def piece_of(modality: Modality, tokens: Tokens, scale: tuple[float, float], generator: torch.Generator) -> Tokens:
    """A connected part of each row, of a share of its tokens drawn from ``scale`` once for the batch: a local view."""
    least, greatest = scale
    share = least + (greatest - least) * torch.rand((), generator=generator, device=tokens.valid.device)
    return tokens.select(*indices_of(modality.region(tokens, share, generator)))


def represent(model: MMSSLModel, modality: Modality, tokens: Tokens, content: Tensor | None = None) -> Tensor:
    """(samples, D) mean of the model's outputs for the valid tokens: what the model returns as its pooled output.

    ``modality`` may be that of another model, the student's when a teacher reads; ``content`` as in ``encode``.
    """
    shared, key = Shared.current, (id(model), id(tokens), torch.is_grad_enabled())
    if shared and key in shared.outputs and content is None:
        return shared.outputs[key]
    pooled = tokens.pool(model.encode(model.adapters[modality.name], tokens, content).tokens)
    if shared and content is None and any(tokens is view for view in shared.views):
        shared.outputs[key] = pooled
    return pooled


def mix(model: MMSSLModel, modality: Modality, tokens: Tokens, other: Tokens, partner: Tensor, share: Tensor) -> Tensor:
    """Embedded contents of ``share * tokens + (1 - share) * other[partner]``, token by token.

    Where tokens are embedded by an affine map this is the mixture of the inputs (Zhang et al., "mixup", ICLR 2018).
    For modalities whose samples have places in common alone: see ``Objective.require_aligned``.

    Args:
        model: whose embedding is mixed.
        modality: the modality that made the tokens.
        tokens: the tokens to keep a share of; of several rows of a sample, which lie one after the other, each is mixed
            with the row of the same number.
        other: the tokens to mix them with, of as many samples; what is longer than ``tokens`` is cut.
        partner: (samples,) long, which sample of ``other`` each is mixed with. Where that has no token, or padding, the
            content stays as it is.
        share: scalar or (samples,).

    Returns:
        (B, N, D), to be read by ``represent`` or ``encode`` with ``tokens``.
    """
    own, others = (model.adapters[modality.name].embed(each) for each in (tokens, other))
    copies = len(own) // len(partner)
    row = (partner[:, None] * copies + torch.arange(copies, device=partner.device)).flatten()
    missing = own.shape[1] - others.shape[1]  # below 0 where others are cut
    others = nn.functional.pad(others[row], (0, 0, 0, missing))
    there = nn.functional.pad(other.valid[row], (0, missing), value=False)
    share = share.expand(len(partner)).repeat_interleave(copies)[:, None, None].to(own.dtype)
    return torch.where(there[..., None], share * own + (1 - share) * others, own)


def smaller_config(config: EncoderConfig, width: int, layers: int, heads: int, drop_path_rate: float) -> EncoderConfig:
    """The shape of a decoder or predictor: blocks of the encoder's kind at a size of their own, no prefix tokens.

    They fill in tokens anywhere, so that theirs is never causal attention.
    """
    config = copy.deepcopy(config)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = width, layers, heads
    config.intermediate_size, config.drop_path_rate, config.final_norm = None, drop_path_rate, True
    config.class_token, config.num_register_tokens, config.causal_attention = False, 0, False
    return config


def global_mean(loss: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of ``loss`` over the batches of all processes: what DDP's mean over ranks turns into that mean.

    A mean of the ranks' means would weigh a token less where its rank has more of them.
    """
    total = sum_over_processes(weight.sum().detach()) / world_size()
    return (loss * weight).sum() / total.clamp(min=1e-12)


__all__ = [
    "Batch",
    "Modality",
    "Objective",
    "ObjectiveOutput",
    "Shared",
    "global_mean",
    "mix",
    "piece_of",
    "represent",
    "smaller_config",
    "split_labels",
    "views_of",
]
