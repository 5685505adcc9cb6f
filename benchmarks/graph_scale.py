"""Attention along edges beside dense attention, by the number of nodes; and GraphMAE on graphs too large for one step.

    python benchmarks/graph_scale.py
    python benchmarks/graph_scale.py --nodes 500 2708 --large 100000 1000000

First table: forward and backward of one attention layer (width 256, four heads) over a random graph of mean degree 8
with either path, and torch-geometric's TransformerConv of the same size on the same edges, alternating in one process;
ratios are medians over rounds. Second table: training steps on parts of a generated graph. Memory is that of the
process: of the graph's own arrays, and what training adds to the whole at most.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch_geometric.nn import TransformerConv
from torch_geometric.utils import add_self_loops

from mmssl import MMSSLConfig, MMSSLModel
from mmssl import encoder as encoder_module
from mmssl.data import PreparedSamples
from mmssl.encoder import Attention, Encoder, EncoderConfig
from mmssl.modalities.graph import Graph
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.samples import Samples

WIDTH, HEADS, DEGREE = 256, 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 300, 1000, 2708, 5000, 20000, 100000])
    parser.add_argument("--dense_up_to", type=int, default=5000, help="Dense attention needs memory for all pairs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--max_nodes", type=int, default=4096, help="Nodes of a part of the large graphs.")
    arguments = parser.parse_args()
    table = Table("nodes", "edge list, ms", "dense / edge list", "TransformerConv / edge list", "chosen")
    for nodes in arguments.nodes:
        table.add_row(*compare(nodes, arguments.rounds, nodes <= arguments.dense_up_to))
    Console().print(table)
    table = Table("nodes", "edges", "graph in memory, MiB", "training adds, MiB", "nodes of a part", "steps a second")
    for nodes in arguments.large:
        with get_context("spawn").Pool(1) as pool:  # memory of a process of its own
            table.add_row(*pool.apply(train, (nodes, arguments.max_nodes)))
    Console().print(table)


def compare(nodes: int, rounds: int, with_dense: bool) -> list[str]:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1))
    attention = Attention(encoder.config)
    peer = TransformerConv(WIDTH, WIDTH // HEADS, heads=HEADS, root_weight=False)
    valid = torch.ones(1, nodes, dtype=torch.bool)
    edges = torch.randint(nodes, (2, nodes * DEGREE))
    edges = edges[:, edges[0] != edges[1]].unique(dim=1)
    looped = add_self_loops(edges, num_nodes=nodes)[0]
    x = torch.randn(1, nodes, WIDTH, requires_grad=True)

    def ours(pairs_per_edge: int) -> None:
        encoder_module.PAIRS_PER_EDGE = pairs_per_edge
        attention(x, encoder.attention_mask(x, valid, edges))[0].sum().backward()

    ways: dict[str, Callable[[], Any]] = {
        "edges": partial(ours, 0),
        "peer": lambda: (peer(x[0], looped) @ attention.proj.weight.T).sum().backward(),
    }
    if with_dense:
        ways["dense"] = partial(ours, nodes**2)
    chosen = encoder_module.PAIRS_PER_EDGE
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begun)
    encoder_module.PAIRS_PER_EDGE = chosen
    kind = "edge list" if nodes**2 > chosen * edges.shape[1] else "dense"

    def ratio(name: str) -> str:
        found = [a / b for a, b in zip(times[name][1:], times["edges"][1:], strict=True)]  # the first round warms up
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    return [
        f"{nodes:,}",
        f"{1000 * statistics.median(times['edges'][1:]):.1f}",
        ratio("dense") if with_dense else "does not fit",
        ratio("peer"),
        kind,
    ]


def train(nodes: int, max_nodes: int, steps: int = 20) -> list[str]:
    generator = np.random.default_rng(0)
    group = generator.integers(8, size=nodes)
    order = np.argsort(group, kind="stable")  # most edges are inside a group, whose features are alike
    source = generator.integers(nodes, size=nodes * DEGREE // 2)
    near = order[(np.argsort(order)[source] + generator.integers(1, 50, size=len(source))) % nodes]
    graph = {
        "x": (generator.normal(size=(8, 64))[group] + generator.normal(size=(nodes, 64))).astype(np.float32),
        "edge_index": np.stack([source, near]),
    }
    modality = Graph(num_features=64, normalize_features=False, max_nodes=max_nodes)
    dataset = PreparedSamples(Samples([graph], str), modality, seed=0)
    dataset.excerpt(0)
    model = MMSSLModel(
        MMSSLConfig(
            modalities={"graph": modality.options()},
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            residual=False,
            feed_forward=False,
        )
    )
    objective = MaskedReconstruction(
        model, corruption="replace", mask_ratio=0.5, remask=True, views=False, decoder_layers=1
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    stored = sum(value.numel() * value.element_size() for value in dataset.modality.prepare(graph).values())
    before, most, sizes = memory(), 0.0, []
    begun = time.perf_counter()
    for step in range(steps):
        dataset.set_epoch(step)
        batch = modality.collate([dataset.excerpt(0)])
        loss = objective(batch, torch.Generator().manual_seed(step)).loss
        most = max(most, memory())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sizes.append(batch["node_features"].shape[1])
    rate = steps / (time.perf_counter() - begun)
    assert dataset.last is not None
    edges = dataset.last[1]["edge_index"].shape[1]
    return [
        f"{nodes:,}",
        f"{edges:,}",
        f"{stored / 2**20:.0f}",
        f"{most - before:.0f}",
        f"{statistics.mean(sizes):,.0f}",
        f"{rate:.1f}",
    ]


def memory() -> float:
    """What this process holds, in MiB."""
    return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
    main()
