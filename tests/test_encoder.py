"""The encoder against slow loops, against PyTorch's own transformer, and against itself without padding."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl import encoder as encoder_module
from mmssl.edges import EdgeList
from mmssl.encoder import DropPath, Encoder, EncoderConfig, EncoderLayer, LayerScale
from mmssl.modeling import MMSSLConfig, MMSSLModel

WIDTH, LENGTHS = 16, (5, 2, 4)
ATTENTION = ("sdpa", "eager")
# Flash attention takes no mask: with edges it goes by their list, sdpa on so few tokens by a dense mask.
PATHS = [("sdpa", False), ("eager", False), ("sdpa", True), ("eager", True), ("flash_attention_2", True)]
PRE = {"norm_position": "pre", "layer_scale_init": 0.5}
POST = {"norm_position": "post", "qkv_bias": False, "intermediate_size": 24, "hidden_act": "relu"}
PREFIX = {"class_token": True, "num_register_tokens": 2}
KINDS = [
    pytest.param(PRE, id="pre"),
    pytest.param(POST, id="post"),
    pytest.param(PRE | PREFIX, id="pre-prefix"),
    pytest.param(POST | PREFIX, id="post-prefix"),
    pytest.param(PRE | PREFIX | {"position_every_block": True}, id="pre-prefix-places-every-block"),
    pytest.param(POST | PREFIX | {"position_every_block": True}, id="post-prefix-places-every-block"),
    pytest.param(PRE | {"residual": False}, id="pre-no-residual"),
    pytest.param(POST | {"residual": False}, id="post-no-residual"),
    pytest.param(PRE | PREFIX | {"residual": False, "feed_forward": False}, id="pre-prefix-bare"),
    pytest.param(POST | {"feed_forward": False}, id="post-no-feed-forward"),
]


def config(attention: str = "sdpa", **options: Any) -> EncoderConfig:
    result = EncoderConfig(**{"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, **options})
    result._attn_implementation = attention  # type: ignore[misc]
    return result


def randomise(module: nn.Module, seed: int = 0) -> None:
    """No weight is left at 0 or 1, where a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
        for child in module.modules():
            if isinstance(child, nn.LayerNorm):
                child.weight.add_(1)


def blocks(encoder: Encoder) -> list[Any]:
    return list(encoder.layers)


def make_encoder(attention: str = "sdpa", **options: Any) -> Encoder:
    encoder = Encoder(config(attention, **options)).eval()
    randomise(encoder)
    return encoder


@dataclass
class Inputs:
    """Three rows of different lengths; ``arrows[row]`` are the edges (source, target) of a row."""

    content: Tensor
    position: Tensor
    valid: Tensor
    arrows: list[list[tuple[int, int]]] | None

    @property
    def edges(self) -> Tensor | None:
        if self.arrows is None:
            return None
        length = self.valid.shape[1]
        flat = [(row * length + s, row * length + t) for row, arrows in enumerate(self.arrows) for s, t in arrows]
        return torch.tensor(flat, dtype=torch.long).reshape(-1, 2).T

    def row(self, number: int) -> "Inputs":
        """One row alone, without padding."""
        length = LENGTHS[number]
        return Inputs(
            self.content[number : number + 1, :length],
            self.position[number : number + 1, :length],
            torch.ones(1, length, dtype=torch.bool),
            None if self.arrows is None else [self.arrows[number]],
        )

    def reads(self, number: int) -> list[set[int]]:
        """The tokens that each token of a row reads: itself and the sources of its edges, or all."""
        length = LENGTHS[number]
        if self.arrows is None:
            return [set(range(length)) for _ in range(length)]
        return [{target} | {s for s, t in self.arrows[number] if t == target} for target in range(length)]


def make_inputs(edges: bool) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS), WIDTH)
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    arrows = [[(0, 1), (1, 0), (1, 2), (4, 2), (3, 0)], [(0, 1)], [(0, 3), (3, 1), (2, 2)]]
    return Inputs(
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        valid,
        arrows if edges else None,
    )


