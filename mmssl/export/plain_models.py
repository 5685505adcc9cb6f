"""An encoder as a plain model of another library: the same numbers, or a refusal."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    VivitConfig,
    VivitModel,
)
from transformers.image_utils import PILImageResampling

from mmssl.modalities.image import Image
from mmssl.modalities.video import Video
from mmssl.modeling import MMSSLModel
from mmssl.training.vision_weights import VIT_BLOCK

NEEDED: dict[str, Any] = {
    "residual": True,
    "feed_forward": True,
    "position_every_block": False,
    "norm_position": "pre",
    "final_norm": True,
    "layer_scale_init": None,
    "causal_attention": False,
    "num_register_tokens": 0,
}
SIGLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def to_transformers(model: MMSSLModel, folder: str | Path, modality: str | None = None) -> None:
    """Save the encoder as the class of transformers that computes the same, and an image processor beside it.

    Images with a class token: ``ViTModel`` (to be loaded with ``add_pooling_layer=False``), without:
    ``SiglipVisionModel``; videos with a class token: ``VivitModel``, which has places for each token of a clip as
    weights. Those of ``VideoMAEModel`` are of the token's number, and cannot be set.

    Args:
        model: the encoder.
        folder: where to save it.
        modality: which one of a model that has several.

    Raises:
        ValueError: no plain class of transformers can be the same; names the option.
    """
    plain, adapter = plain_model(model, modality)
    plain.save_pretrained(folder)
    save_image_processor(adapter, folder)


def plain_model(model: MMSSLModel, modality: str | None) -> tuple[PreTrainedModel, Image | Video]:
    """The plain model, and the modality it is of."""
    where = "plain classes of transformers"
    adapter = expressible(model, modality, NEEDED, where)
    config, class_token = model.config, model.config.class_token
    for name in ("image_size", "patch_size"):
        height, width = getattr(adapter, name)
        if height != width:
            raise ValueError(f"{name}: found {height}x{width}; {where} are written for squares alone")
    shape: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": adapter.image_size[0],
        "num_channels": adapter.num_channels,
    }
    plain: PreTrainedModel
    if isinstance(adapter, Video):
        if not class_token:
            raise ValueError(
                "class_token: found False; expected True: transformers' video encoders without one have places of "
                "their own that cannot be set (VideoMAE). Use self_contained"
            )
        shape |= {"num_frames": adapter.num_frames, "tubelet_size": (adapter.tubelet_size, *adapter.patch_size)}
        plain = VivitModel(VivitConfig(**shape, qkv_bias=config.qkv_bias), add_pooling_layer=False)
    elif class_token:
        shape |= {"patch_size": adapter.patch_size[0], "qkv_bias": config.qkv_bias}
        plain = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    else:
        plain = SiglipVisionModel(SiglipVisionConfig(**shape, patch_size=adapter.patch_size[0], vision_use_head=False))
    plain.load_state_dict(plain_weights(model, adapter))
    nn.Module.to(plain, model.dtype)
    return plain.eval(), adapter


def expressible(model: MMSSLModel, modality: str | None, needed: dict[str, Any], where: str) -> Image | Video:
    """The modality that is exported, if the encoder has no option that other libraries lack."""
    names = list(model.adapters)
    if (modality is None and len(names) > 1) or (modality is not None and modality not in names):
        raise ValueError(f"modality: found {modality}; the model has {', '.join(names)}: say which one to export")
    adapter = model.adapters[modality or names[0]]
    if not isinstance(adapter, Image | Video):
        raise ValueError(f"{adapter.name}: {where} do not read its tokens, those of images are. Use self_contained")
    for name, value in needed.items():
        if (found := getattr(model.config, name)) != value:
            raise ValueError(f"{name}: found {found}; {where} have {value} alone. Use self_contained")
    if isinstance(adapter, Image) and adapter.scattering_scales:
        raise ValueError(
            f"scattering_scales: found {adapter.scattering_scales}; {where} read pixels. Use self_contained"
        )
    return adapter


def save_image_processor(adapter: Image | Video, folder: str | Path) -> None:
    """A stock processor that resizes, crops and normalises as the modality does."""
    kind = VideoMAEImageProcessorPil if isinstance(adapter, Video) else ViTImageProcessorPil  # without torchvision
    side = adapter.image_size[0]
    kind(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_resize=True,
        do_center_crop=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=adapter.num_channels == 3,
        resample=PILImageResampling.BICUBIC,
        image_mean=list(adapter.image_mean),
        image_std=list(adapter.image_std),
    ).save_pretrained(folder)


def places_of(model: MMSSLModel, adapter: Image | Video) -> Tensor:
    """(1, N, D) what the encoder adds to the tokens of an input of the modality's own size."""
    shape = (adapter.num_frames, *adapter.image_size) if isinstance(adapter, Video) else adapter.image_size
    tokens = adapter.tokenize({adapter.inputs[0]: torch.zeros(1, adapter.num_channels, *shape)})
    return adapter.position(tokens.coords.to(model.device)).detach()


def kernel_of(adapter: Image | Video) -> Tensor:
    """The embedding of patches as a convolution's weight (D, C, [frames,] height, width)."""
    weight = adapter.projection.weight.detach()
    patch = (adapter.tubelet_size, *adapter.patch_size) if isinstance(adapter, Video) else adapter.patch_size
    return weight.unflatten(1, (*patch, adapter.num_channels)).movedim(-1, 1).contiguous()


