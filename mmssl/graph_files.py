"""Reads graphs: PyTorch Geometric's data sets, TU folders, .npz archives and edge lists.

A graph is a dict of arrays: ``edge_index`` (2, E), and where they are known ``x`` (nodes, F) and ``num_nodes``.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmssl.samples import Samples

CACHE = Path("~/.cache/mmssl/pyg").expanduser()
MASKS = {"train": "train_mask", "validation": "val_mask", "test": "test_mask"}
EDGE_LISTS = (".csv", ".tsv", ".edges", ".edgelist")


def read_collection(source: str) -> Samples | None:
    """The graphs of ``pyg:CLASS:NAME``, of a TU folder, or of one file. None: the source is none of these.

    Raises:
        ValueError: it is, and is malformed.
    """
    if source.startswith("pyg:"):
        return read_pyg(source)
    path = Path(source).expanduser()
    if path.is_dir():
        for folder in (path, path / "raw", path / path.name / "raw"):
            if found := sorted(folder.glob("*_graph_indicator.txt")):
                return read_tu(folder, found[0].name.removesuffix("_graph_indicator.txt"))
    elif path.is_file() and path.suffix.lower() == ".npz":
        archive = read_archive(path)
        if "node_ptr" in archive:
            return packed(archive, source)
        return one_graph(archive, source, archive, num_nodes(archive))
    elif path.is_file() and path.suffix.lower() in EDGE_LISTS:
        return Samples(values=[source], name=partial(only_name, source))
    return None


def read_file(path: Path) -> dict[str, Any]:
    """One graph from an .npz archive or an edge list."""
    if path.suffix.lower() != ".npz":
        return read_edge_list(path)
    graph = read_archive(path)
    if "node_ptr" in graph:
        raise ValueError(f"{path}: holds many graphs (node_ptr), expected one; give this file itself as data.source")
    return graph


def read_archive(path: Path) -> dict[str, Any]:
    """``edge_index`` and ``x`` (or ``node_feat``), dense or as ``x_data``, ``x_indices``, ``x_indptr``, ``x_shape``."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            graph = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib fail in ways of their own at a corrupt file
        raise ValueError(f"{path}: not a readable archive ({error}); expected an intact .npz file") from error
    if "edge_index" not in graph:
        raise ValueError(f"{path}: found the arrays {', '.join(graph)}; expected edge_index (2, edges), and x")
    if "x_indptr" in graph:
        from scipy.sparse import csr_matrix

        try:
            parts = tuple(graph.pop(f"x_{part}") for part in ("data", "indices", "indptr"))
            graph["x"] = csr_matrix(parts, shape=tuple(graph.pop("x_shape"))).toarray()
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: x cannot be read ({error}); expected x_data, x_indices, x_indptr and x_shape of a CSR matrix"
            ) from error
    elif "node_feat" in graph:
        graph["x"] = graph.pop("node_feat")
    return graph


def read_edge_list(path: Path) -> dict[str, Any]:
    """Two columns of node numbers from 0, separated by commas, tabs or spaces; a header and further columns may be."""
    edges: list[list[int]] = []
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        row = line.replace(",", " ").split()
        if not row or row[0].startswith(("#", "%")) or (not edges and row[0][0] not in "-0123456789"):
            continue  # empty, a comment, or a header
        try:
            first, second = (int(value) for value in row[:2])
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: found {line[:80]!r}; expected two columns of whole numbers, one edge a line"
            ) from error
        edges.append([first, second])
    try:
        return {"edge_index": np.array(edges, dtype=np.int64).reshape(-1, 2).T}
    except OverflowError as error:
        raise ValueError(f"{path}: found a node number beyond 64 bits; expected numbers from 0") from error


def packed(archive: dict[str, Any], source: str) -> Samples:
    """Many graphs in one archive: nodes of graph i stand at ``node_ptr[i]:node_ptr[i + 1]``, edges likewise.

    Edges number the nodes of each graph from 0. ``y``, where it is of classes, has one label for each graph.
    """
    nodes, edges = archive["node_ptr"], archive.get("edge_ptr")
    if edges is None or len(edges) != len(nodes):
        raise ValueError(f"{source}: found node_ptr without an edge_ptr of its length; expected both")
    graphs = [
        {
            "edge_index": archive["edge_index"][:, edges[i] : edges[i + 1]],
            "num_nodes": int(nodes[i + 1] - nodes[i]),
            **({"x": archive["x"][nodes[i] : nodes[i + 1]]} if "x" in archive else {}),
        }
        for i in range(len(nodes) - 1)
    ]
    labels = archive.get("y")
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iub":
        return Samples(graphs, partial(graph_name, source))
    if len(labels) != len(graphs):
        raise ValueError(f"{source}: found {len(labels)} labels in y for {len(graphs)} graphs; expected one for each")
    return Samples(graphs, partial(graph_name, source), *classes_of(labels))


