"""Reads points from arrays, point files and meshes, which are known by their content."""

import io
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.samples import file_of, number_array


def read_points(sample: Any, mesh_points: int) -> np.ndarray:
    """The points of a sample, (N, 3 or more), as they were stored; ``mesh_points`` of them where it is a mesh."""
    if isinstance(sample, dict):
        sample = sample["points"] if sample.get("points") is not None else file_of(sample)
    if isinstance(sample, str | Path):
        sample = Path(sample).read_bytes()
    if not isinstance(sample, bytes):
        return number_array(sample)
    head = sample[:64].split()
    try:
        if sample.startswith((b"\x93NUMPY", b"PK")):
            return decode_numpy(sample)
        if head and head[0] == b"ply":
            return decode_mesh(sample, "ply", mesh_points)
        if head and re.match(rb"\w*OFF", head[0]):
            return decode_mesh(sample, "off", mesh_points)
        if re.search(rb"^v[ \t]", sample, re.MULTILINE):
            return decode_mesh(sample, "obj", mesh_points)
        return decode_text(sample.decode())
    except Exception as error:  # each reader fails in ways of its own at a corrupt file
        if isinstance(error, ImportError | Malformed):
            raise
        raise ValueError(
            f"not a readable point cloud ({error}); expected an intact npy, npz, ply, off, obj or text file"
        ) from error


class Malformed(ValueError):
    """A file that can be read, with contents that cannot be used."""


def decode_numpy(data: bytes) -> np.ndarray:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return number_array(loaded)
    if "points" in loaded.files:
        return number_array(loaded["points"])
    arrays = {name: loaded[name] for name in loaded.files}
    matrices = [array for array in arrays.values() if array.ndim == 2]
    if len(matrices) != 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise Malformed(f"found an npz file of {found}; expected one matrix, or one that is called points")
    return number_array(matrices[0])


def decode_text(text: str) -> np.ndarray:
    """Numbers separated by spaces, commas or semicolons, one point in a line; pts files begin with their number."""
    lines = [line for line in re.sub("[,;]", " ", text).splitlines() if line.split("#")[0].strip()]
    if lines and len(lines[0].split()) == 1 and lines[0].strip().isdecimal():
        lines = lines[1:]
    if not lines:
        raise Malformed("found no points; expected one in each line")
    return np.loadtxt(lines, ndmin=2)


def decode_mesh(data: bytes, kind: str, count: int) -> np.ndarray:
    """Points drawn evenly on the surface of a mesh, or its vertices where it has no faces, (N, 3)."""
    try:
        import trimesh
    except ImportError as error:
        raise ImportError('ply, off and obj files need trimesh: pip install "mmssl[point_cloud]"') from error
    loaded: Any = trimesh.load(io.BytesIO(data), file_type=kind, process=False)
    parts = list(loaded.geometry.values()) if isinstance(loaded, trimesh.Scene) else [loaded]
    parts = [part for part in parts if len(part.vertices)]
    if not parts:
        raise Malformed(f"found a {kind} file with neither faces nor vertices; expected a mesh or a point cloud")
    vertices = np.concatenate([np.asarray(part.vertices) for part in parts])
    meshes = [part for part in parts if len(getattr(part, "faces", ()))]
    if not meshes or not np.isfinite(vertices).all():
        return vertices
    mesh: Any = trimesh.util.concatenate(meshes)
    if not mesh.area > 0:
        raise Malformed(f"found a mesh of {len(mesh.faces)} faces without area; expected a surface")
    # The seed is the content's: the same mesh gives the same points, wherever and whenever it is read.
    return np.asarray(trimesh.sample.sample_surface(mesh, count, seed=zlib.crc32(data))[0])
