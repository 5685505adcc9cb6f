"""Labelled samples that need no download: they come with the packages, or are made from parameters."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mmssl.samples import Rows, Samples


def digits(split: str) -> Samples:
    """scikit-learn's 1,797 handwritten digits, 8x8 and grey: 1,437 in the split "train", 360 in "test"."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    index = {"train": order[:1437], "test": order[1437:]}[checked(split, "digits")]
    images = (data.images[index] / 16).astype(np.float32)
    return Samples(images, f"digits {split}, image {{}}".format, data.target[index], [str(i) for i in range(10)])


def espeak_digits(split: str) -> Samples:
    """Ten digits spoken by 24 synthetic voices of eSpeak NG; those of the split "test" speak in no other."""
    from mmssl.data.espeak_digits import VOICES, espeak_digits

    data = espeak_digits()
    test = np.isin(data.voices, VOICES[1::4])
    index = np.flatnonzero(test if checked(split, "espeak_digits") == "test" else ~test)
    records = [{"array": data.waveforms[i], "sampling_rate": data.sampling_rate} for i in index]
    return Samples(records, f"espeak_digits {split}, clip {{}}".format, data.digits[index], [str(i) for i in range(10)])


def shapes(split: str) -> Samples:
    """Ten families of surfaces as clouds of 2,048 points: 2,000 in the split "train", 500 in "test"."""
    from mmssl.data.shapes import FAMILIES, Shapes

    clouds = Shapes(checked(split, "shapes"))
    labels = np.arange(len(clouds)) % len(FAMILIES)
    return Samples(clouds, f"shapes {split}, cloud {{}}".format, labels, list(FAMILIES))


def moving_digits(split: str) -> Samples:
    """Clips of one of scikit-learn's digits that moves in one of eight directions, the label: see ``MovingDigits``."""
    from mmssl.data.moving_digits import MovingDigits

    clips = MovingDigits(checked(split, "moving_digits"))
    return Samples(clips, f"moving_digits {split}, clip {{}}".format, clips.labels, clips.classes)


def digit_scenes(split: str) -> Samples:
    """Pictures of 2 to 4 of scikit-learn's digits before photographs, each pixel labelled: see ``DigitScenes``."""
    from mmssl.data.digit_scenes import CLASSES, DigitScenes

    scenes = DigitScenes(checked(split, "digit_scenes"))
    masks = DigitScenes(split, part="labels")
    return Samples(scenes, f"digit_scenes {split}, picture {{}}".format, classes=CLASSES, dense_labels=masks)


def shape_scenes(split: str) -> Samples:
    """Clouds of 2 to 4 different shapes that stand apart on a floor, each point labelled: see ``ShapeScenes``."""
    from mmssl.data.shape_scenes import CLASSES, ShapeScenes

    scenes = ShapeScenes(checked(split, "shape_scenes"))
    labels = ShapeScenes(split, part="labels")
    return Samples(scenes, f"shape_scenes {split}, cloud {{}}".format, classes=CLASSES, dense_labels=labels)


def arrow_head(split: str) -> Samples:
    """UCR's outlines of arrow heads, series of 251 steps, of three types: 36 in "train", 175 in "test" (from aeon)."""
    checked(split, "arrow_head")
    try:
        from aeon.datasets import load_classification
    except ImportError as error:
        raise ImportError('arrow_head comes with aeon: pip install "mmssl[time_series]"') from error
    series, types = load_classification("ArrowHead", split=split)
    classes, labels = np.unique(types, return_inverse=True)
    return Samples(series, f"arrow_head {split}, series {{}}".format, labels, classes.tolist())


def digits_graph(split: str) -> Samples:
    """One graph: scikit-learn's 1,797 handwritten digits, each joined to its 8 nearest ones by their pixels.

    20 nodes of each class are labelled for training, 500 for validation, 1,000 for testing, as in citation graphs.
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    checked(split, "digits_graph")
    data = load_digits()
    neighbors = kneighbors_graph(data.data, 8).tocoo()
    order = np.random.RandomState(0).permutation(len(data.target))
    train = np.concatenate([order[data.target[order] == digit][:20] for digit in range(10)])
    rest = order[~np.isin(order, train)]
    splits = np.full(len(order), "", dtype="<U10")
    splits[train], splits[rest[:500]], splits[rest[500:1500]] = "train", "validation", "test"
    graph = {"x": data.data.astype(np.float32), "edge_index": np.stack([neighbors.col, neighbors.row])}
    return Samples([graph], "digits_graph {}".format, token_labels=[data.target], token_splits=[splits])


def digits_table(split: str) -> Samples:
    """The handwritten digits as a table: a column for each of the 64 pixels, in the splits of "digits"."""
    images = digits(checked(split, "digits_table"))
    pixels = np.asarray(images.values).reshape(len(images), 64)
    columns = {f"pixel_{number}": column for number, column in enumerate(pixels.T)}
    return Samples(Rows(columns), f"digits_table {split}, row {{}}".format, images.labels, images.classes)


def breast_cancer(split: str) -> Samples:
    """scikit-learn's table of 569 tumours, 30 numbers each, benign or malignant; a fifth are the split "test"."""
    from sklearn.datasets import load_breast_cancer

    return table(load_breast_cancer(), split, "breast_cancer")


def diabetes(split: str) -> Samples:
    """scikit-learn's table of 442 patients, 10 numbers each, and a quantity: how their disease went on."""
    from sklearn.datasets import load_diabetes

    return table(load_diabetes(scaled=False), split, "diabetes")


def table(data: Any, split: str, name: str) -> Samples:
    """A table of scikit-learn, a fifth of its rows in the split "test"; without class names labels are quantities."""
    checked(split, name)
    order = np.random.RandomState(0).permutation(len(data.target))
    index = order[: len(order) // 5] if split == "test" else order[len(order) // 5 :]
    columns = {str(column): data.data[index, i] for i, column in enumerate(data.feature_names)}
    classes = [str(each) for each in getattr(data, "target_names", ())]
    labels = data.target[index] if classes else data.target[index].astype(np.float64)
    return Samples(Rows(columns), f"{name} {split}, row {{}}".format, labels, classes)


def checked(split: str, source: str) -> str:
    if split not in ("train", "test"):
        raise ValueError(f"data.split: found {split!r}; {source} has the splits train and test")
    return split


BUILTIN: dict[str, Callable[[str], Samples]] = {
    "digits": digits,
    "espeak_digits": espeak_digits,
    "shapes": shapes,
    "moving_digits": moving_digits,
    "digit_scenes": digit_scenes,
    "shape_scenes": shape_scenes,
    "arrow_head": arrow_head,
    "digits_graph": digits_graph,
    "digits_table": digits_table,
    "breast_cancer": breast_cancer,
    "diabetes": diabetes,
}
