"""Training steps of mmssl and of its peers at equal sizes, which benchmarks/peers.py times.

A step has sides: "mmssl" and its peers by name, each a function that builds its model and what computes its loss. What
a peer needs is imported by its own side alone. Batches are in memory; joint embedding makes its views in the step.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional

from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.barlow_twins import BarlowTwins
from mmssl.objectives.base import Objective
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.objectives.self_distillation import SelfDistillation


@dataclass
class Side:
    """One side of a comparison.

    Attributes:
        module: what is trained.
        loss: a forward pass.
        after_step: what follows the optimiser's step.
        batch: what the loss is of, where it is ours.
    """

    module: nn.Module
    loss: Callable[[], Tensor]
    after_step: Callable[[], object] = lambda: None
    batch: Batch | None = None


@dataclass
class Step:
    """A training step.

    Attributes:
        title: of its row.
        samples: in a batch.
        unit: what a sample is.
        sides: who makes it.
    """

    title: str
    samples: int
    unit: str
    sides: dict[str, Callable[[], Side]]


def ours(
    modality: str,
    options: dict[str, Any],
    encoder: dict[str, Any],
    objective: Callable[[MMSSLModel], Objective],
    make_batch: Callable[[], Batch],
) -> Side:
    """An objective on an encoder, with a generator as the loop makes it."""
    model = MMSSLModel(MMSSLConfig(modalities={modality: options}, **encoder))
    built, batch, generator = (
        objective(model).train(),
        make_batch(),
        torch.Generator(torch.get_default_device()).manual_seed(0),
    )
    return Side(built, lambda: built(batch, generator).loss, lambda: built.after_step(0.5), batch)


# Masked images


@dataclass
class MAESize:
    """Of a masked autoencoder of images or clips."""

    side: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder: tuple[int, int, int]  # width, depth, heads
    batch: int

    def ours(self) -> Side:
        encoder = shape(self.width, self.depth, self.heads) | {"class_token": True}
        options = {"image_size": self.side, "patch_size": self.patch}
        return ours("image", options, encoder, reconstruction(self.decoder), lambda: {"pixel_values": self.pixels()})

    def pixels(self) -> Tensor:
        return torch.randn(self.batch, 3, self.side, self.side)

    def transformers(self) -> Side:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        width, depth, heads = self.decoder
        config = ViTMAEConfig(
            image_size=self.side,
            patch_size=self.patch,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=depth,
            decoder_num_attention_heads=heads,
            decoder_intermediate_size=4 * width,
            norm_pix_loss=True,
        )
        model, pixels = ViTMAEForPreTraining(config).train(), self.pixels()
        return Side(model, lambda: model(pixels).loss)

    def vision_transformer(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            self.side, self.patch, num_classes=0, embed_dim=self.width, depth=self.depth, num_heads=self.heads,
            dynamic_img_size=True,
        )  # fmt: skip

    def stable_pretraining(self) -> Side:
        from stable_pretraining.methods import MAE

        model, pixels = MAE(self.vision_transformer(), *self.decoder).train(), self.pixels()
        return Side(model, lambda: model(pixels).loss)

    def lightly(self) -> Side:
        from lightly.models import utils
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM

        width, depth, heads = self.decoder
        backbone = MaskedVisionTransformerTIMM(self.vision_transformer())
        patches = (self.side // self.patch) ** 2
        pixels = self.pixels()
        parts = nn.ModuleDict(
            {
                "backbone": backbone,
                "embed": nn.Linear(self.width, width),
                "decoder": MaskedVisionTransformerDecoderTIMM(patches, width, depth, heads),
                "head": nn.Linear(width, 3 * self.patch**2),
            }
        )

        def loss() -> Tensor:
            keep, mask = utils.random_token_mask((self.batch, patches + 1), mask_ratio=0.75)
            encoded = parts["embed"](backbone.encode(images=pixels, idx_keep=keep))
            tokens = utils.repeat_token(parts["decoder"].mask_token, (self.batch, patches + 1))
            tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
            predicted = parts["head"](utils.get_at_index(parts["decoder"](tokens), mask))
            target = utils.get_at_index(utils.patchify(pixels, self.patch), mask - 1)
            return functional.mse_loss(predicted, utils.normalize_mean_var(target))

        return Side(parts, loss)

    def step(self, title: str) -> Step:
        peers = {
            "transformers": self.transformers,
            "lightly": self.lightly,
            "stable-pretraining": self.stable_pretraining,
        }
        return Step(title, self.batch, "images", {"mmssl": self.ours, **peers})


def shape(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}


def reconstruction(decoder: tuple[int, int, int], **options: Any) -> Callable[[MMSSLModel], Objective]:
    width, depth, heads = decoder
    sizes: dict[str, Any] = {"decoder_hidden_size": width, "decoder_layers": depth, "decoder_attention_heads": heads}
    return partial(MaskedReconstruction, views=False, **sizes, **options)


# Joint embedding of images: 64 images of 32 pixels, two views made in the step

IMAGES, HIDDEN, OUT, PROTOTYPES = 64, 2048, 256, 4096
VIT_TINY = MAESize(32, 4, 192, 12, 3, (0, 0, 0), IMAGES)
VIEWS: dict[str, Any] = {"crop_scale": (0.08, 1.0), "horizontal_flip": 0.5, "color_jitter": 0.4}


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)


def joint(objective: Callable[[MMSSLModel], Objective]) -> Side:
    options = {"image_size": 32, "patch_size": 4, **VIEWS}
    encoder = shape(VIT_TINY.width, VIT_TINY.depth, VIT_TINY.heads) | {"class_token": True}
    pixels = torch.tensor(pictures()).permute(0, 3, 1, 2).float() / 255
    return ours("image", options, encoder, objective, lambda: {"pixel_values": (pixels - 0.45) / 0.225})


def two_views() -> Callable[[], list[Tensor]]:
    """lightly's transform on images in memory, as a worker of its loader runs it."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(32, cj_prob=1.0, cj_strength=0.5, random_gray_scale=0.0, gaussian_blur=0.0)
    images = [PILImage.fromarray(each) for each in pictures()]
    return lambda: [torch.stack(each) for each in zip(*(transform(image) for image in images), strict=True)]


