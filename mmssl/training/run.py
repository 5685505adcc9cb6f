"""What a finished run left behind."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from mmssl.discovery import find_all
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective
from mmssl.training.checkpoint import RECORD

HEADS = "objective.safetensors"


def save_heads(objective: nn.Module, output_dir: Path) -> None:
    """The objective's own weights, beside the model's: its decoder, heads, teacher."""
    state = {
        name: value.contiguous() for name, value in objective.state_dict().items() if not name.startswith("model.")
    }
    save_file(state, output_dir / HEADS)


def load_objective(run: str | Path) -> Objective:
    """The trained objective of a finished run, with its model.

    Raises:
        ValueError: the folder holds no finished run.
    """
    run = Path(run)
    if not (run / HEADS).is_file():
        raise ValueError(f"{run} is no finished run (it has no {HEADS}); expected the output_dir of one")
    ((name, options),) = json.loads((run / RECORD).read_text())["objective"].items()
    objective = find_all("objectives", Objective)[name](MMSSLModel.from_pretrained(run), **options)
    state = load_file(run / HEADS)
    missing, unexpected = objective.load_state_dict(state, strict=False)
    if unexpected or any(not key.startswith("model.") for key in missing):
        raise ValueError(f"{run / HEADS} does not fit {RECORD}: missing {missing}, unexpected {unexpected}")
    return objective.eval()
