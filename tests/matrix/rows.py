"""Batches of some of the samples of a batch, and the cells of the matrix whose samples can be told apart."""

from typing import Any

import torch
from torch import Tensor

from mmssl.modalities.base import Batch
from tests.matrix.cases import CELLS, IDS


def reads_others(options: dict[str, Any]) -> bool:
    return bool(options.get("replace_ratio")) or options.get("corruption") == "alter"


SAMPLE_BY_SAMPLE = {name: cell for name, cell in zip(IDS, CELLS, strict=True) if not reads_others(cell[2])}


def rows_of(batch: Batch, index: Tensor) -> Batch:
    """The samples at ``index``, padded as they were; edges, which join flat numbers of nodes, are renumbered."""
    chosen = {name: value[index] for name, value in batch.items() if name != "edge_index"}
    if "edge_index" in batch:
        nodes = batch["node_features"].shape[1]
        new = torch.full((len(batch["node_features"]),), -1)
        new[index] = torch.arange(len(index))
        row, node = batch["edge_index"] // nodes, batch["edge_index"] % nodes
        chosen["edge_index"] = (new[row] * nodes + node)[:, new[row[0]] >= 0]
    return chosen
