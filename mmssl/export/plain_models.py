"""An encoder as a plain model of another library: the same numbers, or a refusal."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEImageProcessorPil,
    VideoMAEModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    VivitConfig,
    VivitModel,
)
from transformers.image_utils import PILImageResampling

from mmssl.modalities.image import Image
from mmssl.modalities.video import Video
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.training.vision_weights import DINOV2_BLOCK, VIDEOMAE_BLOCK, VIT_BLOCK, blank_tokens

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

# Names in a block, and how the names of the blocks begin.
BLOCKS: dict[type[PreTrainedModel], tuple[dict[str, Any], str]] = {
    ViTModel: (VIT_BLOCK, "layers"),
    VivitModel: (VIT_BLOCK, "layers"),
    SiglipVisionModel: (SIGLIP_BLOCK, "encoder.layers"),
    Dinov2Model: (DINOV2_BLOCK, "encoder.layer"),
    Dinov2WithRegistersModel: (DINOV2_BLOCK, "encoder.layer"),
    VideoMAEModel: (VIDEOMAE_BLOCK, "encoder.layer"),
}


def to_transformers(model: MMSSLModel, folder: str | Path, modality: str | None = None) -> None:
    """Save the encoder as the class of transformers that computes the same, and an image processor beside it.

    Images with a class token: ``ViTModel`` (to be loaded with ``add_pooling_layer=False``), or with layer scale or
    registers ``Dinov2Model`` and ``Dinov2WithRegistersModel``; without: ``SiglipVisionModel``. Videos with a class
    token: ``VivitModel``. All these have places as weights. Videos without a class token: ``VideoMAEModel``, whose
    places are of the token's number, ``position_embedding="index"``.

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
    config, class_token = model.config, model.config.class_token
    adapter = chosen(model, modality, where)
    free: tuple[str, ...] = ()  # what the class has too
    if isinstance(adapter, Image) and class_token:
        free = ("layer_scale_init", "num_register_tokens")
    elif isinstance(adapter, Video) and not class_token:
        free = ("final_norm",)
        if adapter.position_embedding != "index":
            raise ValueError(
                f"position_embedding: found {adapter.position_embedding}; expected index, or an encoder with a class "
                "token: VideoMAE, transformers' video encoder without one, has no other places. Use self_contained"
            )
    kind = f"{where} for {adapter.name}s {'with' if class_token else 'without'} a class token"
    check_options(model, adapter, {name: value for name, value in NEEDED.items() if name not in free}, kind)
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
    patch = adapter.patch_size[0]
    if isinstance(adapter, Video) and class_token:
        shape |= {"num_frames": adapter.num_frames, "tubelet_size": (adapter.tubelet_size, patch, patch)}
        plain = VivitModel(VivitConfig(**shape, qkv_bias=config.qkv_bias), add_pooling_layer=False)
    elif isinstance(adapter, Video):
        shape |= {"num_frames": adapter.num_frames, "tubelet_size": adapter.tubelet_size, "patch_size": patch}
        shape |= {"qv_bias": config.qkv_bias, "use_mean_pooling": not config.final_norm}
        plain = VideoMAEModel(VideoMAEConfig(**shape))
    elif class_token and (config.layer_scale_init is not None or config.num_register_tokens):
        plain = dinov2_model(config, {**shape, "patch_size": patch, "qkv_bias": config.qkv_bias})
    elif class_token:
        plain = ViTModel(ViTConfig(**shape, patch_size=patch, qkv_bias=config.qkv_bias), add_pooling_layer=False)
    else:
        plain = SiglipVisionModel(SiglipVisionConfig(**shape, patch_size=patch, vision_use_head=False))
    plain.load_state_dict(plain_weights(model, adapter, plain))
    nn.Module.to(plain, model.dtype)
    return plain.eval(), adapter


def dinov2_model(config: MMSSLConfig, shape: dict[str, Any]) -> PreTrainedModel:
    """With layer scale, which may be 1, and with registers or without."""
    ratio, rest = divmod(shape.pop("intermediate_size"), config.hidden_size)
    if rest:
        raise ValueError(
            f"intermediate_size: found {config.intermediate_size}; DINOv2, transformers' encoder with layer scale or "
            f"registers, has multiples of hidden_size, {config.hidden_size}, alone. Use self_contained"
        )
    shape |= {
        "mlp_ratio": ratio,
        "layerscale_value": 1.0 if config.layer_scale_init is None else config.layer_scale_init,
    }
    if not config.num_register_tokens:
        return Dinov2Model(Dinov2Config(**shape, use_mask_token=False))
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=config.num_register_tokens))


