"""Weights of transformers' ViT, ViTMAE and VideoMAE under our names.

Their blocks are ours: layer norm, attention, layer norm, GELU. What differs is how things are called, that query, key
and value are one layer here, that a patch is embedded by a convolution there and by a linear layer here, and places:
a class token has none here, so that theirs is added to it, and other tokens have sines and cosines of row and column
(and time). ViTMAE's are the same; those that a ViT has learned, and VideoMAE's, of the token's number, are left out.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, VideoMAEModel, ViTMAEModel, ViTModel
from transformers.utils import cached_file

from mmssl.encoder import EncoderConfig
from mmssl.modeling import make_modality

VISION_MODELS = {"vit": ViTModel, "vit_mae": ViTMAEModel, "videomae": VideoMAEModel}
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
Remarks = list[tuple[str, str, str]]


def read_vision_model(
    name: str, config: PreTrainedConfig
) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor], Remarks]:
    """A model of one of the types of ``VISION_MODELS``, from a folder or the Hub; with a head for some task or without.

    Returns:
        What it is; options of our encoder and modality that make the same model; its weights under our names; and what
        has no weights here, as (what, what became of it, why).

    Raises:
        ValueError: the checkpoint lacks weights.
    """
    video = config.model_type == "videomae"
    kind: Any = VISION_MODELS[config.model_type]
    options = {"add_pooling_layer": False} if kind is ViTModel else {}
    model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"init_from: {name} lacks weights of a {kind.__name__}, such as {missing[0]}")
    theirs = model.state_dict()
    encoder = EncoderConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        qkv_bias=config.qv_bias if video else config.qkv_bias,
        final_norm="layernorm.weight" in theirs,
        class_token=not video,
    )
    modality, about = modality_of(config)
    weights = blocks(theirs, encoder, VIDEOMAE_BLOCK if video else VIT_BLOCK, "encoder.layer" if video else "layers")
    if encoder.final_norm:
        weights |= {f"encoder.norm.{each}": theirs[f"layernorm.{each}"] for each in ("weight", "bias")}
    kernel = theirs["embeddings.patch_embeddings.projection.weight"]  # (D, C, [frames,] height, width)
    weights[f"modalities.{modality}.projection.weight"] = kernel.movedim(1, -1).flatten(1)
    weights[f"modalities.{modality}.projection.bias"] = theirs["embeddings.patch_embeddings.projection.bias"]
    remarks: Remarks = []
    if video:
        remarks.append(("places", "left out", "of the token's number there, of time, row and column here"))
    else:
        table = theirs["embeddings.position_embeddings"][0]
        weights["encoder.prefix_tokens"] = theirs["embeddings.cls_token"] + table[None, :1]
        remarks.append(("places", *compare_places(modality, about, table[1:])))
    left = sorted({".".join(key.split(".")[:2]) for key in info["unexpected_keys"]})
    if left:
        remarks.append((", ".join(left), "left out", "of a head or a decoder"))
    if normalised := normalisation(name):
        about |= normalised
    return f"transformers' {kind.__name__}", asdict(encoder), {modality: about}, weights, remarks


def blocks(theirs: dict[str, Tensor], encoder: EncoderConfig, names: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Weights of the blocks; of query, key and value in one, where a bias that is not there is 0."""
    weights = {}
    for number in range(encoder.num_hidden_layers):
        for own, other in names.items():
            for kind in ("weight", "bias"):
                several = [
                    f"{prefix}.{number}.{each}.{kind}" for each in ([other] if isinstance(other, str) else other)
                ]
                if not any(each in theirs for each in several):  # qkv_bias=False
                    continue
                width = encoder.hidden_size
                parts = [theirs[each] if each in theirs else torch.zeros(width) for each in several]
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


def compare_places(modality: str, about: dict[str, Any], table: Tensor) -> tuple[str, str]:
    """Whether the places of a ViT are those that are computed here."""
    chosen = make_modality(modality, about)
    tokens = chosen.tokenize({chosen.inputs[0]: torch.zeros(1, about["num_channels"], *about["image_size"])})
    here = chosen.positions(table.shape[1])(tokens.coords[0])
    difference = (here - table).abs().max().item() if here.shape == table.shape else float("inf")
    if difference < 1e-4:
        return "the same", "sines and cosines of row and column, computed here"
    return "left out", "learned there, sines and cosines of row and column here: further training has to make up for it"


def normalisation(name: str) -> dict[str, list[float]]:
    """Mean and deviation of each channel that the model's own processor takes off, if it says."""
    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    about = json.loads(Path(file).read_text()) if file else {}
    return {key: about[key] for key in ("image_mean", "image_std") if key in about}
