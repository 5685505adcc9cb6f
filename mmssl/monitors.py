"""Numbers that show whether representations collapse."""

import torch
from torch import Tensor

MOST_ROWS = 256  # a sample of the rows is enough, and keeps the cost of a step's monitors small


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Standard deviation over the rows of (n, D), mean over the columns: 0 where all rows are the same."""
    return features.float().std(dim=0).mean() if len(features) > 1 else features.new_zeros(())


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """How many directions (n, D) features really use (Roy and Vetterli, 2007): from 1 to min(n - 1, D).

    The exponential of the entropy of the singular values of the centred features, each divided by their sum; of evenly
    spaced ``MOST_ROWS`` rows where there are more.
    """
    if len(features) > MOST_ROWS:
        features = features[torch.linspace(0, len(features) - 1, MOST_ROWS, device=features.device).long()]
    values = features.double() if features.device.type != "mps" else features.float()
    values = values - values.mean(dim=0)
    small = values @ values.T if len(values) < values.shape[1] else values.T @ values
    singular = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp().float()
