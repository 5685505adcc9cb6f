"""A citation graph: our GraphMAE recipe for Cora beside GraphMAE with torch-geometric's graph attention layers."""

from collections.abc import Callable
from functools import partial

import torch
from gat import GraphMAEOfGAT
from quality import Data, Field, Learner, Scores, ours, probed
from torch import Tensor
from torch_geometric.utils import add_self_loops

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.modalities.base import Batch
from mmssl.modalities.graph import Graph
from mmssl.probes import Task

FEATURES = 1433


def read(path: str, explore: bool) -> Data:
    """Cora as an npz file. Probes choose on the validation nodes; for exploring they are tested on these too."""
    reader = Graph(num_features=FEATURES)
    samples = load_samples(DataArguments(path), reader)
    prepared = PreparedSamples(samples, reader)
    batch = prepared.collate([prepared[0]])["inputs"]
    assert samples.token_labels is not None and samples.token_splits is not None
    labels, splits = samples.token_labels[0], samples.token_splits[0]

    def score(features: Callable[[Batch], Tensor]) -> Scores:
        with torch.no_grad():
            nodes = features(batch).numpy()
        fit, choose, test = (
            (nodes[splits == part], labels[splits == part]) for part in ("train", "validation", "test")
        )
        return probed(Task(*fit, *(choose if explore else test), choose), "planetoid", "planetoid_normalized")

    return Data(lambda generator: batch, score, lambda batch: batch["node_features"][0])


def of_gat() -> Learner:
    model = GraphMAEOfGAT(FEATURES, width=256, gamma=3, mask_ratio=0.5, replace_ratio=0.05)
    return Learner(
        model, lambda batch, generator: model.loss(*graph_of(batch)), lambda batch: model.encode(*graph_of(batch))
    )


def graph_of(batch: Batch) -> tuple[Tensor, Tensor]:
    x = batch["node_features"][0]
    return x, add_self_loops(batch["edge_index"], num_nodes=len(x))[0]


FIELD = Field(
    read,
    {
        "mmssl GraphMAE": partial(
            ours, "graphmae_cora.yaml", features=lambda model, batch: model(**batch).last_hidden_state[0]
        ),
        "torch-geometric GraphMAE": of_gat,
    },
    (60.0, 90.0),
    (5e-4, 1e-3, 2e-3, 4e-3),
    {"weight_decay": 0.0},
)
