"""The encoders that are measured: pretrained ones from a folder or the Hub, and untrained ones beside them."""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoModel

from mmssl.modeling import MMSSLModel


def load_model(checkpoint: str | Path) -> MMSSLModel:
    """A pretrained model from a folder or the Hub."""
    path = Path(checkpoint)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds no model (no config.json); expected the folder of a finished run, or a Hub name"
        )
    try:
        model = AutoModel.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(f"{checkpoint}: no such folder, and no model on the Hub ({error})") from error
    if not isinstance(model, MMSSLModel):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}; expected a model that mmssl has pretrained")
    return model


def learned_labels(checkpoint: str | Path) -> bool:
    """Whether this is the folder of a run whose objective reads labels."""
    path = Path(checkpoint) / "run.json"
    return path.is_file() and json.loads(path.read_text()).get("reads_labels", False)


def pick_modality(model: MMSSLModel, modality: str | None) -> str:
    """The given one of the model's modalities, or its only one."""
    names = list(model.adapters)
    if (modality is None and len(names) > 1) or (modality is not None and modality not in names):
        raise ValueError(f"modality: found {modality}; the model has {', '.join(names)}: say which one the data are of")
    return modality or names[0]


def fresh(model: MMSSLModel, seed: int) -> MMSSLModel:
    """The same architecture with start values of another seed."""
    with torch.random.fork_rng(), model.device:
        torch.manual_seed(seed)
        return MMSSLModel(copy.deepcopy(model.config))
