"""Graphs from files, against what stands in the files, and the public data sets' published sizes."""

import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmssl.data import DataArguments, load_samples
from mmssl.graph_files import read_collection, read_file
from mmssl.modalities.graph import Graph
from mmssl.samples import Samples

DATA = Path(os.environ.get("MMSSL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "graphs"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no graphs in {DATA}; set MMSSL_DATA")


@pytest.fixture
def geometric() -> Any:
    return pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")


def collection(source: Any) -> Samples:
    samples = read_collection(str(source))
    assert samples is not None
    return samples


def edges_of(graph: Any) -> set[tuple[int, int]]:
    """The edges of a graph before it is prepared, each as (source, target)."""
    edge_index = np.asarray(graph["edge_index"])
    assert edge_index.shape[0] == 2
    return {(source, target) for source, target in edge_index.T.tolist()}


def save(path: Path, **arrays: Any) -> Path:
    values: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, **values)
    return path


# TU folders

# Three graphs. Nodes 1-3 are a path; of nodes 4-7 the last is isolated; nodes 8 and 9 are joined, both ways twice.
TU = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n4, 5\n5, 4\n6, 4\n4, 6\n8, 9\n9, 8\n8, 9\n9, 8\n",
    "graph_indicator": "1\n1\n1\n2\n2\n2\n2\n3\n3\n",
    "graph_labels": "1\n-1\n1\n",
    "node_labels": "3\n5\n3\n4\n4\n3\n5\n5\n5\n",
}
TU_EDGES = [{(0, 1), (1, 0), (1, 2), (2, 1)}, {(0, 1), (1, 0), (2, 0), (0, 2)}, {(0, 1), (1, 0)}]
TU_LABELS = [[3, 5, 3], [4, 4, 3, 5], [5, 5]]


