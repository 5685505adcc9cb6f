"""Reads graphs: PyTorch Geometric's data sets, TU folders, .npz archives and edge lists.

A graph is a dict of arrays: ``edge_index`` (2, E), and where they are known ``x`` (nodes, F) and ``num_nodes``.
"""

import importlib
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
        labels, splits = np.asarray(archive.get("y")), node_splits(archive)
        return Samples(
            values=[archive],
            name=lambda i: source,
            token_labels=None if labels.shape != (num_nodes(archive),) else [node_labels(archive)],
            token_splits=None if splits is None else [splits],
        )
    elif path.is_file() and path.suffix.lower() in EDGE_LISTS:
        return Samples(values=[source], name=lambda i: source)
    return None


def read_file(path: Path) -> dict[str, Any]:
    """One graph from an .npz archive or an edge list."""
    return read_archive(path) if path.suffix.lower() == ".npz" else read_edge_list(path)


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
    return {"edge_index": np.array(edges, dtype=np.int64).reshape(-1, 2).T}


def packed(archive: dict[str, Any], source: str) -> Samples:
    """Many graphs in one archive: those of graph i stand at ``node_ptr[i]:node_ptr[i + 1]``, edges likewise."""
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
    name = f"{source}, graph {{}}".format
    if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iub":
        return Samples(graphs, name, *classes_of(labels))
    return Samples(graphs, name)


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
        return Samples(graphs, lambda i: f"{folder}, graph {i}")
    labels, classes = classes_of(np.array([int(graph.y) for graph in graphs]))
    return Samples(graphs, lambda i: f"{folder}, graph {i}", labels, classes)


def read_pyg(source: str) -> Samples:
    """``pyg:CLASS:NAME``, such as pyg:Planetoid:Cora; ``@FOLDER`` behind it says where the files are, or shall be."""
    wanted, _, root = source.removeprefix("pyg:").partition("@")
    kind, _, name = wanted.partition(":")
    cls = getattr(pyg("datasets"), kind, None)
    if cls is None:
        raise ValueError(f"{source}: torch_geometric.datasets has no {kind}; expected pyg:CLASS:NAME")
    folder = str(Path(root).expanduser() if root else CACHE / kind)
    try:
        dataset = cls(folder, name) if name else (cls(folder) if root or kind not in ("KarateClub",) else cls())
    except (TypeError, AssertionError, OSError) as error:
        raise ValueError(f"{source}: {kind} cannot be read ({type(error).__name__}: {error})") from error
    graphs = [dataset[i] for i in range(len(dataset))]
    first = graphs[0]
    if len(graphs) == 1 and getattr(first, "y", None) is not None and len(first.y) == first.num_nodes:
        masks = {
            key: getattr(first, mask).numpy() for key, mask in MASKS.items() if getattr(first, mask, None) is not None
        }
        splits = splits_of(masks, first.num_nodes) if len(masks) == len(MASKS) else None
        return Samples(
            graphs,
            lambda i: source,
            token_labels=[first.y.numpy()],
            token_splits=None if splits is None else [splits],
        )
    labels = [graph.y for graph in graphs if getattr(graph, "y", None) is not None and graph.y.numel() == 1]
    if len(labels) == len(graphs) and not labels[0].is_floating_point():
        return Samples(graphs, lambda i: f"{source}, graph {i}", *classes_of(np.array([int(y) for y in labels])))
    return Samples(graphs, lambda i: f"{source}, graph {i}")


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
    return len(graph["x"]) if "x" in graph else int(graph["edge_index"].max(initial=-1)) + 1


def node_labels(archive: dict[str, Any]) -> np.ndarray:
    labels = archive["y"].astype(np.int64)
    return np.where(archive["unlabelled"], -1, labels) if "unlabelled" in archive else labels


def node_splits(archive: dict[str, Any]) -> np.ndarray | None:
    if not all(mask in archive for mask in MASKS.values()):
        return None
    return splits_of({key: archive[mask] for key, mask in MASKS.items()}, len(archive["train_mask"]))


def splits_of(masks: dict[str, np.ndarray], nodes: int) -> np.ndarray:
    splits = np.full(nodes, "", dtype="<U10")
    for name, mask in masks.items():
        splits[mask.astype(bool)] = name
    return splits
