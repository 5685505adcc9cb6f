"""Samples whose elements have labels: the scenes that come with the packages, and columns of masks."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from mmssl.data import DataArguments, Samples, load_samples
from mmssl.data.digit_scenes import CLASSES, DigitScenes, photographs
from mmssl.data.moving_digits import digit_images
from mmssl.data.shape_scenes import ShapeScenes
from mmssl.data.shapes import FAMILIES
from mmssl.modalities.image import Image
from mmssl.modalities.point_cloud import PointCloud

datasets = pytest.importorskip("datasets")

IMAGE = Image(image_size=4, patch_size=2, num_channels=1)
MASKS = [np.arange(16).reshape(4, 4), np.full((4, 4), 3), np.eye(4, dtype=np.int64) * 255]
PICTURE: Any = np.arange(16, dtype=np.uint8).reshape(4, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def dense_labels(samples: Samples) -> Any:
    assert samples.dense_labels is not None
    return samples.dense_labels


# What comes with the packages.


@pytest.mark.parametrize("kind", [DigitScenes, ShapeScenes])
def test_scenes_are_always_the_same_and_unlike_each_other(kind: type[DigitScenes] | type[ShapeScenes]) -> None:
    train, test = kind("train"), pickle.loads(pickle.dumps(kind("test")))
    first, labels = [train[i] for i in range(5)], kind("train", part="labels")
    for i in (3, 1):  # in any order
        np.testing.assert_array_equal(kind("train")[i], first[i])
        for other in (train[i + 1], test[i]):
            assert other.shape != first[i].shape or not np.array_equal(other, first[i])
        np.testing.assert_array_equal(labels[i], kind("train", part="labels")[i])
        assert not np.array_equal(labels[i], kind("test", part="labels")[i])
    with pytest.raises(IndexError):
        test[len(test)]


def test_digits_lie_where_their_labels_are() -> None:
    """2 to 4 of them, all different, brighter than what is around, none across the middle lines."""
    counts = []
    for i in range(60):
        image, labels = DigitScenes("train")[i], DigitScenes("train", part="labels")[i]
        assert image.shape == labels.shape == (32, 32) and image.dtype == np.uint8
        kinds = np.unique(labels[labels > 0])
        counts.append(len(kinds))
        assert image[labels > 0].mean() > image[labels == 0].mean() + 30
        for kind in kinds:
            y, x = np.nonzero(labels == kind)
            assert np.ptp(y) < 14 and np.ptp(x) < 14 and len(y) > 20
            assert len(set(y // 16)) == len(set(x // 16)) == 1
    assert set(counts) == {2, 3, 4}
    assert len(CLASSES) == 11 and CLASSES[3] == "2"


def test_no_digit_and_no_piece_of_a_photograph_is_in_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    for split, index in (("train", order[:1437]), ("test", order[1437:])):
        for digit in range(10):
            own = data.images[index[data.target[index] == digit]]
            np.testing.assert_array_equal(digit_images(split)[digit], own)
    assert [[part.shape[1] for part in photographs(split)] for split in ("train", "test")] == [[256] * 2, [64] * 2]
    whole = np.concatenate([photographs("train")[0], photographs("test")[0]], axis=1)
    assert whole.shape == (214, 320) and abs(whole[:, 255] - whole[:, 256]).mean() < 0.05  # they are neighbours
    asked: list[str] = []

    def spy(split: str) -> list[np.ndarray]:
        asked.append(split)
        return [np.full((1, 8, 8), 16.0)] * 10

    monkeypatch.setattr("mmssl.data.digit_scenes.digit_images", spy)
    DigitScenes("test")[0]
    assert set(asked) == {"test"}


def test_a_digit_of_a_scene_is_one_of_its_split() -> None:
    """Found again among all 1,797 by its ink, where no other picture of a digit is as like it."""
    data = load_digits()
    ours = {image.tobytes() for images in digit_images("test") for image in images}
    found = 0
    for i in range(3):
        labels = DigitScenes("test", part="labels")[i]
        for kind in np.unique(labels[labels > 0]):
            y, x = np.nonzero(labels == kind)
            best, least = b"", np.inf
            for digit in data.images[data.target == kind - 1]:
                small = PILImage.fromarray((digit * (255 / 16)).astype(np.uint8))
                ink = np.asarray(small.resize((14, 14), PILImage.Resampling.BICUBIC)) > 0.3 * 255
                rows, columns = np.nonzero(ink)
                top, left = y.min() - rows.min(), x.min() - columns.min()
                mask = np.zeros_like(labels)
                mask[np.clip(rows + top, 0, 31), np.clip(columns + left, 0, 31)] = kind
                wrong = (mask != np.where(labels == kind, kind, 0)).sum()
                if wrong < least:
                    best, least = digit.tobytes(), wrong
            assert least == 0
            found += best in ours
    assert found >= 5  # two digits may have the same ink above the threshold


def test_shapes_stand_apart_on_the_floor() -> None:
    counts = []
    for i in range(20):
        points, labels = ShapeScenes("train")[i], ShapeScenes("train", part="labels")[i]
        assert points.dtype == np.float32 and len(points) == len(labels) and np.isfinite(points).all()
        kinds = np.unique(labels)
        counts.append(len(kinds) - 1)
        assert kinds[0] == 0 and len(points) == 512 * len(kinds) and (np.bincount(labels)[kinds] == 512).all()
        assert np.abs(points[labels == 0][:, 2]).max() < 0.03
        middles = []
        for kind in kinds[1:]:
            shape = points[labels == kind]
            assert abs(shape[:, 2].min()) < 1e-6 and 0.3 < np.ptp(shape[:, 2]) < 1.2
            middles.append((shape[:, :2].min(axis=0) + shape[:, :2].max(axis=0)) / 2)
            assert np.abs(shape[:, :2] - 0.9 * np.sign(middles[-1])).max() < 0.9  # each in a quarter of its own
        assert len({tuple(np.sign(middle)) for middle in middles}) == len(middles)
        assert np.count_nonzero(np.diff(labels)) > 100  # in random order
    assert set(counts) == {2, 3, 4} and len(FAMILIES) == 10


@pytest.mark.parametrize(("name", "modality"), [("digit_scenes", Image(32, 4, 1)), ("shape_scenes", PointCloud(64))])
def test_scenes_are_sources(name: str, modality: Any) -> None:
    for split in ("train", "test"):
        samples = load_samples(DataArguments(name, split=split, max_samples=7), modality)
        assert len(samples) == 7 and len(dense_labels(samples)) == 7 and samples.labels is None
        prepared = modality.labelled(samples.values[2], dense_labels(samples)[2])
        assert set(prepared) == {modality.inputs[0], "labels"}
        chosen = samples.select(np.array([4, 1]))
        np.testing.assert_array_equal(dense_labels(chosen)[0], dense_labels(samples)[4])


@pytest.mark.parametrize("kind", [DigitScenes, ShapeScenes])
def test_unknown_parts_of_scenes(kind: Any) -> None:
    for options in ({"split": "validation"}, {"split": "train", "part": "other"}):
        with pytest.raises(ValueError, match="expected train or test; and"):
            kind(**options)


# Columns of masks.


def encoded(mask: np.ndarray, palette: bool = False) -> bytes:
    file, image = io.BytesIO(), PILImage.fromarray(mask.astype(np.uint8))
    if palette:
        image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(file, format="PNG")
    return file.getvalue()


def parquet(folder: Path, **columns: Any) -> str:
    path = folder / "rows.parquet"
    images = [encoded(PICTURE + i) for i in range(3)]
    table = datasets.Dataset.from_dict({"image": images, **columns})
    for name in set(columns) & {"seen"}:
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("form", ["bytes", "palette", "image", "lists"])
def test_masks_in_a_table(form: str, tmp_path: Path) -> None:
    """As PNG bytes, as a column of images, or as lists; only of 8 bits 255 is no label."""
    name = "seen" if form == "image" else "mask"
    cells = [mask.tolist() if form == "lists" else encoded(mask, form == "palette") for mask in MASKS]
    source = parquet(tmp_path, **{name: cells})
    samples = load_samples(DataArguments(source, label_column=name), IMAGE)
    assert samples.labels is None and len(dense_labels(samples)) == 3
    for mask, found in zip(MASKS, dense_labels(samples), strict=True):
        expected = mask if form == "lists" else np.where(mask == 255, -1, mask)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int64
    assert load_samples(DataArguments(source), IMAGE).dense_labels is None
    few = load_samples(DataArguments(source, label_column=name, max_samples=2), IMAGE)
    assert len(dense_labels(few)) == 2


def test_a_column_called_label_that_holds_masks_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    source = parquet(tmp_path, label=[mask.tolist() for mask in MASKS], kind=["a", "b", "a"])
    found = load_samples(DataArguments(source), IMAGE)
    assert found.labels is None and found.dense_labels is None
    kept = load_samples(DataArguments(source, label_column="label", filter="kind=a"), IMAGE)
    np.testing.assert_array_equal(dense_labels(kept)[1], MASKS[2])
    assert kept.name(1).endswith("row 2")


def test_labels_of_points_in_a_table(tmp_path: Path) -> None:
    """Clouds of different sizes."""
    rng = np.random.default_rng(0)
    labels = [rng.integers(-1, 3, count) for count in (12, 20)]
    clouds = [np.column_stack([rng.normal(size=(len(each), 3)), each]) for each in labels]
    columns = {"points": [cloud.tolist() for cloud in clouds], "part": [each.tolist() for each in labels]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "clouds.parquet"))
    modality = PointCloud(num_points=10, num_groups=4, group_size=4, num_channels=1)
    samples = load_samples(DataArguments(str(tmp_path / "clouds.parquet"), label_column="part"), modality)
    for i, each in enumerate(labels):
        prepared = modality.excerpt(modality.labelled(samples.values[i], dense_labels(samples)[i]), None)
        np.testing.assert_array_equal(dense_labels(samples)[i], each)
        np.testing.assert_allclose(prepared["points"][:, 3], prepared["labels"])
        assert len(prepared["labels"]) == 10


def test_masks_in_arrays(tmp_path: Path) -> None:
    images = np.stack([PICTURE, PICTURE + 1, PICTURE + 2])
    masks = np.stack(MASKS)
    np.savez(tmp_path / "a.npz", image=images, mask=masks, small=masks.astype(np.uint8), few=masks[:2], kind=[0, 1, 0])
    source = str(tmp_path / "a.npz")
    plain = load_samples(DataArguments(source, label_column="mask", filter="kind=0"), IMAGE)
    np.testing.assert_array_equal(np.stack(list(dense_labels(plain))), masks[[0, 2]])
    small = load_samples(DataArguments(source, label_column="small"), IMAGE)
    np.testing.assert_array_equal(dense_labels(small)[2], np.where(MASKS[2] == 255, -1, MASKS[2]))
    with pytest.raises(ValueError, match=r"data.label_column: the array few of .* has 2 rows; expected one for each"):
        load_samples(DataArguments(source, label_column="few"), IMAGE)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (b"no image", "row 1: cannot identify image file"),
        (encoded(MASKS[0])[:40], "row 1: "),
    ],
)
def test_cells_that_are_no_masks(cell: bytes, message: str, tmp_path: Path) -> None:
    source = parquet(tmp_path, mask=[encoded(MASKS[0]), cell, encoded(MASKS[0])])
    samples = load_samples(DataArguments(source, label_column="mask"), IMAGE)
    assert dense_labels(samples)[0].shape == (4, 4)
    with pytest.raises(ValueError, match=message):
        dense_labels(samples)[1]


def test_masks_of_fractions(tmp_path: Path) -> None:
    source = parquet(tmp_path, mask=[[[0.5] * 4] * 4] * 3)
    samples = load_samples(DataArguments(source, label_column="mask"), IMAGE)
    with pytest.raises(ValueError, match="row 0: found labels of type float64; expected integers"):
        dense_labels(samples)[0]
