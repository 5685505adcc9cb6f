"""GraphMAE on a citation graph beside raw features, their average over two hops, and GraphMAE with a GAT.

    python benchmarks/citation.py --name cora --config examples/recipes/graphmae_cora.yaml \
        --data "$MMSSL_DATA/graphs/cora.npz"

The GAT is torch-geometric's, of GraphMAE's shape: two layers of four heads, PReLU after each, decoder of one layer and
one head, Adam without weight decay. Shares of masked and replaced nodes, loss and number of epochs are the recipe's.
Other flags are those of ``mmssl pretrain``. Scores are appended to docs/results.jsonl.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import append
from torch import Tensor, nn
from torch_geometric.nn import GATConv
from torch_geometric.utils import add_self_loops, degree, scatter

from mmssl.cli import pretrain_parser, with_source
from mmssl.data import PreparedSamples, load_samples
from mmssl.evaluation import PROTOCOLS, Score, evaluate, print_scores
from mmssl.probes import Task
from mmssl.training import pretrain

NODE_PROTOCOLS = ["planetoid", "planetoid_normalized"]


def main() -> None:
    parser = pretrain_parser()
    parser.add_argument("--name", type=str, required=True, help="Plain name of the data: cora, citeseer.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--gat.learning_rate", type=float, default=2e-3)
    parser.add_argument("--gat.hidden_size", type=int, default=256)
    config = parser.parse_args(with_source(sys.argv[1:]))
    given = parser.instantiate(config)
    runs = []
    for seed in config.seeds:
        train = replace(given.train, seed=seed, output_dir=f"{given.train.output_dir}/seed{seed}")
        runs.append(pretrain(given.modality, given.objective, given.encoder, given.data, train))
    scores = evaluate(runs, given.data, protocols=NODE_PROTOCOLS)

    samples = load_samples(given.data, given.modality)
    assert samples.token_labels is not None and samples.token_splits is not None
    labels, splits = samples.token_labels[0], samples.token_splits[0]
    graph = PreparedSamples(samples, given.modality)[0][0]
    x, edges = graph["node_features"], add_self_loops(graph["edge_index"], num_nodes=len(graph["node_features"]))[0]
    epochs, objective = given.train.max_train_steps, config.objective.init_args
    embeddings: dict[str, list[Tensor]] = {"2-hop average": [average(average(x, edges), edges)]}
    options = (given.modality.gamma, objective.mask_ratio, objective.replace_ratio, epochs, config.gat)
    embeddings["GAT untrained"] = [gat(x, edges, seed, *options[:3], 0, config.gat) for seed in config.seeds]
    embeddings["GAT pretrained"] = [gat(x, edges, seed, *options) for seed in config.seeds]
    parts = [splits == name for name in ("train", "test", "validation")]
    for row, found in embeddings.items():
        for protocol in NODE_PROTOCOLS:
            values = []
            for embedding in found:
                train_part, test_part, validation = ((embedding.numpy()[part], labels[part]) for part in parts)
                values.append(float(PROTOCOLS[protocol](Task(*train_part, *test_part, validation))["accuracy"].mean()))
            scores.append(Score(protocol, row, values, int(parts[0].sum()), int(parts[1].sum())))
    print_scores(scores, title=config.name)
    append(scores, runs, "graph", config.name, Path(str(config.config[0])).stem)


def average(x: Tensor, edges: Tensor) -> Tensor:
    """Each node's neighbourhood by the normalised adjacency with self loops (Wu et al., SGC, 2019)."""
    scale = degree(edges[1], len(x)).rsqrt()
    return scatter(x[edges[0]] * (scale[edges[0]] * scale[edges[1]])[:, None], edges[1], 0, len(x))


def gat(
    x: Tensor, edges: Tensor, seed: int, gamma: float, mask_ratio: float, replace_ratio: float, epochs: int, shape: Any
) -> Tensor:
    """(nodes, D) embeddings of a GAT after GraphMAE's pretraining (Hou et al., 2022)."""
    torch.manual_seed(seed)
    width, heads = shape.hidden_size, 4
    sizes = {"heads": heads, "dropout": 0.1, "add_self_loops": False}
    layers = nn.ModuleList([GATConv(x.shape[1], width // heads, **sizes), GATConv(width, width // heads, **sizes)])
    activations = nn.ModuleList([nn.PReLU(), nn.PReLU()])
    bridge, decoder = nn.Linear(width, width, bias=False), GATConv(width, x.shape[1], add_self_loops=False)
    mask_token = nn.Parameter(torch.zeros(x.shape[1]))
    model = nn.ModuleList([layers, activations, bridge, decoder])

    def encode(hidden: Tensor) -> Tensor:
        for layer, activation in zip(layers, activations, strict=True):
            hidden = activation(layer(nn.functional.dropout(hidden, 0.2, model.training), edges))
        return hidden

    optimizer = torch.optim.Adam([*model.parameters(), mask_token], lr=shape.learning_rate)
    known = x.norm(dim=1) > 0
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = shape.learning_rate * (1 + np.cos(np.pi * epoch / epochs)) / 2
        hidden = torch.randperm(len(x))[: int(mask_ratio * len(x))]
        replaced = hidden[: int(replace_ratio * len(hidden))]
        seen = x.clone()
        seen[hidden] = mask_token
        seen[replaced] = x[torch.randint(len(x), (len(replaced),))]
        remasked = bridge(encode(seen)).index_fill(0, hidden, 0.0)
        hidden = hidden[known[hidden]]
        cosine = nn.functional.cosine_similarity(decoder(remasked, edges)[hidden], x[hidden])
        loss = ((1 - cosine).clamp(min=0) ** gamma).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return encode(x)


if __name__ == "__main__":
    main()
