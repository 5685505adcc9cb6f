"""From where a token lies to a vector: every module maps coords (B, N, P) to (B, N, width)."""

import torch
from torch import Tensor, nn


class SinCosPositions(nn.Module):
    """Fixed sine-cosine embedding of any number of axes (Vaswani et al., 2017; its 2-D form: He et al., MAE, 2022).

    The width is shared out equally among the axes. For each axis the first half of its share is
    ``sin(coordinate / temperature ** (k / n))`` for k = 0..n-1, the second half the cosine. Computed from the
    coordinates at each call, so any grid, any fractional place and any number of tokens will do, and there is no table
    to store.

    Args:
        width: size of the embedding; a multiple of ``2 * axes``.
        axes: number of coordinates P.
        temperature: the largest wavelength is ``2 pi * temperature``.
        order: the axes in the order of their shares. None: as in the coordinates. MAE puts x before y: ``(1, 0)``.
    """

    def __init__(self, width: int, axes: int, temperature: float = 10_000.0, order: tuple[int, ...] | None = None):
        super().__init__()
        if width % (2 * axes):
            raise ValueError(
                f"sine-cosine positions of {axes} axes need a width that {2 * axes} divides; found {width}"
            )
        self.width, self.temperature = width, temperature
        self.order = tuple(range(axes)) if order is None else order

    def forward(self, coords: Tensor) -> Tensor:
        bands = self.width // (2 * len(self.order))
        band = torch.arange(bands, device=coords.device, dtype=torch.float32)
        angle = coords[..., self.order, None].float() * self.temperature ** (-band / bands)
        return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
