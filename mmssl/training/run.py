"""What a finished run left behind."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mmssl.discovery import find_all
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective
from mmssl.training.checkpoint import RECORD

HEADS = "objective.safetensors"


def save_weights(objective: Objective, state: dict[str, Tensor], output_dir: Path) -> None:
    """The model that a run saves, and beside it the objective's own weights: its decoder, heads, teacher or student.

    Args:
        objective: which may have no more than a part of its weights, where it is sharded.
        state: all of its weights and buffers.
        output_dir: the folder of the run.
    """
    saved = name_of_trained(objective)
    model = {name.removeprefix(saved): value for name, value in state.items() if name.startswith(saved)}
    objective.trained.save_pretrained(output_dir, state_dict=model)
    others = {name: value.contiguous() for name, value in state.items() if not name.startswith(saved)}
    save_file(others, output_dir / HEADS)


def name_of_trained(objective: Objective) -> str:
    """How the names of the weights begin that belong to the model that a run saves."""
    (name,) = (name for name, module in objective.named_modules() if module is objective.trained)
    return f"{name}."


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
    # Both the model and a teacher begin as copies of what the run has saved.
    if unexpected or any(not key.startswith(name_of_trained(objective)) for key in missing):
        raise ValueError(f"{run / HEADS} does not fit {RECORD}: missing {missing}, unexpected {unexpected}")
    return objective.eval()
