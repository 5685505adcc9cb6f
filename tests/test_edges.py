"""Attention along edges against a loop over edges, dense masked attention, finite differences and PyTorch Geometric."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmssl import encoder as encoder_module
from mmssl.edges import EdgeList, edge_attention
from mmssl.encoder import Attention, Encoder, EncoderConfig

WIDTH, HEADS = 12, 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(lengths: tuple[int, ...], *arrows: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Edges (2, E) and validity (B, N) of rows of these lengths; each arrow is (row, source, target)."""
    longest = max(lengths)
    edges = [(row * longest + source, row * longest + target) for row, source, target in arrows]
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T, valid


def random_graph(nodes: int, edges: int) -> tuple[Tensor, Tensor]:
    return torch.randint(nodes, (2, edges), generator=key(5)), torch.ones(1, nodes, dtype=torch.bool)


CASES = {
    "padding": batch((4, 2, 5), (0, 0, 1), (0, 1, 0), (0, 3, 2), (1, 1, 0), (2, 4, 0), (2, 0, 4), (2, 2, 1), (2, 4, 1)),
    "duplicates": batch((3,), (0, 0, 1), (0, 0, 1), (0, 2, 1), (0, 0, 1)),
    "self loops twice": batch((3,), (0, 1, 1), (0, 1, 1), (0, 0, 1), (0, 2, 2)),
    "isolated nodes": batch((5, 3), (0, 0, 4)),
    "no edges": batch((3, 2)),
    "one node": batch((1,)),
    "one node, self loop": batch((1,), (0, 0, 0)),
    "from and to padding": batch((4, 2), (1, 3, 0), (1, 0, 3), (1, 2, 3), (1, 2, 2), (0, 3, 1)),
    "a row of padding": batch((3, 0), (0, 0, 1), (1, 0, 1)),
    "all to all": batch((4,), *[(0, s, t) for s in range(4) for t in range(4)]),
    "many": random_graph(80, 400),
}


def reads(edges: Tensor, valid: Tensor, prefix: int) -> list[list[set[int]]]:
    """For each row and token (prefix tokens first) the tokens of its row that it reads."""
    rows, length = valid.shape
    whole = prefix + length
    result = []
    for row in range(rows):
        real = set(range(prefix)) | {prefix + i for i in range(length) if valid[row, i]}
        of_row = [set(real) if token < prefix else {token} | set(range(prefix)) for token in range(whole)]
        for source, target in edges.T.tolist():
            if target // length == row and prefix + source % length in real:
                of_row[prefix + target % length].add(prefix + source % length)
        result.append(of_row)
    return result


def by_loop(query: Tensor, key: Tensor, value: Tensor, who: list[list[set[int]]], scaling: float) -> Tensor:
    """(B, heads, L, d) each to (B, L, heads, d): the formula, one row, token and head after the other."""
    rows = []
    for row, of_row in enumerate(who):
        for token, others in enumerate(of_row):
            chosen = sorted(others)
            for head in range(query.shape[1]):
                scores = [(query[row, head, token] * key[row, head, other]).sum() * scaling for other in chosen]
                weights = torch.stack(scores).softmax(dim=0)
                rows.append(sum((w * value[row, head, other] for w, other in zip(weights, chosen, strict=True))))
    return torch.stack([torch.as_tensor(x) for x in rows]).view(query.transpose(1, 2).shape)


def random_qkv(
    valid: Tensor, prefix: int, dtype: torch.dtype, heads: int = HEADS, size: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """As the encoder makes them: views of one tensor, not contiguous."""
    rows, length = valid.shape
    qkv = torch.randn(rows, prefix + length, 3, heads, size, generator=key(1), dtype=torch.float64).to(dtype)
    query, keys, value = qkv.requires_grad_().permute(2, 0, 3, 1, 4).unbind(0)
    return query, keys, value


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=key(2), dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case != "many"])
def test_equals_a_loop_over_edges_in_values_and_gradients(case: str, prefix: int, dtype: torch.dtype) -> None:
    edges, valid = CASES[case]
    inputs = random_qkv(valid, prefix, dtype)
    found = edge_attention(*inputs, EdgeList.build(edges, valid, prefix), 0.7, 0.0)
    expected = by_loop(*inputs, reads(edges, valid, prefix), 0.7)
    assert found.dtype == dtype
    for ours, theirs in zip([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)], strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_list_has_each_edge_once_in_both_orders(case: str, prefix: int) -> None:
    edges, valid = CASES[case]
    built, whole = EdgeList.build(edges, valid, prefix), prefix + valid.shape[1]
    expected = {
        (row * whole + other, row * whole + token)
        for row, of_row in enumerate(reads(edges, valid, prefix))
        for token, others in enumerate(of_row)
        for other in others
    }
    incoming = list(zip(built.incoming.other.tolist(), built.incoming.owner.tolist(), strict=True))
    outgoing = list(zip(built.outgoing.owner.tolist(), built.outgoing.other.tolist(), strict=True))
    assert len(incoming) == len(expected) and set(incoming) == expected
    assert [incoming[i] for i in built.order.tolist()] == outgoing
    for bags in (built.incoming, built.outgoing):
        owners = [t for t, n in enumerate(bags.start.diff().tolist()) for _ in range(n)]
        assert bags.owner.tolist() == owners == sorted(owners) and bags.start[0] == 0


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_heads_of_one_channel(heads: int, rows: int) -> None:
    """Strides of 1 where others have more."""
    edges, valid = batch((3,) * rows, (0, 0, 1), (0, 2, 1), (rows - 1, 2, 0))
    inputs = random_qkv(valid, 0, torch.float64, heads, size=1)
    found = edge_attention(*inputs, EdgeList.build(edges, valid, 0), 1.0, 0.0)
    expected = by_loop(*inputs, reads(edges, valid, 0), 1.0)
    for ours, theirs in zip([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1])
