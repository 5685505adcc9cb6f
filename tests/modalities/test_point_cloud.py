"""Point clouds: files and meshes to groups of points, their embedding, views, and Point-MAE on top of them."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.evaluation.pictures import draw_reconstructions
from mmssl.geometry import MAX_DISTANCES
from mmssl.modalities.base import Batch
from mmssl.modalities.point_cloud import MiniPointNet, PointCloud
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.tokens import Tokens, gather

trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")

SMALL: dict[str, Any] = {"num_points": 64, "num_groups": 10, "group_size": 8}


def keyed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(count: int = 64, channels: int = 0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3 + channels)).astype(np.float32)


def modality(**options: Any) -> PointCloud:
    return PointCloud(**{**SMALL, **options})


def batch_of(clouds: PointCloud, *samples: Any) -> Batch:
    return clouds.collate([clouds.excerpt(clouds.prepare(sample), None) for sample in samples])


def small_batch(clouds: PointCloud, count: int = 4) -> Batch:
    return batch_of(clouds, *(cloud(64, clouds.num_channels, seed) for seed in range(count)))


def objective(options: dict[str, Any] | None = None, **others: Any) -> MaskedReconstruction:
    """Point-MAE, tiny, in evaluation mode but with statistics that are not the start values."""
    torch.manual_seed(0)
    config = MMSSLConfig(
        modalities={"point_cloud": {**SMALL, **(options or {})}},
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        position_every_block=True,
    )
    sizes: dict[str, Any] = {"decoder_layers": 1, "decoder_hidden_size": 16, "decoder_attention_heads": 2}
    module = MaskedReconstruction(MMSSLModel(config), views=False, mask_ratio=0.6, **sizes, **others)
    for norm in (layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)):
        norm.running_mean = torch.empty(norm.num_features).uniform_(-1, 1)
        norm.running_var = torch.empty(norm.num_features).uniform_(0.5, 2)
    return module.eval()


# ---- Reading --------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def text(array: np.ndarray, delimiter: str = " ", first: str = "") -> bytes:
    lines = [delimiter.join(repr(float(value)) for value in row) for row in array]
    return (first + "\n".join(lines) + "\n").encode()


def exported(mesh: Any, kind: str) -> bytes:
    data = mesh.export(file_type=kind)
    return data if isinstance(data, bytes) else data.encode()


def ply(vertices: int, faces: int, body: str) -> bytes:
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    return (
        f"ply\nformat ascii 1.0\nelement vertex {vertices}\n{axes}element face {faces}\n"
        f"property list uchar int vertex_indices\nend_header\n{body}"
    ).encode()


WAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda a: a,
    "float64": lambda a: a.astype(np.float64),
    "list": lambda a: a.tolist(),
    "tensor": torch.from_numpy,
    "record of points": lambda a: {"points": a},
    "npy": npy,
    "npy, big-endian": lambda a: npy(a.astype(">f4")),
    "npy record": lambda a: {"bytes": npy(a), "path": None},
    "npz, one matrix": lambda a: npz(xyz=a, label=np.array(3)),
    "npz, points": lambda a: npz(points=a, normals=a),
    "xyz": text,
    "xyz, with a comment": lambda a: text(a, first="# x y z\n\n"),
    "pts": lambda a: text(a, first=f"{len(a)}\n"),
    "commas": lambda a: text(a, ","),
    "ply": lambda a: exported(trimesh.PointCloud(a), "ply"),
    "obj": lambda a: b"# vertices\no cloud\nv " + text(a).strip().replace(b"\n", b"\nv ") + b"\n",
    "off": lambda a: b"OFF\n%d 0 0\n" % len(a) + text(a),
    "more columns": lambda a: np.concatenate([a, a], axis=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_hand_a_sample_over(way: str, tmp_path: Path) -> None:
    points = cloud()
    clouds, sample = modality(normalize=False), WAYS[way](points)
    for given in [sample, *([path_of(tmp_path, sample)] if isinstance(sample, bytes) else [])]:
        out = clouds.prepare(given)["points"]
        assert out.dtype == torch.float32
        np.testing.assert_allclose(out, points, rtol=0, atol=1e-6)


def path_of(folder: Path, data: bytes) -> Path:
    (folder / "cloud").write_bytes(data)
    return folder / "cloud"


def test_half_precision_and_integers_are_read() -> None:
    points = cloud()
    half = modality(normalize=False).prepare(points.astype(np.float16))["points"]
    np.testing.assert_allclose(half, points, atol=2e-3)
    whole = modality(normalize=False).prepare(np.arange(300).reshape(100, 3))["points"]
    assert whole[7].tolist() == [21, 22, 23]


def test_channels_are_kept_and_columns_behind_them_left_out() -> None:
    points = cloud(channels=4)
    out = modality(num_channels=2, normalize=False).prepare(points)["points"]
    np.testing.assert_array_equal(out, points[:, :5])


def test_geographic_coordinates_keep_their_digits() -> None:
    """Single precision has steps of 3 cm at 500 km."""
    points = cloud().astype(np.float64)
    clouds = modality()
    near = clouds.excerpt(clouds.prepare(points), None)["points"]
    far = clouds.excerpt(clouds.prepare(points + np.array([500_000.0, 5_000_000.0, 100.0])), None)["points"]
    torch.testing.assert_close(far, near, rtol=0, atol=1e-6)


MESHES: dict[str, Callable[[], Any]] = {
    "sphere": lambda: trimesh.creation.icosphere(subdivisions=3),
    "box": lambda: trimesh.creation.box(extents=(1, 2, 4)),
}


@pytest.mark.parametrize("kind", ["off", "ply", "obj"])
def test_meshes_are_sampled_on_their_surface(kind: str) -> None:
    clouds = modality(normalize=False)
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    sphere = clouds.prepare(exported(MESHES["sphere"](), kind))["points"]
    assert sphere.shape == (8 * 64, 3)
    assert (sphere.norm(dim=1) > 0.98).all() and (sphere.norm(dim=1) < 1 + 1e-5).all()
    box = clouds.prepare(data := exported(MESHES["box"](), kind))["points"]
    half = torch.tensor([0.5, 1.0, 2.0])
    on_side = (box.abs() - half).abs() < 1e-5
    assert on_side.any(dim=1).all()
    # In proportion to the area: 16 of 28 on the sides across x, 8 across y, 4 across z; five deviations.
    for axis, share in enumerate((16 / 28, 8 / 28, 4 / 28)):
        count = on_side[:, axis].sum().item()
        assert abs(count - 512 * share) < 5 * (512 * share * (1 - share)) ** 0.5
    assert torch.equal(clouds.prepare(data)["points"], box)  # the same points at each call
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]


def test_objects_of_one_file_are_one_mesh() -> None:
    data = b"".join(
        b"usemtl m%d\nv %d 0 0\nv %d 1 0\nv %d 0 1\nf %d %d %d\n" % (i, i, i, i, 3 * i + 1, 3 * i + 2, 3 * i + 3)
        for i in range(2)
    )
    points = modality(normalize=False).prepare(b"mtllib none.mtl\n" + data)["points"]
    assert points[:, 0].round().unique().tolist() == [0, 1]


def spoilt(value: float, count: int = 3) -> np.ndarray:
    points = cloud()
    points[5 : 5 + count, 1] = value
    return points


FLAT = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
MALFORMED: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: spoilt(np.nan), "3 of 64 points with NaN"),
    "infinite": (lambda: spoilt(-np.inf), "3 of 64 points with NaN, infinite"),
    "overflow": (lambda: spoilt(1e30, 1), "1 of 64 points with.*beyond 1e.18"),
    "NaN in a mesh": (lambda: b"OFF\n3 1 0\n0 0 nan\n1 0 0\n0 1 0\n3 0 1 2\n", "1 of 3 points with NaN"),
    "empty": (lambda: np.zeros((0, 3)), "cloud of 0 points.*at least 10"),
    "empty file": (lambda: b"", "found no points"),
    "only a comment": (lambda: b"# x y z\n", "found no points"),
    "fewer points than groups": (lambda: cloud(9), "cloud of 9 points.*at least 10, for 10 groups of 8"),
    "other way round": (lambda: cloud().T, "cloud of 3 points"),
    "one axis": (lambda: np.zeros(64), r"shape \(64,\); expected \(points, 3 or more\)"),
    "three axes": (lambda: np.zeros((2, 64, 3)), r"shape \(2, 64, 3\)"),
    "two columns": (lambda: np.zeros((64, 2)), r"shape \(64, 2\)"),
    "words": (lambda: b"a b c\nd e f\n", "not a readable point cloud"),
    "rows of different length": (lambda: b"1 2 3\n4 5\n", "not a readable point cloud"),
    "binary": (lambda: bytes(range(256)), "not a readable point cloud"),
    "cut npy": (lambda: npy(cloud())[:200], "not a readable point cloud"),
    "cut npz": (lambda: npz(points=cloud())[:200], "not a readable point cloud"),
    "pickled npy": (lambda: npy(np.array([{}, None], dtype=object)), "not a readable point cloud.*pickle"),
    "npz of two": (lambda: npz(a=cloud(), b=cloud()), r"npz file of a \(64, 3\), b \(64, 3\); expected one matrix"),
    "npz of none": (lambda: npz(a=np.zeros(3)), "expected one matrix"),
    "cut ply": (lambda: ply(3, 1, "0 0 0\n1 0"), "not a readable point cloud"),
    "cut binary ply": (lambda: exported(MESHES["sphere"](), "ply")[:900], "not a readable point cloud"),
    "cut off": (lambda: b"OFF\n3 1 0\n0 0 0\n1 0", "not a readable point cloud"),
    "face of no vertex": (lambda: b"v 0 0 0\nv 1 0 0\nf 1 2 9\n", "not a readable point cloud"),
    "ply of nothing": (lambda: ply(0, 0, ""), "neither faces nor vertices"),
    "off of nothing": (lambda: b"OFF\n0 0 0\n", "neither faces nor vertices"),
    "no area": (lambda: exported(FLAT, "off"), "1 faces without area"),
    "null": (lambda: None, "expected"),
    "another record": (lambda: {"text": "words"}, "expected"),
    "words in an array": (lambda: [["a", "b", "c"]], "expected"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_samples(case: str) -> None:
    make, message = MALFORMED[case]
    with pytest.raises(ValueError, match=message):
        modality().prepare(make())


def test_fewer_points_than_a_group() -> None:
    with pytest.raises(ValueError, match=r"cloud of 12 points.*at least 16, for 4 groups of 16"):
        modality(num_groups=4, group_size=16).prepare(cloud(12))


def test_too_few_channels() -> None:
    with pytest.raises(ValueError, match=r"shape \(64, 3\); expected \(points, 6 or more\) with num_channels=3"):
        modality(num_channels=3).prepare(cloud())
    with pytest.raises(ValueError, match=r"meshes.*give xyz alone"):
        modality(num_channels=3).prepare(exported(MESHES["box"](), "off"))


def test_without_trimesh_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    assert len(modality().prepare(npy(cloud()))["points"]) == 64
    with pytest.raises(ImportError, match=r'pip install "mmssl\[point_cloud\]"'):
        modality().prepare(b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 9}, "num_points: found 9; expected at least .* 10"),
        ({"crop_scale": (0.5, 1.2)}, "crop_scale"),
        ({"scale": (0.0, 1.0)}, "scale: found"),
        ({"drop": 1.0}, "drop: found"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modality(**options)


@pytest.mark.parametrize(
    ("points", "mask", "message"),
    [
        ((2, 64, 4), (2, 64), "found shape"),
        ((2, 64, 3), (2, 63), "found shape"),
        ((64, 3), (64,), "found shape"),
        ((2, 9, 3), (2, 9), "found clouds of 9 points; expected at least 10"),
    ],
)
def test_malformed_batches(points: tuple[int, ...], mask: tuple[int, ...], message: str) -> None:
    batch = {"points": torch.zeros(points), "attention_mask": torch.ones(mask, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"points: {message}"):
        modality().tokenize(batch)


# ---- Excerpts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["random", "block"])
def test_excerpts_of_large_clouds(style: str) -> None:
    clouds = modality(excerpt_style=style, normalize=False)
    points = cloud(500, seed=2)
    sample = clouds.prepare(points)
    always = clouds.excerpt(sample, None)["points"]
    assert torch.equal(always, clouds.excerpt(sample, None)["points"])
    first, second = (clouds.excerpt(sample, keyed(seed))["points"] for seed in (1, 2))
    assert torch.equal(first, clouds.excerpt(sample, keyed(1))["points"])
    assert not torch.equal(first, second)
    for excerpt in (always, first, second):
        known = {tuple(row) for row in points.tolist()}
        assert len({tuple(row) for row in excerpt.tolist()} & known) == 64
    if style == "block":  # no point outside is nearer to the first one than any inside
        inside = np.linalg.norm(first.numpy() - first[0].numpy(), axis=1)
        everywhere = np.sort(np.linalg.norm(points - first[0].numpy(), axis=1))
        np.testing.assert_allclose(np.sort(inside), everywhere[:64], atol=1e-6)
    assert len(sample["points"]) == 500


def test_random_excerpts_take_all_points_alike() -> None:
    clouds = modality(normalize=False)
    sample = {"points": torch.arange(256.0)[:, None].expand(-1, 3)}
    counts = torch.zeros(256)
    for seed in range(400):
        counts[clouds.excerpt(sample, keyed(seed))["points"][:, 0].long()] += 1
    assert ((counts - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()


def test_normalisation() -> None:
    """Mean zero, the farthest point at one, other channels as they are; of the excerpt, not of the whole cloud."""
    clouds = modality(num_channels=1)
    sample = clouds.prepare(5 + 3 * cloud(500, channels=1))
    out = clouds.excerpt(sample, keyed())["points"]
    torch.testing.assert_close(out[:, :3].mean(dim=0), torch.zeros(3), rtol=0, atol=1e-6)
    assert out[:, :3].norm(dim=1).max() == pytest.approx(1.0)
    raw = modality(num_channels=1, normalize=False).excerpt(sample, keyed())["points"]
    assert torch.equal(out[:, 3], raw[:, 3])
    centred = (raw - raw.mean(dim=0))[:, :3]
    torch.testing.assert_close(out[:, :3], centred / centred.norm(dim=1).max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e17])
def test_normalisation_of_any_size(size: float) -> None:
    points = cloud().astype(np.float64)
    expected = batch_of(modality(), points)["points"]
    torch.testing.assert_close(batch_of(modality(), points * size)["points"], expected, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_scenes_need_bounded_memory() -> None:
    """50,000 points, read in excerpts or whole: never one tensor of (centres x points)."""
    scene = cloud(50_000)
    clouds = PointCloud(num_points=1024, excerpt_style="block")
    assert batch_of(clouds, scene, scene)["points"].shape == (2, 1024, 3)
    whole = PointCloud(num_points=50_000, num_groups=128)
    batch = batch_of(whole, scene)
    with Largest() as largest:
        tokens = whole.tokenize(batch)
    assert tokens.content.shape == (1, 128, 32, 3)
    assert largest.numel <= MAX_DISTANCES < 128 * 50_000


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def test_groups_are_the_neighbours_of_their_centres() -> None:
    """Each group holds its centre first and then the points that a slow search finds, with their channels."""
    clouds = modality(num_channels=2)
    batch = small_batch(clouds)
    tokens = clouds.tokenize(batch)
    assert tokens.content.shape == (4, 10, *clouds.content_shape) and tokens.valid.all()
    assert not tokens.content[:, :, 0, :3].any()
    for row in range(4):
        points = batch["points"][row]
        assert torch.equal(tokens.coords[row, 0], points[0, :3])
        for centre, group in zip(tokens.coords[row], tokens.content[row], strict=True):
            gaps = (points[:, :3] - centre).norm(dim=1)
            near = points[gaps.argsort()[:8]].clone()
            near[:, :3] -= centre
            assert torch.equal(group, near)


def test_padding_never_matters() -> None:
    """Not even if it is huge or not a number, bit by bit; alone and in a batch a cloud has the same tokens."""
    clouds = modality()
    samples = [cloud(count, seed=count) for count in (20, 64, 33)]
    batch = batch_of(clouds, *samples)
    tokens, features = clouds.tokenize(batch), clouds.raw_features(batch)
    for padding in (1e6, torch.nan, torch.inf):
        other = {**batch, "points": batch["points"].masked_fill(batch["attention_mask"][..., None] == 0, padding)}
        assert torch.equal(clouds.tokenize(other).content, tokens.content)
        assert torch.equal(clouds.tokenize(other).coords, tokens.coords)
        assert torch.equal(clouds.raw_features(other), features)
    for row, sample in enumerate(samples):
        alone = clouds.tokenize(batch_of(clouds, sample))
        assert torch.equal(alone.content[0], tokens.content[row]) and torch.equal(alone.coords[0], tokens.coords[row])


def test_clouds_of_equal_points_are_read() -> None:
    clouds = modality(**SMALL)
    batch = batch_of(clouds, np.full((64, 3), 0.1), np.repeat(cloud(5), 12, axis=0))
    tokens = clouds.tokenize(batch)
    assert tokens.content.isfinite().all() and tokens.coords.isfinite().all()
    assert len(tokens.coords[1].unique(dim=0)) == 5
    features = clouds.raw_features(batch)
    assert features.isfinite().all() and features[0, 0] == 1
    module = objective().train()
    out = module(batch, keyed())
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(value.grad is None or value.grad.isfinite().all() for value in module.parameters())


def test_tokens_stay_in_single_precision_under_autocast() -> None:
    clouds = modality()
    batch = small_batch(clouds)
    expected = clouds.tokenize(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = clouds.tokenize(batch)
    assert torch.equal(found.content, expected.content) and torch.equal(found.coords, expected.coords)


def test_block_masks_hide_the_groups_nearest_to_one() -> None:
    clouds = modality()
    tokens = clouds.tokenize(small_batch(clouds))
    first, second = (clouds.mask(tokens, 0.5, keyed(seed), style="block") for seed in (0, 1))
    assert not torch.equal(first.hidden, second.hidden)
    assert first.hidden.sum(dim=1).tolist() == [5] * 4
    for centres, hidden in zip(tokens.coords, first.hidden, strict=True):
        gaps = torch.cdist(centres, centres)
        blocks = [set(row.argsort()[:5].tolist()) for row in gaps]
        assert set(hidden.nonzero().flatten().tolist()) in blocks


@pytest.mark.parametrize("style", ["random", "block"])
def test_all_samples_hide_equally_many(style: str) -> None:
    clouds = modality(num_groups=64)
    tokens = clouds.tokenize(batch_of(clouds, *(cloud(count, seed=count) for count in (64, 70, 100))))
    mask = clouds.mask(tokens, 0.6, keyed(), style=style)
    assert mask.hidden.sum(dim=1).tolist() == [39] * 3 and mask.visible_index.shape == (3, 25)
    assert mask.visible_valid.all() and mask.hidden_valid.all()


# ---- Embedding ------------------------------------------------------------------------------------------------------


def published_form(net: MiniPointNet, groups: Tensor) -> Tensor:
    """With the maximum put beside each point, and convolutions over (B, C, S), as the paper draws it."""
    points = groups.flatten(0, 1).transpose(1, 2)
    conv = nn.functional.conv1d
    local = conv(net.norm1(conv(points, net.fc1.weight[..., None], net.fc1.bias)).relu(), net.fc2.weight[..., None])
    local = local + net.fc2.bias[:, None]
    both = torch.cat([local.max(dim=2, keepdim=True).values.expand_as(local), local], dim=1)
    weight = torch.cat([net.fc3_group.weight, net.fc3_point.weight], dim=1)
    hidden = net.norm2(conv(both, weight[..., None], net.fc3_point.bias)).relu()
    out = conv(hidden, net.fc4.weight[..., None], net.fc4.bias).max(dim=2).values
    return out.view(*groups.shape[:2], -1)


@pytest.mark.parametrize("training", [True, False])
def test_embedding_equals_the_published_form(training: bool) -> None:
    torch.manual_seed(0)
    net = MiniPointNet(4, 24).train(training)
    groups = torch.randn(3, 5, 8, 4, generator=keyed())
    torch.testing.assert_close(net(groups), published_form(net, groups), rtol=1e-4, atol=1e-5)
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters() if "weight" in name}
    assert shapes == {
        "fc1.weight": (128, 4),
        "norm1.weight": (128,),
        "fc2.weight": (256, 128),
        "fc3_group.weight": (512, 256),
        "fc3_point.weight": (512, 256),
        "norm2.weight": (512,),
        "fc4.weight": (24, 512),
    }


def test_embedding_does_not_know_the_order_of_points() -> None:
    net = MiniPointNet(3, 16).eval()
    groups = torch.randn(2, 4, 8, 3, generator=keyed())
    other = groups[:, :, torch.randperm(8, generator=keyed())]
    torch.testing.assert_close(net(other), net(groups))


def test_start_values_and_statistics_survive_saving(tmp_path: Path) -> None:
    model = objective({"num_channels": 1}).model
    fresh = MMSSLModel(model.config)
    for name, buffer in fresh.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, torch.full_like(buffer, float("var" in name)))
    for norm in (layer for layer in fresh.modules() if isinstance(layer, nn.BatchNorm1d)):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    model.save_pretrained(tmp_path)
    again = MMSSLModel.from_pretrained(tmp_path)
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    batch = small_batch(modality(num_channels=1))
    assert torch.equal(model.eval()(**batch).pooler_output, again.eval()(**batch).pooler_output)


# ---- Point-MAE ------------------------------------------------------------------------------------------------------


def hidden_and_visible(module: MaskedReconstruction, tokens: Tokens) -> Tensor:
    return module.model.adapters["point_cloud"].mask(tokens, 0.6, keyed(), "random").hidden


def test_the_encoder_sees_nothing_of_hidden_groups() -> None:
    """With other points in the hidden groups its output is the same to the bit; so are the predictions."""
    module = objective()
    clouds = module.model.adapters["point_cloud"]
    tokens = clouds.tokenize(small_batch(modality()))
    hidden = hidden_and_visible(module, tokens)
    out = module.reconstruct(clouds, tokens, keyed())
    content = torch.where(hidden[..., None, None], torch.randn(tokens.content.shape), tokens.content)
    other = module.reconstruct(clouds, Tokens(content, tokens.coords, tokens.valid), keyed())
    assert torch.equal(out.encoded, other.encoded) and torch.equal(out.prediction, other.prediction)
    # Hidden centres reach the decoder, as published, but not the encoder.
    coords = torch.where(hidden[..., None], tokens.coords + 0.3, tokens.coords)
    moved = module.reconstruct(clouds, Tokens(tokens.content, coords, tokens.valid), keyed())
    assert torch.equal(out.encoded, moved.encoded) and not torch.allclose(out.prediction, moved.prediction)


def test_in_training_nothing_of_hidden_groups_reaches_the_batch_statistics() -> None:
    module = objective().train()
    clouds = module.model.adapters["point_cloud"]
    tokens = clouds.tokenize(small_batch(modality()))
    hidden = hidden_and_visible(module, tokens)
    content = torch.where(hidden[..., None, None], torch.randn(tokens.content.shape), tokens.content)
    out, other = (
        module.reconstruct(clouds, Tokens(each, tokens.coords, tokens.valid), keyed()).encoded
        for each in (tokens.content, content)
    )
    assert torch.equal(out, other)


def test_published_size() -> None:
    """29.0 M parameters, and 0.15 M for the linear layer that the authors' code has not between encoder and decoder."""
    with torch.device("meta"):
        config = MMSSLConfig(
            modalities={"point_cloud": {}},
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            qkv_bias=False,
        )
        sizes: dict[str, Any] = {"decoder_layers": 4, "decoder_hidden_size": 384, "decoder_attention_heads": 6}
        module = MaskedReconstruction(MMSSLModel(config), **sizes)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count - (384 * 384 + 384) == pytest.approx(29.0e6, rel=5e-4)


