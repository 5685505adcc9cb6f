"""Small additions to a frozen encoder by peft, and their merger into plain layers."""

from collections.abc import Iterable

import torch
from torch import nn

from mmssl.modeling import MMSSLModel
from mmssl.training.arguments import ModelArguments


def add_peft_layers(model: MMSSLModel, arguments: ModelArguments, trained_before: Iterable[str]) -> None:
    """Freeze what was trained before, and put additions beside those of it that are linear layers of the blocks.

    Before an objective is built on the model, so that a teacher, which is a copy of it, has them too and can follow.

    Args:
        model: with the weights that it begins with.
        arguments: which additions, and of what size.
        trained_before: names of these weights; all others stay trained.

    Raises:
        ImportError: peft is not installed.
        ValueError: none of the blocks was trained before.
    """
    try:
        from peft import IA3Config, LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"peft_type {arguments.peft_type} needs peft: pip install 'mmssl[peft]' ({error})") from error
    frozen = set(trained_before)
    new = [parameter for name, parameter in model.named_parameters() if name not in frozen]
    layers = [
        name
        for name, module in model.encoder.named_modules()
        if isinstance(module, nn.Linear) and f"encoder.{name}.weight" in frozen
    ]
    if not layers:
        raise ValueError(f"peft_type {arguments.peft_type}: init_from has no weights of the blocks to add to")
    model.requires_grad_(False)
    if arguments.peft_type == "lora":
        rank, alpha = arguments.lora_rank, arguments.lora_alpha
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), model.encoder)
    else:
        # Factors of keys and values, which are one layer with the queries here, and of the feed-forward's inner layer.
        layers = [name for name in layers if name.endswith(("qkv", "fc2"))]
        inner = [name for name in layers if name.endswith("fc2")]
        inject_adapter_in_model(IA3Config(target_modules=layers, feedforward_modules=inner), model.encoder)
    for parameter in new:
        parameter.requires_grad_(True)


@torch.no_grad()
def merge_peft_layers(module: nn.Module) -> None:
    """Put plain layers that compute the same in the place of all additions, teachers' too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())
