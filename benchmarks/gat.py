"""GraphMAE with graph attention layers of torch-geometric, as a peer of ours."""

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv


class GraphMAEOfGAT(nn.Module):
    """GraphMAE's shape: two layers of four heads, PReLU after each, a decoder of one layer and one head.

    Hou et al., "GraphMAE", KDD 2022. Edges (2, E) are those in both directions, and a loop at each node.

    Args:
        features: number F of them.
        width: of the layers.
        gamma: power of the scaled cosine error.
        mask_ratio: share of the nodes that are hidden.
        replace_ratio: share of these that get another node's features.
    """

    def __init__(self, features: int, width: int, gamma: float, mask_ratio: float, replace_ratio: float):
        super().__init__()
        self.gamma, self.mask_ratio, self.replace_ratio = gamma, mask_ratio, replace_ratio
        sizes = {"heads": 4, "dropout": 0.1, "add_self_loops": False}
        self.layers = nn.ModuleList([GATConv(features, width // 4, **sizes), GATConv(width, width // 4, **sizes)])
        self.activations = nn.ModuleList([nn.PReLU(), nn.PReLU()])
        self.bridge = nn.Linear(width, width, bias=False)
        self.decoder = GATConv(width, features, add_self_loops=False)
        self.mask_token = nn.Parameter(torch.zeros(features))

    def encode(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(nn.functional.dropout(x, 0.2, self.training), edges))
        return x

    def loss(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.randperm(len(x))[: int(self.mask_ratio * len(x))]
        replaced = hidden[: int(self.replace_ratio * len(hidden))]
        seen = x.clone()
        seen[hidden] = self.mask_token
        seen[replaced] = x[torch.randint(len(x), (len(replaced),))]
        remasked = self.bridge(self.encode(seen, edges)).index_fill(0, hidden, 0.0)
        hidden = hidden[x[hidden].norm(dim=1) > 0]
        cosine = nn.functional.cosine_similarity(self.decoder(remasked, edges)[hidden], x[hidden])
        return ((1 - cosine).clamp(min=0) ** self.gamma).mean()