def run(encoder: Encoder, inputs: Inputs) -> tuple[Tensor, Tensor]:
    out = encoder(inputs.content, inputs.position, inputs.valid, inputs.edges)
    return out.tokens, out.prefix


def slow_attention(encoder: Encoder, layer: Any, x: Tensor, reads: list[set[int]]) -> Tensor:
    """Attention of one row (N, D), token by token and head by head, over what each token reads."""
    heads = encoder.config.num_attention_heads
    size = x.shape[1] // heads
    query, key, value = F.linear(x, layer.attention.qkv.weight, layer.attention.qkv.bias).chunk(3, dim=1)
    rows = []
    for token, others in enumerate(reads):
        chosen = sorted(others)
        parts = []
        for head in range(heads):
            channels = slice(head * size, (head + 1) * size)
            scores = torch.stack([query[token, channels] @ key[other, channels] for other in chosen])
            weights = (scores / math.sqrt(size)).exp()
            weights = weights / weights.sum()
            parts.append(sum(w * value[other, channels] for w, other in zip(weights, chosen, strict=True)))
        rows.append(torch.cat(parts))
    return F.linear(torch.stack(rows), layer.attention.proj.weight, layer.attention.proj.bias)


def slow_block(encoder: Encoder, layer: Any, x: Tensor, reads: list[set[int]]) -> Tensor:
    """A block in words: y = x + attention(norm(x)), y + mlp(norm(y)), or with the norm after each sum.

    Without residual only what is added to x; without feed-forward only y, where the activation follows the attention.
    """
    old = 1 if encoder.config.residual else 0
    activation: Any = {"gelu": F.gelu, "relu": F.relu}[encoder.config.hidden_act]

    def norm(module: nn.LayerNorm, values: Tensor) -> Tensor:
        return F.layer_norm(values, (WIDTH,), module.weight, module.bias, eps=encoder.config.layer_norm_eps)

    def mlp(values: Tensor) -> Tensor:
        inner = activation(F.linear(values, layer.mlp.fc1.weight, layer.mlp.fc1.bias))
        return F.linear(inner, layer.mlp.fc2.weight, layer.mlp.fc2.bias)

    def attend(values: Tensor) -> Tensor:
        read = slow_attention(encoder, layer, values, reads)
        return read if encoder.config.feed_forward else activation(read)

    if encoder.config.norm_position == "pre":
        x = old * x + layer.scale1.scale * attend(norm(layer.norm1, x))
        return old * x + layer.scale2.scale * mlp(norm(layer.norm2, x)) if encoder.config.feed_forward else x
    x = norm(layer.norm1, old * x + attend(x))
    return norm(layer.norm2, old * x + mlp(x)) if encoder.config.feed_forward else x


def slow_encoder(encoder: Encoder, inputs: Inputs, number: int, reads: list[set[int]] | None = None) -> Tensor:
    """One row (prefix + N, D), without padding. Prefix tokens read everything and are read by everything.

    Or each token what ``reads`` says, prefix tokens being the first ones.
    """
    alone, prefix = inputs.row(number), encoder.num_prefix_tokens
    place = torch.cat([torch.zeros(prefix, WIDTH), alone.position[0]])  # prefix tokens have none
    x = alone.content[0]
    if prefix:
        x = torch.cat([encoder.prefix_tokens[0], x])
    every = encoder.config.position_every_block
    x = x if every else x + place
    if reads is None:
        everything = set(range(len(x)))
        reads = [everything] * prefix + [
            set(range(prefix)) | {prefix + other for other in others} for others in inputs.reads(number)
        ]
    pre = encoder.config.norm_position == "pre"
    x = x if pre else encoder.norm(x)
    for layer in blocks(encoder):
        x = slow_block(encoder, layer, x + place if every else x, reads)
    return encoder.norm(x) if pre else x


@pytest.mark.parametrize(("attention", "edges"), PATHS)
@pytest.mark.parametrize("options", KINDS)
@torch.no_grad()
def test_equals_loops_over_tokens_heads_and_neighbours(attention: str, options: dict[str, Any], edges: bool) -> None:
    encoder, inputs = make_encoder(attention, **options), make_inputs(edges)
    tokens, prefix = run(encoder, inputs)
    for number, length in enumerate(LENGTHS):
        expected = slow_encoder(encoder, inputs, number)
        found = torch.cat([prefix[number], tokens[number, :length]])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("options", KINDS)
