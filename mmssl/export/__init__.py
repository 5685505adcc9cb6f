"""A trained encoder for programs without mmssl: with its code beside it, or as a plain model of another library.

Whatever is written computes the same as the encoder; an option that the other library does not have is refused.
"""

from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from mmssl import task_models
from mmssl.export.plain_models import to_onnx, to_timm, to_transformers
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.remote_code import self_contained

__all__ = ["export", "self_contained", "to_onnx", "to_timm", "to_transformers"]

FORMATS = {"transformers": to_transformers, "timm": to_timm, "onnx": to_onnx}


def export(
    checkpoint: str,
    output: str,
    format: Literal["self_contained", "transformers", "timm", "onnx"] = "self_contained",
    modality: str | None = None,
) -> None:
    """Write a checkpoint for programs that do not have mmssl.

    Args:
        checkpoint: folder of a finished run, or a Hub name.
        output: new or empty folder to write to.
        format: self_contained puts the code beside the weights, of any modality, with a head or without; transformers
            (images, videos), timm and onnx (images) are plain models of the encoder alone.
        modality: which one of a model that has several, for a plain model.

    Raises:
        ValueError: no checkpoint of mmssl, a folder that is not empty, or an encoder that the format cannot be the same
            as.
    """
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise ValueError(f"output: {output} is not empty; expected a new folder")
    if Path(checkpoint).exists() and not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no model (no config.json); expected the folder of a finished run")
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, MMSSLConfig):
        raise ValueError(f"{checkpoint}: found a model of type {config.model_type}; expected one of mmssl")
    if format != "self_contained":
        FORMATS[format](MMSSLModel.from_pretrained(checkpoint, use_safetensors=True), output, modality)
        return
    if modality is not None:
        raise ValueError(f"modality: found {modality}; a self_contained model keeps all it has: leave the flag out")
    (name,) = config.architectures or [MMSSLModel.__name__]
    kind = MMSSLModel if name == MMSSLModel.__name__ else getattr(task_models, name)
    self_contained(kind.from_pretrained(checkpoint, use_safetensors=True), output)