def write_tu(folder: Path, name: str = "SET", **changes: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in {**TU, **changes}.items():
        if text is not None:
            (folder / f"{name}_{part}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("inside", [".", "raw", "SET/raw"])
@pytest.mark.parametrize("node_labels", [True, False])
def test_tu_folder_equals_a_parse_by_hand(node_labels: bool, inside: str, tmp_path: Path, geometric: Any) -> None:
    """Node labels 3, 4 and 5 become one-hot; the isolated node at the end of the second graph is there."""
    without: dict[str, Any] = {} if node_labels else {"node_labels": None}
    write_tu(tmp_path / "SET" / inside, **without)
    samples = collection(tmp_path / "SET")
    assert len(samples) == 3
    assert samples.labels is not None and samples.labels.tolist() == [1, 0, 1]  # -1 comes before 1
    assert len(samples.classes) == 2 and "graph 2" in samples.name(2)
    for graph, edges, labels in zip(samples.values, TU_EDGES, TU_LABELS, strict=True):
        assert edges_of(graph) == edges and graph.num_nodes == len(labels)
        if node_labels:
            assert graph.x.tolist() == [[float(label == value) for value in (3, 4, 5)] for label in labels]
        else:
            assert graph.x is None
    prepared = Graph(num_features=3).prepare(samples.values[1])
    expected = np.eye(3)[[1, 1, 0, 2] if node_labels else [2, 1, 1, 0]]  # labels, or degrees
    np.testing.assert_array_equal(prepared["node_features"], expected)


def test_tu_graphs_without_edges_at_the_end_are_not_lost(tmp_path: Path, geometric: Any) -> None:
    folder = write_tu(tmp_path, A="1, 2\n2, 1\n4, 5\n5, 4\n")
    samples = collection(folder)
    assert [graph.num_nodes for graph in samples.values] == [3, 4, 2]
    assert [edges_of(graph) for graph in samples.values] == [{(0, 1), (1, 0)}, {(0, 1), (1, 0)}, set()]


def test_tu_folder_without_labels_can_be_read(tmp_path: Path, geometric: Any) -> None:
    """Pretraining needs none."""
    samples = collection(write_tu(tmp_path, graph_labels=None))
    assert samples.labels is None and [edges_of(graph) for graph in samples.values] == TU_EDGES


@pytest.mark.parametrize(
    "changes", [{"A": None}, {"A": "1, x\n"}, {"A": "1, 20\n20, 1\n"}], ids=["none", "text", "far"]
)
def test_malformed_tu_folders_are_refused(changes: dict[str, Any], tmp_path: Path, geometric: Any) -> None:
    with pytest.raises(ValueError, match="cannot read the TU data set SET"):
        read_collection(str(write_tu(tmp_path, **changes)))


# Archives


def test_archive_of_one_graph_with_labels_and_splits(tmp_path: Path) -> None:
    masks = np.eye(3, 5, dtype=bool)
    path = save(
        tmp_path / "one.npz",
        edge_index=[[0, 1, 4], [1, 2, 0]],
        x=np.arange(10).reshape(5, 2),
        y=[2, 0, 1, 1, 9],
        unlabelled=[False] * 4 + [True],
        train_mask=masks[0],
        val_mask=masks[1],
        test_mask=masks[2],
    )
    samples = collection(path)
    assert len(samples) == 1 and samples.labels is None and str(path) in samples.name(0)
    assert samples.token_labels is not None and samples.token_labels[0].tolist() == [2, 0, 1, 1, -1]
    assert samples.token_splits is not None
    assert samples.token_splits[0].tolist() == ["train", "validation", "test", "", ""]
    assert edges_of(samples.values[0]) == {(0, 1), (1, 2), (4, 0)}
    np.testing.assert_array_equal(samples.values[0]["x"], np.arange(10).reshape(5, 2))


def test_archive_with_a_part_of_the_splits_has_none(tmp_path: Path) -> None:
    samples = collection(save(tmp_path / "a.npz", edge_index=[[0], [1]], x=np.eye(2), train_mask=[True, False]))
    assert samples.token_splits is None and samples.token_labels is None


@pytest.mark.parametrize("y", [3, [1.5]], ids=["number", "one value"])
def test_archive_with_a_label_of_the_whole_graph(y: Any, tmp_path: Path) -> None:
    samples = collection(save(tmp_path / "a.npz", edge_index=[[0], [1]], x=np.eye(2), y=y))
    assert len(samples) == 1 and samples.token_labels is None


def test_archive_with_sparse_features(tmp_path: Path) -> None:
    """Rows are (0, 7, 0), nothing, (5, 0, 6): values, their columns, and where each row begins."""
    parts = {"x_data": [7.0, 5.0, 6.0], "x_indices": [1, 0, 2], "x_indptr": [0, 1, 1, 3], "x_shape": [3, 3]}
    graph = read_file(save(tmp_path / "csr.npz", edge_index=[[0], [2]], **parts))
    np.testing.assert_array_equal(graph["x"], [[0, 7, 0], [0, 0, 0], [5, 0, 6]])
    prepared = Graph(num_features=3, normalize_features=False).prepare(tmp_path / "csr.npz")
    np.testing.assert_array_equal(prepared["node_features"], graph["x"])


@pytest.mark.parametrize("features", ["x", "node_feat", None])
def test_archive_of_many_graphs(features: str | None, tmp_path: Path) -> None:
    """The second graph has no edges; the third has an isolated node at its end."""
    arrays: dict[str, Any] = {
        "node_ptr": [0, 2, 3, 6],
        "edge_ptr": [0, 2, 2, 3],
        "edge_index": [[0, 1, 1], [1, 0, 0]],
        "y": [4, 8, 4],
    }
    if features:
        arrays[features] = np.arange(12).reshape(6, 2)
    samples = collection(save(tmp_path / "many.npz", **arrays))
    assert [edges_of(graph) for graph in samples.values] == [{(0, 1), (1, 0)}, set(), {(1, 0)}]
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 0] and list(samples.classes) == ["4", "8"]
    assert "many.npz, graph 2" in samples.name(2)
    if features:
        rows = [[[0, 1], [2, 3]], [[4, 5]], [[6, 7], [8, 9], [10, 11]]]
        assert [graph["x"].tolist() for graph in samples.values] == rows
    modality = Graph(num_features=2, normalize_features=False)
    assert [len(modality.prepare(graph)["node_features"]) for graph in samples.values] == [2, 1, 3]


def test_numbers_to_regress_are_no_classes(tmp_path: Path) -> None:
    many: dict[str, Any] = {"node_ptr": [0, 1, 2], "edge_ptr": [0, 0, 0], "edge_index": np.zeros((2, 0), int)}
    assert collection(save(tmp_path / "a.npz", **many, y=[0.5, np.nan])).labels is None
    assert collection(save(tmp_path / "b.npz", **many, y=[[0, 1], [1, 0]])).labels is None


def broken(kind: str, folder: Path) -> Path:
    path = save(folder / "broken.npz", edge_index=np.arange(400).reshape(2, 200), x=np.ones((400, 2)))
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped bits":
        middle = content.index(b"edge_index") + 300
        path.write_bytes(
            content[:middle] + bytes(255 - byte for byte in content[middle : middle + 40]) + content[middle + 40 :]
        )
    elif kind == "text":
        path.write_text("these are notes")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "objects":
        save(path, edge_index=np.array([{"a": 1}], dtype=object))
    elif kind == "gone":
        path.unlink()
    return path


@pytest.mark.parametrize("kind", ["cut", "flipped bits", "text", "empty", "one array", "objects", "gone"])
def test_corrupt_archives_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"broken\.npz.*expected an intact \.npz file"):
        Graph(num_features=2).prepare(broken(kind, tmp_path))