def test_ways_to_attend_are_equal_in_outputs_and_gradients(options: dict[str, Any], edges: bool) -> None:
    results = []
    for attention in [attention for attention, with_edges in PATHS if with_edges == edges]:
        encoder, inputs = make_encoder(attention, **options), make_inputs(edges)
        inputs.content.requires_grad_()
        tokens, prefix = run(encoder, inputs)
        seen = torch.cat([tokens[inputs.valid], prefix.flatten(0, 1)])
        seen.square().sum().backward()
        results.append((seen, inputs.content.grad, blocks(encoder)[0].attention.qkv.weight.grad))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("attention", "edges"), PATHS)
@pytest.mark.parametrize("options", KINDS)
@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_padded_batch(attention: str, options: dict[str, Any], edges: bool) -> None:
    encoder, inputs = make_encoder(attention, **options), make_inputs(edges)
    tokens, prefix = run(encoder, inputs)
    for number, length in enumerate(LENGTHS):
        alone, alone_prefix = run(encoder, inputs.row(number))
        torch.testing.assert_close(tokens[number, :length], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(prefix[number], alone_prefix[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("attention", "edges"), PATHS)
@pytest.mark.parametrize("options", KINDS)
def test_what_padding_contains_never_matters(attention: str, options: dict[str, Any], edges: bool) -> None:
    """Neither to outputs, to the bit, nor by a gradient."""
    encoder, inputs = make_encoder(attention, **options), make_inputs(edges)
    before = run(encoder, inputs)
    garbage = 1e4 * torch.randn(inputs.content.shape, generator=torch.Generator().manual_seed(2))
    inputs.content = torch.where(inputs.valid[..., None], inputs.content, garbage).requires_grad_()
    inputs.position = torch.where(inputs.valid[..., None], inputs.position, -1.7 * garbage.flip(2))
    tokens, prefix = run(encoder, inputs)
    assert torch.equal(tokens[inputs.valid], before[0][inputs.valid])
    assert torch.equal(prefix, before[1])
    (tokens[inputs.valid].square().sum() + prefix.square().sum()).backward()
    assert inputs.content.grad is not None
    assert not inputs.content.grad[~inputs.valid].any()
    assert inputs.content.grad[inputs.valid].any(dim=-1).all()


@pytest.mark.parametrize(("attention", "edges"), PATHS)
def test_a_row_without_valid_tokens_is_finite(attention: str, edges: bool) -> None:
    encoder, inputs = make_encoder(attention, **PRE), make_inputs(edges)
    inputs.valid[1] = False
    inputs.content.requires_grad_()
    tokens, _ = run(encoder, inputs)
    tokens.square().sum().backward()
    assert inputs.content.grad is not None
    assert tokens.isfinite().all()
    assert inputs.content.grad.isfinite().all()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("attention", [attention for attention, edges in PATHS if edges])
def test_along_edges_influence_goes_one_step_a_layer(attention: str, layers: int) -> None:
    """Row 0 is the path 0 -> 1 -> ... -> 5, row 1 the same one backwards. Beyond reach and across rows: exact zero."""
    length = 6
    encoder = make_encoder(attention, **PRE, num_hidden_layers=layers)
    forward = torch.tensor([[i, i + 1] for i in range(length - 1)]).T
    edges = torch.cat([forward, forward.flip(0) + length], dim=1)
    content = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, length, dtype=torch.bool)

    def tokens(content: Tensor) -> Tensor:
        return encoder(content, torch.zeros_like(content), valid, edges).tokens

    jacobian = torch.autograd.functional.jacobian(tokens, content)  # (2, N, D, 2, N, D): output, input
    influence = jacobian.abs().amax(dim=(2, 5))
    for row in range(2):
        for target in range(length):
            for source in range(length):
                steps = target - source if row == 0 else source - target
                assert (influence[row, target, row, source] > 0) == (0 <= steps <= layers), (row, source, target)
                assert influence[row, target, 1 - row, source] == 0


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@torch.no_grad()
def test_equals_the_transformer_of_pytorch(norm_position: str, attention: str) -> None:
    encoder = make_encoder(attention, norm_position=norm_position, layer_norm_eps=1e-5, intermediate_size=40)
    block = nn.TransformerEncoderLayer(
        WIDTH, 2, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_position == "pre"
    )
    theirs = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    for their, our in zip(theirs.layers, blocks(encoder), strict=True):
        names = {
            "self_attn.in_proj_": our.attention.qkv,
            "self_attn.out_proj.": our.attention.proj,
            "linear1.": our.mlp.fc1,
            "linear2.": our.mlp.fc2,
            "norm1.": our.norm1,
            "norm2.": our.norm2,
        }
        their.load_state_dict(
            {name + key: value for name, part in names.items() for key, value in part.state_dict().items()}
        )
    inputs = make_inputs(edges=False)
    x = inputs.content + inputs.position
    if norm_position == "pre":
        expected = encoder.norm(theirs(x, src_key_padding_mask=~inputs.valid))
    else:
        expected = theirs(encoder.norm(x), src_key_padding_mask=~inputs.valid)
    found, _ = run(encoder, inputs)
    torch.testing.assert_close(found[inputs.valid], expected[inputs.valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", KINDS)
@torch.no_grad()
def test_keep_layers_returns_the_outputs_of_those_blocks(options: dict[str, Any]) -> None:
    """Block k of a deep encoder is the last block of one with k blocks and the same weights."""
    inputs = make_inputs(edges=False)
    deep = make_encoder(**options, num_hidden_layers=3)
    out = deep(inputs.content, inputs.position, inputs.valid, keep_layers=(3, 1))
    assert len(out.layers) == 2
    for kept, depth in zip(out.layers, (1, 3), strict=True):
        shallow = make_encoder(**options, num_hidden_layers=depth)
        shallow.load_state_dict(deep.state_dict(), strict=False)
        expected, _ = run(shallow, inputs)
        found = deep.norm(kept) if options["norm_position"] == "pre" else kept
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not deep(inputs.content, inputs.position, inputs.valid).layers


def test_drop_path_in_evaluation_changes_nothing() -> None:
    branch = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DropPath(0.7).eval()(branch), branch)


def test_drop_path_drops_whole_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    rate, samples = 0.3, 20_000
    dropped = DropPath(rate).train()(torch.ones(samples, 3, 2))
    first = dropped[:, 0, 0]
    assert torch.equal(dropped, first[:, None, None].expand_as(dropped))
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full((int(kept.sum()),), 1 / (1 - rate)))
    error = math.sqrt(rate * (1 - rate) / samples)
    assert abs(kept.double().mean() - (1 - rate)) < 5 * error
    assert abs(first.double().mean() - 1) < 5 * error / (1 - rate)


def test_drop_path_of_a_block_drops_each_branch_by_itself() -> None:
    """In training a row is one of four: with or without attention, with or without the feed-forward layer."""
    torch.manual_seed(0)
    layer: Any = EncoderLayer(config(), drop_path=0.5)
    row = torch.randn(1, 3, WIDTH)
    found = layer.train()(row.expand(64, -1, -1), None)
    cases = []
    for attends in (0, 2):
        middle = row + attends * layer.attention(layer.norm1(row), None)[0]
        cases += [middle + forwards * layer.mlp(layer.norm2(middle)) for forwards in (0, 2)]
    distance = torch.stack([(found - case).abs().amax(dim=(1, 2)) for case in cases])
    assert distance.amin(dim=0).max() < 1e-5
    assert set(distance.argmin(dim=0).tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(layer.eval()(row.expand(2, -1, -1), None), layer(row, None).expand(2, -1, -1))


def test_drop_path_rate_grows_linearly_over_depth() -> None:
    encoder = make_encoder(drop_path_rate=0.3, num_hidden_layers=4)
    assert [layer.drop_path.rate for layer in blocks(encoder)] == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("option", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_acts_in_training_only(attention: str, option: str) -> None:
    inputs = make_inputs(edges=False)
    encoder = make_encoder(attention, **{option: 0.5})
    without, _ = run(make_encoder(attention), inputs)
    assert torch.equal(run(encoder, inputs)[0], without)
    encoder.train()
    torch.manual_seed(0)
    assert not torch.allclose(run(encoder, inputs)[0], without)


@pytest.mark.parametrize("start", [0.0, 1e-5, 1.0])
def test_layer_scale_starts_at_its_value(start: float) -> None:
    encoder = Encoder(config(layer_scale_init=start))
    scales = [module.scale for module in encoder.modules() if isinstance(module, LayerScale)]
    assert len(scales) == 4  # two branches in each of two blocks
    for scale in scales:
        assert torch.equal(scale, torch.full((WIDTH,), start))
        assert scale.requires_grad


def test_layer_scale_takes_a_whole_number() -> None:
    """A config written by hand says 1, not 1.0."""
    assert blocks(Encoder(config(layer_scale_init=1)))[0].scale1.scale.is_floating_point()


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@torch.no_grad()
def test_layer_scale_multiplies_the_branches(norm_position: str) -> None:
    """As if the last linear layer of each branch were multiplied, channel by channel."""
    inputs = make_inputs(edges=False)
    scaled = make_encoder(norm_position=norm_position, layer_scale_init=0.1)
    plain = make_encoder(norm_position=norm_position)
    plain.load_state_dict(scaled.state_dict(), strict=False)
    for ours, theirs in zip(blocks(plain), blocks(scaled), strict=True):
        for last, scale in ((ours.attention.proj, theirs.scale1.scale), (ours.mlp.fc2, theirs.scale2.scale)):
            last.weight *= scale[:, None]
            last.bias *= scale
    torch.testing.assert_close(run(scaled, inputs)[0], run(plain, inputs)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layer_scale_of_zero_makes_blocks_the_identity() -> None:
    inputs = make_inputs(edges=False)
    encoder = Encoder(config(layer_scale_init=0.0)).eval()
    found, _ = run(encoder, inputs)
    torch.testing.assert_close(found, F.layer_norm(inputs.content + inputs.position, (WIDTH,), eps=1e-6))


def test_without_layer_scale_there_is_no_parameter_for_it() -> None:
    names = [name for name, _ in make_encoder().named_parameters()]
    assert not [name for name in names if "scale" in name or "prefix" in name]


@pytest.mark.parametrize("options", KINDS)
def test_every_parameter_is_used(options: dict[str, Any]) -> None:
    """None that a distributed optimiser would wait for in vain, and none whose gradient is zero."""
    encoder, inputs = make_encoder(**options), make_inputs(edges=True)
    tokens, prefix = run(encoder, inputs)
    seen = torch.cat([tokens[inputs.valid], prefix.flatten(0, 1)])
    (seen * torch.randn(seen.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    idle = [name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle
    names = [name for name, _ in encoder.named_parameters()]
    assert any("mlp" in name for name in names) == any("norm2" in name for name in names)
    assert any("mlp" in name for name in names) == options.get("feed_forward", True)


def test_without_a_final_norm_outputs_are_those_of_the_last_block() -> None:
    torch.manual_seed(0)
    encoder = Encoder(config(final_norm=False))
    content, valid = torch.randn(2, 5, encoder.config.hidden_size), torch.ones(2, 5, dtype=torch.bool)
    depth = encoder.config.num_hidden_layers
    out = encoder(content, torch.zeros_like(content), valid, keep_layers=[depth])
    assert torch.equal(out.tokens, out.layers[0])
    assert not any(name.startswith("norm.") for name, _ in encoder.named_parameters())
    with pytest.raises(ValueError, match="final_norm=False is of pre-norm encoders"):
        Encoder(config(final_norm=False, norm_position="post"))


def test_dropping_residual_branches_where_there_are_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_path_rate.*residual=False.*0"):
        Encoder(config(residual=False, drop_path_rate=0.1))


@pytest.mark.parametrize("edge_path", [True, False])
def test_activation_checkpointing_along_edges_gives_the_same_gradients(
    edge_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are computed twice, with the same dropout, and the list of edges passes through."""
    monkeypatch.setattr(encoder_module, "PAIRS_PER_EDGE", 0 if edge_path else math.inf)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape: dict[str, Any] = sizes | {"position_every_block": True, "attention_probs_dropout_prob": 0.3}
    model = MMSSLModel(MMSSLConfig(modalities={"graph": {"num_features": 4, "random_walk_steps": 2}}, **shape)).train()
    randomise(model)
    modality = model.modalities["graph"]
    ring: dict[str, Any] = {"x": np.eye(4)[np.arange(8) % 4], "edge_index": [list(range(8)), [*range(1, 8), 0]]}
    batch = modality.collate([modality.prepare(ring), modality.prepare(ring | {"x": ring["x"] + 0.5})])
    calls: list[bool] = []
    blocks(model.encoder)[1].attention.register_forward_hook(
        lambda _, inputs, __: calls.append(isinstance(inputs[1], EdgeList))
    )
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch).last_hidden_state.sin().sum().backward()
        results.append([value.grad.clone() for value in model.parameters()])
        assert calls == [edge_path] * (3 if checkpointing else 1)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 heads.*16"):
        Encoder(config(num_attention_heads=3))


@pytest.mark.parametrize(("option", "value"), [("norm_position", "Pre"), ("initializer", "norml")])
def test_a_choice_that_does_not_exist_is_refused(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        Encoder(config(**{option: value}))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_prior_is_added_to_the_scores_of_attention(kind: str) -> None:
    """Against attention of one block written out: with keys that padding hides, and a class token that has no prior."""
    torch.manual_seed(0)
    config = EncoderConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, class_token=True)
    config._attn_implementation = kind  # type: ignore[misc]
    encoder = Encoder(config).eval()
    content, position, prior = torch.randn(2, 5, 8), torch.randn(2, 5, 8), 3 * torch.randn(2, 5, 5)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    found = encoder(content, position, valid, prior=prior)
    layer: Any = encoder.layers[0]
    attention = layer.attention
    for row in range(2):
        hidden = torch.cat([encoder.prefix_tokens[0], content[row] + position[row]])
        query, key, value = attention.qkv(layer.norm1(hidden)).chunk(3, dim=-1)
        read = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = query[:, head] @ key[:, head].T / 2
            scores[1:, 1:] += prior[row]
            scores[:, 1:][:, ~valid[row]] = -torch.inf
            read.append(scores.softmax(dim=-1) @ value[:, head])
        hidden = hidden + attention.proj(torch.cat(read, dim=-1))
        hidden = encoder.norm(hidden + layer.mlp(layer.norm2(hidden)))
        torch.testing.assert_close(found.tokens[row][valid[row]], hidden[1:][valid[row]], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="attention prior need attn_implementation sdpa or eager, and no edges"):
        encoder(content, position, valid, torch.zeros(2, 1, dtype=torch.long), prior=prior)


# A part of the tokens is read, or those before alone


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("options", KINDS)
@torch.no_grad()
def test_with_a_context_every_token_reads_it_and_the_prefix_alone(attention: str, options: dict[str, Any]) -> None:
    """In all layers the same ones, tokens outside of it and prefix tokens too; padding is none of it."""
    encoder, inputs = make_encoder(attention, **options), make_inputs(edges=False)
    context = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    out = encoder(inputs.content, inputs.position, inputs.valid, context=context)
    prefix = encoder.num_prefix_tokens
    for row, (length, members) in enumerate(zip(LENGTHS, ({0, 3}, {1}, {2}), strict=True)):
        reads = set(range(prefix)) | {prefix + member for member in members}
        expected = slow_encoder(encoder, inputs, row, [reads] * (prefix + length))
        found = torch.cat([out.prefix[row], out.tokens[row, :length]])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_with_all_tokens_as_context_nothing_changes(attention: str) -> None:
    encoder, inputs = make_encoder(attention, **PRE, **PREFIX), make_inputs(edges=False)
    out = encoder(inputs.content, inputs.position, inputs.valid, context=torch.ones_like(inputs.valid))
    assert torch.equal(out.tokens, run(encoder, inputs)[0])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("options", KINDS)
@torch.no_grad()
def test_causal_attention_reads_itself_and_what_is_before(attention: str, options: dict[str, Any]) -> None:
    """Prefix tokens come first: they read themselves and those before them, and all others read them."""
    encoder, inputs = make_encoder(attention, **options, causal_attention=True), make_inputs(edges=False)
    tokens, prefix = run(encoder, inputs)
    for row, length in enumerate(LENGTHS):
        reads = [set(range(token + 1)) for token in range(encoder.num_prefix_tokens + length)]
        expected = slow_encoder(encoder, inputs, row, reads)
        found = torch.cat([prefix[row], tokens[row, :length]])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_causal_attention_passes_over_padding_before_and_between_tokens(attention: str) -> None:
    """A query of padding that has nothing to read stays finite and spoils nothing."""
    encoder, inputs = make_encoder(attention, **PRE, causal_attention=True), make_inputs(edges=False)
    valid = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], dtype=torch.bool)
    inputs.content.requires_grad_()
    tokens = encoder(inputs.content, inputs.position, valid).tokens
    assert tokens.isfinite().all()
    for row in range(3):
        content, position = inputs.content[row : row + 1, valid[row]], inputs.position[row : row + 1, valid[row]]
        alone = encoder(content, position, torch.ones(content.shape[:2], dtype=torch.bool)).tokens
        torch.testing.assert_close(tokens[row, valid[row]], alone[0], atol=1e-5, rtol=0)
    tokens[valid].square().sum().backward()
    assert inputs.content.grad is not None and inputs.content.grad.isfinite().all()
    assert not inputs.content.grad[~valid].any()


@pytest.mark.parametrize("attention", ATTENTION)
def test_causal_attention_reads_nothing_later_while_dropout_is_drawn(attention: str) -> None:
    encoder, inputs = make_encoder(attention, **PRE, causal_attention=True), make_inputs(edges=False)
    inputs.valid[:] = True
    encoder.config.attention_probs_dropout_prob = 0.5
    encoder.train()
    inputs.content.requires_grad_()
    length = inputs.valid.shape[1]
    for token in range(length):
        (output,) = torch.autograd.grad(run(encoder, inputs)[0][:, token, 0].sum(), inputs.content)
        read = output.abs().sum(-1) > 0
        assert read[:, token].all() and not read[:, token + 1 :].any()
        assert token == 0 or read[:, :token].any()


@torch.no_grad()
def test_causal_attention_reaches_flash_attention_which_takes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        assert attention_mask is None
        out = F.scaled_dot_product_attention(query, key, value, is_causal=module.is_causal, scale=options["scaling"])
        return out.transpose(1, 2), None

    monkeypatch.setitem(encoder_module.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    inputs = make_inputs(edges=False)
    inputs.valid[:] = True
    options = {**PRE, **PREFIX}
    for causal in (True, False):
        by_flash = run(make_encoder("flash_attention_2", **options, causal_attention=causal), inputs)
        by_mask = run(make_encoder("sdpa", **options, causal_attention=causal), inputs)
        torch.testing.assert_close(by_flash[0], by_mask[0], atol=1e-5, rtol=1e-5)


def test_what_a_context_and_causal_attention_cannot_go_with_is_refused() -> None:
    inputs = make_inputs(edges=True)
    content, position, valid = inputs.content, inputs.position, inputs.valid
    prior = torch.zeros(*valid.shape, valid.shape[1])
    for causal, context in ((True, None), (False, valid)):
        encoder = make_encoder(causal_attention=causal)
        for extra in ({"edges": inputs.edges}, {"prior": prior}):
            with pytest.raises(ValueError, match="without edges and without attention prior"):
                encoder(content, position, valid, context=context, **extra)
    with pytest.raises(ValueError, match=r"flash attention.*sdpa or eager"):
        make_encoder("flash_attention_2")(content, position, valid, context=valid)
