"""GraphMAE on a citation graph beside raw features, their average over two hops, and GraphMAE with a GAT.

    python benchmarks/citation.py --name cora --config examples/recipes/graphmae_cora.yaml \
        --data "$MMSSL_DATA/graphs/cora.npz"

The GAT is torch-geometric's, of GraphMAE's shape, trained by Adam without weight decay. Shares of masked and replaced
nodes, loss and number of epochs are the recipe's. Other flags are those of ``mmssl pretrain``. Scores are appended to
docs/results.jsonl.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gat import GraphMAEOfGAT
from results import append
from torch import Tensor
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
    """(nodes, D) embeddings of a GAT after GraphMAE's pretraining."""
    torch.manual_seed(seed)
    model = GraphMAEOfGAT(x.shape[1], shape.hidden_size, gamma, mask_ratio, replace_ratio)
    optimizer = torch.optim.Adam(model.parameters(), lr=shape.learning_rate)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = shape.learning_rate * (1 + np.cos(np.pi * epoch / epochs)) / 2
        optimizer.zero_grad()
        model.loss(x, edges).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model.encode(x, edges)


if __name__ == "__main__":
    main()
