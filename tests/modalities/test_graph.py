"""The graph modality against loops over nodes and edges, dense linear algebra and networkx."""

import math
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mmssl import encoder as encoder_module
from mmssl.data import PreparedSamples
from mmssl.data.builtin import digits_graph
from mmssl.modalities.base import Batch
from mmssl.modalities.graph import Graph
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.positions import MLPPositions
from mmssl.samples import Samples
from mmssl.tokens import Tokens

WALK = 4


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def geometric() -> Any:
    return pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")


def sample(nodes: int, edges: int, features: int = 3, seed: int = 0) -> dict[str, Any]:
    """A random graph with self loops, duplicates and isolated nodes."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(nodes, features))
    return {"x": x, "edge_index": generator.integers(nodes, size=(2, edges)), "num_nodes": nodes}


def path_graph(nodes: int, **more: Any) -> dict[str, Any]:
    return {"edge_index": np.stack([np.arange(nodes - 1), np.arange(1, nodes)]), "num_nodes": nodes, **more}


def clean_edges(graph: dict[str, Any], undirected: bool = True) -> set[tuple[int, int]]:
    """Each edge once, no self loops."""
    pairs = {(s, t) for s, t in np.asarray(graph["edge_index"]).T.tolist() if s != t}
    return pairs | {(t, s) for s, t in pairs} if undirected else pairs


def pairs(edge_index: Tensor) -> list[tuple[int, int]]:
    return [(s, t) for s, t in edge_index.T.tolist()]


def adjacency(edges: set[tuple[int, int]], nodes: int) -> np.ndarray:
    """Row: source, column: target."""
    matrix = np.zeros((nodes, nodes))
    for source, target in edges:
        matrix[source, target] = 1
    return matrix


def model(options: dict[str, Any], **shape: Any) -> MMSSLModel:
    """In double precision, no parameter at its start value."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = MMSSLModel(MMSSLConfig(modalities={"graph": options}, **{**sizes, **shape})).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=key(1), dtype=torch.float64))
    return made


def nodes_of(made: MMSSLModel, batch: Batch) -> Tensor:
    hidden = made(**batch).last_hidden_state
    assert hidden is not None
    return hidden[:, made.encoder.num_prefix_tokens :]


# What prepare makes of a graph


@pytest.mark.parametrize("undirected", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_edges_have_no_self_loops_and_no_duplicates(undirected: bool, seed: int) -> None:
    graph = sample(12, 40, seed=seed)
    found = Graph(num_features=3, undirected=undirected).prepare(graph)["edge_index"]
    assert len(pairs(found)) == len(set(pairs(found))) and set(pairs(found)) == clean_edges(graph, undirected)
    assert found[1].tolist() == sorted(found[1].tolist()) and found.dtype == torch.long


@pytest.mark.parametrize("undirected", [True, False])
@pytest.mark.parametrize("places", [2, 4, 64])
def test_without_features_degrees_are_one_hot_and_capped(places: int, undirected: bool) -> None:
    """Directed graphs: how many nodes one reads."""
    graph = sample(10, 30)
    del graph["x"]
    found = Graph(num_features=places, undirected=undirected).prepare(graph)["node_features"]
    edges = clean_edges(graph, undirected)
    degrees = [sum(t == node for _, t in edges) for node in range(10)]
    assert max(degrees) > 3 and min(degrees) < 3
    expected = [[float(place == min(degree, places - 1)) for place in range(places)] for degree in degrees]
    assert found.tolist() == expected


def test_rows_are_divided_by_the_sum_of_their_absolute_values() -> None:
    """Negative values keep their signs, rows of zeros stay zeros."""
    x = [[1.0, -3.0, 4.0], [0.0, 0.0, 0.0], [0.0, -2.0, 0.0], [1e-3, 1e-3, 0.0]]
    graph = {"x": x, "edge_index": [[0], [1]]}
    expected = torch.tensor([[1 / 8, -3 / 8, 4 / 8], [0, 0, 0], [0, -1, 0], [0.5, 0.5, 0]])
    torch.testing.assert_close(Graph(num_features=3).prepare(graph)["node_features"], expected)
    raw = Graph(num_features=3, normalize_features=False).prepare(graph)["node_features"]
    assert torch.equal(raw, torch.tensor(x))


def test_forms_of_the_same_graph(tmp_path: Path) -> None:
    """Records of lists, arrays and tensors, files, networkx and PyG graphs."""
    networkx = pytest.importorskip("networkx", reason="networkx is not installed")
    data = geometric().data.Data
    x, edges = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0], [0.0, 1.0]]), [[0, 1, 3], [1, 2, 0]]
    np.savez(tmp_path / "graph.npz", x=x, edge_index=edges)
    named = networkx.Graph([("a", "b"), ("b", "c"), ("d", "a")])
    for name, row in zip("abcd", x, strict=True):
        named.nodes[name]["x"] = row.tolist()
    forms = [
        {"x": x.tolist(), "edge_index": edges},
        {"x": torch.tensor(x), "edge_index": torch.tensor(edges, dtype=torch.int32), "y": 3, "other": None},
        tmp_path / "graph.npz",
        str(tmp_path / "graph.npz"),
        data(x=torch.tensor(x), edge_index=torch.tensor(edges), y=torch.ones(4)),
        named,
    ]
    modality = Graph(num_features=2, random_walk_steps=2)
    first, *others = [modality.prepare(form) for form in forms]
    assert set(pairs(first["edge_index"])) == {(0, 1), (1, 0), (1, 2), (2, 1), (3, 0), (0, 3)}
    for other in others:
        assert set(other) == set(first)
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_networkx_and_pyg_graphs_without_features() -> None:
    """Directions, isolated nodes and attributes that are no features."""
    networkx = pytest.importorskip("networkx", reason="networkx is not installed")
    data = geometric().data.Data
    directed = networkx.DiGraph([(0, 1), (1, 2)])
    directed.add_node(3, colour="red")
    directed.edges[0, 1]["weight"] = 2.0
    for form in (directed, data(edge_index=torch.tensor([[0, 1], [1, 2]]), num_nodes=4)):
        prepared = Graph(num_features=3, undirected=False).prepare(form)
        assert set(pairs(prepared["edge_index"])) == {(0, 1), (1, 2)}
        assert prepared["node_features"].argmax(dim=1).tolist() == [0, 1, 1, 0]
        both = Graph(num_features=3).prepare(form)
        assert both["node_features"].argmax(dim=1).tolist() == [1, 2, 1, 0]
    assert Graph(num_features=2).prepare(networkx.empty_graph(3))["node_features"].tolist() == [[1.0, 0.0]] * 3


