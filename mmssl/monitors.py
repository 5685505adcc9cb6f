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
    # The decomposition raises at NaN, but that is for the training loop to see, which knows where it is from.
    finite = values.isfinite().all()
    values = (values - values.mean(dim=0)).nan_to_num(0.0, 0.0, 0.0)
    small = values @ values.T if len(values) < values.shape[1] else values.T @ values
    singular = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-12)
    return torch.where(finite, torch.special.entr(share).sum().exp().float(), torch.nan)


@torch.no_grad()
def relative_spread(features: Tensor) -> Tensor:
    """Spread of (n, D) features of length 1, times the root of D: 0 if all point one way, 1 if they point anywhere.

    So it depends neither on the scale of features nor on their number (Chen and He, SimSiam, 2021, whose 1 / sqrt(d) is
    the 1 here).
    """
    return spread(torch.nn.functional.normalize(features.float(), dim=1)) * features.shape[1] ** 0.5


@torch.no_grad()
def similarities(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of two views of the same sample, and of views of two samples, from (n, D) features of each view."""
    first, second = (torch.nn.functional.normalize(view.float(), dim=1) for view in (first, second))
    cosine, count = first @ second.T, len(first)
    same = cosine.diagonal().mean()
    return same, (cosine.sum() - cosine.diagonal().sum()) / max(count * (count - 1), 1)
