"""Losses and gradients of each cell of the matrix: of two processes with half of a batch each, and of one with all."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmssl.modalities.base import Batch, View
from mmssl.objectives.base import Objective
from tests.matrix.cases import build, make_batch
from tests.matrix.draws import TOTAL, of_samples
from tests.matrix.rows import SAMPLE_BY_SAMPLE, rows_of


def noisy(batch: Batch, generator: torch.Generator) -> View:
    """A view that does not depend on the other samples of the batch."""
    name, value = next(iter(batch.items()))
    if name == "cells":  # codes of categories are no place for noise
        return View(batch)
    return View({**batch, name: value + 0.3 * torch.randn(value.shape, generator=generator)})


def loss_and_gradients(module: torch.nn.Module, batch: Batch, index: Tensor) -> dict[str, Tensor]:
    with of_samples(index):
        loss = module(batch, torch.Generator().manual_seed(0)).loss
    loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def make(modality: str, objective: str, options: dict[str, Any]) -> tuple[Objective, Batch]:
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options)
    for own in module.model.adapters.values():
        own.view = noisy  # type: ignore[method-assign]
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):  # that of an embedding knows its own process alone, as in DDP
            layer.eval()
    return module, make_batch(adapter, TOTAL)


def main(folder: Path) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2, f"found {accelerator.num_processes} processes"
    together, alone = {}, {}
    first = accelerator.process_index * TOTAL // 2
    index = torch.arange(first, first + TOTAL // 2)
    for name, cell in SAMPLE_BY_SAMPLE.items():
        module, batch = make(*cell)
        found = loss_and_gradients(DistributedDataParallel(module), rows_of(batch, index), index)
        found["loss"] = accelerator.reduce(found["loss"], "mean")
        together[name] = found
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
    if accelerator.is_main_process:
        for name, cell in SAMPLE_BY_SAMPLE.items():
            module, batch = make(*cell)
            alone[name] = loss_and_gradients(module, batch, torch.arange(TOTAL))
        torch.save(alone, folder / "alone.pt")
    torch.save(together, folder / f"together{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