def test_loss_does_not_change_when_the_cloud_is_moved() -> None:
    """Contents and targets, by a shift that loses no digits; the loss with the places held still."""
    clouds = modality(normalize=False)
    points = torch.randint(0, 1024, (4, 64, 3), generator=keyed()) / 1024
    batch = {"points": points, "attention_mask": torch.ones(4, 64, dtype=torch.long)}
    here, there = clouds.tokenize(batch), clouds.tokenize({**batch, "points": points + torch.tensor([8.0, -16, 4])})
    assert torch.equal(here.content, there.content) and torch.equal(clouds.target(here), clouds.target(there))
    assert torch.equal(there.coords - here.coords, torch.tensor([8.0, -16, 4]).expand_as(here.coords))
    module = objective({"normalize": False})
    adapter = module.model.adapters["point_cloud"]
    losses = []
    for tokens in (here, Tokens(there.content, here.coords, there.valid)):
        out = module.reconstruct(adapter, tokens, keyed())
        assert out.index is not None
        losses.append(adapter.reconstruction_loss(out.prediction, gather(adapter.target(tokens), out.index), out.where))
    assert torch.equal(losses[0][0], losses[1][0])


def test_loss_does_not_depend_on_the_order_of_points() -> None:
    """The first point is where sampling starts, so it stays."""
    module = objective()
    batch = small_batch(modality())
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(63, generator=keyed())])
    other = {name: value[:, order] for name, value in batch.items()}
    torch.testing.assert_close(module(other, keyed()).loss, module(batch, keyed()).loss)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_reconstruction_loss(distance: str) -> None:
    """Mean over hidden groups of the Chamfer distance; xyz alone, in single precision, zero and flat at the truth."""
    clouds = modality(num_channels=1, distance=distance)
    tokens = clouds.tokenize(small_batch(clouds))
    target = clouds.target(tokens)
    assert target.shape == (4, 10, 8, 3)
    prediction = torch.randn(target.shape, generator=keyed())
    where = torch.rand(4, 10, generator=keyed()) < 0.5
    loss, weight = clouds.reconstruction_loss(prediction.bfloat16(), target, where)
    gaps = torch.cdist(prediction.bfloat16().double(), target.double())
    gaps = gaps.square() if distance == "l2" else gaps / 2
    expected = gaps.amin(dim=-1).mean(dim=-1) + gaps.amin(dim=-2).mean(dim=-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight, where.float())
    exact = target[:, :, torch.randperm(8)].clone().requires_grad_()
    zero, _ = clouds.reconstruction_loss(exact, target, where)
    zero.sum().backward()
    assert not zero.any() and exact.grad is not None and exact.grad.isfinite().all()


