"""Random numbers of a sample that do not depend on which others are drawn for, to compare batches by their rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TOTAL = 10  # samples of the whole batch; a half has 5, which few lengths but the number of samples are a multiple of


@contextmanager
def of_samples(index: Tensor) -> Iterator[None]:
    """``torch.rand`` and its like draw for ``TOTAL`` samples and return the rows of those at ``index``.

    What does not have a row, or a few, for each sample, is drawn as ever. Permutations of samples stay within halves.
    """

    def rows(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*size: Any, **options: Any) -> Tensor:
            shape = tuple(size[0]) if size and not isinstance(size[0], int) else size
            if not shape or shape[0] == 0 or shape[0] % len(index):
                return draw(shape, **options)
            each = shape[0] // len(index)
            return draw((TOTAL, each, *shape[1:]), **options)[index].flatten(0, 1)

        return drawn

    def within_halves(count: int, **_: Any) -> Tensor:
        half = TOTAL // 2
        turned = (torch.arange(half) + 1) % half
        return torch.cat([turned + start for start in range(0, count, half)])

    integers: Callable[..., Tensor] = torch.randint

    def randint(*arguments: Any, **options: Any) -> Tensor:
        *bounds, shape = arguments
        return rows(lambda size, **rest: integers(*bounds, size, **rest))(shape, **options)

    gammas = torch._standard_gamma

    def standard_gamma(parameter: Tensor, **options: Any) -> Tensor:
        return rows(lambda size, **rest: gammas(parameter[:1].expand(size), **rest))(parameter.shape, **options)

    with (
        mock.patch("torch.rand", rows(torch.rand)),
        mock.patch("torch.randn", rows(torch.randn)),
        mock.patch("torch.randint", randint),
        mock.patch("torch._standard_gamma", standard_gamma),
        mock.patch("torch.randperm", within_halves),
    ):
        yield
