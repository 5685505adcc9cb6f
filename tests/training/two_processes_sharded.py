"""Sharded by FSDP2 over two processes against unsharded: each objective by torch alone, and whole runs by Accelerate.

Accelerate has FSDP2 for GPUs only. Here its state is told that these CPUs are some; all that follows is its own code.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmssl.encoder import EncoderLayer
from mmssl.modalities.base import Batch
from mmssl.training.prepare import read_through_objective
from tests.matrix.draws import TOTAL, of_samples
from tests.matrix.rows import SAMPLE_BY_SAMPLE, rows_of
from tests.matrix.two_processes import make
from tests.training.tiny import run

# One cell of each objective, but of those with a teacher a second one: with prototypes, with a queue, and so on.
CELLS: dict[str, tuple[str, str, dict[str, Any]]] = {}
for name, cell in SAMPLE_BY_SAMPLE.items():
    same = [other for other in CELLS.values() if other[1] == cell[1]]
    if cell[0] == "image" and len(same) < 1 + (cell[1] in ("SelfDistillation", "Contrastive", "Sum")):
        CELLS[name] = cell

SETTINGS = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "EncoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def shard(module: nn.Module) -> None:
    """Each block of students, teachers, decoders and predictors is a unit, and all the rest is one."""
    mesh = init_device_mesh("cpu", (2,))
    total = sum(parameter.numel() for parameter in module.parameters())
    for layer in [each for each in module.modules() if isinstance(each, EncoderLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    kept = 0
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor)
        kept += parameter.to_local().numel()
    assert kept < 0.6 * total, f"{kept} of {total} weights are on one process"


def steps(module: Any, batch: Batch, index: Tensor) -> dict[str, Tensor]:
    """Losses and norms of some optimiser steps of these samples; the teachers follow."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses, norms = [], []
    for step in range(3):
        with of_samples(index):
            loss = module(batch, torch.Generator().manual_seed(step)).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
        optimizer.zero_grad()
        module.after_step((step + 1) / 4)
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), "norm": torch.stack(norms)}


def sharded(accelerator: Accelerator, module: Any, batch: Batch) -> dict[str, Tensor]:
    shard(module)
    read_through_objective(module)
    index = torch.arange(TOTAL).chunk(2)[accelerator.process_index]
    plain = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        module.trained(**plain)  # before the first forward, as a run's health does
    found = steps(module, rows_of(batch, index), index)
    with torch.no_grad():
        found["read"] = module.trained(**plain).pooler_output
    found["loss"] = accelerator.reduce(found["loss"], "mean")
    state: Any = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return found | state


def unsharded(cell: tuple[str, str, dict[str, Any]]) -> dict[str, Tensor]:
    module, batch = make(*cell)
    found = steps(module, batch, torch.arange(TOTAL))
    with torch.no_grad():
        found["read"] = module.trained(**{k: value for k, value in batch.items() if k != "labels"}).pooler_output
    return found | module.state_dict()


def call_cpus_gpus() -> None:
    """Let Accelerate shard on CPUs, and several runs follow each other in one process group."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **others: Any) -> None:
        new = not AcceleratorState._shared_state
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **others)
        if new and fsdp_plugin is not None:  # what it does for processes with GPUs
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
    Accelerator.end_training = lambda self: None


def pretrain(output_dir: Path, fsdp: bool, **flags: Any) -> None:
    """A run in bfloat16 of its own kind, whatever the one before it was."""
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    os.environ |= SETTINGS | {"ACCELERATE_USE_FSDP": str(fsdp), "ACCELERATE_MIXED_PRECISION": "bf16"}
    run(output_dir, **flags)
    assert (AcceleratorState().distributed_type == DistributedType.FSDP) == fsdp


def main(folder: Path) -> None:
    call_cpus_gpus()
    built = {name: make(*cell) for name, cell in CELLS.items()}  # before transformers knows which process may save
    accelerator = Accelerator()
    assert accelerator.num_processes == 2, f"found {accelerator.num_processes} processes"
    together = {name: sharded(accelerator, *each) for name, each in built.items()}

    flags: dict[str, Any] = {"queue": True, "max_train_steps": 6, "health_steps": 2, "checkpointing_steps": 3}
    flags |= {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    pretrain(folder / "ddp", False, **flags)
    pretrain(folder / "fsdp", True, **flags, activation_checkpointing=True)
    pretrain(folder / "resumed", True, **flags, resume_from_checkpoint=str(folder / "fsdp" / "step_3"))

    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "0":
        torch.save({name: unsharded(cell) for name, cell in CELLS.items()}, folder / "unsharded.pt")
        torch.save(together, folder / "sharded.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