def joint_of_lightly(head: Callable[[], nn.Module], loss: Callable[[], nn.Module]) -> Side:
    backbone, views, criterion = VIT_TINY.vision_transformer(), two_views(), loss()
    whole = nn.Sequential(backbone, head())
    return Side(whole, lambda: criterion(*(whole(view) for view in views())))


def dino_of_lightly() -> Side:
    from lightly.loss import DINOLoss
    from lightly.models.modules.heads import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    def half() -> nn.Module:
        return nn.Sequential(VIT_TINY.vision_transformer(), DINOProjectionHead(192, HIDDEN, OUT, PROTOTYPES))

    student, teacher, criterion, make = half(), half(), DINOLoss(PROTOTYPES, 0.04, 0.04, 1), two_views()
    deactivate_requires_grad(teacher)

    def loss() -> Tensor:
        views = make()
        with torch.no_grad():
            known = [teacher(view) for view in views]
        return criterion(known, [student(view) for view in views])

    return Side(student, loss, lambda: update_momentum(student, teacher, 0.996))


def simclr_of_lightly() -> Side:
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    return joint_of_lightly(lambda: SimCLRProjectionHead(192, HIDDEN, OUT), lambda: NTXentLoss(0.1))


def barlow_of_lightly() -> Side:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import BarlowTwinsProjectionHead

    return joint_of_lightly(lambda: BarlowTwinsProjectionHead(192, HIDDEN, HIDDEN), BarlowTwinsLoss)


def joint_of_stable_pretraining(method: str, projector: Sequence[int]) -> Side:
    from stable_pretraining import methods

    model, views = getattr(methods, method)(VIT_TINY.vision_transformer(), projector).train(), two_views()
    return Side(model, lambda: model(*views()).loss)


# Speech: TERA base on 8 clips of 4 seconds

CLIPS, SECONDS, RATE = 8, 4, 16_000
TERA: dict[str, Any] = {
    **shape(768, 3, 12),
    "norm_position": "post",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer": "normal",
}


def waves(clips: int) -> Tensor:
    return 0.1 * torch.randn(clips, SECONDS * RATE)


def tera(clips: int = CLIPS) -> Side:
    objective = partial(
        MaskedReconstruction, corruption="alter", views=False, decoder_layers=0, head_layers=1, head_norm=True
    )
    mask = torch.ones(clips, SECONDS * RATE, dtype=torch.long)
    return ours("speech", {}, TERA, objective, lambda: {"input_values": waves(clips), "attention_mask": mask})