def test_gradients_equal_finite_differences(prefix: int) -> None:
    edges, valid = CASES["padding"]
    built = EdgeList.build(edges, valid, prefix)
    inputs = [x.detach().clone().requires_grad_() for x in random_qkv(valid, prefix, torch.float64, 2, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: edge_attention(q, k, v, built, 0.8, 0.0), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_weights_of_each_target_sum_to_one(case: str, dtype: torch.dtype) -> None:
    """Constant values come back."""
    edges, valid = CASES[case]
    query, keys, value = random_qkv(valid, 2, dtype)
    out = edge_attention(20 * query, 20 * keys, torch.full_like(value, 3.0), EdgeList.build(edges, valid, 2), 1.0, 0.0)
    torch.testing.assert_close(out, torch.full_like(out, 3.0), atol=1e-5, rtol=0)


def test_huge_scores_neither_overflow_nor_vanish() -> None:
    edges, valid = CASES["all to all"]
    query, keys, value = random_qkv(valid, 0, torch.float32)
    found = edge_attention(1e3 * query, 1e3 * keys, value, EdgeList.build(edges, valid, 0), 1.0, 0.0)
    best = (query @ keys.transpose(2, 3)).argmax(dim=3)  # the softmax has become a choice
    expected = value.gather(2, best[..., None].expand_as(value)).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_half_precision_sums_over_many_neighbours_keep_their_digits() -> None:
    """The mean of 5,000 values; sums in bfloat16 would stop growing."""
    nodes = 5001
    edges = torch.stack([torch.arange(1, nodes), torch.zeros(nodes - 1, dtype=torch.long)])
    built = EdgeList.build(edges, torch.ones(1, nodes, dtype=torch.bool), 0)
    value = torch.rand(1, 1, nodes, 4, generator=key(0)).bfloat16()
    out = edge_attention(torch.zeros_like(value), value, value, built, 1.0, 0.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[0, 0, 0].double(), value[0, 0].double().mean(dim=0), atol=0, rtol=2**-8)


# In the encoder: the edge path and the dense path


def make(attention: str = "sdpa", **options: Any) -> Encoder:
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config = EncoderConfig(**{**shape, **options})
    config._attn_implementation = attention  # type: ignore[misc]
    encoder = Encoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=key(parameter.numel())))
    return encoder


def contents(valid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*valid.shape, WIDTH, generator=key(3), dtype=torch.float64).to(dtype)


def run(encoder: Encoder, edges: Tensor, valid: Tensor, content: Tensor | None = None) -> Tensor:
    """Outputs of prefix tokens and valid tokens."""
    content = contents(valid) if content is None else content
    out = encoder(content, torch.zeros_like(content), valid, edges)
    return torch.cat([out.prefix.flatten(0, 1), out.tokens[valid]])


def use(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "PAIRS_PER_EDGE", {"edges": 0, "dense": math.inf}[path])


