"""Wavelet scattering of pixels: a fixed map that moves little where the picture moves, through kymatio.

Of a plane x, wavelets psi of J scales and L directions, and a low-pass phi as wide as 2**J pixels:

    S0 = x * phi,    S1 = |x * psi_1| * phi,    S2 = ||x * psi_1| * psi_2| * phi,    psi_2 of a coarser scale than psi_1

at every 2**J-th pixel: K = 1 + L J + L^2 J (J - 1) / 2 coefficients there (Mallat, "Group invariant scattering", 2012;
Bruna and Mallat, "Invariant scattering convolution networks", 2013; before a trained encoder: Oyallon et al., "Scaling
the scattering transform", 2017, and Kinakh et al., "ScatSimCLR", 2021).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmssl.pixels import Size

GAIN = 10.0  # what each modulus of a wavelet takes away, about: of pictures, at all scales


def number_of_coefficients(scales: int, directions: int) -> int:
    """K for each channel, at one place."""
    return sum(orders(scales, directions))


def orders(scales: int, directions: int) -> tuple[int, int, int]:
    """Numbers of coefficients of order 0, 1 and 2; without scales the pixel itself is left."""
    return 1, directions * scales, directions**2 * scales * (scales - 1) // 2


def check_scattering(scales: int, directions: int, patch: Size) -> None:
    """Whether these are numbers of scales and directions, and places with coefficients fill patches."""
    if scales < 0 or directions < 1:
        raise ValueError(
            f"scattering_scales, scattering_directions: found {scales} and {directions}; expected at least 0 scales "
            "(0: pixels) and 1 direction"
        )
    if any(side % 2**scales for side in patch):
        raise ValueError(
            f"scattering_scales: found {scales} with patches of {patch[0]}x{patch[1]} pixels; expected multiples of "
            f"2**{scales} = {2**scales} pixels, from one place with coefficients to the next: use fewer scales or a "
            "larger patch_size"
        )


def scatter(pixels: Tensor, scales: int, directions: int) -> Tensor:
    """(B, C, H, W) to (B, K * C, H / 2**J, W / 2**J), S0 of all channels first; always float32.

    S1 comes 10-fold and S2 100-fold, so that all are about as large as S0: of pictures, whose amplitudes fall with the
    frequency as wavelets of unit mass gain width, each modulus takes away about as much at every scale.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        transform, gain = wavelets(scales, directions, (pixels.shape[2], pixels.shape[3]), pixels.device)
        coefficients = transform(pixels.float().contiguous()) * gain  # (B, C, K, H / 2**J, W / 2**J)
    return coefficients.transpose(1, 2).flatten(1, 2)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # else those of an evaluation could not be used in training
def wavelets(scales: int, directions: int, size: Size, device: torch.device) -> tuple[Any, Tensor]:
    """kymatio's transform of pictures of this size, and the gains (K, 1, 1); not part of any checkpoint."""
    transform = scattering_2d()(J=scales, L=directions, shape=size, frontend="torch").to(device)
    gain = [GAIN**order for order, count in enumerate(orders(scales, directions)) for _ in range(count)]
    return transform, torch.tensor(gain, device=device)[:, None, None]


def scattering_2d() -> Any:
    try:
        # Not from kymatio.torch: that also loads spheres, which need a function that SciPy 1.17 no longer has.
        from kymatio import Scattering2D
    except ImportError as error:
        raise ImportError('scattering of images needs kymatio: pip install "mmssl[image]"') from error
    return Scattering2D