def plain_weights(model: MMSSLModel, adapter: Image | Video) -> dict[str, Tensor]:
    """The weights under the names of ViTModel and VivitModel, or without a class token of SiglipVisionModel."""
    own, places, class_token = model.encoder.state_dict(), places_of(model, adapter), model.config.class_token
    block, layers = (VIT_BLOCK, "layers") if class_token else (SIGLIP_BLOCK, "encoder.layers")
    if class_token:
        weights = {
            "embeddings.cls_token": own["prefix_tokens"],
            "embeddings.position_embeddings": torch.cat([torch.zeros_like(places[:, :1]), places], dim=1),
        }
        norm, patch = "layernorm", "embeddings.patch_embeddings.projection"
    else:
        weights = {"embeddings.position_embedding.weight": places[0]}
        norm, patch = "post_layernorm", "embeddings.patch_embedding"
    weights |= {f"{norm}.{kind}": own[f"norm.{kind}"] for kind in ("weight", "bias")}
    weights |= {f"{patch}.weight": kernel_of(adapter), f"{patch}.bias": adapter.projection.bias.detach()}
    for number in range(model.config.num_hidden_layers):
        for name, other in block.items():
            for kind in ("weight", "bias"):
                value = own.get(f"layers.{number}.{name}.{kind}")
                if value is None:  # qkv_bias=False, which Siglip has no option for
                    if class_token:
                        continue
                    value = torch.zeros(3 * model.config.hidden_size)
                others = (other,) if isinstance(other, str) else other
                for each, part in zip(others, value.chunk(len(others)), strict=True):
                    weights[f"{layers}.{number}.{each}.{kind}"] = part
    return weights


# For timm and for ONNX

TIMM_BLOCK = {
    "norm1": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "scale1": "ls1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "scale2": "ls2",
}
TIMM_NEEDED = {
    name: value
    for name, value in NEEDED.items()
    if name not in ("layer_scale_init", "num_register_tokens", "final_norm")
} | {"hidden_act": "gelu", "layer_norm_eps": 1e-6}


def to_timm(model: MMSSLModel, folder: str | Path, modality: str | None = None) -> None:
    """Save an image encoder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, or from the Hub.

    A ``VisionTransformer`` without a head, whose output is the mean of the patches' tokens. Class token, registers and
    layer scale are kept. timm itself is not needed here.

    Args:
        model: the encoder.
        folder: where to save it.
        modality: which one of a model that has several.

    Raises:
        ValueError: timm's model cannot be the same; names the option.
    """
    adapter = image_alone(expressible(model, modality, TIMM_NEEDED, "timm's vision transformers"))
    own, config = model.encoder.state_dict(), model.config
    weights = {"patch_embed.proj.weight": kernel_of(adapter), "patch_embed.proj.bias": adapter.projection.bias.detach()}
    weights["pos_embed"] = places_of(model, adapter)
    first = int(config.class_token)
    if first:
        weights["cls_token"] = own["prefix_tokens"][:, :1]
    if config.num_register_tokens:
        weights["reg_token"] = own["prefix_tokens"][:, first:]
    if config.final_norm:
        weights |= {f"norm.{kind}": own[f"norm.{kind}"] for kind in ("weight", "bias")}
    for number in range(config.num_hidden_layers):
        for name, other in TIMM_BLOCK.items():
            for kind in ("weight", "bias", "scale"):
                if (value := own.get(f"layers.{number}.{name}.{kind}")) is not None:
                    weights[f"blocks.{number}.{other}.{'gamma' if kind == 'scale' else kind}"] = value
    options = {
        "img_size": adapter.image_size,
        "patch_size": adapter.patch_size,
        "in_chans": adapter.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size or 4 * config.hidden_size) / config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "init_values": config.layer_scale_init,
        "class_token": config.class_token,
        "reg_tokens": config.num_register_tokens,
        "no_embed_class": True,
        "global_pool": "avg",
        "fc_norm": False,
        "final_norm": config.final_norm,
    }
    about = {
        "input_size": (adapter.num_channels, *adapter.image_size),
        "mean": adapter.image_mean,
        "std": adapter.image_std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    text = {
        "architecture": "vit_base_patch16_224",  # one that timm knows; all that it stands for is set below
        "num_classes": 0,
        "num_features": config.hidden_size,
        "pretrained_cfg": about,
        "model_args": options,
    }
    (folder / "config.json").write_text(json.dumps(text, indent=2))


class Outputs(nn.Module):
    """Of a plain model its tokens, and the mean of those of patches."""

    def __init__(self, plain: PreTrainedModel, prefix: int):
        super().__init__()
        self.plain, self.prefix = plain, prefix

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.plain(pixel_values).last_hidden_state
        return hidden, hidden[:, self.prefix :].mean(dim=1)


def to_onnx(model: MMSSLModel, folder: str | Path, modality: str | None = None) -> None:
    """Save an image encoder as ``model.onnx``, for batches of any size, and a stock image processor beside it.

    It has the input ``pixel_values`` and the outputs ``last_hidden_state`` and ``pooler_output``.

    Args:
        model: the encoder.
        folder: where to save it.
        modality: which one of a model that has several.

    Raises:
        ValueError: as ``to_transformers``, by way of whose models it goes.
        ImportError: onnx or onnxscript is not installed.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ImportError(f"to write ONNX, torch needs {' and '.join(missing)}: pip install onnx onnxscript")
    plain, adapter = plain_model(model, modality)
    image_alone(adapter)
    nn.Module.to(plain, "cpu", torch.float32)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, adapter.num_channels, *adapter.image_size)
    torch.onnx.export(
        Outputs(plain, int(model.config.class_token)).eval(),
        (example,),
        folder / "model.onnx",
        input_names=["pixel_values"],
        output_names=["last_hidden_state", "pooler_output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    save_image_processor(adapter, folder)


def image_alone(adapter: Image | Video) -> Image:
    if not isinstance(adapter, Image):
        raise ValueError(f"{adapter.name}: found an encoder of clips; this format is for images. Use self_contained")
    return adapter
