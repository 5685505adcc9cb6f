"""Attention along the edges of a graph, in time and memory linear in their number.

Each token reads the sources of the edges that end in it, and itself:

    out[t] = sum over edges (s, t) of softmax over s (query[t] . key[s] * scaling) value[s]

Both products are sparse: scores are dot products of the rows that an edge joins, sums are products of a sparse matrix
with a dense one, and each is the other's derivative. The kernels behind ``embedding_bag`` compute them without ever
making a (number of edges, width) tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmssl.dropout import dropout as dropped


@dataclass
class Bags:
    """Edges grouped by the token at one of their ends.

    Attributes:
        owner: (E,) long, ascending: the token whose group an edge is in.
        other: (E,) long: the token at its other end.
        start: (T + 1,) long: where each token's group begins.
    """

    owner: Tensor
    other: Tensor
    start: Tensor

    @classmethod
    def of(cls, owner: Tensor, other: Tensor, tokens: int) -> "Bags":
        start = torch.searchsorted(owner, torch.arange(tokens + 1, device=owner.device))
        return cls(owner, other, start)


@dataclass
class EdgeList:
    """Who reads whom among T = B * L tokens, prefix tokens and padding included; every token reads itself.

    Attributes:
        incoming: edges grouped by target; the order of scores and weights.
        outgoing: the same edges grouped by source.
        order: (E,) long: position in ``incoming`` of each edge of ``outgoing``.
    """

    incoming: Bags
    outgoing: Bags
    order: Tensor

    @classmethod
    def build(cls, edges: Tensor, valid: Tensor, prefix: int) -> "EdgeList":
        """From the edges (2, E) and the validity (B, N) of ``Tokens``, after ``prefix`` tokens in front of each row."""
        (batch, length), device = valid.shape, valid.device
        whole = prefix + length
        tokens = batch * whole
        source, target = (edges // length) * whole + prefix + edges % length
        every = torch.arange(tokens, device=device)
        sources, targets = [source, every], [target, every]
        if prefix:  # prefix tokens read their row, and their row reads them
            first = every[:, None] // whole * whole + torch.arange(prefix, device=device)
            rest = every[:, None].expand_as(first)
            sources += [first.flatten(), rest.flatten()]
            targets += [rest.flatten(), first.flatten()]
        source, target = torch.cat(sources), torch.cat(targets)
        readable = nn.functional.pad(valid, (prefix, 0), value=True).flatten()
        key = (target * tokens + source)[readable[source] | (source == target)].unique()
        source, target = key % tokens, key // tokens
        order = source.argsort(stable=True)
        return cls(Bags.of(target, source, tokens), Bags.of(source[order], target[order], tokens), order)


def edge_attention(
    query: Tensor, key: Tensor, value: Tensor, edges: EdgeList, scaling: float, dropout: float
) -> Tensor:
    """Attention of each token over its incoming edges: (B, heads, L, D / heads) to (B, L, heads, D / heads)."""
    batch, heads, length, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)  # sums over many neighbours want all digits
    rows = [x.to(wide).transpose(0, 1).reshape(heads, batch * length, -1) for x in (query * scaling, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        scores = EdgeScores.apply(rows[0], rows[1], edges).T
        start, owner = edges.incoming.start, edges.incoming.owner
        largest = torch.segment_reduce(scores.detach(), "max", offsets=start, axis=0)
        weights = (scores - largest.index_select(0, owner)).exp()
        total = torch.zeros_like(largest).index_add(0, owner, weights)
        weights = (weights / total.index_select(0, owner)).T.contiguous()
        weights = dropped(weights, dropout)
        out = EdgeSum.apply(weights, rows[2], edges)
    return out.view(heads, batch, length, -1).permute(1, 2, 0, 3).to(value.dtype)


class EdgeScores(torch.autograd.Function):
    """Dot products (heads, E) of the queries and keys (heads, T, width) that the edges join."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, edges: EdgeList) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.edges = edges
        return dots(query, key, edges.incoming)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        query, key = ctx.saved_tensors
        edges = ctx.edges
        grad = grad.contiguous()
        return sums(grad, key, edges.incoming), sums(grad[:, edges.order], query, edges.outgoing), None


class EdgeSum(torch.autograd.Function):
    """Sums (heads, T, width) of the values at the sources of each token's edges, weighted by weights (heads, E)."""

    @staticmethod
    def forward(ctx, weights: Tensor, value: Tensor, edges: EdgeList) -> Tensor:
        ctx.save_for_backward(weights, value)
        ctx.edges = edges
        return sums(weights, value, edges.incoming)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weights, value = ctx.saved_tensors
        edges = ctx.edges
        grad = grad.contiguous()
        return dots(grad, value, edges.incoming), sums(weights[:, edges.order], grad, edges.outgoing), None


def sums(weights: Tensor, values: Tensor, bags: Bags) -> Tensor:
    """Weighted sums over the bag of each head and token: (heads, E) and (heads, T, d) to (heads, T, d)."""
    return torch.stack(
        [
            nn.functional.embedding_bag(bags.other, v, bags.start[:-1], mode="sum", per_sample_weights=w)
            for w, v in zip(weights, values, strict=True)
        ]
    )


def dots(owners: Tensor, others: Tensor, bags: Bags) -> Tensor:
    """For each head and edge the dot product of its two rows: (heads, T, d) twice to (heads, E)."""
    # The derivative of embedding_bag by its weights is just that, and its kernel gathers nothing.
    kernel = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return torch.stack(
        [kernel(a, b, bags.other, bags.start[:-1], bags.owner, 0) for a, b in zip(owners, others, strict=True)]
    )
