"""What ``accelerate launch`` asks for, where Accelerate's own ``prepare`` would not do: FSDP2 and compiled blocks.

FSDP2 shards an objective as one module, in units of a block and one unit of all the rest. Whatever reads a weight has
to come through the forward of the objective, which gathers that last unit; blocks gather their own.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method

from mmssl.encoder import EncoderLayer
from mmssl.objectives.base import Objective
from mmssl.training.arguments import TrainArguments


def prepare(
    accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer, train: TrainArguments
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The objective and its optimiser, ready for this way of running.

    Raises:
        ValueError: a setting of FSDP or DeepSpeed that an objective, or a run, cannot do with.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        set_up_sharding(accelerator)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        if train.on_nonfinite == "skip":
            raise ValueError(
                "on_nonfinite: found skip; expected stop, as DeepSpeed takes a step before one can look at it"
            )
        # It clips by itself, at 1 if it is not told, and sees no loader here that would tell it the size of a batch.
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
            "gradient_clipping": train.max_grad_norm or 0.0,
        }
    dynamo = accelerator.state.dynamo_plugin
    backend = dynamo.backend
    if backend != DynamoBackend.NO:
        compile_blocks(objective, **dynamo.to_kwargs())
    # Or Accelerate would wrap whole modules, whose names change, and whose keys, such as those of heads, are hidden.
    dynamo.backend = DynamoBackend.NO
    module, optimizer = accelerator.prepare(objective, optimizer)
    dynamo.backend = backend
    if isinstance(module, FSDPModule):
        read_through_objective(objective)
    return module, optimizer


def set_up_sharding(accelerator: Accelerator) -> None:
    """Check FSDP's settings, and set its precision.

    Raises:
        ValueError: a setting that an objective cannot do with.
    """
    plugin = accelerator.state.fsdp_plugin
    for name, found, expected, why in (
        ("version", plugin.fsdp_version, 2, "version 1 knows no block that is read twice in a step, as two views are"),
        (
            "cpu_ram_efficient_loading",
            plugin.cpu_ram_efficient_loading,
            False,
            "it knows no buffers, and queues and centres of objectives are some",
        ),
        (
            "activation_checkpointing",
            plugin.activation_checkpointing,
            False,
            "it would draw other dropout when it computes again; set --train.activation_checkpointing true",
        ),
    ):
        if found != expected:
            raise ValueError(f"fsdp_{name}: found {str(found).lower()}; expected {str(expected).lower()}, as {why}")
    # Autocast alone lowers the precision, as without FSDP. Its own policy would cast inputs too: codes of categories,
    # places and sound would lose their digits.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def compile_blocks(objective: nn.Module, **options) -> None:
    """``torch.compile`` of each block, in place, so that names of weights are what they were."""
    blocks = [module for module in objective.modules() if isinstance(module, EncoderLayer)]
    # They share their code, which is compiled once for each rate of stochastic depth, with gradient and without; beyond
    # the limit, torch would give up and say so in a warning.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(**options)


def read_through_objective(objective: Objective) -> None:
    """Let the model of a sharded objective be read outside its forward, as a look at a run's health does."""
    model = objective.trained
    objective.read = model.forward
    register_fsdp_forward_method(objective, "read")

    def forward(**inputs):
        out = objective.read(**inputs)  # type: ignore[operator]
        objective.reshard()  # type: ignore[operator]
        return out

    model.forward = forward
