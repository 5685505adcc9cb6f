"""Weights of transformers' ViT, ViTMAE, DINOv2, Data2VecVision and VideoMAE under our names.

Their blocks are ours: layer norm, attention, layer norm, GELU. What differs is how things are called, that query, key
and value are one layer here, that a patch is embedded by a convolution there and by a linear layer here, and that a
class token has no place here, so that theirs is added to it. Which places the others have is the modality's option.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Data2VecVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    VideoMAEModel,
    ViTMAEModel,
    ViTModel,
)
from transformers.utils import cached_file

from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.modalities.video import Video
from mmssl.modeling import make_modality
from mmssl.pixels import patch_grid
from mmssl.tokens import Tokens

VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VIDEOMAE_BLOCK = {
    "norm1": "layernorm_before",
    "attention.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DATA2VEC_BLOCK = {**VIDEOMAE_BLOCK, "scale1": "lambda_1", "scale2": "lambda_2"}
DINOV2_BLOCK = {
    "norm1": "norm1",
    "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.proj": "attention.o_proj",
    "scale1": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "scale2": "layer_scale2.lambda1",
}
# The class, names in a block, and how the names of the blocks begin.
VISION_MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "vit": (ViTModel, VIT_BLOCK, "layers"),
    "vit_mae": (ViTMAEModel, VIT_BLOCK, "layers"),
    "videomae": (VideoMAEModel, VIDEOMAE_BLOCK, "encoder.layer"),
    "dinov2": (Dinov2Model, DINOV2_BLOCK, "encoder.layer"),
    "dinov2_with_registers": (Dinov2WithRegistersModel, DINOV2_BLOCK, "encoder.layer"),
    "data2vec-vision": (Data2VecVisionModel, DATA2VEC_BLOCK, "encoder.layer"),
}
Remarks = list[tuple[str, str, str]]


def refusal(config: PreTrainedConfig) -> str | None:
    """Why a model of transformers cannot be expressed here. None: it can, or its type is not known."""
    if config.model_type == "audio-spectrogram-transformer":
        return (
            "its tokens are patches of a spectrogram, over time and frequency, which overlap where their stride is "
            "smaller than they are; those of Speech are frames"
        )
    if getattr(config, "use_swiglu_ffn", False):
        return (
            "use_swiglu_ffn is true: its feed-forward is gated, silu(gate) * up, the encoder's here is not; expected a "
            "DINOv2 without"
        )
    for name in ("use_relative_position_bias", "use_shared_relative_position_bias"):
        if config.model_type == "data2vec-vision" and getattr(config, name):
            return (
                f"{name} is true: its attention has a learned bias for each distance of two patches, which the encoder "
                "here does not have; expected a checkpoint without"
            )
    return None


def read_vision_model(
    name: str, config: PreTrainedConfig
) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor], Remarks]:
    """A model of one of the types of ``VISION_MODELS``, from a folder or the Hub; with a head for some task or without.

    Args:
        name: the folder, or the name on the Hub.
        config: its configuration, which ``refusal`` has nothing against.

    Returns:
        What it is; options of our encoder and modality that make the same model; its weights under our names; and what
        has no weights here, as (what, what became of it, why).

    Raises:
        ValueError: the checkpoint lacks weights.
    """
    kind, block, prefix = VISION_MODELS[config.model_type]
    video = kind is VideoMAEModel
    options = {"add_pooling_layer": False} if kind is ViTModel else {}
    model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"init_from: {name} lacks weights of a {kind.__name__}, such as {missing[0]}")
    theirs = model.state_dict()
    weights = blocks(theirs, config, block, prefix)
    scale = getattr(config, "layerscale_value", getattr(config, "layer_scale_init_value", None))
    encoder = EncoderConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        qkv_bias="encoder.layers.0.attention.qkv.bias" in weights,
        final_norm="layernorm.weight" in theirs,
        layer_scale_init=scale if "encoder.layers.0.scale1.scale" in weights else None,
        class_token=not video,
        num_register_tokens=getattr(config, "num_register_tokens", 0),
    )
    modality, about = modality_of(config)
    if encoder.final_norm:
        weights |= {f"encoder.norm.{each}": theirs[f"layernorm.{each}"] for each in ("weight", "bias")}
    kernel = theirs["embeddings.patch_embeddings.projection.weight"]  # (D, C, [frames,] height, width)
    weights[f"modalities.{modality}.projection.weight"] = kernel.movedim(1, -1).flatten(1)
    weights[f"modalities.{modality}.projection.bias"] = theirs["embeddings.patch_embeddings.projection.bias"]
    remarks: Remarks = []
    if video:
        about["position_embedding"] = "index"
        remarks.append(("places", "of the token's number", "the same with --modality.position_embedding index"))
    else:
        image = Image(**about)
        coords = blank_tokens(image, image).coords
        # Data2VecVision may have no absolute places: learned ones that are 0.
        table = theirs.get("embeddings.position_embeddings", torch.zeros(1, coords.shape[1] + 1, config.hidden_size))
        registers = theirs.get("embeddings.register_tokens", table[:, :0])
        weights["encoder.prefix_tokens"] = torch.cat([theirs["embeddings.cls_token"] + table[:, :1], registers], dim=1)
        if (image.positions(config.hidden_size)(coords) - table[:, 1:]).abs().max() < 1e-4:
            remarks.append(("places", "the same", "sines and cosines of row and column"))
        else:
            about["position_embedding"] = "learned"
            grid = patch_grid(*image.image_size, image.patch_size)
            weights["modalities.image.position.grid_tokens"] = table[0, 1:].unflatten(0, grid)
            remarks.append(("places", "learned", "the same with --modality.position_embedding learned, else left out"))
    if "embeddings.mask_token" in theirs:
        remarks.append(("mask token", "left out", "objectives that hide tokens have their own"))
    left = sorted({".".join(key.split(".")[:2]) for key in info["unexpected_keys"]})
    if left:
        remarks.append((", ".join(left), "left out", "of a head or a decoder"))
    if normalised := normalisation(name):
        about |= normalised
    return f"transformers' {kind.__name__}", asdict(encoder), {modality: about}, weights, remarks


def blocks(
    theirs: dict[str, Tensor], config: PreTrainedConfig, names: dict[str, Any], prefix: str
) -> dict[str, Tensor]:
    """Weights of the blocks; of query, key and value in one, where a bias that is not there is 0."""
    weights = {}
    for number in range(config.num_hidden_layers):
        for own, other in names.items():
            if own in ("scale1", "scale2"):
                if (scale := theirs.get(f"{prefix}.{number}.{other}")) is not None:
                    weights[f"encoder.layers.{number}.{own}.scale"] = scale
                continue
            for kind in ("weight", "bias"):
                several = [
                    f"{prefix}.{number}.{each}.{kind}" for each in ([other] if isinstance(other, str) else other)
                ]
                if not any(each in theirs for each in several):  # qkv_bias=False
                    continue
                parts = [theirs[each] if each in theirs else torch.zeros(config.hidden_size) for each in several]
                weights[f"encoder.layers.{number}.{own}.{kind}"] = torch.cat(parts)
    return weights


def modality_of(config: PreTrainedConfig) -> tuple[str, dict[str, Any]]:
    """Name of our modality, and its options as far as the model says them."""
    names = ["image_size", "patch_size", "num_channels"]
    if config.model_type == "videomae":
        names += ["num_frames", "tubelet_size"]
    about = {name: getattr(config, name) for name in names}
    modality = "video" if config.model_type == "videomae" else "image"
    options = make_modality(modality, about).options()
    return modality, {name: options[name] for name in names}


def blank_tokens(reader: Image | Video, like: Image | Video) -> Tokens:
    """What ``reader`` makes of one input of the size that ``like`` is for."""
    size = (like.num_frames, *like.image_size) if isinstance(like, Video) else like.image_size
    return reader.tokenize({reader.inputs[0]: torch.zeros(1, reader.num_channels, *size)})


def normalisation(name: str) -> dict[str, list[float]]:
    """Mean and deviation of each channel that the model's own processor takes off, if it says."""
    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    about = json.loads(Path(file).read_text()) if file else {}
    return {key: about[key] for key in ("image_mean", "image_std") if key in about}
