"""The shared transformer encoder: reads embedded tokens of any modality, with padding and with edges.

Pre-norm blocks (Dosovitskiy et al., ViT, 2021) or post-norm blocks (Devlin et al., BERT, 2019), with class and
register tokens (Darcet et al., 2024), stochastic depth (Huang et al., 2016) and LayerScale (Touvron et al., CaiT,
2021). Attention goes through transformers' attention interface, so that eager, sdpa, flash and flex attention are
chosen by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmssl.dropout import Dropout
from mmssl.dropout import dropout as dropped
from mmssl.edges import EdgeList, edge_attention

PAIRS_PER_EDGE = 16  # how many pairs of tokens dense attention reads in the time that one edge takes


@dataclass
class EncoderConfig:
    """The shape of the transformer.

    Attributes:
        hidden_size: width D of a token.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block; must divide the width.
        intermediate_size: width of the feed-forward layer. None: four times the hidden size.
        hidden_act: activation of the feed-forward layer, or without one, of what the attention returns.
        position_every_block: add the places before every block (Point-MAE), not only to the embedded tokens.
        residual: add the input of each sub-layer to its output. Without (GraphMAE), a token is what it has read.
        feed_forward: give each block a feed-forward layer after its attention.
        norm_position: "pre" normalises the input of each sub-layer and the final output (ViT); "post" normalises the
            embedded tokens and the sum after each sub-layer (BERT, TERA).
        final_norm: normalise the output of a pre-norm encoder. Without (GraphMAE), outputs have a length of their own.
        layer_norm_eps: epsilon of the layer norms.
        qkv_bias: give the query, key and value projections a bias.
        layer_scale_init: start value of a learned scale per channel of each residual branch. None: no LayerScale.
        drop_path_rate: share of samples whose residual branch is dropped in the last block; grows linearly from 0.
        hidden_dropout_prob: dropout of the embedded tokens and of each residual branch.
        attention_probs_dropout_prob: dropout of the attention weights.
        causal_attention: a token reads itself and those before it alone, in training and ever after; class and register
            tokens come before all others, and so read none of them.
        class_token: put one learned token before the others.
        num_register_tokens: further learned tokens before the others, whose output is thrown away.
        initializer: distribution of the linear layers' start values: "xavier_uniform" (MAE) or "normal" (BERT, TERA).
        initializer_range: standard deviation of "normal", and of learned tokens.
    """

    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    position_every_block: bool = False
    residual: bool = True
    feed_forward: bool = True
    norm_position: Literal["pre", "post"] = "pre"
    final_norm: bool = True
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    layer_scale_init: float | None = None
    drop_path_rate: float = 0.0
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    causal_attention: bool = False
    class_token: bool = False
    num_register_tokens: int = 0
    initializer: Literal["xavier_uniform", "normal"] = "xavier_uniform"
    initializer_range: float = 0.02

    _attn_implementation: ClassVar[str] = "sdpa"  # MMSSLConfig has transformers' property of this name instead


@dataclass
class EncoderOutput:
    """What the encoder returns.

    Attributes:
        tokens: (B, N, D) one output per token, in the order of the input.
        prefix: (B, number of class and register tokens, D), the class token first.
        layers: the outputs (B, N, D) of the blocks that were asked for, before the final norm.
    """

    tokens: Tensor
    prefix: Tensor
    layers: list[Tensor] = field(default_factory=list)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out, (B, heads, N, D / heads) each; the only form that also returns the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = dropped(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.is_causal = config.causal_attention  # flash attention takes no mask, and reads it here
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | EdgeList | None) -> tuple[Tensor, Tensor | None]:
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        weights = None
        if isinstance(attention_mask, EdgeList):
            out = edge_attention(query, key, value, attention_mask, self.scaling, dropout)
        else:
            kind = self.config._attn_implementation
            if kind == "sdpa" and dropout and query.device.type == "cpu" and query.dtype == torch.float32:
                kind = "eager"  # torch has no fast kernel with dropout there, and its plain one draws a slow mask
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention)
            out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.proj(out.reshape(batch, length, width)), weights


class MLP(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class LayerScale(nn.Module):
    def __init__(self, width: int, start: float):
        super().__init__()
        self.start = start
        self.scale = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.scale


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of a whole sample, and scales the others up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.rate)
        return branch * (keep / (1 - self.rate))


class EncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EncoderConfig, drop_path: float):
        super().__init__()
        self.pre_norm, self.residual = config.norm_position == "pre", config.residual
        width, start = config.hidden_size, config.layer_scale_init
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.scale1 = nn.Identity() if start is None else LayerScale(width, start)
        self.feed_forward = config.feed_forward
        if config.feed_forward:
            self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.mlp = MLP(config)
            self.scale2 = nn.Identity() if start is None else LayerScale(width, start)
        else:
            self.act = ACT2FN[config.hidden_act]
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_states: Tensor, attention_mask: Any) -> Tensor:
        branch, _ = self.attention(self.norm1(hidden_states) if self.pre_norm else hidden_states, attention_mask)
        if not self.feed_forward:
            branch = self.act(branch)
        if self.pre_norm:
            hidden_states = self.add(hidden_states, self.scale1(branch))
            if self.feed_forward:
                hidden_states = self.add(hidden_states, self.scale2(self.mlp(self.norm2(hidden_states))))
            return hidden_states
        hidden_states = self.norm1(self.add(hidden_states, self.scale1(branch)))
        if self.feed_forward:
            hidden_states = self.norm2(self.add(hidden_states, self.scale2(self.mlp(hidden_states))))
        return hidden_states

    def add(self, hidden_states: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop_path(self.dropout(branch))
        return hidden_states + branch if self.residual else branch


class Encoder(nn.Module):
    """Embedded tokens in, contextualised tokens out. Prefix tokens have no place and are never masked."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size; found {config.num_attention_heads} heads "
                f"and a hidden size of {config.hidden_size}"
            )
        if config.norm_position == "post" and not config.final_norm:
            raise ValueError("final_norm=False is of pre-norm encoders; the last norm of a post-norm block is its own")
        if config.drop_path_rate and not config.residual:
            raise ValueError("drop_path_rate drops residual branches; with residual=False set it to 0")
        for name, choices in (("norm_position", ("pre", "post")), ("initializer", ("xavier_uniform", "normal"))):
            if getattr(config, name) not in choices:  # a config file is not checked against the types
                raise ValueError(f"{name}: found {getattr(config, name)!r}; expected one of {', '.join(choices)}")
        self.config = config
        self.num_prefix_tokens = int(config.class_token) + config.num_register_tokens
        if self.num_prefix_tokens:
            self.prefix_tokens = nn.Parameter(torch.zeros(1, self.num_prefix_tokens, config.hidden_size))
        self.dropout = Dropout(config.hidden_dropout_prob)
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(EncoderLayer(config, rate) for rate in rates)
        # The final norm of a pre-norm encoder; the norm of the embedded tokens of a post-norm one.
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        valid: Tensor,
        edges: Tensor | None = None,
        keep_layers: Sequence[int] = (),
        prefix: Tensor | None = None,
        prior: Tensor | None = None,
        context: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode a batch.

        Args:
            content: (B, N, D) embedded contents.
            position: (B, N, D) embedded places, added to the contents.
            valid: (B, N) bool, False for padding.
            edges: (2, E) long as in ``Tokens``, or None where all valid tokens of a row attend to each other.
            keep_layers: blocks (from 1) whose outputs are returned too.
            prefix: (B, number, D) tokens to put first. None: the encoder's own class and register tokens.
            prior: (B, N, N) added to the scores of attention, as in ``Tokens``, or None.
            context: (B, N) bool, tokens that any token may read; the others are read by none. None: all valid ones.

        Raises:
            ValueError: a prior with edges, or with an attention function other than "sdpa" and "eager"; a context or
                causal attention with a prior or edges; a context with flash attention.
        """
        dtype = next(self.parameters()).dtype  # the residual stream keeps the precision of the weights under autocast
        hidden, position = content.to(dtype), position.to(dtype)
        if not self.config.position_every_block:
            hidden = hidden + position
        if prefix is None and self.num_prefix_tokens:
            prefix = self.prefix_tokens.expand(len(hidden), -1, -1)
        first = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            hidden = torch.cat([prefix.to(hidden.dtype), hidden], dim=1)
        if (context is not None or self.config.causal_attention) and (prior is not None or edges is not None):
            raise ValueError("a context and causal attention are for tokens without edges and without attention prior")
        if context is not None and "flash" in self.config._attn_implementation:
            raise ValueError("flash attention drops the tokens that are not read; with a context use sdpa or eager")
        read = valid if context is None else valid & context
        mask = self.attention_mask(hidden, read, edges, prior)
        if self.config.norm_position == "post":
            hidden = self.norm(hidden)
        hidden = self.dropout(hidden)
        layers = []
        position = nn.functional.pad(position, (0, 0, first, 0))  # prefix tokens have no place
        for number, layer in enumerate(self.layers, start=1):
            if self.config.position_every_block:
                hidden = hidden + position
            hidden = layer(hidden, mask)
            if number in keep_layers:
                layers.append(hidden[:, first:])
        if self.config.norm_position == "pre":
            hidden = self.norm(hidden)
        return EncoderOutput(tokens=hidden[:, first:], prefix=hidden[:, :first], layers=layers)

    def attention_mask(self, hidden: Tensor, valid: Tensor, edges: Tensor | None, prior: Tensor | None = None) -> Any:
        """What the chosen attention function wants; None where everything may attend to everything."""
        prefix = hidden.shape[1] - valid.shape[1]
        padded = nn.functional.pad(valid, (prefix, 0), value=True)
        if prior is not None:
            if edges is not None or self.config._attn_implementation not in ("sdpa", "eager"):
                raise ValueError("tokens with an attention prior need attn_implementation sdpa or eager, and no edges")
            bias = nn.functional.pad(prior.to(hidden.dtype), (prefix, 0, prefix, 0))
            return bias.masked_fill(~padded[:, None, :], torch.finfo(hidden.dtype).min)[:, None]
        if edges is None:
            return create_bidirectional_mask(
                config=cast(Any, self.config),
                inputs_embeds=hidden,
                attention_mask=padded,
                and_mask_function=not_after if self.config.causal_attention else None,
            )
        batch, length = valid.shape
        kind, pairs = self.config._attn_implementation, batch * length**2
        if kind != "eager" and (kind != "sdpa" or pairs > PAIRS_PER_EDGE * edges.shape[1]):
            return EdgeList.build(edges, valid, prefix)
        source, target = edges
        allowed = torch.zeros(batch, length, length, dtype=torch.bool, device=valid.device)
        allowed[target // length, target % length, source % length] = True
        allowed = nn.functional.pad(allowed, (prefix, 0, prefix, 0), value=True) & padded[:, None, :]
        allowed |= torch.eye(prefix + length, dtype=torch.bool, device=valid.device)  # no query without a key
        bias = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        return bias.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[:, None]


def not_after(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which keys a query may read, for transformers' masks."""
    return key <= query


def init_weights(module: nn.Module, config: EncoderConfig) -> None:
    """Start values of one module's own parameters, for models and heads; skips what a checkpoint has filled."""
    if isinstance(module, nn.Linear):
        if config.initializer == "xavier_uniform":
            init.xavier_uniform_(module.weight)
        else:
            init.normal_(module.weight, std=config.initializer_range)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm1d):
        for name, value in module.state_dict(keep_vars=True).items():
            (init.ones_ if name in ("weight", "running_var") else init.zeros_)(value)
    elif isinstance(module, LayerScale):
        init.constant_(module.scale, module.start)
    elif isinstance(module, Encoder) and module.num_prefix_tokens:
        init.normal_(module.prefix_tokens, std=config.initializer_range)
