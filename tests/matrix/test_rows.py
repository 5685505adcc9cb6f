"""Every cell of the matrix: neither the order of a batch matters, nor which process reads which samples."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.matrix.draws import TOTAL, of_samples
from tests.matrix.rows import SAMPLE_BY_SAMPLE, rows_of
from tests.matrix.two_processes import make
from tests.training.test_processes import launch


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Losses and gradients of all cells: of each of two processes, and of one alone."""
    folder = tmp_path_factory.mktemp("two_processes")
    launch("tests.matrix.two_processes", str(folder))
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("together0", "together1", "alone")]


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")  # that they are launched once
@pytest.mark.parametrize("cell", SAMPLE_BY_SAMPLE)
def test_two_processes_are_one_with_the_whole_batch(cell: str, found: Any) -> None:
    *together, alone = (results[cell] for results in found)
    for process in together:
        assert process.keys() == alone.keys()
        for name, value in process.items():
            # What a batch norm takes off again has gradients of 0, which are rounding errors here.
            close = torch.allclose(value, alone[name], rtol=1e-3, atol=1e-4)
            assert close, f"{name}: found {value}, alone {alone[name]}"


# Who is mixed with whom is drawn by their places in the batch.
MIXED = [name for name, cell in SAMPLE_BY_SAMPLE.items() if cell[1] == "EmbeddingMixup" or cell[2].get("mix_weight")]


@pytest.mark.parametrize("cell", [name for name in SAMPLE_BY_SAMPLE if name not in MIXED])
def test_order_of_the_batch_does_not_matter(cell: str) -> None:
    module, batch = make(*SAMPLE_BY_SAMPLE[cell])
    half = torch.randperm(TOTAL // 2, generator=torch.Generator().manual_seed(1))
    losses = []
    for order in (torch.arange(TOTAL), torch.cat([half, half + TOTAL // 2])):
        with of_samples(order), torch.no_grad():
            losses.append(module.eval()(rows_of(batch, order), torch.Generator().manual_seed(0)).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
