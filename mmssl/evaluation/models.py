"""The encoders that are measured: pretrained ones from a folder or the Hub, and untrained ones beside them."""

import copy
import json
from pathlib import Path
from typing import TypeVar, cast

import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mmssl.evaluation.foreign import ForeignModel, load_foreign
from mmssl.modeling import MMSSLConfig, MMSSLModel

AnyModel = MMSSLModel | ForeignModel
Model = TypeVar("Model", bound=AnyModel)


def load_model(checkpoint: str | Path) -> AnyModel:
    """A model from a folder or the Hub: one that mmssl has pretrained, or another encoder of transformers.

    Raises:
        ValueError: nothing there, no safetensors, or no encoder that could be measured.
    """
    path = Path(checkpoint)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds no model (no config.json); expected the folder of a finished run, or a Hub name"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        # Asked for before transformers is: it would have the weights converted by a service of the Hub.
        safe = [
            cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
            for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        ]
    except OSError as error:
        raise ValueError(f"{checkpoint}: no such folder, and no model on the Hub ({error})") from error
    except ValueError as error:
        raise ValueError(
            f"{checkpoint}: transformers cannot read its config ({' '.join(str(error).split())})"
        ) from error
    if not any(safe):
        raise ValueError(
            f"{checkpoint} has no {SAFE_WEIGHTS_NAME}; expected weights as safetensors: those of pickle (.bin) can run "
            "any code, and are not read"
        )
    if not isinstance(config, MMSSLConfig):
        return load_foreign(checkpoint, config)
    return AutoModel.from_pretrained(checkpoint, use_safetensors=True)


def load_own(checkpoint: str | Path) -> MMSSLModel:
    """A model that mmssl has pretrained, where another one will not do."""
    model = load_model(checkpoint)
    if not isinstance(model, MMSSLModel):
        raise ValueError(
            f"{checkpoint} was not pretrained by mmssl; expected one that was: of others, mmssl evaluate and "
            "mmssl embed read the frozen features"
        )
    return model


def learned_labels(checkpoint: str | Path) -> bool:
    """Whether this is the folder of a run whose objective reads labels."""
    path = Path(checkpoint) / "run.json"
    return path.is_file() and json.loads(path.read_text()).get("reads_labels", False)


def pick_modality(model: AnyModel, modality: str | None) -> str:
    """The given one of the model's modalities, or its only one."""
    names = list(model.adapters)
    if (modality is None and len(names) > 1) or (modality is not None and modality not in names):
        raise ValueError(f"modality: found {modality}; the model has {', '.join(names)}: say which one the data are of")
    return modality or names[0]


def fresh(model: Model, seed: int) -> Model:
    """The same architecture with start values of another seed."""
    with torch.random.fork_rng(), model.device:
        torch.manual_seed(seed)
        untrained = model.untrained() if isinstance(model, ForeignModel) else MMSSLModel(copy.deepcopy(model.config))
        return cast(Model, untrained)
