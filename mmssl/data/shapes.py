"""Ten families of surfaces as point clouds: a small labelled set for examples and tests, made from random parameters.

Each shape is a mesh, stretched to a box whose sides are drawn alike for all families, so that proportions do not tell
them apart; turned about the up axis z; and points are drawn evenly on it, with a little noise. They are geometry, not
scans, so an accuracy on them says little about real objects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

Mesh = tuple[np.ndarray, np.ndarray]  # vertices (V, 3) and triangles (T, 3)
SIZES = {"train": 2000, "test": 500}


@dataclass(frozen=True)
class Shapes(Sequence):
    """Clouds (num_points, 3) float32, made when they are indexed; the family of shape i is ``i % 10``."""

    split: str
    num_points: int = 2048

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, i):
        index = range(len(self))[i]  # raises IndexError, which ends a loop over the sequence
        rng = np.random.default_rng([list(SIZES).index(self.split), index])
        vertices, triangles = list(FAMILIES.values())[index % len(FAMILIES)](rng)
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        vertices = ((vertices - low) / (high - low) - 0.5) * rng.uniform(0.5, 1.0, 3)
        points = on_surface(vertices, triangles, self.num_points, rng)
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(angle), np.sin(angle)
        points = points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        return (points + rng.normal(0, rng.uniform(0.002, 0.015), points.shape)).astype(np.float32)


def on_surface(vertices: np.ndarray, triangles: np.ndarray, count: int, rng: Generator) -> np.ndarray:
    """Points drawn evenly on triangles, (count, 3)."""
    corner, first, second = vertices[triangles].swapaxes(0, 1)
    first, second = first - corner, second - corner
    area = np.linalg.norm(np.cross(first, second), axis=1)
    chosen = rng.choice(len(area), size=count, p=area / area.sum())
    u, v = rng.uniform(size=(2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)  # the other half of the parallelogram
    return corner[chosen] + u * first[chosen] + v * second[chosen]


def sheet(points: np.ndarray) -> Mesh:
    """A grid of points (R, C, 3) as triangles."""
    rows, columns = points.shape[:2]
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = (part.ravel() for part in (index[:-1, :-1], index[1:, :-1], index[:-1, 1:], index[1:, 1:]))
    return points.reshape(-1, 3), np.concatenate([np.stack([a, b, c], axis=1), np.stack([b, d, c], axis=1)])


def lathe(radius: Sequence[float] | np.ndarray, height: Sequence[float] | np.ndarray, sides: int = 48) -> Mesh:
    """A profile turned about the up axis; few sides make it a prism or a pyramid."""
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    radius, height = np.asarray(radius)[:, None], np.asarray(height)[:, None]
    return sheet(np.stack([radius * np.cos(angle), radius * np.sin(angle), height + 0 * angle], axis=-1))


def boxes(*corners: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Mesh:
    """Boxes between their lowest and their highest corners."""
    cube = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(8, 3)
    faces = [[0, 1, 3, 2], [4, 5, 7, 6], [0, 1, 5, 4], [2, 3, 7, 6], [0, 2, 6, 4], [1, 3, 7, 5]]
    triangles = np.array([[f[0], f[i], f[i + 1]] for f in faces for i in (1, 2)])
    vertices = [np.array(low) + cube * (np.array(high) - low) for low, high in corners]
    return np.concatenate(vertices), np.concatenate([triangles + 8 * number for number in range(len(corners))])


def legs(thickness: float, height: float) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    places = (0.0, 1.0 - thickness)
    return [((x, y, 0.0), (x + thickness, y + thickness, height)) for x in places for y in places]


def ellipsoid(rng: Generator) -> Mesh:
    angle = np.linspace(0, np.pi, 24)
    return lathe(np.sin(angle), np.cos(angle))


def cuboid(rng: Generator) -> Mesh:
    return boxes(((0, 0, 0), (1, 1, 1)))


def cylinder(rng: Generator) -> Mesh:
    return lathe([0, 1, 1, 0], [0, 0, 1, 1])


def cone(rng: Generator) -> Mesh:
    top = rng.uniform(0, 0.4)
    return lathe([0, 1, top, 0], [0, 0, 1, 1])


def pyramid(rng: Generator) -> Mesh:
    top = rng.uniform(0, 0.4)
    return lathe([0, 1, top, 0], [0, 0, 1, 1], sides=int(rng.integers(3, 5)))


def torus(rng: Generator) -> Mesh:
    angle, tube = np.linspace(0, 2 * np.pi, 24), rng.uniform(0.2, 0.6)
    return lathe(1 + tube * np.cos(angle), tube * np.sin(angle))


def helix(rng: Generator) -> Mesh:
    turns, tube = rng.uniform(1.5, 4), rng.uniform(0.1, 0.2)
    angle = np.linspace(0, 2 * np.pi * turns, 120)[:, None]
    around = np.linspace(0, 2 * np.pi, 13)
    radius = 1 + tube * np.cos(around)
    rise = angle / (2 * np.pi) * rng.uniform(0.5, 1.0)
    return sheet(np.stack([radius * np.cos(angle), radius * np.sin(angle), rise + tube * np.sin(around)], axis=-1))


def terrain(rng: Generator) -> Mesh:
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, 32)], indexing="ij")
    height = np.zeros_like(x)
    for _ in range(rng.integers(3, 7)):
        (a, b), width = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.5)
        height += rng.choice([-1, 1]) * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * width**2))
    return sheet(np.stack([x, y, height], axis=-1))


def table(rng: Generator) -> Mesh:
    thickness, top = rng.uniform(0.08, 0.25), rng.uniform(0.08, 0.25)
    return boxes(((0, 0, 1 - top), (1, 1, 1)), *legs(thickness, 1 - top))


def chair(rng: Generator) -> Mesh:
    thickness, seat = rng.uniform(0.08, 0.25, 2)
    height, back = rng.uniform(0.3, 0.6), rng.uniform(0.08, 0.25)
    return boxes(((0, 0, height), (1, 1, height + seat)), ((0, 0, height), (back, 1, 1)), *legs(thickness, height))


FAMILIES: dict[str, Callable[[Generator], Mesh]] = {
    family.__name__: family
    for family in (ellipsoid, cuboid, cylinder, cone, pyramid, torus, helix, terrain, table, chair)
}