def read_tu(folder: Path, name: str) -> Samples:
    """The TU collection's text files; node labels become one-hot features."""
    io, separate = pyg("io"), pyg("data.separate").separate
    try:
        data, slices, _ = io.read_tu_data(str(folder), name)
    except (ValueError, IndexError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: cannot read the TU data set {name} ({error})") from error
    count = int(np.loadtxt(folder / f"{name}_graph_indicator.txt", dtype=np.int64, ndmin=1).max())
    if len(slices["edge_index"]) <= count:  # the last graphs have no edges
        last = slices["edge_index"][-1:].expand(count + 1 - len(slices["edge_index"]))
        slices["edge_index"] = torch.cat([slices["edge_index"], last])
    graphs = [separate(type(data), data, i, slices, decrement=False) for i in range(count)]
    if not (folder / f"{name}_graph_labels.txt").exists():
        return Samples(graphs, partial(graph_name, str(folder)))
    labels, classes = classes_of(np.array([int(graph.y) for graph in graphs]))
    return Samples(graphs, partial(graph_name, str(folder)), labels, classes)


def read_pyg(source: str) -> Samples:
    """``pyg:CLASS:NAME``, such as pyg:Planetoid:Cora; ``@FOLDER`` behind it says where the files are, or shall be."""
    wanted, _, root = source.removeprefix("pyg:").partition("@")
    kind, _, name = wanted.partition(":")
    cls = getattr(pyg("datasets"), kind, None)
    if cls is None:
        raise ValueError(f"{source}: torch_geometric.datasets has no {kind}; expected pyg:CLASS:NAME")
    folder = str(Path(root).expanduser() if root else CACHE / kind)
    arguments = () if kind == "KarateClub" else (folder, name) if name else (folder,)
    try:
        dataset = cls(*arguments)
        graphs = [dataset[i] for i in range(len(dataset))]
    except (TypeError, AssertionError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{source}: {kind} cannot be read ({type(error).__name__}: {error})") from error
    first, labels = graphs[0], [graph.y for graph in graphs if getattr(graph, "y", None) is not None]
    if len(graphs) == 1:
        arrays = {key: first[key].numpy() for key in ("y", *MASKS.values()) if isinstance(first.get(key), torch.Tensor)}
        return one_graph(first, source, arrays, first.num_nodes)
    if len(labels) == len(graphs) and all(y.numel() == 1 and not y.is_floating_point() for y in labels):
        return Samples(graphs, partial(graph_name, source), *classes_of(np.array([int(y) for y in labels])))
    return Samples(graphs, partial(graph_name, source))


def one_graph(graph: Any, source: str, arrays: dict[str, Any], nodes: int) -> Samples:
    """One graph whose nodes have labels, where ``arrays`` holds one whole number for each in "y", and splits."""
    labels = np.asarray(arrays.get("y"))
    if labels.shape == (nodes, 1):
        labels = labels[:, 0]
    if labels.shape != (nodes,) or labels.dtype.kind not in "iu":
        return Samples([graph], partial(only_name, source))
    labels = np.where(arrays["unlabelled"], -1, labels) if "unlabelled" in arrays else labels
    masks = {name: np.asarray(arrays.get(mask)) for name, mask in MASKS.items()}
    splits = np.full(nodes, "", dtype="<U10")
    for name, mask in masks.items():
        if mask.shape == (nodes,):  # several splits side by side are none that a probe could choose
            splits[mask.astype(bool)] = name
    whole = all(mask.shape == (nodes,) for mask in masks.values())
    return Samples(
        [graph],
        partial(only_name, source),
        token_labels=[labels.astype(np.int64)],
        token_splits=[splits] if whole else None,
    )


def only_name(source: str, i: int) -> str:
    return source


def graph_name(source: str, i: int) -> str:
    return f"{source}, graph {i}"


def pyg(module: str) -> Any:
    try:
        return importlib.import_module(f"torch_geometric.{module}")
    except ImportError as error:
        raise ImportError('graphs need torch-geometric: pip install "mmssl[graph]"') from error


def classes_of(labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    values, positions = np.unique(labels, return_inverse=True)
    return positions, [str(value) for value in values]


def num_nodes(graph: dict[str, Any]) -> int:
    if "num_nodes" in graph:
        return int(graph["num_nodes"])
    known = "x" in graph and np.ndim(graph["x"]) > 0
    return len(graph["x"]) if known else int(graph["edge_index"].max(initial=-1)) + 1