def test_head_and_content_of_a_prediction() -> None:
    clouds = modality(num_channels=2)
    tokens = clouds.tokenize(small_batch(clouds))
    prediction = clouds.reconstruction_head(16)(torch.zeros(4, 10, 16))
    assert prediction.shape == clouds.target(tokens).shape
    content = clouds.content_of(prediction, tokens)
    assert content.shape == tokens.content.shape and torch.equal(content[..., :3], prediction)


# ---- Views ----------------------------------------------------------------------------------------------------------


def test_without_options_a_view_is_the_batch() -> None:
    batch = small_batch(modality())
    view = modality().view(batch, keyed())
    assert torch.equal(view.batch["points"], batch["points"]) and not view.parameters
    assert torch.equal(view.batch["attention_mask"], batch["attention_mask"])


def test_published_views_scale_each_axis_and_shift_before_grouping() -> None:
    clouds = modality(scale=(2 / 3, 3 / 2), translate=0.2)
    batch = batch_of(clouds, *(cloud(seed=seed) for seed in range(200)))
    view = clouds.view(batch, keyed())
    scale, shift = view.parameters["scale"], view.parameters["translation"]
    torch.testing.assert_close(view.batch["points"], batch["points"] * scale[:, None] + shift[:, None])
    assert scale.shape == shift.shape == (200, 3)
    assert scale.min() >= 2 / 3 and scale.max() <= 3 / 2 and shift.abs().max() <= 0.2
    assert scale.min() < 0.7 and scale.max() > 1.47 and shift.max() > 0.19 and shift.min() < -0.19
    assert (scale.amax(dim=1) > scale.amin(dim=1)).all()  # each axis its own
    # Uniform: the mean lies within five deviations.
    assert abs(scale.mean() - 13 / 12) < 5 * (5 / 6) / 12**0.5 / 600**0.5
    # Neighbours are those of the stretched cloud.
    tokens = clouds.tokenize(view.batch)
    moved = view.batch["points"][0]
    gaps = (moved - tokens.coords[0, 3]).norm(dim=1).sort().values[:8]
    torch.testing.assert_close(tokens.content[0, 3].norm(dim=-1), gaps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis", ["x", "y", "z", "any"])
def test_rotations(axis: str) -> None:
    clouds = modality(rotation=axis)
    batch = batch_of(clouds, *(cloud(seed=seed) for seed in range(100)))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # coordinates keep their digits
        view = clouds.view(batch, keyed())
    turn = view.parameters["rotation"]
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(3).expand(100, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(100))
    torch.testing.assert_close(view.batch["points"], torch.einsum("bij,bnj->bni", turn, batch["points"]))
    if axis == "any":  # no direction is preferred: the images of x average out, and have covariance 1 / 3
        assert turn[:, :, 0].mean(dim=0).abs().max() < 5 * (1 / 3) ** 0.5 / 10
    else:
        fixed = "xyz".index(axis)
        torch.testing.assert_close(turn[:, fixed], torch.eye(3)[fixed].expand(100, 3), rtol=0, atol=1e-6)
        one, two = (i for i in range(3) if i != fixed)
        angle = torch.atan2(turn[:, two, one], turn[:, one, one])
        assert torch.histc(angle, 4, -torch.pi, torch.pi).min() > 25 - 5 * (100 * 0.25 * 0.75) ** 0.5


def test_jitter() -> None:
    clouds = modality(jitter=0.05)
    batch = small_batch(clouds)
    view = clouds.view(batch, keyed())
    noise = view.batch["points"] - batch["points"]
    torch.testing.assert_close(noise, view.parameters["jitter"], rtol=0, atol=1e-6)
    assert noise.std().item() == pytest.approx(0.05, rel=0.15)


def test_drops_leave_the_rest_valid() -> None:
    clouds = modality(drop=0.9)
    batch = batch_of(clouds, *(cloud(count, seed=count) for count in range(30, 64)))
    view = clouds.view(batch, keyed())
    before, after = batch["attention_mask"].bool(), view.batch["attention_mask"].bool()
    assert not (after & ~before).any()
    share = 1 - view.parameters["drop_share"]
    expected = (before.sum(dim=1) * share).round().clamp(min=10)
    assert after.sum(dim=1).tolist() == expected.tolist()
    assert (expected == 10).any() and torch.equal(view.batch["points"], batch["points"])
    tokens = clouds.tokenize(view.batch)  # of the points that are left, whatever the first one is
    assert not after[:, 0].all()
    for row in range(len(after)):
        left = {tuple(point) for point in batch["points"][row, after[row]].tolist()}
        assert {tuple(point) for point in tokens.coords[row].tolist()} <= left


def test_crops_are_the_points_nearest_to_one() -> None:
    clouds = modality(crop_scale=(0.3, 0.6))
    batch = small_batch(clouds, 20)
    view = clouds.view(batch, keyed())
    share, kept = view.parameters["crop_share"], view.batch["attention_mask"].bool()
    assert (share >= 0.3).all() and (share <= 0.6).all()
    assert kept.sum(dim=1).tolist() == (64 * share).round().tolist()
    for row, centre in enumerate(view.parameters["crop_centre"]):
        gaps = (batch["points"][row] - batch["points"][row, centre]).norm(dim=1)
        assert gaps[kept[row]].max() <= gaps[~kept[row]].min()


def test_views_are_keyed_and_keep_channels() -> None:
    every: dict[str, Any] = {
        "crop_scale": (0.5, 1.0), "drop": 0.3, "rotation": "any", "scale": (0.5, 2.0), "jitter": 0.1, "translate": 1.0,
    }  # fmt: skip
    clouds = modality(num_channels=2, **every)
    batch = small_batch(clouds)
    before = {name: value.clone() for name, value in batch.items()}
    first, again, other = (clouds.view(batch, keyed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first.batch[name], again.batch[name]) for name in batch)
    assert not torch.equal(first.batch["points"], other.batch["points"])
    assert all(torch.equal(before[name], batch[name]) for name in batch)
    assert torch.equal(first.batch["points"][..., 3:], batch["points"][..., 3:])
    names = {"crop_share", "crop_centre", "drop_share", "rotation", "scale", "jitter", "translation"}
    assert set(first.parameters) == names
    assert all(len(value) == 4 for value in first.parameters.values())


# ---- Raw features and pictures --------------------------------------------------------------------------------------


def test_distances_of_two_places() -> None:
    """Half of the points at one place, half at another: of all pairs, half lie 0 apart and half 2 radii."""
    clouds = modality()
    points = np.repeat([[0.0, 0, 0], [0, 3, 4]], 32, axis=0)
    features = clouds.raw_features(batch_of(clouds, points))[0]
    assert features.sum() == pytest.approx(1.0) and features[1:-1].sum() == 0
    assert abs(features[0] - 0.5) < 5 * 0.5 / 8192**0.5


def test_distances_on_a_sphere() -> None:
    """Between random points of a unit sphere the density of a distance d is d / 2 (0 to 2)."""
    clouds = PointCloud(num_points=4096)
    half = cloud(2048).astype(np.float64)
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    features = clouds.raw_features(batch_of(clouds, np.concatenate([half, -half])))[0]
    edges = torch.linspace(0, 2, 65)
    expected = (edges[1:] ** 2 - edges[:-1] ** 2) / 4
    assert (features.cumsum(0) - expected.cumsum(0)).abs().max() < 0.03


def test_distances_do_not_change_when_the_cloud_is_turned_moved_or_scaled() -> None:
    clouds = modality(normalize=False, rotation="any")
    batch = small_batch(clouds)
    other = clouds.view(batch, keyed()).batch
    other["points"] = 3 * other["points"] + 5
    assert (clouds.raw_features(other) - clouds.raw_features(batch)).abs().sum(dim=1).max() < 0.01  # edges of bins


def test_pictures_show_points_and_leave_hidden_groups_out() -> None:
    clouds = modality(num_channels=1)
    tokens = clouds.tokenize(small_batch(clouds))
    whole = clouds.picture(tokens)
    assert whole.shape == (4, 160, 160, 3) and whole.min() >= 0 and whole.max() <= 1
    drawn = (whole < 1).any(dim=-1).flatten(1).sum(dim=1)
    assert (drawn > 50).all()
    content = tokens.content.clone()
    content[:, 2:] = torch.nan
    part = clouds.picture(Tokens(content, tokens.coords, tokens.valid))
    assert ((part < 1).any(dim=-1).flatten(1).sum(dim=1) < drawn / 2).all()
    assert ((part < 1) <= (whole < 1)).all()


def test_pictures_show_heights_upwards_and_near_points_darker() -> None:
    clouds = modality(num_groups=2, group_size=1)
    centres = torch.tensor([[[0.0, 0, -1], [0, 0, 1]], [[0, -1, 0], [0, 1, 0]]])
    valid = torch.ones(2, 2, dtype=torch.bool)
    upright, lying = clouds.picture(Tokens(torch.zeros(2, 2, 1, 3), centres, valid))[..., 0]
    rows = (upright < 1).any(dim=1).nonzero().flatten()
    assert rows.min() < 40 and rows.max() > 120
    shades = [lying[row][lying[row] < 1].mean() for row in (lying < 1).any(dim=1).nonzero().flatten()]
    assert shades[0] > shades[-1]  # what is far off stands higher, as seen from above


def test_reconstructions_are_drawn(tmp_path: Path) -> None:
    module = objective({"num_channels": 2})
    path = draw_reconstructions(module, small_batch(modality(num_channels=2), 2), tmp_path / "groups.png")
    assert path is not None and path.stat().st_size > 1000


# Labels of points, and features at points.


def test_features_are_spread_by_the_three_nearest_centres() -> None:
    """Against a loop over the points, whatever the size of the cloud; the order is that of the points."""
    clouds = modality(normalize=False)
    batch = batch_of(clouds, cloud(64, seed=0) * 1e-3, cloud(40, seed=1))
    tokens = clouds.tokenize(batch)
    features = torch.randn(2, 10, 5, generator=keyed())
    found = clouds.spread(features, tokens, batch)
    assert [len(each) for each in found] == [64, 40]
    for number, count in enumerate((64, 40)):
        centres, own = tokens.coords[number].double(), features[number].double()
        for point in range(count):
            distance = (batch["points"][number, point].double() - centres).square().sum(dim=1)
            near = distance.argsort()[:3]
            if distance[near[0]] == 0:
                expected = own[near[0]]
            else:
                weight = 1 / distance[near]
                expected = (own[near] * weight[:, None]).sum(dim=0) / weight.sum()
            torch.testing.assert_close(found[number][point].double(), expected, atol=1e-5, rtol=1e-4)


def test_features_at_a_centre_are_those_of_its_group() -> None:
    """Also where centres coincide, and where there are fewer than three of them."""
    for groups in (1, 2, 10):
        clouds = modality(num_groups=groups, normalize=False)
        points = np.repeat(cloud(8), 8, axis=0)  # eight places, of eight points each
        batch = batch_of(clouds, points)
        tokens = clouds.tokenize(batch)
        (found,) = clouds.spread(tokens.coords, tokens, batch)
        assert found.isfinite().all() and found.shape == (64, 3)
        at_centre = (tokens.coords[0][None] == batch["points"][0][:, None]).all(dim=-1).any(dim=1)
        assert at_centre.sum() == 8 * min(groups, 8)
        torch.testing.assert_close(found[at_centre], batch["points"][0][at_centre])


def test_elements_are_points_without_padding() -> None:
    clouds = modality(num_channels=2)
    batch = batch_of(clouds, cloud(64, 2), cloud(30, 2))
    first, second = clouds.elements(batch)
    assert torch.equal(first, batch["points"][0]) and torch.equal(second, batch["points"][1, :30])


@pytest.mark.parametrize("style", ["random", "block"])
@pytest.mark.parametrize("normalize", [True, False])
def test_labels_go_with_their_points(style: str, normalize: bool) -> None:
    """A channel says what the label of each point is."""
    clouds = modality(num_channels=1, excerpt_style=style, normalize=normalize)
    points = cloud(200, 1)
    labels = np.random.default_rng(1).integers(-1, 5, 200)
    points[:, 3] = labels
    whole = clouds.labelled(points, labels)
    for generator in (None, keyed(1)):
        part = clouds.excerpt(whole, generator)
        assert len(part["points"]) == len(part["labels"]) == 64
        np.testing.assert_array_equal(part["points"][:, 3], part["labels"])
    assert len(whole["labels"]) == 200 and part["labels"].dtype == torch.long
    plain = clouds.excerpt(clouds.prepare(points), keyed(1))
    assert torch.equal(plain["points"], part["points"]) and set(plain) == {"points"}
    assert set(clouds.collate([part])) == set(clouds.inputs)


@pytest.mark.parametrize("shape", [(63,), (64, 1), (8, 8), ()])
def test_labels_that_are_not_of_the_points(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="found 64 points and labels of shape"):
        modality().labelled(cloud(64), np.zeros(shape, dtype=np.int64))
