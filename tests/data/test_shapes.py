"""The built-in shapes: the same ones everywhere, of ten families that proportions do not tell apart."""

import pickle

import numpy as np
import pytest

from mmssl.data import DataArguments
from mmssl.data.shapes import FAMILIES, Shapes, boxes, lathe, on_surface
from mmssl.data.sources import load_samples
from mmssl.modalities.point_cloud import PointCloud


def test_shapes_are_a_source_with_labels() -> None:
    sizes = {}
    for split in ("train", "test"):
        samples = load_samples(DataArguments(source="shapes", split=split), PointCloud())
        assert samples.labels is not None and samples.classes == list(FAMILIES)
        assert np.bincount(samples.labels).tolist() == [len(samples) // 10] * 10
        assert samples.name(3) == f"shapes {split}, cloud 3"
        assert samples.values[0].shape == (2048, 3) and samples.values[0].dtype == np.float32
        sizes[split] = len(samples)
    assert sizes == {"train": 2000, "test": 500}
    with pytest.raises(ValueError, match="shapes has the splits train and test"):
        load_samples(DataArguments(source="shapes", split="validation"), PointCloud())


def test_each_shape_is_always_the_same_and_unlike_the_others() -> None:
    train, test = Shapes("train", 64), pickle.loads(pickle.dumps(Shapes("test", 64)))
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    first = [train[index] for index in range(30)]
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    for index in (17, 3):  # in any order
        assert np.array_equal(Shapes("train", 64)[index], first[index])
        assert not np.array_equal(test[index], first[index])
        assert not np.allclose(first[index], first[index + 10], atol=0.05)
    with pytest.raises(IndexError):
        test[500]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_fill_boxes_of_the_same_sizes(family: str) -> None:
    """Sides from 0.5 to 1 before the turn: heights stay within that, but for the noise."""
    shapes, number = Shapes("train", 1024), list(FAMILIES).index(family)
    heights = np.array([np.ptp(shapes[index][:, 2]) for index in range(number, 600, 10)])
    assert heights.min() > 0.4 and heights.max() < 1.15
    assert heights.min() < 0.65 and heights.max() > 0.85
    clouds = [shapes[index] for index in range(number, 100, 10)]
    assert all(np.isfinite(cloud).all() and np.linalg.norm(cloud[:, :2], axis=1).max() < 0.8 for cloud in clouds)


def test_points_lie_evenly_on_the_surface() -> None:
    """Of a box of 1 x 2 x 4: in proportion to the area of its sides, and evenly along each."""
    rng = np.random.default_rng(0)
    points = on_surface(*boxes(((0, 0, 0), (1, 2, 4))), 20_000, rng)
    for axis, (side, share) in enumerate(zip((1, 2, 4), (16 / 28, 8 / 28, 4 / 28), strict=True)):
        for place in (0, side):
            on_it = np.abs(points[:, axis] - place) < 1e-9
            assert abs(on_it.sum() - 10_000 * share) < 5 * (10_000 * share) ** 0.5
            for other in {0, 1, 2} - {axis}:
                length = (1, 2, 4)[other]
                count = on_it.sum()
                assert abs(points[on_it, other].mean() - length / 2) < 5 * length / (12 * count) ** 0.5


def test_a_lathe_turns_a_profile() -> None:
    """Of a cylinder with radius 1 and height 2, half of the area is the mantle without its caps' 2 pi of 6 pi."""
    vertices, triangles = lathe([0, 1, 1, 0], [0, 0, 2, 2], sides=200)
    points = on_surface(vertices, triangles, 20_000, np.random.default_rng(0))
    radius = np.hypot(points[:, 0], points[:, 1])
    mantle = (points[:, 2] > 1e-9) & (points[:, 2] < 2 - 1e-9)
    assert (radius[mantle] > 0.999).all() and radius.max() < 1 + 1e-9
    assert abs(mantle.mean() - 2 / 3) < 5 * (2 / 9 / 20_000) ** 0.5