def chosen(model: MMSSLModel, modality: str | None, where: str) -> Image | Video:
    """The modality that is exported."""
    names = list(model.adapters)
    if (modality is None and len(names) > 1) or (modality is not None and modality not in names):
        raise ValueError(f"modality: found {modality}; the model has {', '.join(names)}: say which one to export")
    adapter = model.adapters[modality or names[0]]
    if not isinstance(adapter, Image | Video):
        raise ValueError(f"{adapter.name}: {where} do not read its tokens, those of images are. Use self_contained")
    return adapter


def check_options(model: MMSSLModel, adapter: Image | Video, needed: dict[str, Any], where: str) -> None:
    """Refuse an encoder with an option that other libraries lack."""
    for name, value in needed.items():
        if (found := getattr(model.config, name)) != value:
            raise ValueError(f"{name}: found {found}; {where} have {value} alone. Use self_contained")
    if isinstance(adapter, Image) and adapter.scattering_scales:
        raise ValueError(
            f"scattering_scales: found {adapter.scattering_scales}; {where} read pixels. Use self_contained"
        )


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
    return adapter.position(blank_tokens(adapter, adapter).coords.to(model.device)).detach()


def kernel_of(adapter: Image | Video) -> Tensor:
    """The embedding of patches as a convolution's weight (D, C, [frames,] height, width)."""
    weight = adapter.projection.weight.detach()
    patch = (adapter.tubelet_size, *adapter.patch_size) if isinstance(adapter, Video) else adapter.patch_size
    return weight.unflatten(1, (*patch, adapter.num_channels)).movedim(-1, 1).contiguous()


def plain_weights(model: MMSSLModel, adapter: Image | Video, plain: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names of a plain model."""
    own, places, width = model.encoder.state_dict(), places_of(model, adapter), model.config.hidden_size
    block, layers = BLOCKS[type(plain)]
    norm, patch = "layernorm", "embeddings.patch_embeddings.projection"
    weights: dict[str, Tensor] = {}
    if isinstance(plain, SiglipVisionModel):
        weights["embeddings.position_embedding.weight"] = places[0]
        norm, patch = "post_layernorm", "embeddings.patch_embedding"
    elif not isinstance(plain, VideoMAEModel):
        weights["embeddings.cls_token"] = own["prefix_tokens"][:, :1]
        weights["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
    if isinstance(plain, Dinov2WithRegistersModel):
        weights["embeddings.register_tokens"] = own["prefix_tokens"][:, 1:]
        weights["embeddings.mask_token"] = places.new_zeros(1, width)
    if model.config.final_norm:
        weights |= {f"{norm}.{kind}": own[f"norm.{kind}"] for kind in ("weight", "bias")}
    weights |= {f"{patch}.weight": kernel_of(adapter), f"{patch}.bias": adapter.projection.bias.detach()}
    for number in range(model.config.num_hidden_layers):
        for name, other in block.items():
            if name in ("scale1", "scale2"):
                scale = own.get(f"layers.{number}.{name}.scale", torch.ones(width))
                weights[f"{layers}.{number}.{other}"] = scale
                continue
            for kind in ("weight", "bias"):
                value = own.get(f"layers.{number}.{name}.{kind}")
                if value is None:  # qkv_bias=False, which Siglip has no option for
                    if not isinstance(plain, SiglipVisionModel):
                        continue
                    value = torch.zeros(3 * width)
                others = (other,) if isinstance(other, str) else other
                for each, part in zip(others, value.chunk(len(others)), strict=True):
                    weights[f"{layers}.{number}.{each}.{kind}"] = part
    if isinstance(plain, VideoMAEModel):
        # Keys have no bias there: it adds the same to all scores of a query, of which softmax takes no notice.
        weights = {name: value for name, value in weights.items() if not name.endswith(".attention.key.bias")}
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
    where = "timm's vision transformers"
    adapter = chosen(model, modality, where)
    check_options(model, adapter, TIMM_NEEDED, where)
    adapter = image_alone(adapter)
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
        Outputs(plain, model.encoder.num_prefix_tokens).eval(),
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
