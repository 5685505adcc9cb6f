"""Small images: our recipes beside those of transformers and lightly, an encoder of one size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from quality import Data, Field, Learner, held_out, labelled
from torch import Tensor, nn

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.masked_reconstruction import MaskedReconstruction

WIDTH, DEPTH, HEADS, PATCH, BATCH = 128, 4, 4, 8, 128
DECODER: dict[str, Any] = {"decoder_hidden_size": 128, "decoder_layers": 2, "decoder_attention_heads": 4}
READER = Image(image_size=32, patch_size=PATCH)
CROPS: dict[str, Any] = {"crop_scale": (0.4, 1.0), "horizontal_flip": 0.5}
JITTER = 0.4
IMAGES, TEST_IMAGES = 10_000, 2_000


def read(path: str, explore: bool) -> Data:
    """A folder with train.parquet and test.parquet."""
    if explore:
        train, test = held_out(pixels_of(f"{path}/train.parquet", IMAGES + TEST_IMAGES), TEST_IMAGES)
    else:
        train, test = pixels_of(f"{path}/train.parquet", IMAGES), pixels_of(f"{path}/test.parquet", TEST_IMAGES)
    return labelled(train, test, lambda pixels: pixels.flatten(1), BATCH)


def pixels_of(source: str, count: int) -> tuple[Tensor, np.ndarray]:
    samples = load_samples(DataArguments(source, max_samples=count), READER)
    prepared = PreparedSamples(samples, READER)
    assert samples.labels is not None
    return torch.stack([prepared[i][0]["pixel_values"] for i in range(len(prepared))]), samples.labels


def ours(objective: Callable[[MMSSLModel], Objective], **views: Any) -> Learner:
    modalities: dict[str, Any] = {"image": {"image_size": 32, "patch_size": PATCH, **CROPS, **views}}
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    built = objective(MMSSLModel(MMSSLConfig(modalities=modalities, **shape)))
    return Learner(
        built,
        lambda pixels, generator: built({"pixel_values": pixels}, generator).loss,
        lambda pixels: built.model(pixel_values=pixels).pooler_output,
    )


def mae_of_transformers() -> Learner:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=32,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        decoder_hidden_size=128,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=512,
        norm_pix_loss=True,
    )
    model, views = ViTMAEForPreTraining(config), Image(image_size=32, patch_size=PATCH, **CROPS)

    def features(pixels: Tensor) -> Tensor:
        model.vit.embeddings.config.mask_ratio = 0.0
        hidden = model.vit(pixels).last_hidden_state[:, 1:].mean(dim=1)
        model.vit.embeddings.config.mask_ratio = 0.75
        return hidden

    def loss(pixels: Tensor, generator: torch.Generator) -> Tensor:
        return model(views.view({"pixel_values": pixels}, generator).batch["pixel_values"]).loss

    return Learner(model, loss, features)


def simclr_of_lightly() -> Learner:
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from timm.models.vision_transformer import VisionTransformer

    backbone = VisionTransformer(
        32, PATCH, num_classes=0, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, class_token=False, global_pool="avg"
    )
    whole, criterion = nn.Sequential(backbone, SimCLRProjectionHead(WIDTH, 512, 128)), NTXentLoss(0.1)
    transform = SimCLRTransform(
        32, cj_prob=1.0, cj_strength=JITTER / 0.8, min_scale=0.4, random_gray_scale=0.0, gaussian_blur=0.0
    )
    mean, std = (torch.tensor(each)[:, None, None] for each in (READER.image_mean, READER.image_std))

    def loss(pixels: Tensor, generator: torch.Generator) -> Tensor:
        whole_numbers = ((pixels * std + mean) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        pairs = [transform(PILImage.fromarray(each)) for each in whole_numbers]
        return criterion(*(whole(torch.stack(view)) for view in zip(*pairs, strict=True)))

    return Learner(whole, loss, lambda pixels: backbone.forward_features(pixels).mean(dim=1))


FIELD = Field(
    read,
    {
        "mmssl MAE": lambda: ours(partial(MaskedReconstruction, **DECODER)),
        "mmssl MAE, half of the hidden patches": lambda: ours(
            partial(MaskedReconstruction, predict_ratio=0.5, **DECODER)
        ),
        "mmssl SimCLR": lambda: ours(partial(Contrastive, projector_hidden_size=512), color_jitter=JITTER),
        "transformers MAE": mae_of_transformers,
        "lightly SimCLR": simclr_of_lightly,
    },
    (60.0, 90.0),
    (2.5e-4, 5e-4, 1e-3, 2e-3),
    {"betas": (0.9, 0.95), "weight_decay": 0.05},
)