def tera_of_s3prl() -> Side:
    from s3prl.pretrain.mockingjay.task import generate_masked_acoustic_model_data
    from s3prl.upstream.mockingjay.model import TransformerConfig, TransformerModel, TransformerSpecPredictionHead
    from torchaudio.compliance.kaldi import fbank

    about = {
        **shape(768, 3, 12),
        "hidden_act": "gelu",
        "intermediate_size": 3072,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "share_layer": False,
        "pre_layer_norm": False,
    }
    task = {
        "position_encoding_size": 768,
        "mask_proportion": 0.15,
        "mask_consecutive_min": 7,
        "mask_consecutive_max": 7,
        "mask_allow_overlap": True,
        "mask_bucket_ratio": 1.5,
        "mask_frequency": 0.2,
        "noise_proportion": 0.15,
    }
    config = TransformerConfig(about)
    parts = nn.ModuleList([TransformerModel(config, 80), TransformerSpecPredictionHead(config, 80)]).train()
    clips = waves(CLIPS)

    def loss() -> Tensor:
        frames = [fbank(2**15 * clip[None], num_mel_bins=80) for clip in clips]
        spectra = torch.stack([(each - each.mean(dim=0)) / (each.std(dim=0) + 1e-10) for each in frames])
        altered, places, where, attended, target = generate_masked_acoustic_model_data([spectra], task)
        hidden = parts[0](altered, places.expand(CLIPS, -1, -1), attended, output_all_encoded_layers=False)
        predicted, _ = parts[1](hidden)
        return functional.l1_loss(predicted.masked_select(where), target.masked_select(where))

    return Side(parts, loss)


# Time series: PatchTST on 64 windows of the 7 channels of ETT

WINDOWS, CHANNELS, LENGTH, PATCH = 64, 7, 512, 12


def patchtst(heads: int = 16) -> Side:
    encoder = shape(128, 3, heads) | {
        "intermediate_size": 512,
        "norm_position": "post",
        "hidden_dropout_prob": 0.2,
    }
    objective = partial(
        MaskedReconstruction,
        corruption="replace",
        mask_ratio=0.4,
        mask_token_space="input",
        views=False,
        decoder_layers=0,
    )
    series = torch.randn(WINDOWS, LENGTH, CHANNELS)
    batch = {
        "series": series,
        "observed_mask": torch.ones_like(series),
        "attention_mask": torch.ones(WINDOWS, LENGTH, dtype=torch.long),
    }
    return ours("time_series", {"patch_length": PATCH, "max_length": LENGTH}, encoder, objective, lambda: batch)


def patchtst_of_transformers() -> Side:
    from transformers import PatchTSTConfig, PatchTSTForPretraining

    config = PatchTSTConfig(
        num_input_channels=CHANNELS,
        context_length=LENGTH,
        patch_length=PATCH,
        patch_stride=PATCH,
        d_model=128,
        num_hidden_layers=3,
        num_attention_heads=16,
        ffn_dim=512,
        attention_dropout=0.0,
        ff_dropout=0.0,  # ours has none there
        path_dropout=0.2,
        positional_dropout=0.2,
        do_mask_input=True,
        random_mask_ratio=0.4,
    )
    model, series = PatchTSTForPretraining(config).train(), torch.randn(WINDOWS, LENGTH, CHANNELS)
    return Side(model, lambda: model(past_values=series).loss)


# Graphs: GraphMAE on a graph of the size of Cora

NODES, EDGES, FEATURES = 2708, 5278, 1433


def citations() -> tuple[Tensor, Tensor]:
    """Features (nodes, F), 1.3 % of them there, and edges (2, E) in both directions."""
    there = (torch.rand(NODES, FEATURES) < 0.0127).float()
    one, other = torch.randint(NODES, (2, EDGES))
    return there / there.sum(dim=1, keepdim=True).clamp(min=1), torch.stack(
        [torch.cat([one, other]), torch.cat([other, one])]
    )


def graphmae(width: int) -> Side:
    encoder = shape(width, 2, 4) | {
        "residual": False,
        "feed_forward": False,
        "final_norm": False,
        "hidden_act": "prelu",
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.1,
    }
    objective = reconstruction(
        (width, 1, 1), corruption="replace", mask_ratio=0.5, mask_token_space="input", replace_ratio=0.05, remask=True
    )
    features, edges = citations()
    batch = {
        "node_features": features[None],
        "node_encodings": torch.zeros(1, NODES, 0),
        "edge_index": edges,
        "attention_mask": torch.ones(1, NODES, dtype=torch.long),
    }
    return ours("graph", {"num_features": FEATURES}, encoder, objective, lambda: batch)


