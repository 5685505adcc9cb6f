"""Encoders with a head for one task, as transformers' ``AutoModelFor...`` classes load them.

Each is a pretrained encoder and one linear layer. ``from_pretrained`` of an encoder's checkpoint takes over the encoder
and gives the head start values; ``AutoModel.from_pretrained`` of a model with a head takes over the encoder alone. With
``labels`` the loss is returned too, so that transformers' ``Trainer`` can train them.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from mmssl.encoder import init_weights
from mmssl.modalities.time_series import TimeSeries
from mmssl.modeling import MMSSLConfig, MMSSLModel

UNLABELLED = -100  # transformers' label of what does not count


class TaskModel(PreTrainedModel):
    """The encoder under the name ``mmssl``; a subclass adds the head."""

    config: MMSSLConfig
    base_model_prefix = "mmssl"
    main_input_name = MMSSLModel.main_input_name
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # forward takes any modality's tensors by name; Trainer is not to add its own
    _no_split_modules = MMSSLModel._no_split_modules
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MMSSLConfig):
        super().__init__(config)
        self.mmssl = MMSSLModel(config)
        self.main_input_name = self.mmssl.main_input_name

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config)


class MMSSLForSequenceClassification(TaskModel):
    """Classes or quantities of whole samples, of any modality: linear on the mean of the valid tokens.

    The loss follows ``problem_type`` as everywhere in transformers: squared error where there is one label or the
    problem is "regression", cross-entropy for labels of type long, else binary cross-entropy for several at once.
    """

    def __init__(self, config: MMSSLConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(self, labels: Tensor | None = None, **inputs) -> SequenceClassifierOutput:
        """A batch as the processor returns it to logits (samples, labels).

        Args:
            labels: (samples,) long classes or float quantities; (samples, labels) float of several.
            inputs: the tensors of one modality.
        """
        out = self.mmssl(**inputs, return_dict=True)
        logits = self.head(out.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )


class MMSSLForTokenClassification(TaskModel):
    """Classes of single tokens: the nodes of a graph, the patches of an image, the frames of a sound."""

    def __init__(self, config: MMSSLConfig):
        super().__init__(config)
        check_classes(config)
        self.head = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(self, labels: Tensor | None = None, **inputs) -> TokenClassifierOutput:
        """A batch as the processor returns it to logits (B, N, labels), class and register tokens left out.

        Args:
            labels: (B, N) long, -100 where a token has none. Those of padding do not count.
            inputs: the tensors of one modality.
        """
        out = self.mmssl(**inputs, return_dict=True)
        prefix = self.mmssl.encoder.num_prefix_tokens
        logits = self.head(out.last_hidden_state[:, prefix:])
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:2], "token")
            labels = labels.masked_fill(~out.token_mask[:, prefix:], UNLABELLED)
            loss = self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )


class MMSSLForSemanticSegmentation(TaskModel):
    """Classes of elements: of each pixel of an image, of each point of a cloud.

    Logits of tokens are interpolated at the elements, as the modality's ``spread`` does it.
    """

    def __init__(self, config: MMSSLConfig):
        super().__init__(config)
        check_classes(config)
        self.head = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SemanticSegmenterOutput:
        """A batch as the processor returns it to logits (B, labels, *E), 0 where a sample has fewer elements.

        Args:
            labels: (B, *E) long, such as (B, height, width), -100 where an element has none, or is padding.
            inputs: the tensors of one modality.

        Raises:
            ValueError: a modality without such elements.
        """
        modality = self.mmssl.modality_of(inputs)
        tokens = modality.tokenize(inputs)
        scores = self.head(self.mmssl.encode(modality, tokens).tokens)
        if not modality.offers("spread"):
            raise ValueError(f"{modality.name} has no elements but its tokens; use MMSSLForTokenClassification")
        spread = modality.spread(scores, tokens, inputs)
        logits = nn.utils.rnn.pad_sequence(spread, batch_first=True).movedim(-1, 1)
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:1] + logits.shape[2:], "element")
            loss = nn.functional.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED)
        return SemanticSegmenterOutput(loss=loss, logits=logits)


@dataclass
class ForecastOutput(ModelOutput):
    """What a forecasting model returns.

    Attributes:
        loss: mean squared error of the steps that are known.
        prediction_outputs: (B, prediction_length, C) the steps that follow, in the units of the series.
        hidden_states: as the encoder returns them.
        attentions: as the encoder returns them.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MMSSLForForecasting(TaskModel):
    """The next steps of a series: linear on all tokens of a channel, the same for all channels (Nie et al., PatchTST).

    Args:
        config: of the encoder. It keeps the two lengths, so that a model that was saved needs them no more.
        context_length: steps that a forecast is made from.
        prediction_length: steps that are forecast.

    Raises:
        ValueError: a length is not given, or the encoder reads no series.
    """

    def __init__(self, config: MMSSLConfig, context_length: int | None = None, prediction_length: int | None = None):
        for name, given in (("context_length", context_length), ("prediction_length", prediction_length)):
            if given is not None:
                setattr(config, name, given)
            if getattr(config, name, None) is None:
                raise ValueError(f"{name} is missing: from_pretrained(..., context_length=336, prediction_length=96)")
        super().__init__(config)
        series = [each for each in self.mmssl.adapters.values() if isinstance(each, TimeSeries)]
        if not series:
            raise ValueError(f"found an encoder of {', '.join(self.mmssl.adapters)}; forecasting needs one of series")
        self.modality = series[0].name
        channels = series[0].num_channels or 1
        with torch.device("cpu"):  # from_pretrained builds on a device without values
            empty = torch.zeros(1, config.context_length, channels)
            known = torch.ones_like(empty, dtype=torch.long)
            tokens = series[0].tokenize(dict(zip(TimeSeries.inputs, (empty, known, known[..., 0]), strict=True)))
        width = tokens.valid.numel() // channels * config.hidden_size
        self.head = nn.Linear(width, config.prediction_length)
        self.post_init()

    @can_return_tuple
    def forward(self, labels: Tensor | None = None, **inputs) -> ForecastOutput:
        """A batch of series to the steps that follow.

        Args:
            labels: (B, prediction_length, C) these steps, NaN where they are not known.
            inputs: the tensors of a batch of series (B, context_length, C).

        Raises:
            ValueError: series or labels of other lengths.
        """
        batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        modality = self.mmssl.modality_of(batch)
        if not isinstance(modality, TimeSeries):
            raise ValueError(f"found a batch of {modality.name}; forecasting needs one of {self.modality}")
        count, steps, channels = batch["series"].shape
        if steps != self.config.context_length:
            raise ValueError(f"series: found {steps} steps; expected context_length, {self.config.context_length}")
        out = self.mmssl(**inputs, return_dict=True)
        prefix = self.mmssl.encoder.num_prefix_tokens
        hidden = out.last_hidden_state[:, prefix:] * out.token_mask[:, prefix:, None]
        forecast = modality.denormalize(self.head(hidden.reshape(count * channels, -1))[:, None], batch)
        forecast = forecast.reshape(count, channels, -1).transpose(1, 2)
        loss = None
        if labels is not None:
            if labels.shape != forecast.shape:
                raise ValueError(f"labels: found shape {tuple(labels.shape)}; expected {tuple(forecast.shape)}")
            known = ~labels.isnan()
            loss = (forecast.float() - labels)[known].square().mean()
        return ForecastOutput(
            loss=loss, prediction_outputs=forecast, hidden_states=out.hidden_states, attentions=out.attentions
        )


def check_classes(config: MMSSLConfig) -> None:
    if cast(int, config.num_labels) < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"found num_labels={config.num_labels} and problem_type={config.problem_type}; expected at least 2 classes "
            "of which one is right: quantities are of whole samples, see MMSSLForSequenceClassification"
        )


def check_labels(labels: Tensor, expected: torch.Size, what: str) -> None:
    if labels.shape != expected:
        raise ValueError(
            f"labels: found shape {tuple(labels.shape)}; expected {tuple(expected)}, one for each {what}, and "
            f"{UNLABELLED} where there is none"
        )
