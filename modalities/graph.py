"""Graphs with one token per node; edges say who may read whom (Hou et al., GraphMAE, KDD 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.drawings import Drawing, Network
from mmssl.graph_files import EDGE_LISTS, pyg, read_collection, read_file
from mmssl.modalities.base import Batch, Modality, View, nearest
from mmssl.positions import MLPPositions, NoPositions
from mmssl.samples import Samples
from mmssl.tokens import Tokens

SPARSE = 20  # features of which fewer than one in so many is not 0 are multiplied one by one
MOST_HOPS = 10  # what is farther away counts as unconnected


class Graph(Modality):
    """Graphs as sets of nodes that read their neighbours and themselves.

    Args:
        num_features: features F of a node. A graph without any gets its degree, one-hot: the last place is for all
            degrees from ``num_features - 1`` on.
        normalize_features: divide a node's features by the sum of their absolute values (GraphMAE on citation graphs).
        undirected: read each edge both ways.
        random_walk_steps: places are the probabilities that a random walk is back after 1, 2, ... so many steps
            (Dwivedi et al., 2022). 0: nodes have no such place.
        laplacian_vectors: places are so many eigenvectors of the normalised Laplacian, those of the smallest
            eigenvalues but the first, times the root of the number of nodes (Dwivedi and Bresson, 2021). 0: none.
        encoding_gate: start value of the learned factor of these places. At 1 they would be all that the first layer
            sees of features that are normalised; where features say little (TU graphs), 1 is better.
        max_nodes: training reads a sampled part of a graph with more nodes than this. None: always the whole graph.
        num_neighbors: how many neighbours such a part takes in for each node, hop by hop from random nodes on.
        gamma: power of the scaled cosine error.
        drop_edges: share of the edges that a view leaves out.
        mask_features: share of the features that a view sets to zero in all nodes of a graph.
    """

    inputs: ClassVar = ("node_features", "node_encodings", "edge_index", "attention_mask")
    extensions: ClassVar = (".npz", *EDGE_LISTS)
    columns: ClassVar = ("graph",)
    mask_styles: ClassVar = ("random", "block")
    aligned: ClassVar = False
    affine: ClassVar = True

    def __init__(
        self,
        num_features: int = 64,
        normalize_features: bool = True,
        undirected: bool = True,
        random_walk_steps: int = 0,
        laplacian_vectors: int = 0,
        encoding_gate: float = 0.0,
        max_nodes: int | None = None,
        num_neighbors: Sequence[int] = (10, 10),
        gamma: float = 3.0,
        drop_edges: float = 0.0,
        mask_features: float = 0.0,
    ):
        super().__init__()
        self.num_features, self.normalize_features, self.undirected = num_features, normalize_features, undirected
        self.random_walk_steps, self.laplacian_vectors = random_walk_steps, laplacian_vectors
        self.encoding_gate = float(encoding_gate)
        self.max_nodes, self.num_neighbors, self.gamma = max_nodes, tuple(num_neighbors), gamma
        self.drop_edges, self.mask_features = drop_edges, mask_features
        for name in ("drop_edges", "mask_features"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}; expected a share from 0 to below 1")
        if min(random_walk_steps, laplacian_vectors, *self.num_neighbors) < 0:
            raise ValueError("random_walk_steps, laplacian_vectors, num_neighbors: found a number below 0")
        if gamma < 1:
            raise ValueError(f"gamma: found {gamma}; expected at least 1, or small errors would have endless slopes")
        if max_nodes is not None and max_nodes < 2:
            raise ValueError(f"max_nodes: found {max_nodes}; expected at least 2")

    @property
    def content_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def build(self, width: int) -> Self:
        self.projection = nn.Linear(self.num_features, width)
        return super().build(width)

    def collection(self, source: str) -> Samples | None:
        return read_collection(source)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """A path, a ``{"edge_index", "x", "num_nodes"}`` record, a networkx graph or a torch_geometric ``Data``.

        Edges come back without self loops and duplicates, ordered by their target; features are checked and scaled.
        """
        if isinstance(sample, str | Path):
            sample = read_file(Path(sample))
        elif hasattr(sample, "nodes") and hasattr(sample, "edges"):
            sample = from_networkx(sample)
        elif hasattr(sample, "edge_index") and hasattr(sample, "to_dict"):
            sample = sample.to_dict() | {"num_nodes": sample.num_nodes}
        if not isinstance(sample, dict) or sample.get("edge_index") is None:
            found = f"the fields {', '.join(sample)}" if isinstance(sample, dict) else type(sample).__name__
            raise ValueError(f"found {found}; expected a path, a networkx or PyG graph, or a dict with edge_index")
        edge_index = numbers(sample["edge_index"], "edge_index", "iu").long()
        if edge_index.numel() == 0:
            edge_index = edge_index.new_zeros(2, 0)
        if edge_index.dim() != 2 or len(edge_index) != 2:
            raise ValueError(f"edge_index: found shape {tuple(edge_index.shape)}; expected (2, edges)")
        features = sample.get("x")
        nodes = sample.get("num_nodes")
        if nodes is None:
            nodes = len(features) if features is not None else int(edge_index.max()) + 1 if edge_index.numel() else 0
        nodes = int(nodes)
        if nodes < 1:
            raise ValueError(f"found a graph without nodes (num_nodes {nodes}); expected at least one")
        if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < nodes:
            raise ValueError(
                f"edge_index: found node numbers from {int(edge_index.min())} to {int(edge_index.max())}; expected "
                f"0 to {nodes - 1}, as the graph has {nodes} nodes"
            )
        edge_index = self.clean(edge_index, nodes)
        if features is None:
            degree = torch.bincount(edge_index[1], minlength=nodes).clamp(max=self.num_features - 1)
            x = nn.functional.one_hot(degree, self.num_features).float()
        else:
            x = self.checked(features, nodes)
        prepared = {"node_features": x, "edge_index": edge_index}
        if self.max_nodes is None or nodes <= self.max_nodes:  # else the encodings are those of the part that is read
            prepared["node_encodings"] = self.encodings(edge_index, nodes)
        return prepared

    def clean(self, edge_index: Tensor, nodes: int) -> Tensor:
        """No self loops (every node reads itself in any case), no duplicates, both ways if undirected."""
        source, target = edge_index[:, edge_index[0] != edge_index[1]]
        if self.undirected:
            source, target = torch.cat([source, target]), torch.cat([target, source])
        key = (target * nodes + source).unique()
        return torch.stack([key % nodes, key // nodes])

    def checked(self, features: Any, nodes: int) -> Tensor:
        x = numbers(features, "x", "iufb").float()
        if x.shape != (nodes, self.num_features):
            hint = f"; set modality.num_features to {x.shape[1]}" if x.dim() == 2 and len(x) == nodes else ""
            raise ValueError(f"x: found shape {tuple(x.shape)}; expected ({nodes}, {self.num_features}){hint}")
        if not x.isfinite().all():
            row = int((~x.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"x: found NaN or infinite features, the first at node {row}; expected finite values")
        return x / x.abs().sum(dim=1, keepdim=True).clamp(min=1e-12) if self.normalize_features else x

    def encodings(self, edge_index: Tensor, nodes: int) -> Tensor:
        """(nodes, P) the places of the nodes; all of about the size of 1 at most."""
        walk = torch.zeros(nodes, self.random_walk_steps)
        if self.random_walk_steps and edge_index.numel():
            data = pyg("data").Data(edge_index=edge_index, num_nodes=nodes)
            walk = pyg("transforms").AddRandomWalkPE(self.random_walk_steps, attr_name="walk")(data).walk
        return torch.cat([walk, laplacian_vectors(edge_index, nodes, self.laplacian_vectors)], dim=1)

    def excerpt(self, sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """In training, of a graph with more than ``max_nodes``: random nodes, neighbours of theirs, the edges between.

        Takes memory for the part and its edges alone, however large the graph is.
        """
        x, (source, target) = sample["node_features"], sample["edge_index"]
        if self.max_nodes is None or len(x) <= self.max_nodes:
            return sample
        if generator is None:
            return sample | {"node_encodings": self.encodings(sample["edge_index"], len(x))}
        nodes = torch.zeros(0, dtype=torch.long)
        seeds = max(1, self.max_nodes // (1 + int(np.cumprod(self.num_neighbors).sum())))
        for _ in range(8):  # the first round takes in fewer nodes than it may where nodes have few neighbours
            found = [torch.randint(len(x), (seeds,), generator=generator)]
            for count in self.num_neighbors:
                start, degree = group(target, found[-1])
                draw = torch.rand(len(degree), count, generator=generator)
                picked = (start[:, None] + (draw * degree[:, None]).long())[degree > 0]
                found.append(source[picked.flatten()].unique())
            new = torch.cat(found).unique()
            new = new[~torch.isin(new, nodes)]
            nodes = torch.cat([nodes, new[torch.randperm(len(new), generator=generator)]])[: self.max_nodes]
            if len(nodes) == self.max_nodes:
                break
            seeds = max(1, (self.max_nodes - len(nodes)) * seeds // max(1, len(new)))
        nodes = nodes.sort().values
        start, degree = group(target, nodes)
        place = torch.arange(len(nodes)).repeat_interleave(degree)  # of the target of each edge that ends in the part
        edge = torch.arange(int(degree.sum())) + (start - degree.cumsum(0) + degree).repeat_interleave(degree)
        other = torch.searchsorted(nodes, source[edge]).clamp(max=len(nodes) - 1)
        inside = nodes[other] == source[edge]
        edge_index = torch.stack([other[inside], place[inside]])
        return {
            "node_features": x[nodes],
            "edge_index": edge_index,
            "node_encodings": self.encodings(edge_index, len(nodes)),
        }

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        lengths = torch.tensor([len(sample["node_features"]) for sample in samples])
        longest = int(lengths.max())
        edges = [sample["edge_index"] + row * longest for row, sample in enumerate(samples)]
        pad = nn.utils.rnn.pad_sequence
        return {
            "node_features": pad([sample["node_features"] for sample in samples], batch_first=True),
            "node_encodings": pad([sample["node_encodings"] for sample in samples], batch_first=True),
            "edge_index": torch.cat(edges, dim=1),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }

    def tokenize(self, batch: Batch) -> Tokens:
        """Contents (B, N, F) are the features; edges (2, E) count nodes through the whole padded batch."""
        x, valid = batch["node_features"], batch["attention_mask"].bool()
        if x.dim() != 3 or x.shape[2] != self.num_features or x.shape[:2] != valid.shape:
            raise ValueError(
                f"node_features: found shape {tuple(x.shape)} and an attention_mask of {tuple(valid.shape)}; expected "
                f"(batch, nodes, {self.num_features}) and (batch, nodes)"
            )
        return Tokens(content=x, coords=batch["node_encodings"], valid=valid, edges=batch["edge_index"])

    def embed(self, tokens: Tokens) -> Tensor:
        content = tokens.content.to(self.projection.weight.dtype)
        sparse = content.device.type == "cpu" and not content.requires_grad
        if sparse and content.count_nonzero() * SPARSE < content.numel():
            return sparse_linear(content, self.projection)
        return self.projection(content)

    def positions(self, width: int) -> nn.Module:
        axes = self.random_walk_steps + self.laplacian_vectors
        return MLPPositions(width, axes, gate=self.encoding_gate) if axes else NoPositions(width)

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, F + 2) sums of the features over the nodes (counts, where they are one-hot), nodes and edges."""
        valid = batch["attention_mask"].float()
        row = batch["edge_index"][1] // valid.shape[1]
        edges = torch.bincount(row, minlength=len(valid)).to(valid.dtype)
        total = (batch["node_features"] * valid[..., None]).sum(dim=1)
        return torch.cat([total, valid.sum(dim=1)[:, None], edges[:, None]], dim=1)

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        """ "block": the nodes that are the fewest hops from a random one, then those of other components."""
        order = super().hiding_order(tokens, generator, style)
        if style == "random" or tokens.edges is None:
            return order
        first = order.masked_fill(~tokens.valid, torch.inf).argmin(dim=1, keepdim=True)
        hops = torch.full_like(order, order.shape[1]).scatter_(1, first, 0.0).flatten()
        source, target = tokens.edges
        while (nearer := hops.scatter_reduce(0, target, hops[source] + 1, reduce="amin")).lt(hops).any():
            hops = nearer
        return hops.view_as(order) + order

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """Leave out edges, both directions at once, and set features to zero (Zhu et al., GRACE, 2020)."""
        x, edges, parameters = batch["node_features"], batch["edge_index"], {}
        if self.drop_edges:
            nodes = x.shape[0] * x.shape[1]
            low, high = edges.amin(dim=0), edges.amax(dim=0)
            pairs, pair_of = (low * nodes + high).unique(return_inverse=True)
            kept = torch.rand(len(pairs), generator=generator, device=x.device) >= self.drop_edges
            edges = edges[:, kept[pair_of]]
            parameters["edges_kept"] = torch.bincount(edges[1] // x.shape[1], minlength=len(x))
        if self.mask_features:
            draw = torch.rand(len(x), x.shape[2], generator=generator, device=x.device)
            parameters["features_kept"] = draw >= self.mask_features
            x = x * parameters["features_kept"][:, None]
        return View({**batch, "node_features": x, "edge_index": edges}, parameters)

    def region(
        self, tokens: Tokens, share: float | Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> Tensor:
        """The nodes that the fewest edges part from a random one; among those equally far away, random ones."""
        allowed = tokens.valid if allowed is None else allowed & tokens.valid
        noise = torch.rand(allowed.shape, generator=generator, device=allowed.device)
        reached = torch.zeros_like(allowed)
        reached[torch.arange(len(noise), device=noise.device), noise.masked_fill(~allowed, -1.0).argmax(dim=1)] = True
        distance = (~reached).float()
        source, target = (tokens.valid.new_zeros(2, 0).long() if tokens.edges is None else tokens.edges).unbind()
        for _ in range(MOST_HOPS):
            known = reached.flatten()
            reached = known.index_fill(0, target[known[source]], True).view_as(reached)
            distance = distance + (~reached).float()
        return nearest(distance + noise, tokens.valid, share, allowed)

    def content_of(self, prediction: Tensor, tokens: Tokens) -> Tensor:
        """Only the direction is predicted; its length is that of the features."""
        return nn.functional.normalize(prediction, dim=-1) * tokens.content.norm(dim=-1, keepdim=True)

    def picture(self, tokens: Tokens) -> Tensor:
        """Nodes downwards, features across, the larger the darker; at most 128 of each."""
        content = tokens.content
        rows, columns = (torch.linspace(0, n - 1, min(n, 128)).long() for n in content.shape[1:])
        content = content[:, rows][:, :, columns].float()
        largest = content.nan_to_num().abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        return (1 - content.abs() / largest)[..., None].expand(-1, -1, -1, 3)

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """Nodes with the features that the model reads, scaled if ``normalize_features``; edges without direction."""
        length = tokens.valid.shape[1]
        edges = np.zeros((2, 0), dtype=np.int64) if tokens.edges is None else tokens.edges.numpy(force=True)
        row, edges = edges[1] // length, np.sort(edges % length, axis=0)
        return [
            Network(np.unique(edges[:, row == number], axis=1), content[valid].float().numpy(force=True))
            for number, (content, valid) in enumerate(zip(tokens.content, tokens.valid, strict=True))
        ]

    def reconstruction_loss(self, prediction: Tensor, target: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine error ``(1 - cos(prediction, target)) ** gamma``; a node without features has no direction."""
        prediction, target = prediction.float(), target.float()
        # The root of a sum with a small number in it: at a prediction of zero its slope is finite.
        length = (prediction.square().sum(dim=-1) + 1e-6).sqrt()
        goal = target.norm(dim=-1)
        cosine = (prediction * target).sum(dim=-1) / (length * goal.clamp(min=1e-12))
        loss = (1 - cosine).clamp(min=0) ** self.gamma
        known = where & (goal > 0)
        return loss, known.float()


def sparse_linear(content: Tensor, layer: nn.Linear) -> Tensor:
    """The layer's output for contents (..., F) that are nearly all 0, such as bags of words: skips these."""
    rows = content.flatten(0, -2)
    row, column = rows.nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(rows)))
    values = nn.functional.embedding_bag(
        column, layer.weight.T.contiguous(), start, mode="sum", per_sample_weights=rows[row, column].detach()
    )
    return (values + layer.bias).view(*content.shape[:-1], -1)


def group(target: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Where the edges that end in each node begin, in edges ordered by target, and how many there are."""
    target = target.contiguous()
    start = torch.searchsorted(target, nodes)
    return start, torch.searchsorted(target, nodes, right=True) - start


def laplacian_vectors(edge_index: Tensor, nodes: int, count: int) -> Tensor:
    """(nodes, count) eigenvectors of the normalised Laplacian, times the root of the number of nodes.

    They belong to the smallest eigenvalues but the first; the largest entry of each is positive. Edges count both
    ways. Where there are fewer vectors than wanted, zeros fill up.
    """
    result = torch.zeros(nodes, count)
    kept = min(count, nodes - 1)
    if not kept:
        return result
    from scipy.sparse.linalg import eigsh

    utils = pyg("utils")
    edges = utils.to_undirected(edge_index, num_nodes=nodes)
    weight = torch.ones(edges.shape[1], dtype=torch.float64)
    matrix = utils.to_scipy_sparse_matrix(*utils.get_laplacian(edges, weight, "sym", num_nodes=nodes), nodes)
    if nodes < 100 or kept + 1 >= nodes:
        values, vectors = np.linalg.eigh(matrix.toarray())
    else:  # shifted, since the smallest eigenvalues converge slowly
        start = np.random.RandomState(0).rand(nodes)  # else the solver draws from the global generator
        try:
            values, vectors = eigsh(matrix.tocsc(), kept + 1, sigma=-0.01, v0=start)
        except RuntimeError as error:
            raise ValueError(f"laplacian_vectors: they cannot be computed ({error}); take fewer") from error
    vectors = vectors[:, values.argsort()[1 : kept + 1]]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    result[:, :kept] = torch.from_numpy(vectors * np.where(largest < 0, -1.0, 1.0) * nodes**0.5)
    return result


def numbers(values: Any, name: str, kinds: str) -> Tensor:
    """An array of one of NumPy's kinds of numbers, as a tensor; an empty one may be of any kind."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: found rows of different lengths; expected a matrix ({error})") from error
    if array.size and array.dtype.kind not in kinds:
        expected = "whole numbers" if kinds == "iu" else "numbers"
        raise ValueError(f"{name}: found {array.dtype}; expected {expected}")
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind in "fbO" else np.int64))


def from_networkx(graph: Any) -> dict[str, Any]:
    """Edges, and the nodes' attribute "x" where all of them have it; other attributes are not read."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    edges = [[position[source], position[target]] for source, target in graph.edges()]
    if not graph.is_directed():
        edges += [edge[::-1] for edge in edges]
    features = [attributes.get("x") for _, attributes in graph.nodes(data=True)]
    known = bool(features) and all(value is not None for value in features)
    if not known and any(value is not None for value in features):
        raise ValueError(f"x: {sum(value is None for value in features)} of {len(features)} nodes have none")
    return {
        "edge_index": np.array(edges, dtype=np.int64).reshape(-1, 2).T,
        "num_nodes": len(position),
        **({"x": features} if known else {}),
    }