def graphmae_of_gat(width: int) -> Side:
    from torch_geometric.nn import GATConv

    features, edges = citations()
    layers = nn.ModuleList(
        [
            GATConv(FEATURES, width // 4, heads=4, dropout=0.1),
            GATConv(width, width // 4, heads=4, dropout=0.1),
            GATConv(width, FEATURES, heads=1, dropout=0.1),
        ]
    )
    activations = nn.ModuleList([nn.PReLU(), nn.PReLU()])
    bridge, token = nn.Linear(width, width, bias=False), nn.Parameter(torch.zeros(FEATURES))
    whole = nn.ModuleList([layers, activations, bridge, nn.ParameterList([token])]).train()

    def loss() -> Tensor:
        order = torch.randperm(NODES)
        masked = order[: NODES // 2]
        hidden = features.clone()
        hidden[masked] = 0
        others = masked[: NODES // 40]
        hidden[others] = features[torch.randperm(NODES)[: NODES // 40]]
        hidden[masked[NODES // 40 :]] += token
        for layer, activation in zip(layers, activations, strict=False):
            hidden = activation(layer(functional.dropout(hidden, 0.2), edges))
        hidden = bridge(hidden).index_fill(0, masked, 0.0)
        predicted = layers[2](hidden, edges)
        similar = functional.cosine_similarity(predicted[masked], features[masked], dim=-1)
        return (1 - similar).pow(3).mean()

    return Side(whole, loss)


# Video: VideoMAE small on 2 clips of 16 frames of 224 pixels

CLIP = (3, 16, 224, 224)


def videomae(width: int = 384, clips: int = 2) -> Side:
    """The decoder is half as wide; heads have 64 channels."""
    objective = reconstruction((width // 2, 4, width // 128), mask_ratio=0.9, mask_style="tube")
    encoder = shape(width, 12, width // 64)
    return ours("video", {}, encoder, objective, lambda: {"pixel_values_videos": torch.randn(clips, *CLIP)})


def videomae_of_transformers(width: int = 384, clips: int = 2) -> Side:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = VideoMAEConfig(
        hidden_size=width,
        num_hidden_layers=12,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        decoder_hidden_size=width // 2,
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=width // 128,
        decoder_intermediate_size=2 * width,
    )
    model, pixels = VideoMAEForPreTraining(config).train(), torch.randn(clips, *CLIP).transpose(1, 2)

    def loss() -> Tensor:
        hidden = torch.zeros(196, dtype=torch.bool)
        hidden[random.sample(range(196), 176)] = True
        return model(pixels, bool_masked_pos=hidden.repeat(8).expand(clips, -1)).loss

    return Side(model, loss)


# Point clouds: Point-MAE, and the same transformer without grouping, group embedding and Chamfer distance

CLOUDS = 8
POINT_ENCODER = shape(384, 12, 6) | {"position_every_block": True, "qkv_bias": False}


def point_mae(clouds: int = CLOUDS) -> Side:
    objective = reconstruction((384, 4, 6), mask_ratio=0.6)
    batch = {"points": torch.randn(clouds, 1024, 3), "attention_mask": torch.ones(clouds, 1024, dtype=torch.long)}
    return ours("point_cloud", {}, POINT_ENCODER, objective, lambda: batch)


def bare_transformer(clouds: int = CLOUDS) -> Side:
    side = point_mae(clouds)
    whole: Any = side.module
    content, place = torch.randn(clouds, 26, 384), torch.randn(clouds, 26, 384)
    all_places, target = torch.randn(clouds, 64, 384), torch.randn(clouds, 38, 96)
    seen, valid = torch.ones(clouds, 26, dtype=torch.bool), torch.ones(clouds, 64, dtype=torch.bool)
    head = nn.Linear(384, 96)
    parts = nn.ModuleList([whole.model.encoder, whole.decoder_input, whole.decoder, head])

    def loss() -> Tensor:
        encoded = whole.decoder_input(whole.model.encoder(content, place, seen).tokens)
        hidden = whole.decoder_mask_token.expand(clouds, 38, -1)
        decoded = whole.decoder(torch.cat([encoded, hidden], dim=1), all_places, valid).tokens
        return functional.mse_loss(head(decoded[:, 26:]), target)

    return Side(parts, loss)


# Tables: T-JEPA's tokens of 512 rows of 54 columns

ROWS, COLUMNS, TOKEN = 512, 54, 64


def table_tokens() -> Side:
    schema = [{"name": str(i), "kind": "numerical", "mean": 0.0, "std": 1.0} for i in range(COLUMNS)]
    model = MMSSLModel(MMSSLConfig(modalities={"tabular": {"schema": schema}}, **shape(TOKEN, 1, 2)))
    modality, batch = model.adapters["tabular"], {"cells": torch.randn(ROWS, COLUMNS)}
    return Side(modality, lambda: modality.embed(modality.tokenize(batch)).square().mean(), batch=batch)


def table_tokens_one_by_one() -> Side:
    layers, cells = nn.ModuleList(nn.Linear(1, TOKEN) for _ in range(COLUMNS)), torch.randn(ROWS, COLUMNS)
    places = nn.Parameter(torch.randn(COLUMNS, TOKEN))

    def loss() -> Tensor:
        tokens = torch.stack([layer(cells[:, i : i + 1]) for i, layer in enumerate(layers)], dim=1) + places
        return tokens.square().mean()

    return Side(nn.ModuleList([layers, nn.ParameterList([places])]), loss)


def simclr(model: MMSSLModel) -> Objective:
    return Contrastive(model, 0.1, 2, HIDDEN, OUT)


def barlow(model: MMSSLModel) -> Objective:
    return BarlowTwins(model, 3, HIDDEN, HIDDEN)


def dino(model: MMSSLModel) -> Objective:
    return SelfDistillation(model, PROTOTYPES, 3, HIDDEN, OUT)


STEPS: dict[str, Step] = {
    "mae_tiny": MAESize(32, 4, 192, 12, 3, (192, 4, 3), 128).step("MAE, 32 pixels, patch 4, 192 x 12, decoder 192 x 4"),
    "mae_small": MAESize(224, 16, 384, 12, 6, (512, 8, 16), 8).step("MAE, ViT-S/16, decoder 512 x 8"),
    "simclr": Step(
        "SimCLR, ViT-Tiny, 32 pixels, patch 4, with views",
        IMAGES,
        "images",
        {
            "mmssl": lambda: joint(simclr),
            "lightly": simclr_of_lightly,
            "stable-pretraining": lambda: joint_of_stable_pretraining("SimCLR", (HIDDEN, OUT)),
        },
    ),
    "barlow_twins": Step(
        "Barlow Twins, the same",
        IMAGES,
        "images",
        {
            "mmssl": lambda: joint(barlow),
            "lightly": barlow_of_lightly,
            "stable-pretraining": lambda: joint_of_stable_pretraining("BarlowTwins", (HIDDEN,) * 3),
        },
    ),
    "dino": Step("DINO, the same", IMAGES, "images", {"mmssl": lambda: joint(dino), "lightly": dino_of_lightly}),
    "tera": Step("TERA base, 4 s", CLIPS, "clips", {"mmssl": tera, "s3prl": tera_of_s3prl}),
    "patchtst": Step(
        "PatchTST, 128 x 3, 16 heads, 7 channels of 512",
        WINDOWS,
        "windows",
        {"mmssl": patchtst, "transformers": patchtst_of_transformers},
    ),
    "graphmae_256": Step(
        "GraphMAE, 256 x 2, a graph of Cora's size",
        1,
        "graphs",
        {"mmssl": lambda: graphmae(256), "torch-geometric GATConv": lambda: graphmae_of_gat(256)},
    ),
    "graphmae_512": Step(
        "GraphMAE, 512 x 2, the same",
        1,
        "graphs",
        {"mmssl": lambda: graphmae(512), "torch-geometric GATConv": lambda: graphmae_of_gat(512)},
    ),
    "videomae": Step(
        "VideoMAE small, 16 x 224", 2, "clips", {"mmssl": videomae, "transformers": videomae_of_transformers}
    ),
    "point_mae": Step(
        "Point-MAE, 384 x 12, decoder 384 x 4",
        CLOUDS,
        "clouds",
        {"mmssl": point_mae, "its transformer alone": bare_transformer},
    ),
    "table_tokens": Step(
        "T-JEPA's tokens of 54 columns",
        ROWS,
        "rows",
        {"mmssl": table_tokens, "a layer for each column": table_tokens_one_by_one},
    ),
}

# Sizes for a GPU

GPU_STEPS: dict[str, Step] = {
    "mae_base": MAESize(224, 16, 768, 12, 12, (512, 8, 16), 256).step("MAE, ViT-B/16, decoder 512 x 8"),
    "mae_large": MAESize(224, 16, 1024, 24, 16, (512, 8, 16), 128).step("MAE, ViT-L/16, decoder 512 x 8"),
    "videomae_base": Step(
        "VideoMAE base, 16 x 224",
        16,
        "clips",
        {"mmssl": lambda: videomae(768, 16), "transformers": lambda: videomae_of_transformers(768, 16)},
    ),
    "tera_base": Step("TERA base, 4 s", 64, "clips", {"mmssl": lambda: tera(64)}),
    "point_mae_large": Step(
        "Point-MAE, 384 x 12, decoder 384 x 4",
        128,
        "clouds",
        {"mmssl": lambda: point_mae(128), "its transformer alone": lambda: bare_transformer(128)},
    ),
}