@pytest.mark.parametrize(
    ("arrays", "fragments"),
    [
        ({"edges": [[0], [1]], "x": np.eye(2)}, ["edges, x", "expected edge_index"]),
        ({"edge_index": [[0], [0]], "node_ptr": [0, 1]}, ["node_ptr", "edge_ptr"]),
        ({"edge_index": [[0], [0]], "node_ptr": [0, 1], "edge_ptr": [0]}, ["node_ptr", "edge_ptr"]),
        ({"edge_index": [[0], [0]], "x_indptr": [0, 1], "x_data": [1.0]}, ["x_shape"]),
        ({"edge_index": [[0], [0]], "x_indptr": [0, 9], "x_data": [1.0], "x_indices": [0], "x_shape": [1, 1]}, ["x_"]),
    ],
    ids=["no edge_index", "no edge_ptr", "short edge_ptr", "half a sparse matrix", "broken sparse matrix"],
)
def test_archives_that_lack_something_are_refused(arrays: dict[str, Any], fragments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_collection(str(save(tmp_path / "a.npz", **arrays)))
    assert all(fragment in str(error.value) for fragment in ["a.npz", *fragments]), str(error.value)


# Edge lists

LISTS = {
    "plain.csv": "0,1\n2,1\n1,4\n",
    "header.csv": "source,target\n0,1\n2,1\n1,4\n",
    "weights.tsv": "from\tto\tweight\n0\t1\t0.5\n2\t1\t1e-3\n1\t4\tnan\n",
    "comments.edges": "# a comment\n% another\n0 1\n\n2 1\n# in between\n1 4\n",
    "spaces.edgelist": "0   1\n2 1 {'weight': 3}\n1\t4\n",
    "windows.csv": "0, 1\r\n2, 1\r\n1, 4\r\n",
    "mark.csv": "\ufeff0,1\n2,1\n1,4\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_edge_lists(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(LISTS[name].encode())
    assert edges_of(read_file(path)) == {(0, 1), (2, 1), (1, 4)}
    samples = load_samples(DataArguments(source=str(path)), Graph())
    assert len(samples) == 1 and samples.name(0) == str(path)
    prepared = Graph(num_features=4).prepare(samples.values[0])
    assert prepared["node_features"].argmax(dim=1).tolist() == [1, 3, 1, 0, 1]  # degrees; node 3 is isolated


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("0,1\n1,two\n", ["line 2", "1,two", "whole numbers"]),
        ("0,1\n1\n", ["two columns"]),
        ("0\n1\n", ["two columns"]),
        ("0,1\n1.5,2\n", ["1.5", "whole numbers"]),
        ("0,1\n-1,2\n", ["-1"]),
        ("-1,2\n0,1\n", ["-1"]),
        ("", ["without nodes"]),
        ("source,target\n", ["without nodes"]),
    ],
    ids=["text", "one column", "one column in all", "fraction", "negative", "negative first", "empty", "header only"],
)
def test_broken_edge_lists_are_refused(text: str, fragments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Graph().prepare(path)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_a_folder_of_files_has_one_graph_each_and_labels_of_its_folders(tmp_path: Path) -> None:
    for name, nodes in (("rings/a.csv", 3), ("rings/b.NPZ", 4), ("stars/c.npz", 5)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        edges = [list(range(nodes)), [*range(1, nodes), 0]]
        if path.suffix == ".csv":
            path.write_text("".join(f"{s},{t}\n" for s, t in zip(*edges, strict=True)))
        else:
            with path.open("wb") as file:
                np.savez(file, edge_index=np.array(edges))
    samples = load_samples(DataArguments(source=str(tmp_path)), Graph())
    assert samples.labels is not None and samples.labels.tolist() == [0, 0, 1]
    assert [len(Graph().prepare(value)["node_features"]) for value in samples.values] == [3, 4, 5]


@pytest.mark.parametrize("source", ["folder", "folder/missing.npz", "folder/notes.txt", "someone/dataset"])
def test_other_sources_are_left_to_others(source: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("0 1\n")
    assert read_collection(str(tmp_path / source)) is None


# PyTorch Geometric


def test_karate_club_from_torch_geometric(geometric: Any) -> None:
    """34 members, 78 friendships, 4 groups, one labelled member each (Zachary, 1977; Kipf and Welling, 2017)."""
    networkx = pytest.importorskip("networkx", reason="networkx is not installed")
    samples = collection("pyg:KarateClub")
    assert len(samples) == 1 and samples.token_splits is None  # it has no validation and no test members
    assert samples.token_labels is not None and len(samples.token_labels[0]) == 34
    assert len(set(samples.token_labels[0].tolist())) == 4
    assert edges_of(samples.values[0]) == set(networkx.karate_club_graph().to_directed().edges)
    assert Graph(num_features=34).prepare(samples.values[0])["edge_index"].shape == (2, 2 * 78)


@pytest.mark.parametrize("source", ["pyg:NoSuchSet:Cora", "pyg:", "pyg:cora"])
def test_unknown_sets_of_torch_geometric_are_refused(source: str, geometric: Any) -> None:
    with pytest.raises(ValueError, match=rf"{source}: .*expected pyg:CLASS:NAME"):
        read_collection(source)


def test_sets_that_torch_geometric_cannot_read_are_refused(tmp_path: Path, geometric: Any) -> None:
    with pytest.raises(ValueError, match=r"pyg:Planetoid@.*: Planetoid cannot be read .*name"):
        read_collection(f"pyg:Planetoid@{tmp_path}")


@pytest.mark.parametrize("use", ["collection", "encodings"])
def test_without_torch_geometric_the_error_says_what_to_install(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_geometric")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    graph = {"edge_index": [[0], [1]], "x": np.eye(2)}
    assert len(Graph(num_features=2).prepare(graph)["node_features"]) == 2  # plain graphs do without
    with pytest.raises(ImportError, match=r'pip install "mmssl\[graph\]"'):
        if use == "collection":
            read_collection("pyg:KarateClub")
        else:
            Graph(num_features=2, random_walk_steps=2).prepare(graph)


# Public data sets, where they are at hand

# Nodes, edges (both directions, no self loops, no duplicates), features, classes, splits, as torch-geometric has them.
PUBLIC = {"Cora": (2708, 10556, 1433, 7, [140, 500, 1000]), "CiteSeer": (3327, 9104, 3703, 6, [120, 500, 1000])}


@needs_data
@pytest.mark.parametrize("name", PUBLIC)
def test_public_citation_graphs(name: str, tmp_path: Path, geometric: Any) -> None:
    """From an archive and from the raw files, the same numbers and the same graph."""
    nodes, edges, features, classes, splits = PUBLIC[name]
    shutil.copytree(DATA / "planetoid" / name, tmp_path / name)
    modality, graphs = Graph(num_features=features), []
    for source in (DATA / f"{name.lower()}.npz", f"pyg:Planetoid:{name}@{tmp_path}"):
        samples = collection(source)
        assert samples.token_labels is not None and samples.token_splits is not None
        assert len(set(samples.token_labels[0].tolist()) - {-1}) == classes
        counts = [int((samples.token_splits[0] == part).sum()) for part in ("train", "validation", "test")]
        assert counts == splits
        assert (samples.token_labels[0][samples.token_splits[0] != ""] >= 0).all()
        graphs.append(modality.prepare(samples.values[0]))
        assert graphs[-1]["edge_index"].shape == (2, edges) and len(graphs[-1]["node_features"]) == nodes
    assert graphs[0]["edge_index"].equal(graphs[1]["edge_index"])
    np.testing.assert_allclose(graphs[0]["node_features"], graphs[1]["node_features"], atol=1e-6)


@needs_data
@pytest.mark.parametrize(
    ("name", "graphs", "node_labels"),
    [("MUTAG", 188, 7), ("PROTEINS", 1113, 3), ("NCI1", 4110, 37), ("IMDB-BINARY", 1000, None)],
)
def test_public_tu_sets(name: str, graphs: int, node_labels: int | None, geometric: Any) -> None:
    samples = collection(DATA / "TUDataset" / name)
    assert len(samples) == graphs and samples.labels is not None and set(samples.labels.tolist()) == {0, 1}
    first = samples.values[0]
    assert (None if first.x is None else first.x.shape[1]) == node_labels
    assert len(Graph(num_features=node_labels or 64).prepare(first)["node_features"]) == first.num_nodes


@needs_data
def test_public_packed_archive() -> None:
    samples = collection(DATA / "molecules" / "esol.npz")
    assert len(samples) == 1128 and samples.labels is None
    assert all(graph["edge_index"].max(initial=-1) < graph["num_nodes"] for graph in samples.values)


def test_what_is_no_label_of_a_node_is_left_out(tmp_path: Path) -> None:
    """Several splits side by side, labels of several classes, and labels that are no whole numbers."""
    base: dict[str, Any] = {"x": np.eye(4), "edge_index": np.array([[0, 1], [1, 2]])}
    masks: dict[str, Any] = {f"{name}_mask": np.eye(4, 2, dtype=bool) for name in ("train", "val", "test")}
    cases: dict[str, Any] = {
        "splits": ({"y": np.arange(4), **masks}, [0, 1, 2, 3]),
        "column": ({"y": np.arange(4)[:, None]}, [0, 1, 2, 3]),
        "several": ({"y": np.ones((4, 3), dtype=int)}, None),
        "real": ({"y": np.linspace(0, 1, 4)}, None),
    }
    for name, (arrays, expected) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **base, **arrays)
        samples = read_collection(str(tmp_path / f"{name}.npz"))
        assert samples is not None and samples.token_splits is None
        found = None if samples.token_labels is None else samples.token_labels[0].tolist()
        assert found == expected, name


def test_packed_archives_have_one_label_for_each_graph_and_are_no_single_graph(tmp_path: Path) -> None:
    path = tmp_path / "packed{}.npz"  # braces in a name are none of a format
    arrays: dict[str, Any] = {
        "x": np.eye(4),
        "edge_index": np.zeros((2, 0), dtype=int),
        "node_ptr": [0, 2, 4],
        "edge_ptr": [0, 0, 0],
    }
    np.savez(path, **arrays, y=[0, 1])
    samples = read_collection(str(path))
    assert samples is not None and samples.name(1) == f"{path}, graph 1"
    assert pickle.loads(pickle.dumps(samples)).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"holds many graphs.*data\.source"):
        Graph(num_features=4).prepare(path)
    np.savez(path, **arrays, y=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="found 4 labels in y for 2 graphs"):
        read_collection(str(path))
