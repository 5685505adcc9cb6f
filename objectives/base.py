"""Objective: a self-supervised loss that knows tokens and the encoder, and never asks which modality they came from."""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmssl.collectives import sum_over_processes, world_size
from mmssl.encoder import EncoderConfig, init_weights
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.tokens import Tokens


@dataclass
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: scalar; the mean over ranks is the loss of the global batch.
        metrics: further scalars to log, detached.
        embedding: (samples, D) pooled output of the encoder, detached, for the monitors.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None


class Objective(nn.Module):
    """One module that owns the model, its own heads and, if it needs one, the teacher; its forward is the loss.

    The arguments of ``__init__`` after ``model`` are its configuration: typed, documented, and turned into flags.
    """

    def __init__(self, model: MMSSLModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        """The loss of one batch; all randomness but dropout's is drawn from ``generator``, on the batch's device."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called once after each optimiser step, with the share of training that is done; moves teachers on."""

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

    def init_heads(self, config: EncoderConfig) -> None:
        """Give the objective's own modules start values, as the encoder's were."""
        for name, child in self.named_children():
            if name != "model":
                with torch.no_grad():
                    child.apply(lambda module: init_weights(module, config))


def views_of(modality: Modality, batch: Batch, generator: torch.Generator, count: int = 2) -> list[Tokens]:
    """Tokens of so many random views of each sample."""
    return [modality.tokenize(modality.view(batch, generator).batch) for _ in range(count)]


def represent(model: MMSSLModel, modality: Modality, tokens: Tokens) -> Tensor:
    """(samples, D) mean of the model's outputs for the valid tokens: what the model returns as its pooled output.

    ``modality`` may be that of another model, the student's when a teacher reads.
    """
    return tokens.pool(model.encode(model.adapters[modality.name], tokens).tokens)


def smaller_config(config: EncoderConfig, width: int, layers: int, heads: int, drop_path_rate: float) -> EncoderConfig:
    """The shape of a decoder or predictor: blocks of the encoder's kind at a size of their own, no prefix tokens."""
    config = copy.deepcopy(config)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = width, layers, heads
    config.intermediate_size, config.drop_path_rate, config.final_norm = None, drop_path_rate, True
    config.class_token, config.num_register_tokens = False, 0
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
    "global_mean",
    "represent",
    "smaller_config",
    "views_of",
]
