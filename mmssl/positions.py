"""From where a token lies to a vector: every module maps coords (B, N, P) to (B, N, width)."""

import torch
from torch import Tensor, nn
from transformers import initialization as init


class SinCosPositions(nn.Module):
    """Fixed sine-cosine embedding of any number of axes (Vaswani et al., 2017; its 2-D form: He et al., MAE, 2022).

    The width is shared out among the axes in pairs of a sine and a cosine; where they cannot have equally many, the
    first axes have one more. Of an axis with n pairs the first half of its share is
    ``sin(coordinate / temperature ** (k / n))`` for k = 0..n-1, the second half the cosine. Computed from the
    coordinates at each call, so any grid, any fractional place and any number of tokens will do, and there is no table
    to store.

    Args:
        width: size of the embedding; even, and at least ``2 * axes``.
        axes: number of coordinates P.
        temperature: the largest wavelength is ``2 pi * temperature``.
        order: the axes in the order of their shares. None: as in the coordinates. MAE puts x before y: ``(1, 0)``.
    """

    def __init__(self, width: int, axes: int, temperature: float = 10_000.0, order: tuple[int, ...] | None = None):
        super().__init__()
        if width % 2 or width < 2 * axes:
            raise ValueError(
                f"sine-cosine positions of {axes} axes need an even width of at least {2 * axes}; found {width}"
            )
        self.width, self.temperature = width, temperature
        self.order = tuple(range(axes)) if order is None else order

    def forward(self, coords: Tensor) -> Tensor:
        pairs, left_over = divmod(self.width // 2, len(self.order))
        waves = []
        for place, axis in enumerate(self.order):
            bands = pairs + (place < left_over)
            band = torch.arange(bands, device=coords.device, dtype=torch.float32)
            angle = coords[..., axis, None].float() * self.temperature ** (-band / bands)
            waves += [angle.sin(), angle.cos()]
        return torch.cat(waves, dim=-1)


class MLPPositions(nn.Module):
    """Learned embedding of continuous coordinates: linear, GELU, linear (Pang et al., Point-MAE, 2022).

    Args:
        width: size of the embedding.
        axes: number of coordinates P.
        hidden_size: width of the hidden layer.
        gate: multiply by a learned number that starts here. At 0, places do not drown the contents before training has
            found a use for them. None: no such number.
    """

    def __init__(self, width: int, axes: int, hidden_size: int = 128, gate: float | None = None):
        super().__init__()
        self.fc1 = nn.Linear(axes, hidden_size)
        self.fc2 = nn.Linear(hidden_size, width)
        self.start, self.gate = gate, None if gate is None else nn.Parameter(torch.full((1,), gate))

    def start_values(self, std: float) -> None:
        if self.gate is not None and self.start is not None:
            init.constant_(self.gate, self.start)

    def forward(self, coords: Tensor) -> Tensor:
        position = self.fc2(nn.functional.gelu(self.fc1(coords.to(self.fc1.weight.dtype))))
        return position if self.gate is None else self.gate * position


class NoPositions(nn.Module):
    """Zeros: tokens that have no place."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, coords: Tensor) -> Tensor:
        return coords.new_zeros(*coords.shape[:-1], self.width)


class IndexPositions(nn.Module):
    """A learned vector for each whole-number place on one axis, such as the columns of a table.

    Args:
        width: size of the embedding.
        count: places are 0 to ``count - 1``.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.index_tokens = nn.Parameter(torch.empty(count, width))
        self.start_values()

    def start_values(self, std: float = 0.02) -> None:
        init.normal_(self.index_tokens, std=std)

    def forward(self, coords: Tensor) -> Tensor:
        return nn.functional.embedding(coords[..., 0].round().long(), self.index_tokens)


class RasterPositions(nn.Module):
    """Fixed sines and cosines of the number of the token on a grid, row by row (Tong et al., VideoMAE, 2022).

    Even channels are ``sin(number / 10000 ** (channel / width))``, each odd one the cosine of the same angle. A
    fractional place, of a grid that is stretched over this one, has the number of the nearest; along the first axis the
    grid has no end, so that a longer clip goes on counting.

    Args:
        width: size of the embedding; even.
        grid: number of places along each axis.
    """

    def __init__(self, width: int, grid: tuple[int, ...]):
        super().__init__()
        if width % 2:
            raise ValueError(f"sine-cosine positions of a number need an even width; found {width}")
        self.width, self.grid = width, grid

    def forward(self, coords: Tensor) -> Tensor:
        exact = torch.float32 if coords.device.type == "mps" else torch.float64  # MPS has no other
        nearest = coords.round().long()
        number = torch.zeros_like(nearest[..., 0])
        for axis, count in enumerate(self.grid):
            place = nearest[..., axis]
            number = number * count + (place.clamp(0, count - 1) if axis else place)
        channel = torch.arange(0, self.width, 2, device=coords.device, dtype=exact)
        angle = number[..., None] * 10_000 ** (-channel / self.width)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).float()


class GridPositions(nn.Module):
    """A learned vector for each place on a grid of two or three axes (Dosovitskiy et al., ViT, 2021).

    Between places it is interpolated linearly along each axis; beyond the outermost ones it is theirs.

    Args:
        width: size of the embedding.
        grid: number of places along each axis.
    """

    def __init__(self, width: int, grid: tuple[int, ...]):
        super().__init__()
        self.grid_tokens = nn.Parameter(torch.empty(*grid, width))
        self.start_values()

    def start_values(self, std: float = 0.02) -> None:
        init.normal_(self.grid_tokens, std=std)

    def forward(self, coords: Tensor) -> Tensor:
        *grid, width = self.grid_tokens.shape
        dtype = torch.promote_types(self.grid_tokens.dtype, torch.float32)  # places between two need its precision
        # From -1, the first place of an axis, to 1, the last one; of the table's axes the last one first.
        share = [2 * coords[..., axis].to(dtype) / max(count - 1, 1) - 1 for axis, count in enumerate(grid)]
        where = torch.stack(share[::-1], dim=-1).view(1, *[1] * (len(grid) - 1), -1, len(grid))
        table = self.grid_tokens.to(dtype).movedim(-1, 0)[None]
        sampled = nn.functional.grid_sample(table, where, padding_mode="border", align_corners=True)
        return sampled.view(width, *coords.shape[:-1]).movedim(0, -1).to(self.grid_tokens.dtype)
