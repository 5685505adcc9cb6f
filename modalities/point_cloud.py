"""Point clouds and meshes as groups of neighbouring points (Pang et al., Point-MAE, 2022)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.drawings import Drawing, Points
from mmssl.geometry import chamfer, farthest_points, nearest_points
from mmssl.modalities.base import Batch, Modality, View
from mmssl.point_files import read_points
from mmssl.positions import MLPPositions
from mmssl.tokens import Tokens, gather

MESH_POINTS = 8  # points sampled on a mesh, as a multiple of num_points: excerpts differ (ShapeNet-55: 8192 for 1024)
# Which axis stands in the place of x, y, z, and the signs: rotations that bring z, and y, to six different directions.
TURNS = ((0, 1, 2), (1, 2, 0), (2, 0, 1)) * 2
SIGNS = ((1.0, 1.0, 1.0),) * 3 + ((1.0, -1.0, -1.0),) * 3
LARGEST = 1e18  # squared distances beyond would overflow


class PointCloud(Modality):
    """Point clouds of any size as groups: the nearest neighbours of centres that lie far from each other.

    Args:
        num_points: points read of a cloud at one time; larger clouds are cut, others in each epoch.
        excerpt_style: what is kept of a larger cloud: "random" points, or for scenes the "block" of the points nearest
            to a random one.
        num_groups: groups G, one token each; their centres are found by farthest point sampling.
        group_size: points S of a group, the centre's nearest neighbours, itself among them.
        num_channels: channels of a point after xyz: a normal, a colour, an intensity. Columns behind them are left out.
        normalize: subtract the mean of a cloud and divide by its greatest norm, after the excerpt.
        distance: Chamfer distance of the reconstruction: "l2", squared distances (Point-MAE), or "l1", plain ones.
        crop_scale: least and greatest share of the points that a view keeps: those nearest to a random one.
        drop: greatest share of the points that a view drops at random.
        rotation: a view is turned by any angle about this axis, or about "any".
        scale: least and greatest factor of a view's size, drawn for each axis (Point-MAE: 2/3 to 3/2).
        jitter: standard deviation of the noise on a view's coordinates.
        translate: greatest shift of a view along each axis (Point-MAE: 0.2).
    """

    inputs: ClassVar = ("points", "attention_mask")
    extensions: ClassVar = (".npy", ".npz", ".ply", ".off", ".obj", ".xyz", ".pts")
    columns: ClassVar = ("points", "point_cloud", "xyz")
    mask_styles: ClassVar = ("random", "block")
    aligned: ClassVar = False

    def __init__(
        self,
        num_points: int = 1024,
        excerpt_style: Literal["random", "block"] = "random",
        num_groups: int = 64,
        group_size: int = 32,
        num_channels: int = 0,
        normalize: bool = True,
        distance: Literal["l1", "l2"] = "l2",
        crop_scale: tuple[float, float] = (1.0, 1.0),
        drop: float = 0.0,
        rotation: Literal["none", "x", "y", "z", "any"] = "none",
        scale: tuple[float, float] = (1.0, 1.0),
        jitter: float = 0.0,
        translate: float = 0.0,
    ):
        super().__init__()
        self.num_points, self.excerpt_style = num_points, excerpt_style
        self.num_groups, self.group_size, self.num_channels = num_groups, group_size, num_channels
        self.normalize, self.distance = normalize, distance
        self.crop_scale, self.drop, self.rotation = tuple(crop_scale), drop, rotation
        self.scale, self.jitter, self.translate = tuple(scale), jitter, translate
        self.least = max(num_groups, group_size)
        for option, choices in (
            ("distance", ("l1", "l2")),
            ("excerpt_style", ("random", "block")),
            ("rotation", ("none", "x", "y", "z", "any")),
        ):
            if getattr(self, option) not in choices:  # a config file is not checked against the types
                raise ValueError(f"{option}: found {getattr(self, option)!r}; expected one of {', '.join(choices)}")
        if min(num_groups, group_size) < 1 or min(num_channels, jitter, translate) < 0:
            raise ValueError(
                "num_groups and group_size must be at least 1; num_channels, jitter and translate at least 0"
            )
        if num_points < self.least:
            raise ValueError(
                f"num_points: found {num_points}; expected at least num_groups and group_size, {self.least}"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: found {crop_scale}; expected least and greatest share, above 0, at most 1")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: found {scale}; expected least and greatest factor, above 0")
        if not 0 <= drop < 1:
            raise ValueError(f"drop: found {drop}; expected a share from 0 to below 1")

    @property
    def content_shape(self) -> tuple[int, ...]:
        return (self.group_size, 3 + self.num_channels)

    def build(self, width: int) -> Self:
        self.group_embedding = MiniPointNet(3 + self.num_channels, width)
        return super().build(width)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """Read a path, bytes, a ``{"bytes", "path"}`` record, an array (N, 3 + C or more) or ``{"points": array}``.

        Files are known by their content: npy; npz with one matrix, or one that is called points; text with one point in
        a line; ply, off and obj. Of a mesh, points are drawn evenly on the surface, the same ones at each call.
        """
        points = read_points(sample, MESH_POINTS * self.num_points)
        channels = 3 + self.num_channels
        if points.ndim != 2 or points.shape[1] < channels:
            raise ValueError(
                f"found an array of shape {points.shape}; expected (points, {channels} or more) with num_channels="
                f"{self.num_channels}; meshes, ply, off and obj give xyz alone"
            )
        points = points[:, :channels].astype(np.float64)
        bad = len(points) - int((np.abs(points) < LARGEST).all(axis=1).sum())
        if bad:
            raise ValueError(
                f"found {bad} of {len(points)} points with NaN, infinite or values beyond {LARGEST:g}; remove them"
            )
        if len(points) < self.least:
            raise ValueError(
                f"found a cloud of {len(points)} points; expected at least {self.least}, for {self.num_groups} groups "
                f"of {self.group_size} points: lower num_groups or group_size, or leave the cloud out"
            )
        if self.normalize:  # in double precision: geographic coordinates have more digits than single precision
            points[:, :3] -= points[:, :3].mean(axis=0)
        return {"points": torch.from_numpy(points).float()}

    def labelled(self, sample: Any, labels: np.ndarray) -> dict[str, Tensor]:
        """A label (N,) for each point that is stored; the points drawn on a mesh have none."""
        prepared = self.prepare(sample)
        if labels.shape != (len(prepared["points"]),):
            raise ValueError(
                f"found {len(prepared['points'])} points and labels of shape {labels.shape}; expected a label for "
                "each point, of a cloud and not of a mesh"
            )
        return {**prepared, "labels": torch.from_numpy(labels.astype(np.int64))}

    def excerpt(self, sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """At most ``num_points`` points, at random or around a random one, normalised."""
        points = sample["points"]
        if len(points) > self.num_points:
            generator = torch.Generator().manual_seed(0) if generator is None else generator
            if self.excerpt_style == "random":
                index = torch.randperm(len(points), generator=generator)[: self.num_points]
            else:
                centre = points[torch.randint(len(points), (), generator=generator), :3]
                index = (points[:, :3] - centre).square().sum(dim=1).topk(self.num_points, largest=False).indices
            sample = {name: values[index] for name, values in sample.items()}  # labels of points go with them
            points = sample["points"]
        if self.normalize:
            xyz = points[:, :3] - points[:, :3].mean(dim=0)
            xyz = xyz / positive(xyz.abs().max())  # so that no square overflows or vanishes
            xyz = xyz / positive(xyz.norm(dim=1).max())
            points = torch.cat([xyz, points[:, 3:]], dim=1)
        return {**sample, "points": points}

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        clouds = [sample["points"] for sample in samples]
        points = nn.utils.rnn.pad_sequence(clouds, batch_first=True)
        lengths = torch.tensor([len(cloud) for cloud in clouds])
        return {"points": points, "attention_mask": (torch.arange(points.shape[1]) < lengths[:, None]).long()}

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Points (B, N, 3 + C), zero in the padding, and their validity (B, N)."""
        points, attention = batch["points"], batch["attention_mask"]
        if points.dim() != 3 or points.shape[2] != 3 + self.num_channels or points.shape[:2] != attention.shape:
            raise ValueError(
                f"points: found shape {tuple(points.shape)} and an attention_mask of {tuple(attention.shape)}; "
                f"expected (batch, points, {3 + self.num_channels}) and (batch, points)"
            )
        if points.shape[1] < self.least:
            raise ValueError(f"points: found clouds of {points.shape[1]} points; expected at least {self.least}")
        valid = attention.bool()
        return points.float().masked_fill(~valid[..., None], 0.0), valid

    def tokenize(self, batch: Batch) -> Tokens:
        """Contents (B, G, S, 3 + C): groups of points with xyz relative to their centre; places: the centres' xyz."""
        points, valid = self.read(batch)
        xyz = points[..., :3]
        centres = gather(xyz, farthest_points(xyz, valid, self.num_groups))
        content = gather(points, nearest_points(centres, xyz, valid, self.group_size).flatten(1))
        content = content.unflatten(1, (self.num_groups, self.group_size))
        relative = content[..., :3] - centres[:, :, None]
        return Tokens(
            content=torch.cat([relative, content[..., 3:]], dim=-1),
            coords=centres,
            valid=torch.ones(centres.shape[:2], dtype=torch.bool, device=centres.device),
        )

    def embed(self, tokens: Tokens) -> Tensor:
        return self.group_embedding(tokens.content)

    def positions(self, width: int) -> nn.Module:
        return MLPPositions(width, axes=3, hidden_size=128)

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, 64) how often each distance occurs between two points of a cloud (Osada et al., D2, 2002).

        Of 8,192 random pairs, the same ones at each call, with the greatest distance from the mean as the unit.
        """
        points, valid = self.read(batch)
        count = valid.sum(dim=1, keepdim=True)
        mean = points[..., :3].sum(dim=1, keepdim=True) / count[..., None]
        radius = (points[..., :3] - mean).norm(dim=-1).masked_fill(~valid, 0.0).amax(dim=1, keepdim=True)
        place = torch.rand(2, 8192, generator=torch.Generator().manual_seed(0)).to(points.device)
        order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # valid ones first
        first, second = (gather(points[..., :3], order.gather(1, (share * count).long())) for share in place)
        distance = (first - second).norm(dim=-1) / positive(radius)
        bins = (distance * 32).long().clamp(max=63)
        return points.new_zeros(len(points), 64).scatter_add_(1, bins, torch.ones_like(distance)) / place.shape[1]

    def elements(self, batch: Batch) -> list[Tensor]:
        """(points, 3 + C) the points."""
        return [points[valid] for points, valid in zip(*self.read(batch), strict=True)]

    def spread(self, features: Tensor, tokens: Tokens, batch: Batch) -> list[Tensor]:
        """(points, F) of the 3 nearest centres, weighted by inverse squared distance (Qi et al., PointNet++, 2017)."""
        points, valid = self.read(batch)
        xyz, centres = points[..., :3], tokens.coords
        index = nearest_points(xyz, centres, tokens.valid, min(3, centres.shape[1]))
        difference = xyz[:, :, None] - gather(centres, index.flatten(1)).unflatten(1, index.shape[1:])
        distance = difference.square().sum(dim=-1)
        weight = torch.where(distance > 0, distance[..., :1] / distance, 1.0)  # at a centre, of that one alone
        weight = weight / weight.sum(dim=-1, keepdim=True)
        near = gather(features, index.flatten(1)).unflatten(1, index.shape[1:])
        dense = (near * weight[..., None].to(near.dtype)).sum(dim=2)
        return [values[there] for values, there in zip(dense, valid, strict=True)]

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        """Style "block": the groups nearest to a random one."""
        order = super().hiding_order(tokens, generator, style)
        if style == "random":
            return order
        centre = gather(tokens.coords, order.masked_fill(~tokens.valid, -1.0).argmax(dim=1, keepdim=True))
        return (tokens.coords - centre).square().sum(dim=-1)

    @property
    def pretexts(self) -> dict[str, int]:
        return {"up": len(TURNS)}

    def transform(self, batch: Batch, pretext: str, number: Tensor) -> Batch:
        """Turn clouds so that what was up, along z or y, points in one of the six directions of the axes.

        Channels after xyz stay as they are. Those that are directions, such as normals, tell the answer: leave them
        out, with ``num_channels``.
        """
        if pretext != "up":
            return super().transform(batch, pretext, number)
        points, device = batch["points"], number.device
        axes, signs = torch.tensor(TURNS, device=device)[number], torch.tensor(SIGNS, device=device)[number]
        xyz = points[..., :3] * signs[:, None].to(points.dtype)
        xyz = xyz.gather(2, axes[:, None].expand(-1, points.shape[1], -1))
        return {**batch, "points": torch.cat([xyz, points[..., 3:]], dim=-1)}

    def target(self, tokens: Tokens) -> Tensor:
        """(B, G, S, 3) the points of a group relative to its centre."""
        return tokens.content[..., :3].detach()

    def content_of(self, prediction: Tensor, tokens: Tokens) -> Tensor:
        """Predicted points with zeros for the channels that are not predicted."""
        return nn.functional.pad(prediction, (0, self.num_channels))

    def reconstruction_head(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 3 * self.group_size), nn.Unflatten(-1, (self.group_size, 3)))

    def reconstruction_loss(self, prediction: Tensor, target: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Chamfer distance of each group: the order of the points in it has no meaning."""
        return chamfer(prediction.float(), target.float(), squared=self.distance == "l2"), where.float()

    def points_of(self, tokens: Tokens) -> Tensor:
        """(B, G, S, 3) xyz in the cloud: relative to the centre, plus the centre."""
        return tokens.content[..., :3].float() + tokens.coords.float()[:, :, None]

    def picture(self, tokens: Tokens) -> Tensor:
        """(B, 160, 160, 3) the points seen from the side and slightly from above, z upwards, near ones darker."""
        size, turn, tilt = 160, 0.6, 0.35
        centres = tokens.coords.float()
        low, high = centres.amin(dim=1, keepdim=True), centres.amax(dim=1, keepdim=True)
        # The frame is that of the centres, so pictures of the same cloud with other contents agree.
        points = (self.points_of(tokens).flatten(1, 2) - (low + high) / 2) / positive(
            (high - low).norm(dim=-1, keepdim=True) * 0.6
        )
        x, y, z = points.unbind(dim=-1)
        right, depth = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
        up, depth = z * np.cos(tilt) + depth * np.sin(tilt), depth * np.cos(tilt) - z * np.sin(tilt)
        seen = points.isfinite().all(dim=-1) & (right.abs() < 1) & (up.abs() < 1)
        column, row = (((value.nan_to_num(0.0) + 1) / 2 * (size - 1)).long() for value in (right, -up))
        shade = torch.where(seen, (0.45 + 0.5 * depth).clamp(0.1, 0.8), 1.0)
        image = shade.new_ones(len(points), size * size)
        for across, down in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a dot is two pixels wide
            pixel = (row + down).clamp(0, size - 1) * size + (column + across).clamp(0, size - 1)
            image = image.scatter_reduce(1, pixel, shade, reduce="amin")
        return image.unflatten(1, (size, size))[..., None] ** torch.tensor([1.0, 0.7, 0.45], device=image.device)

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """Clouds in the units that the model reads, after ``normalize``; what groups share is in each of them."""
        number = torch.arange(tokens.valid.shape[1], device=tokens.valid.device)[:, None].expand(-1, self.group_size)
        return [
            Points(points[valid].flatten(0, 1).numpy(force=True), number[valid].flatten().numpy(force=True))
            for points, valid in zip(self.points_of(tokens), tokens.valid, strict=True)
        ]

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """Crop, drop points, turn, scale, add noise and shift; left-out points are marked in the attention mask.

        Channels after xyz stay as they are, normals too.
        """
        points, valid = self.read(batch)
        xyz, parameters = points[..., :3], {}
        (count, length), device = valid.shape, points.device

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand((count, *shape), generator=generator, device=device)

        if self.crop_scale != (1.0, 1.0):
            least, greatest = self.crop_scale
            share = parameters["crop_share"] = uniform(least, greatest)
            centre = uniform(0, 1, length).masked_fill(~valid, -1.0).argmax(dim=1, keepdim=True)
            parameters["crop_centre"] = centre[:, 0]
            valid = self.keep(valid, (xyz - gather(xyz, centre)).square().sum(dim=-1), share)
        if self.drop:
            share = parameters["drop_share"] = uniform(0, self.drop)
            valid = self.keep(valid, uniform(0, 1, length), 1 - share)
        if self.rotation != "none":
            with torch.autocast(device.type, enabled=False):
                parameters["rotation"] = self.rotations(count, generator, device)
                xyz = xyz @ parameters["rotation"].transpose(1, 2)
        if self.scale != (1.0, 1.0):
            least, greatest = self.scale
            parameters["scale"] = uniform(least, greatest, 3)
            xyz = xyz * parameters["scale"][:, None]
        if self.jitter:
            noise = torch.randn(xyz.shape, generator=generator, device=device) * self.jitter
            parameters["jitter"] = noise
            xyz = xyz + noise
        if self.translate:
            parameters["translation"] = uniform(-self.translate, self.translate, 3)
            xyz = xyz + parameters["translation"][:, None]
        points = torch.cat([xyz, points[..., 3:]], dim=-1)
        return View({**batch, "points": points, "attention_mask": valid.long()}, parameters)

    def keep(self, valid: Tensor, order: Tensor, share: Tensor) -> Tensor:
        """The valid points of lowest order, ``share`` (B,) of them, but no fewer than groups need: (B, N) bool."""
        rank = order.masked_fill(~valid, torch.inf).argsort(dim=1).argsort(dim=1)
        return valid & (rank < (valid.sum(dim=1) * share).round().clamp(min=self.least)[:, None])

    def rotations(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """(count, 3, 3) random rotations, from unit quaternions."""
        quaternion = torch.randn(count, 4, generator=generator, device=device)
        if self.rotation != "any":  # by any angle about this axis: the vector part lies along it
            along = torch.tensor([True, *(axis == self.rotation for axis in "xyz")], device=device)
            quaternion = quaternion * along
        w, x, y, z = nn.functional.normalize(quaternion, dim=1).unbind(dim=1)
        zero = torch.zeros_like(w)
        cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(-1, 3, 3)
        return torch.eye(3, device=device) + 2 * w[:, None, None] * cross + 2 * cross @ cross


class MiniPointNet(nn.Module):
    """A group (..., S, C) to a vector (..., width), whatever the order of its points (Qi et al., PointNet, 2017).

    As in Point-MAE: C - 128 - 256, the maximum over the points put beside each of them, 512 - 512 - width, maximum.
    In training, batch normalisation takes its statistics of all the groups it is given: with hidden groups dropped
    before, of visible ones alone.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(channels, 128), nn.BatchNorm1d(128)
        self.fc2 = nn.Linear(128, 256)
        # One layer of 512 inputs: the half that reads the maximum is the same for all points of a group.
        self.fc3_group, self.fc3_point = nn.Linear(256, 512, bias=False), nn.Linear(256, 512)
        self.norm2, self.fc4 = nn.BatchNorm1d(512), nn.Linear(512, width)

    def forward(self, groups: Tensor) -> Tensor:
        *shape, size, channels = groups.shape
        points = groups.reshape(-1, channels).to(self.fc1.weight.dtype)
        points = self.fc2(self.norm1(self.fc1(points)).relu()).view(-1, size, 256)
        points = self.fc3_point(points) + self.fc3_group(points.amax(dim=1, keepdim=True))
        points = self.fc4(self.norm2(points.flatten(0, 1)).relu())
        return points.view(*shape, size, -1).amax(dim=-2)


def positive(value: Tensor) -> Tensor:
    """What may be divided by: 1 in place of 0."""
    return torch.where(value > 0, value, 1.0)