PREFIX: dict[str, Any] = {"class_token": True, "num_register_tokens": 2}
BARE: dict[str, Any] = {"residual": False, "feed_forward": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, PREFIX, BARE], ids=["plain", "prefix", "bare"])
@pytest.mark.parametrize("case", CASES)
def test_edge_path_equals_dense_path_in_outputs_and_all_gradients(
    case: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges, valid = CASES[case]
    results = []
    for path in ("edges", "dense"):
        use(path, monkeypatch)
        encoder = make(**options).to(dtype)
        content = contents(valid, dtype).requires_grad_()
        mask = encoder.attention_mask(content, valid, edges)
        assert isinstance(mask, EdgeList) == (path == "edges")
        out = run(encoder, edges, valid, content)
        results.append([out, *gradients(out, [content, *encoder.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours / scale, theirs / scale, atol=TOLERANCE[dtype], rtol=0)


def test_what_padding_contains_is_ignored_though_edges_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use("edges", monkeypatch)
    edges, valid = CASES["from and to padding"]
    encoder, content = make(**PREFIX), contents(valid)
    garbage = torch.where(valid[..., None], content, 1e4).requires_grad_()
    out = run(encoder, edges, valid, garbage)
    assert torch.equal(out, run(encoder, edges, valid, content))
    assert not gradients(out, [garbage])[0][~valid].any()


def test_the_order_of_edges_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    use("edges", monkeypatch)
    edges, valid = CASES["many"]
    shuffled = edges[:, torch.randperm(edges.shape[1], generator=key(0))]
    assert torch.equal(run(make(), edges, valid), run(make(), shuffled, valid))
    assert not torch.allclose(run(make(), edges, valid), run(make(), edges.flip(0), valid)), "direction is lost"


def test_autocast_stays_close_to_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    edges, valid = CASES["many"]
    outs = []
    for path in ("edges", "dense"):
        use(path, monkeypatch)
        encoder = make()
        exact = run(encoder, edges, valid)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(encoder, edges, valid)
        assert out.dtype == torch.float32
        out.square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())
        assert 0 < (out - exact).abs().max() < 0.03 * exact.abs().max()
        outs.append((out - exact).norm())
    assert outs[0] < 2 * outs[1], "the edge path loses more than the dense path"


def test_dropout_acts_in_training_only_and_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    use("edges", monkeypatch)
    edges, valid = CASES["many"]
    encoder = make(attention_probs_dropout_prob=0.5)
    plain = run(make(), edges, valid)
    assert torch.equal(run(encoder, edges, valid), plain)
    encoder.train()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(encoder, edges, valid)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.allclose(drawn(0), drawn(1)) and not torch.allclose(drawn(0), plain)


def test_dropout_keeps_the_expectation() -> None:
    """A target with 10,000 equal weights of which a share of 0.3 is dropped and the others are scaled up."""
    nodes, rate = 10_000, 0.3
    edges = torch.stack([torch.arange(nodes), torch.zeros(nodes, dtype=torch.long)])
    built = EdgeList.build(edges, torch.ones(1, nodes, dtype=torch.bool), 0)
    value = torch.ones(1, 1, nodes, 2)
    torch.manual_seed(0)
    out = edge_attention(torch.zeros_like(value), value, value, built, 1.0, rate)[0, :, 0, 0]
    assert 0 < abs(out[0] - 1) < 5 * math.sqrt(rate / (1 - rate) / nodes)
    alone = out[1:]  # all others read only themselves: all or nothing
    assert torch.isin(alone, torch.tensor([0.0, 1 / (1 - rate)])).all()
    assert abs((alone == 0).double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / nodes)


@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_that_takes_no_mask_uses_the_edge_path(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edges, valid = CASES["all to all"]  # small and full: the case for dense attention
    assert isinstance(make(kind).attention_mask(contents(valid), valid, edges), EdgeList)
    use("dense", monkeypatch)
    torch.testing.assert_close(run(make(kind), edges, valid), run(make("sdpa"), edges, valid), atol=1e-5, rtol=0)


def test_eager_attention_is_always_dense_and_returns_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are zero without an edge, positive with one, and sum to 1."""
    use("edges", monkeypatch)
    edges, valid = CASES["padding"]
    encoder = make("eager")
    mask = encoder.attention_mask(contents(valid), valid, edges)
    layer: Any = encoder.layers[0]
    _, weights = layer.attention(contents(valid), mask)
    assert weights.shape == (3, HEADS, 5, 5)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(3, HEADS, 5))
    for row, of_row in enumerate(reads(edges, valid, 0)):
        for token, others in enumerate(of_row):
            for other in range(5):
                assert (weights[row, :, token, other] > 0).all() == (other in others)
                assert (weights[row, :, token, other] == 0).all() == (other not in others)


@pytest.mark.parametrize(("pairs_per_edge", "edge_path"), [(11, True), (12, False), (13, False)])
def test_the_path_is_chosen_by_pairs_per_edge(
    pairs_per_edge: int, edge_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 rows of 6 tokens are 72 pairs; 6 edges at 12 pairs each cost the same: dense."""
    monkeypatch.setattr(encoder_module, "PAIRS_PER_EDGE", pairs_per_edge)
    edges, valid = batch((6, 6), *[(row, i, i + 1) for row in range(2) for i in range(3)])
    mask = make().attention_mask(contents(valid), valid, edges)
    assert isinstance(mask, EdgeList) == edge_path


@pytest.mark.parametrize("case", ["isolated nodes", "no edges", "one node", "duplicates", "self loops twice", "many"])
@torch.no_grad()
def test_equals_transformer_conv_of_torch_geometric(case: str) -> None:
    """With self loops among its edges and without its root weight; Shi et al. (2021)."""
    geometric = pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")
    edges, valid = CASES[case]
    valid = torch.ones_like(valid)
    attention = Attention(EncoderConfig(hidden_size=WIDTH, num_attention_heads=HEADS))
    for parameter in attention.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=key(parameter.numel())))
    conv = geometric.nn.TransformerConv(WIDTH, WIDTH // HEADS, heads=HEADS, root_weight=False)
    parts = zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    for linear, (weight, bias) in zip((conv.lin_query, conv.lin_key, conv.lin_value), parts, strict=True):
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    content = contents(valid)
    loops = geometric.utils.add_self_loops(geometric.utils.remove_self_loops(edges)[0], num_nodes=valid.numel())[0]
    out = conv(content.flatten(0, 1), geometric.utils.coalesce(loops))
    found, _ = attention(content, EdgeList.build(edges, valid, 0))
    expected = nn.functional.linear(out, attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-5, rtol=0)