X = np.eye(4)
NAN = np.where(np.arange(16).reshape(4, 4) == 9, np.nan, X)
MALFORMED: dict[str, tuple[Any, list[str]]] = {
    "beyond the nodes": ({"x": X, "edge_index": [[0, 1], [1, 4]]}, ["edge_index", "0 to 4", "0 to 3", "4 nodes"]),
    "negative": ({"x": X, "edge_index": [[0, -1], [1, 2]]}, ["edge_index", "-1 to 2", "0 to 3"]),
    "three rows": ({"x": X, "edge_index": np.zeros((3, 5), int)}, ["edge_index", "(3, 5)", "(2, edges)"]),
    "turned": ({"x": X, "edge_index": np.zeros((5, 2), int)}, ["edge_index", "(5, 2)", "(2, edges)"]),
    "flat": ({"x": X, "edge_index": [0, 1]}, ["edge_index", "(2,)", "(2, edges)"]),
    "ragged": ({"x": X, "edge_index": [[0, 1], [1]]}, ["edge_index"]),
    "names": ({"x": X, "edge_index": [["a"], ["b"]]}, ["edge_index"]),
    "fractions": ({"x": X, "edge_index": [[0.5], [1.0]]}, ["edge_index"]),
    "NaN": ({"x": NAN, "edge_index": [[0], [1]]}, ["x:", "NaN", "node 2", "finite"]),
    "infinity": ({"x": np.where(np.isnan(NAN), np.inf, X), "edge_index": [[0], [1]]}, ["x:", "node 2", "finite"]),
    "features": ({"x": np.ones((4, 7)), "edge_index": [[0], [1]]}, ["x:", "(4, 7)", "(4, 4)", "num_features to 7"]),
    "too few rows": ({"x": X, "edge_index": [[0], [1]], "num_nodes": 5}, ["x:", "(4, 4)", "(5, 4)"]),
    "flat features": ({"x": np.ones(4), "edge_index": [[0], [1]]}, ["x:", "(4,)", "(4, 4)"]),
    "words": ({"x": [["a"] * 4] * 4, "edge_index": [[0], [1]]}, ["x:"]),
    "no nodes": ({"edge_index": np.zeros((2, 0))}, ["without nodes", "at least one"]),
    "zero nodes": ({"edge_index": np.zeros((2, 0)), "num_nodes": 0}, ["without nodes", "at least one"]),
    "less than zero nodes": ({"edge_index": np.zeros((2, 0)), "num_nodes": -1}, ["at least one"]),
    "no edge_index": ({"x": X, "edges": [[0], [1]]}, ["x, edges", "expected", "edge_index"]),
    "None": (None, ["NoneType", "expected a path"]),
    "number": (3, ["int", "expected a path"]),
    "array": (X, ["ndarray", "expected a path"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_graphs_are_refused_and_say_why(case: str) -> None:
    value, fragments = MALFORMED[case]
    with pytest.raises(ValueError) as error:
        Graph(num_features=4).prepare(value)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_other_graphs_that_are_malformed() -> None:
    networkx = pytest.importorskip("networkx", reason="networkx is not installed")
    some = networkx.path_graph(3)
    some.nodes[0]["x"] = [1.0]
    with pytest.raises(ValueError, match="without nodes"):
        Graph().prepare(networkx.Graph())
    with pytest.raises(ValueError, match="nodes"):
        Graph(num_features=1).prepare(some)
    table = pytest.importorskip("pandas").DataFrame({"source": [0], "target": [1]})
    with pytest.raises(ValueError, match="found DataFrame; expected a path"):
        Graph().prepare(table)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"drop_edges": 1.0}, ["drop_edges", "1.0", "below 1"]),
        ({"mask_features": -0.1}, ["mask_features", "-0.1"]),
        ({"gamma": 0.5}, ["gamma", "0.5", "at least 1"]),
        ({"max_nodes": 1}, ["max_nodes", "1", "at least 2"]),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Graph(**options)
    assert all(fragment in str(error.value) for fragment in fragments)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    modality = Graph(num_features=3)
    batch = modality.collate([modality.prepare(sample(4, 6))])
    with pytest.raises(ValueError, match=r"node_features.*\(1, 4, 3\).*\(batch, nodes, 5\)"):
        Graph(num_features=5).tokenize(batch)
    with pytest.raises(ValueError, match=r"attention_mask of \(1, 3\)"):
        modality.tokenize({**batch, "attention_mask": batch["attention_mask"][:, :3]})


# Places


@pytest.mark.parametrize("undirected", [True, False])
def test_random_walk_places_equal_powers_of_the_dense_matrix(undirected: bool) -> None:
    geometric()
    graph = sample(15, 22)
    found = Graph(num_features=3, undirected=undirected, random_walk_steps=5).prepare(graph)["node_encodings"]
    matrix = adjacency(clean_edges(graph, undirected), 15)
    step = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    expected = np.stack([np.diag(np.linalg.matrix_power(step, k)) for k in range(1, 6)], axis=1)
    assert (expected == 0).all(axis=1).any() and (expected > 0).any()  # isolated nodes never come back
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_random_walk_places_of_a_long_ring() -> None:
    """Sparse arithmetic from 2,001 nodes on; after 2 k steps (2 k over k) of 4 ** k walks are back."""
    geometric()
    nodes = 2003
    edges = np.stack([np.arange(nodes), np.roll(np.arange(nodes), 1)])
    found = Graph(random_walk_steps=4).prepare({"edge_index": edges, "num_nodes": nodes + 1})["node_encodings"]
    expected = torch.tensor([0, 2 / 4, 0, 6 / 16]).expand(nodes, 4)
    torch.testing.assert_close(found[:-1], expected)
    assert not found[-1].any()


def slow_laplacian(edges: set[tuple[int, int]], nodes: int, count: int) -> np.ndarray:
    matrix = adjacency(edges, nodes)
    scale = 1 / np.sqrt(matrix.sum(axis=1))
    values, vectors = np.linalg.eigh(np.eye(nodes) - scale[:, None] * matrix * scale)
    assert np.diff(values[: count + 2]).min() > 1e-4  # else vectors are not unique
    return vectors[:, 1 : count + 1] * math.sqrt(nodes)


def assert_equal_up_to_sign(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    for ours, theirs in zip(found.T, expected.T, strict=True):
        np.testing.assert_allclose(ours * np.sign(ours @ theirs), theirs, atol=tolerance)


@pytest.mark.parametrize(("nodes", "tolerance"), [(20, 1e-4), (99, 1e-4), (100, 2e-3), (150, 2e-3)])
def test_laplacian_places_equal_dense_eigenvectors(nodes: int, tolerance: float) -> None:
    """Of the normalised Laplacian; up to sign, and with the length of the root of the number of nodes."""
    geometric()
    graph = path_graph(nodes)
    chords = np.random.default_rng(0).integers(nodes, size=(2, nodes // 4))
    graph["edge_index"] = np.concatenate([graph["edge_index"], chords], axis=1)
    modality = Graph(laplacian_vectors=3)
    found = modality.prepare(graph)["node_encodings"]
    expected = slow_laplacian(clean_edges(graph), nodes, 3)
    assert_equal_up_to_sign(found.numpy(), expected, tolerance)
    assert torch.equal(modality.prepare(graph)["node_encodings"], found)


@pytest.mark.parametrize("nodes", [1, 2, 5, 110])
def test_graphs_with_fewer_nodes_than_vectors_get_zeros(nodes: int) -> None:
    geometric()
    wanted = nodes + 3
    graph = path_graph(nodes)
    chords = np.random.default_rng(1).integers(nodes, size=(2, 6 * nodes if nodes > 9 else 0))
    graph["edge_index"] = np.concatenate([graph["edge_index"], chords], axis=1)
    found = Graph(laplacian_vectors=wanted).prepare(graph)["node_encodings"]
    assert found.shape == (nodes, wanted) and not found[:, nodes - 1 :].any()
    if nodes > 1:  # all vectors but the first: orthogonal, of equal length, and orthogonal to the first
        product = (found.T @ found)[: nodes - 1, : nodes - 1]
        torch.testing.assert_close(product, nodes * torch.eye(nodes - 1), atol=1e-3 * nodes, rtol=0)
        root = torch.bincount(torch.tensor([t for _, t in clean_edges(graph)]), minlength=nodes).float().sqrt()
        torch.testing.assert_close(root @ found, torch.zeros(wanted), atol=1e-3 * nodes, rtol=0)


@pytest.mark.parametrize("nodes", [6, 140])
def test_laplacian_places_do_not_depend_on_global_randomness(nodes: int) -> None:
    """Nor where eigenvalues are the same: a ring, and four parts without an edge between them."""
    geometric()
    ring = np.stack([np.arange(nodes), np.roll(np.arange(nodes), 1)])
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        found.append(Graph(laplacian_vectors=4).prepare({"edge_index": ring, "num_nodes": nodes + 3}))
    assert torch.equal(found[0]["node_encodings"], found[1]["node_encodings"])
    assert found[0]["node_encodings"].isfinite().all()


def test_both_kinds_of_places_stand_side_by_side_and_none_is_empty() -> None:
    geometric()
    graph = path_graph(7)
    both = Graph(random_walk_steps=2, laplacian_vectors=3).prepare(graph)["node_encodings"]
    walk = Graph(random_walk_steps=2).prepare(graph)["node_encodings"]
    vectors = Graph(laplacian_vectors=3).prepare(graph)["node_encodings"]
    assert torch.equal(both, torch.cat([walk, vectors], dim=1))
    assert Graph().prepare(graph)["node_encodings"].shape == (7, 0)


def test_places_do_not_drown_features_before_training() -> None:
    """Their gate is closed at first, and training can open it; a decoder's likewise."""
    geometric()
    options: dict[str, Any] = {"num_features": 3, "random_walk_steps": WALK}
    torch.manual_seed(0)
    made = MMSSLModel(
        MMSSLConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, modalities={"graph": options})
    )
    modality: Any = made.modalities["graph"]
    batch = modality.collate([modality.prepare(sample(9, 14))])
    loud = {**batch, "node_encodings": 1e3 * batch["node_encodings"] + 5}
    assert torch.equal(nodes_of(made, batch), nodes_of(made, loud))
    nodes_of(made, batch).square().sum().backward()
    gate = modality.position.gate
    assert gate.item() == 0 and gate.grad.item() != 0
    decoder = modality.positions(8)
    assert isinstance(decoder, MLPPositions) and decoder.gate is not None and decoder.gate.item() == 0
    with torch.no_grad():
        gate.fill_(1.0)
    assert not torch.allclose(nodes_of(made, batch), nodes_of(made, loud))


# In the model

PATHS = {"edges": 0.0, "dense": math.inf}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prefix", [{}, {"class_token": True, "num_register_tokens": 1}], ids=["plain", "prefix"])
@torch.no_grad()
def test_renumbering_nodes_renumbers_their_embeddings(
    prefix: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometric()
    monkeypatch.setattr(encoder_module, "PAIRS_PER_EDGE", PATHS[path])
    made = model({"num_features": 3, "random_walk_steps": WALK}, **prefix)
    modality: Any = made.modalities["graph"]
    graph = sample(14, 25)
    order = np.random.default_rng(3).permutation(14)  # new node i is old node order[i]
    renumbered = {"x": graph["x"][order], "edge_index": np.argsort(order)[graph["edge_index"]], "num_nodes": 14}
    first, second = (nodes_of(made, modality.collate([modality.prepare(g)])) for g in (graph, renumbered))
    # Features and places are prepared in single precision; their sums may differ in the last digit.
    torch.testing.assert_close(second[0], first[0, order], atol=1e-5, rtol=0)
    batch = modality.collate([modality.prepare(graph)])
    turned = {
        "node_features": batch["node_features"][:, order],
        "node_encodings": batch["node_encodings"][:, order],
        "edge_index": torch.from_numpy(np.argsort(order))[batch["edge_index"]].flip(1),
        "attention_mask": batch["attention_mask"],
    }
    torch.testing.assert_close(nodes_of(made, turned)[0], first[0, order], atol=1e-10, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_a_graph_alone_equals_the_graph_in_a_batch(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometric()
    monkeypatch.setattr(encoder_module, "PAIRS_PER_EDGE", PATHS[path])
    made = model({"num_features": 3, "random_walk_steps": WALK}, class_token=True)
    modality: Any = made.modalities["graph"]
    prepared = [modality.prepare(sample(n, e, seed=n)) for n, e in ((5, 8), (11, 20), (1, 0), (3, 0))]
    batch = modality.collate(prepared)
    together = made(**batch)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 11, 1, 3]
    for row, graph in enumerate(prepared):
        alone, length = made(**modality.collate([graph])), len(graph["node_features"])
        torch.testing.assert_close(
            together.last_hidden_state[row, : length + 1], alone.last_hidden_state[0], atol=1e-10, rtol=0
        )
        torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_eager_attention_returns_weights_along_edges_only() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["attn_implementation"] = "eager"
    config = MMSSLConfig(modalities={"graph": {"num_features": 3}}, **sizes)
    made, graph = MMSSLModel(config).eval(), sample(6, 7)
    modality: Any = made.modalities["graph"]
    weights = made(**modality.collate([modality.prepare(graph)]), output_attentions=True).attentions[0]
    allowed = adjacency(clean_edges(graph), 6).T + np.eye(6) > 0  # row: the node that reads
    assert np.array_equal((weights[0] > 0).all(dim=0).numpy(), allowed) and weights.shape == (1, 2, 6, 6)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(1, 2, 6))


# Parts of a large graph


def numbered(nodes: int, edges: int, **options: Any) -> tuple[Graph, dict[str, Tensor]]:
    """A prepared random graph whose nodes carry their numbers."""
    modality = Graph(num_features=1, normalize_features=False, **options)
    graph = {"x": np.arange(nodes)[:, None], "edge_index": np.random.default_rng(2).integers(nodes, size=(2, edges))}
    return modality, modality.prepare(graph)


def numbers(part: dict[str, Tensor]) -> list[int]:
    return part["node_features"][:, 0].long().tolist()


@pytest.mark.parametrize("undirected", [True, False])
@pytest.mark.parametrize(
    ("max_nodes", "num_neighbors"),
    [(40, (2, 2)), (40, (50,)), (2, (10, 10)), (25, ()), (30, (1, 1, 1, 1)), (199, (3,))],
)
def test_a_part_is_what_its_nodes_induce(max_nodes: int, num_neighbors: tuple[int, ...], undirected: bool) -> None:
    """Never more nodes than asked for, each once, and all the edges between them, found by a loop."""
    modality, whole = numbered(200, 500, max_nodes=max_nodes, num_neighbors=num_neighbors, undirected=undirected)
    edges, before = pairs(whole["edge_index"]), {name: value.clone() for name, value in whole.items()}
    sizes = set()
    for seed in range(12):
        part = modality.excerpt(whole, key(seed))
        kept = numbers(part)
        assert 1 <= len(kept) <= max_nodes and len(set(kept)) == len(kept)
        sizes.add(len(kept))
        expected = [(s, t) for s, t in edges if s in kept and t in kept]
        found = [(kept[s], kept[t]) for s, t in pairs(part["edge_index"])]
        assert sorted(found) == sorted(expected)
        targets = part["edge_index"][1].tolist()
        assert targets == sorted(targets) and part["node_encodings"].shape == (len(kept), 0)
    assert max(sizes) >= 2
    assert all(torch.equal(whole[name], value) for name, value in before.items()) and set(before) == set(whole)


def test_a_part_spreads_hop_by_hop_from_random_nodes() -> None:
    """On a path and with one random node the part is a piece of two hops to either side, where the path goes on."""
    nodes = 300
    modality = Graph(num_features=1, normalize_features=False, max_nodes=5, num_neighbors=(10, 10))
    whole = modality.prepare(path_graph(nodes, x=np.arange(nodes)[:, None]))
    middles, pieces = [], 0
    for seed in range(20):
        kept = sorted(numbers(modality.excerpt(whole, key(seed))))
        assert len(kept) == 5 and np.diff(kept).min() == 1
        pieces += int(np.diff(kept).max() > 1)
        middles.append(sum(kept) / len(kept))
    assert pieces <= 2  # two neighbours are seldom missed in ten draws
    assert len(set(middles)) > 15 and min(middles) < 100 < 200 < max(middles)


def test_a_part_follows_edges_against_their_direction() -> None:
    """A node's neighbours are those it reads."""
    modality = Graph(num_features=1, normalize_features=False, undirected=False, max_nodes=2, num_neighbors=(2,))
    whole = modality.prepare(path_graph(100, x=np.arange(100)[:, None]))
    for seed in range(10):
        kept = sorted(numbers(modality.excerpt(whole, key(seed))))
        assert len(kept) == 2 and (kept[1] == kept[0] + 1 or kept[0] == 0)  # node 0 reads nobody


def test_places_of_a_part_are_those_of_the_part() -> None:
    geometric()
    modality, whole = numbered(200, 500, max_nodes=40, random_walk_steps=3)
    assert "node_encodings" not in whole  # of the whole they would be wasted
    part = modality.excerpt(whole, key(0))
    count = len(part["node_features"])
    matrix = adjacency(set(pairs(part["edge_index"])), count)
    step = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    expected = np.stack([np.diag(np.linalg.matrix_power(step, k)) for k in (1, 2, 3)], axis=1)
    np.testing.assert_allclose(part["node_encodings"], expected, atol=1e-6)


def test_the_same_generator_gives_the_same_part_and_none_gives_the_whole() -> None:
    geometric()
    modality, whole = numbered(200, 500, max_nodes=40, random_walk_steps=2)
    first, same, other = (numbers(modality.excerpt(whole, key(seed))) for seed in (1, 1, 2))
    assert first == same != other
    complete, expected = modality.excerpt(whole, None), numbered(200, 500, random_walk_steps=2)[1]
    assert set(complete) == set(expected)
    assert all(torch.equal(complete[name], expected[name]) for name in expected)
    small, prepared = numbered(40, 60, max_nodes=40, random_walk_steps=2)
    assert all(torch.equal(small.excerpt(prepared, key(0))[name], prepared[name]) for name in prepared)


def test_every_epoch_has_its_part_whatever_the_number_of_workers() -> None:
    modality, _ = numbered(2, 1, max_nodes=30, num_neighbors=(2, 2))
    graph = {"x": np.arange(200)[:, None], "edge_index": np.random.default_rng(2).integers(200, size=(2, 500))}
    data = PreparedSamples(Samples([graph], "graph {}".format), modality, seed=3)
    parts = []
    for workers in (0, 2):
        loader = DataLoader(data, 1, num_workers=workers, collate_fn=data.collate, persistent_workers=workers > 0)
        for epoch in range(3):
            data.set_epoch(epoch)
            (batch,) = loader
            parts.append(
                (numbers({"node_features": batch["inputs"]["node_features"][0]}), batch["inputs"]["edge_index"])
            )
    assert len({tuple(part[0]) for part in parts}) == 3
    for alone, worker in zip(parts[:3], parts[3:], strict=True):
        assert alone[0] == worker[0] and torch.equal(alone[1], worker[1])
    whole = PreparedSamples(data.samples, modality)[0][0]
    assert len(whole["node_features"]) == 200


def test_global_randomness_is_neither_read_nor_changed() -> None:
    """By prepare, by the search for eigenvectors, dense or sparse, and by excerpt."""
    geometric()
    options: dict[str, Any] = {"random_walk_steps": 2, "laplacian_vectors": 2}

    def states() -> tuple[bytes, list[int], int, Any]:
        numpy_state: Any = np.random.get_state()
        return bytes(torch.get_rng_state().tolist()), list(numpy_state[1]), int(numpy_state[2]), random.getstate()

    parts = []
    for seed in (0, 1):
        for reseed in (torch.manual_seed, np.random.seed, random.seed):
            reseed(seed)
        before = states()
        modality, whole = numbered(300, 900, max_nodes=150, num_neighbors=(5, 5), **options)
        parts.append(modality.excerpt(whole, key(5)))
        modality.excerpt(whole, None)
        for nodes in (20, 150):
            numbered(nodes, 4 * nodes, **options)
        assert states() == before
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


# The loss


@pytest.mark.parametrize("gamma", [1.0, 2.5, 3.0])
def test_scaled_cosine_error_equals_that_of_cosine_similarity(gamma: float) -> None:
    prediction, target = torch.randn(2, 3, 6, 5, generator=key(0)).double()
    where = torch.rand(3, 6, generator=key(1)) < 0.5
    loss, weight = Graph(num_features=5, gamma=gamma).reconstruction_loss(prediction, 7 * target, where)
    expected = (1 - F.cosine_similarity(prediction, target, dim=-1)) ** gamma
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(weight, where.float())
    assert loss.max() > 1 > loss.min()


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("case", ["zero prediction", "zero target", "both zero", "tiny", "perfect", "opposite"])
def test_loss_and_gradient_are_finite(case: str, gamma: float) -> None:
    target = torch.randn(1, 2000, 7, generator=key(0))
    prediction = {"perfect": 3 * target, "opposite": -target, "tiny": 1e-20 * target}.get(case, target.flip(1)).clone()
    if case in ("zero prediction", "both zero"):
        prediction = torch.zeros_like(prediction)
    if case in ("zero target", "both zero"):
        target = torch.zeros_like(target)
    if case == "perfect":  # rounding makes cosines a little larger than 1, whose error has no root
        cosine = (prediction * target).sum(-1) / (prediction.square().sum(-1).sqrt() * target.norm(dim=-1))
        assert (cosine > 1).any()
    prediction.requires_grad_()
    where = torch.ones(1, 2000, dtype=torch.bool)
    loss, weight = Graph(num_features=7, gamma=gamma).reconstruction_loss(prediction, target, where)
    (loss * weight).sum().backward()
    assert loss.isfinite().all() and (loss >= 0).all()
    assert prediction.grad is not None and prediction.grad.isfinite().all()
    if case == "perfect":
        torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-5, rtol=0)
    if case == "opposite":
        torch.testing.assert_close(loss, torch.full_like(loss, 2**gamma))
    if case in ("zero target", "both zero"):
        assert not weight.any() and not prediction.grad.any()


def test_nodes_without_features_and_hidden_from_view_weigh_nothing() -> None:
    target = torch.randn(1, 4, 3, generator=key(0))
    target[0, 1] = 0
    where = torch.tensor([[True, True, False, True]])
    assert Graph(num_features=3).reconstruction_loss(target + 1, target, where)[1].tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_half_precision_predictions_are_compared_in_single_precision() -> None:
    prediction, target = torch.randn(2, 1, 50, 5, generator=key(0)).bfloat16()
    where = torch.ones(1, 50, dtype=torch.bool)
    modality = Graph(num_features=5)
    found, expected = (
        modality.reconstruction_loss(p, t, where)[0]
        for p, t in ((prediction, target), (prediction.float(), target.float()))
    )
    assert found.dtype == torch.float32 and torch.equal(found, expected)


# Views and masks


def prepared_batch(modality: Graph, *sizes: tuple[int, int]) -> Batch:
    return modality.collate([modality.prepare(sample(n, e, modality.num_features, seed=n)) for n, e in sizes])


@pytest.mark.parametrize("undirected", [True, False])
def test_views_leave_out_edges_in_both_directions(undirected: bool) -> None:
    modality = Graph(num_features=3, undirected=undirected, drop_edges=0.3)
    batch = prepared_batch(modality, (60, 900), (80, 900), (1, 0))
    before = {name: value.clone() for name, value in batch.items()}
    view = modality.view(batch, key(0))
    all_edges, kept = pairs(batch["edge_index"]), pairs(view.batch["edge_index"])
    known, left = set(all_edges), set(kept)
    assert left < known and len(left) == len(kept)
    for source, target in known:
        if (target, source) in known:
            assert ((source, target) in left) == ((target, source) in left)
    links = {frozenset(edge) for edge in all_edges}
    share = len({frozenset(edge) for edge in kept}) / len(links)
    assert abs(share - 0.7) < 5 * math.sqrt(0.21 / len(links))
    assert view.parameters["edges_kept"].tolist() == [sum(t // 80 == row for _, t in kept) for row in range(3)]
    assert torch.equal(view.batch["node_features"], batch["node_features"])
    assert all(torch.equal(batch[name], value) for name, value in before.items()), "the input was changed"
    assert torch.equal(modality.view(batch, key(0)).batch["edge_index"], view.batch["edge_index"])
    assert not torch.equal(modality.view(batch, key(1)).batch["edge_index"], view.batch["edge_index"])


def test_views_set_features_to_zero_in_all_nodes_of_a_graph() -> None:
    modality = Graph(num_features=400, mask_features=0.25)
    batch = prepared_batch(modality, (4, 3), (6, 8))
    before = batch["node_features"].clone()
    view = modality.view(batch, key(0))
    kept = view.parameters["features_kept"]
    assert kept.shape == (2, 400) and not torch.equal(kept[0], kept[1])
    assert abs(kept.double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 800)
    for row in range(2):
        for feature in range(400):
            expected = before[row, :, feature] if kept[row, feature] else torch.zeros(6)
            assert torch.equal(view.batch["node_features"][row, :, feature], expected)
    assert torch.equal(batch["node_features"], before) and torch.equal(view.batch["edge_index"], batch["edge_index"])


def test_views_without_options_change_nothing() -> None:
    modality = Graph(num_features=3)
    batch = prepared_batch(modality, (5, 8), (3, 0))
    view = modality.view(batch, key(0))
    assert not view.parameters and all(torch.equal(view.batch[name], batch[name]) for name in batch)


def hops_from(root: int, edges: list[tuple[int, int]], nodes: int) -> list[float]:
    """Breadth first; infinity where there is no way."""
    distance, queue = [math.inf] * nodes, deque([root])
    distance[root] = 0
    while queue:
        node = queue.popleft()
        for source, target in edges:
            if source == node and distance[target] == math.inf:
                distance[target] = distance[node] + 1
                queue.append(target)
    return distance


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_blocks_hide_the_nodes_around_a_random_one(ratio: float) -> None:
    """Breadth first from one hidden node, no visible node is nearer than a hidden one."""
    modality = Graph(num_features=3)
    batch = prepared_batch(modality, (30, 36), (18, 15), (40, 60), (4, 0))
    tokens = modality.tokenize(batch)
    roots_of: list[set[int]] = [set() for _ in range(4)]
    for seed in range(6):
        mask = modality.mask(tokens, ratio, key(seed), "block")
        for row, nodes in enumerate((30, 18, 40, 4)):
            assert int(mask.hidden[row].sum()) == nodes - max(1, int(nodes * (1 - ratio)))
            own = [(s - 40 * row, t - 40 * row) for s, t in pairs(batch["edge_index"]) if t // 40 == row]
            hidden = mask.hidden[row].nonzero().squeeze(1).tolist()
            visible = [node for node in range(nodes) if node not in hidden]
            roots = set()
            for root in hidden:
                hops = hops_from(root, own, nodes)
                if max(hops[node] for node in hidden) <= min(hops[node] for node in visible):
                    roots.add(root)
            assert roots, "hidden nodes surround no node"
            roots_of[row] |= roots
    assert all(len(roots) > 1 for roots in roots_of)
    hidden = [tuple(modality.mask(tokens, ratio, key(seed), "block").hidden[0].tolist()) for seed in range(6)]
    assert len(set(hidden)) > 1


def test_blocks_in_graphs_that_reach_far() -> None:
    """On a path the hidden nodes are one piece, or two where the end was reached first; also beyond 32 hops."""
    modality = Graph(num_features=3)
    for nodes in (40, 200):
        tokens = modality.tokenize(modality.collate([modality.prepare(path_graph(nodes))]))
        for seed in range(4):
            hidden = modality.mask(tokens, 0.6, key(seed), "block").hidden[0].int()
            assert int((hidden.diff() != 0).sum()) <= 2


# What else a modality offers


def test_raw_features_are_sums_and_counts() -> None:
    modality = Graph(num_features=3)
    batch = prepared_batch(modality, (5, 8), (9, 20), (2, 0))
    batch["node_features"][0, 5:] = 100  # padding
    found = modality.raw_features(batch)
    for row, nodes in enumerate((5, 9, 2)):
        total = batch["node_features"][row, :nodes].sum(dim=0).tolist()
        edges = sum(t // 9 == row for _, t in pairs(batch["edge_index"]))
        assert found[row].tolist() == pytest.approx([*total, nodes, edges], abs=1e-5)


def test_content_of_a_prediction_has_its_direction_and_the_length_of_the_features() -> None:
    content, prediction = torch.randn(2, 1, 5, 3, generator=key(0))
    content[0, 2], prediction[0, 3] = 0, 0
    tokens = Tokens(content, torch.zeros(1, 5, 0), torch.ones(1, 5, dtype=torch.bool))
    found = Graph(num_features=3).content_of(prediction, tokens)[0]
    for node in (0, 1, 4):
        expected = prediction[0, node] * math.dist(content[0, node], [0] * 3) / math.dist(prediction[0, node], [0] * 3)
        torch.testing.assert_close(found[node], expected)
    assert not found[2].any() and not found[3].any()


@pytest.mark.parametrize(("nodes", "features"), [(5, 3), (300, 200), (1, 1)])
def test_pictures_are_darker_where_features_are_larger(nodes: int, features: int) -> None:
    content = torch.randn(2, nodes, features, generator=key(0)) * torch.tensor([1.0, 50.0])[:, None, None]
    valid = torch.ones(2, nodes, dtype=torch.bool)
    picture = Graph(num_features=features).picture(Tokens(content, torch.zeros(2, nodes, 0), valid))
    assert picture.shape == (2, min(nodes, 128), min(features, 128), 3)
    assert picture.min() >= 0 and picture.max() <= 1
    if nodes <= 128:
        for row in range(2):
            expected = 1 - content[row].abs() / content[row].abs().max()
            torch.testing.assert_close(picture[row], expected[..., None].expand(-1, -1, 3))
    else:  # first and last row and column are shown
        corners = content[:, [0, 0, -1, -1], [0, -1, 0, -1]].abs()
        shown = 1 - picture[:, [0, 0, -1, -1], [0, -1, 0, -1], 0]
        torch.testing.assert_close(corners / corners[:, :1], shown / shown[:, :1], atol=1e-3, rtol=1e-3)


def test_pictures_leave_unknown_content_blank() -> None:
    content = torch.randn(1, 4, 3, generator=key(0))
    valid, where = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, 3, dtype=torch.bool)
    where[0, 1], where[0, 3, 2] = True, True
    draw = Graph(num_features=3).picture
    found = draw(Tokens(content.masked_fill(where, torch.nan), torch.zeros(1, 4, 0), valid))
    expected = draw(Tokens(content.masked_fill(where, 0.0), torch.zeros(1, 4, 0), valid))
    assert torch.equal(found.isnan(), where[..., None].expand(-1, -1, -1, 3))
    assert torch.equal(found[~found.isnan()], expected[~found.isnan()])
    assert draw(Tokens(torch.zeros(1, 2, 3), torch.zeros(1, 2, 0), valid[:, :2])).eq(1).all()


# The graph that the packages bring


def test_digits_graph_joins_digits_to_the_nearest_by_their_pixels() -> None:
    """Neighbours by a loop; 20 labelled nodes of each class, 500 and 1,000 others, as in citation graphs."""
    from sklearn.datasets import load_digits

    samples, data = digits_graph("train"), load_digits()
    graph = samples.values[0]
    assert samples.token_labels is not None and samples.token_splits is not None
    labels, splits = samples.token_labels[0], samples.token_splits[0]
    assert np.array_equal(graph["x"], data.data) and np.array_equal(labels, data.target)
    assert [int((splits == name).sum()) for name in ("train", "validation", "test", "")] == [200, 500, 1000, 97]
    assert np.bincount(labels[splits == "train"]).tolist() == [20] * 10
    for node in range(0, 1797, 100):
        distance = ((data.data - data.data[node]) ** 2).sum(axis=1)
        distance[node] = np.inf
        read = graph["edge_index"][0][graph["edge_index"][1] == node]
        assert len(set(read.tolist())) == 8 and np.sort(distance[read]).tolist() == np.sort(distance)[:8].tolist()


def is_sparse(out: Any) -> bool:
    """Whether it was made by summing rows of a weight, as its gradient tells."""
    steps, names = [out.grad_fn], set()
    while steps:
        step = steps.pop()
        names.add(step.name())
        steps += [each for each, _ in step.next_functions if each is not None]
    return any("EmbeddingBag" in name for name in names)


def test_features_that_are_nearly_all_zero_are_multiplied_one_by_one() -> None:
    """Values and gradients of a dense product; nodes without any feature, and the first and last of them, too."""
    torch.manual_seed(0)
    content = torch.randn(2, 30, 400) * (torch.rand(2, 30, 400) < 0.01)
    content[0, 0] = content[1, -1] = content[1, 3:6] = 0
    modality = Graph(num_features=400).build(16)
    tokens = Tokens(content, torch.zeros(2, 30, 0), torch.ones(2, 30, dtype=torch.bool))
    weight = torch.randn(2, 30, 16)
    found = modality.embed(tokens)
    assert is_sparse(found)
    expected = content @ modality.projection.weight.T + modality.projection.bias
    torch.testing.assert_close(found, expected)
    for out in (found, expected):
        (out * weight).sum().backward()
    assert modality.projection.weight.grad is not None and modality.projection.bias.grad is not None
    torch.testing.assert_close(modality.projection.bias.grad, 2 * weight.sum(dim=(0, 1)))
    torch.testing.assert_close(
        modality.projection.weight.grad, 2 * torch.einsum("bnd,bnf->df", weight, content), atol=1e-4, rtol=1e-4
    )
    content[0] = 1.0
    assert not is_sparse(modality.embed(tokens))
