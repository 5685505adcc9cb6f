"""What a run needs before its first step: its folder and its optimiser."""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from mmssl.training.arguments import TrainArguments
from mmssl.training.checkpoint import RECORD, remove, step_folders
from mmssl.training.metrics import METRICS


def check_output_dir(output_dir: Path, train: TrainArguments) -> None:
    """Refuse a file, and a folder that holds another run, before anything is computed.

    Raises:
        ValueError: says what is in the way, and what to do.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file; expected a folder, or a name that is free")
    holds_run = (output_dir / RECORD).exists() or bool(step_folders(output_dir))
    own = train.resume_from_checkpoint and (
        train.resume_from_checkpoint == "latest"
        or Path(train.resume_from_checkpoint).resolve().parent == output_dir.resolve()
    )
    if holds_run and not own and not train.overwrite_output_dir:
        raise ValueError(
            f"output_dir: {output_dir} holds another run; resume it with --train.resume_from_checkpoint latest, "
            "delete it with --train.overwrite_output_dir true, or choose another folder"
        )


def prepare_output_dir(output_dir: Path, train: TrainArguments, step: int) -> None:
    """Make room for a run that stands at ``step``: delete what is to be overwritten, forget what came later."""
    if train.overwrite_output_dir and not train.resume_from_checkpoint:
        shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder in step_folders(output_dir):
        if int(folder.name.removeprefix("step_")) > step:
            remove(folder)
    for folder in (*output_dir.glob(".*.tmp"), *output_dir.glob(".*.old")):  # what a killed run was about
        shutil.rmtree(folder)
    metrics = output_dir / METRICS
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]  # a killed run may cut one
        metrics.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))


def make_optimizer(module: nn.Module, train: TrainArguments) -> torch.optim.AdamW:
    """AdamW; only weight matrices decay. Learned tokens and factors of IA3 are told by name: some have two axes."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            told = "token" in name.rpartition(".")[2] or ".ia3_l." in name
            (others if parameter.ndim <= 1 or told else decayed).append(parameter)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,  # one pass over the weights where the default makes several
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
