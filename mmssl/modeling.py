"""The Hugging Face side of a pretrained encoder: ``AutoConfig`` and ``AutoModel`` load these classes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, cast, get_args

import torch
from huggingface_hub.dataclasses import type_validator
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mmssl.discovery import find, option_names
from mmssl.encoder import Attention, Encoder, EncoderConfig, EncoderLayer, EncoderOutput, init_weights
from mmssl.modalities.base import Batch, Modality
from mmssl.tokens import Tokens


def make_modality(name: str, options: dict[str, Any]) -> Modality:
    """The modality of this name with these options, without parameters.

    Raises:
        ValueError: no such modality, or an option that it does not have.
    """
    cls = find("modalities", name, Modality)
    if unknown := set(options) - set(option_names(cls)):
        raise ValueError(
            f"unknown option of modality {name!r}: {', '.join(sorted(unknown))}; it has: {', '.join(option_names(cls))}"
        )
    return cls(**options)


class MMSSLConfig(PreTrainedConfig, EncoderConfig):
    """Shape of the encoder and options of its modalities: ``{"image": {"image_size": 32, ...}}``.

    Raises:
        ValueError: an unknown modality, or an option that a modality does not have.
    """

    model_type = "mmssl"

    modalities: dict[str, dict[str, Any]] | None = None

    def __post_init__(self, **kwargs):
        self.modalities = {
            name: make_modality(name, options).options() for name, options in sorted((self.modalities or {}).items())
        }
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """From what a file says; errors name the file.

        Raises:
            ValueError: a value that is not of its option's type, or what the class itself refuses.
        """
        folder = kwargs.get("name_or_path")
        types = {field.name: field.type for field in fields(EncoderConfig)}
        types["modalities"] = dict[str, dict[str, Any]] | None
        try:
            for name in types.keys() & config_dict.keys():
                value, expected = config_dict[name], types[name]
                if isinstance(value, int) and float in (expected, *get_args(expected)):
                    value = float(value)  # JSON does not tell 0 from 0.0
                type_validator(name, value, expected)
            return super().from_dict(config_dict, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}/config.json: {error}" if folder else f"config.json: {error}") from error


@dataclass
class MMSSLModelOutput(ModelOutput):
    """What the model returns.

    Attributes:
        last_hidden_state: (B, prefix + N, D), class and register tokens first.
        pooler_output: (samples, D) mean of the valid tokens, class and register tokens left out.
        token_mask: (B, prefix + N) True where a token is not padding.
        hidden_states: with ``output_hidden_states``, the input and the output of each block.
        attentions: with ``output_attentions`` and eager attention, (B, heads, prefix + N, prefix + N) of each block.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    token_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MMSSLModel(PreTrainedModel):
    """One encoder and the modalities that share it. A batch holds one of them, known by the names of its tensors."""

    config: MMSSLConfig
    base_model_prefix = "mmssl"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": Attention}

    def __init__(self, config: MMSSLConfig):
        super().__init__(config)
        if not config.modalities:
            raise ValueError('the config names no modality; expected for example modalities={"image": {}}')
        self.modalities = nn.ModuleDict(
            {
                name: make_modality(name, options).build(config.hidden_size)
                for name, options in config.modalities.items()
            }
        )
        self.main_input_name = next(iter(self.adapters.values())).inputs[0]
        self.encoder = Encoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args, **kwargs) -> Self:
        """As transformers does it; raises a ValueError that names the file where the weights are damaged."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: model.safetensors is cut off or damaged ({error}); copy or download "
                "it again"
            ) from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config)
        if start_values := getattr(module, "start_values", None):  # of parameters that are no layer's of torch
            start_values(self.config.initializer_range)

    @property
    def adapters(self) -> dict[str, Modality]:
        """The modalities by their names."""
        return cast(dict[str, Modality], dict(self.modalities.items()))

    def modality_of(self, batch: Batch) -> Modality:
        """The modality whose tensors these are."""
        for modality in self.adapters.values():
            if set(batch) == set(modality.inputs):
                return modality
        expected = " or ".join(str(list(modality.inputs)) for modality in self.adapters.values())
        raise ValueError(f"found inputs {sorted(batch)}; expected {expected}, as the processor returns them")

    def encode(
        self,
        modality: Modality,
        tokens: Tokens,
        content: Tensor | None = None,
        keep_layers: Sequence[int] = (),
        places: bool = True,
        context: Tensor | None = None,
    ) -> EncoderOutput:
        """Embed tokens, add their places and encode them.

        Args:
            modality: the modality that made the tokens.
            tokens: the tokens.
            content: (B, N, D) embedded contents, where an objective has changed them. None: those of the tokens.
            keep_layers: blocks (from 1) whose outputs are returned too.
            places: without, the encoder is not told where tokens lie.
            context: (B, N) bool, tokens that any token may read. None: all valid ones.
        """
        content = modality.embed(tokens) if content is None else content
        position = modality.position(tokens.coords) if places else torch.zeros_like(content)
        return self.encoder(
            content, position, tokens.valid, tokens.edges, keep_layers, prior=tokens.prior, context=context
        )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, **inputs) -> MMSSLModelOutput:
        """Encode a batch as the processor returns it, for example ``model(pixel_values=...)``."""
        batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        modality = self.modality_of(batch)
        tokens = modality.tokenize(batch)
        out = self.encode(modality, tokens)
        return MMSSLModelOutput(
            last_hidden_state=torch.cat([out.prefix, out.tokens], dim=1),
            pooler_output=tokens.pool(out.tokens),
            token_mask=nn.functional.pad(tokens.valid, (self.encoder.num_prefix_tokens, 0), value=True),
        )

    def get_input_embeddings(self):
        raise NotImplementedError("tokens are embedded by the modalities, not by a table: see MMSSLModel.modalities")
