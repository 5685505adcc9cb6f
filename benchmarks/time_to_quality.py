"""Quality by CPU time on small images: our recipes beside those of transformers and lightly.

    pip install -e ".[bench]"
    python benchmarks/time_to_quality.py --data "$MMSSL_DATA/images/cifar10_jpg" --explore true   # learning rates
    python benchmarks/time_to_quality.py --data "$MMSSL_DATA/images/cifar10_jpg" --output docs/time_to_quality.json

All sides train an encoder of one size on one thread, on the same images, for a budget of CPU seconds in which views and
steps count, the learning rate warmed up over the first tenth of the budget and brought down to 0 by a cosine. The same
probes then read the means of patch tokens, beside pixels and untrained encoders. Learning rates are chosen for each
side alike, by a linear probe of held-out training images, at a third of the budget.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import CLI
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.probes import PROTOCOLS, Task

WIDTH, DEPTH, HEADS, PATCH, BATCH = 128, 4, 4, 8, 128
DECODER: dict[str, Any] = {"decoder_hidden_size": 128, "decoder_layers": 2, "decoder_attention_heads": 4}
READER = Image(image_size=32, patch_size=PATCH)
CROPS: dict[str, Any] = {"crop_scale": (0.4, 1.0), "horizontal_flip": 0.5}
JITTER = 0.4
RATES = (5e-4, 1e-3, 2e-3)


@dataclass
class Learner:
    """A side: a module, the loss of pixels (B, 3, 32, 32), and the mean of its patch tokens (B, D)."""

    module: nn.Module
    loss: Callable[[Tensor, torch.Generator], Tensor]
    features: Callable[[Tensor], Tensor]


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


SIDES: dict[str, Callable[[], Learner]] = {
    "mmssl MAE": lambda: ours(partial(MaskedReconstruction, **DECODER)),
    "mmssl MAE, half of the hidden patches": lambda: ours(partial(MaskedReconstruction, predict_ratio=0.5, **DECODER)),
    "mmssl SimCLR": lambda: ours(partial(Contrastive, projector_hidden_size=512), color_jitter=JITTER),
    "transformers MAE": mae_of_transformers,
    "lightly SimCLR": simclr_of_lightly,
}


def main(
    data: str,
    side: tuple[str, ...] = tuple(SIDES),
    budget: tuple[float, ...] = (200.0, 300.0),
    seeds: tuple[int, ...] = (0, 1, 2),
    images: int = 10_000,
    test_images: int = 2_000,
    rates: dict[str, float] | None = None,
    explore: bool = False,
    output: str = "",
) -> None:
    """Compare.

    Args:
        data: folder with train.parquet and test.parquet.
        side: which sides.
        budget: CPU seconds of a run; each is a run of its own.
        seeds: of start values, batches and views.
        images: so many training images.
        test_images: so many test images; with explore, so many training images are held out in their place.
        rates: learning rate of each side; 1e-3 where none is given.
        explore: try all learning rates with the first seed and a third of the greatest budget, on held-out images.
        output: JSON file that the numbers of these sides are written to, beside those of others that it has.
    """
    torch.set_num_threads(1)
    if explore:
        train, test = split(read(f"{data}/train.parquet", images + test_images), images)
    else:
        train, test = (
            read(f"{data}/{name}.parquet", count) for name, count in (("train", images), ("test", test_images))
        )
    found: dict[str, Any] = json.loads(Path(output).read_text()) if output and Path(output).is_file() else {}
    if not explore and "pixels" not in found:
        found["pixels"] = {"scores": {"": [probe(*((pixels.flatten(1), labels) for pixels, labels in (train, test)))]}}
    show = Table("side", "learning rate", "CPU seconds", "steps", "linear", "kNN")
    for name in side:
        tried = RATES if explore else ((rates or {}).get(name, 1e-3),)
        scores: dict[str, list[dict[str, float]]] = {"0": [untrained(name, seed, train, test) for seed in seeds]}
        for rate in tried:
            for seconds in [max(budget) / 3] if explore else budget:
                key = f"{seconds:.0f} at {rate}"
                for seed in seeds[:1] if explore else seeds:
                    scores.setdefault(key, []).append(run(name, seed, rate, seconds, train, test))
                    print(name, key, scores[key][-1], flush=True)
        found[name] = {"scores": scores}
        if output and not explore:
            Path(output).write_text(json.dumps(found, indent=1))
    for name, about in found.items():
        for key, runs in about["scores"].items():
            seconds, _, rate = key.partition(" at ")
            show.add_row(name, rate, seconds, *(spread(runs, what) for what in ("steps", "linear", "knn")))
    Console().print(show)


def spread(runs: list[dict[str, float]], what: str) -> str:
    values = [run[what] for run in runs if what in run]
    if not values:
        return ""
    digits = 0 if what == "steps" else 3
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def read(source: str, count: int) -> tuple[Tensor, np.ndarray]:
    samples = load_samples(DataArguments(source, max_samples=count), READER)
    prepared = PreparedSamples(samples, READER)
    assert samples.labels is not None
    return torch.stack([prepared[i][0]["pixel_values"] for i in range(len(prepared))]), samples.labels


def split(both: tuple[Tensor, np.ndarray], first: int) -> tuple[tuple[Tensor, np.ndarray], tuple[Tensor, np.ndarray]]:
    pixels, labels = both
    return (pixels[:first], labels[:first]), (pixels[first:], labels[first:])


def probe(train: tuple[Tensor, np.ndarray], test: tuple[Tensor, np.ndarray]) -> dict[str, float]:
    task = Task(train[0].numpy(), train[1], test[0].numpy(), test[1])
    return {name: float(next(iter(PROTOCOLS[name](task).values())).mean()) for name in ("linear", "knn")}


def scored(learner: Learner, train: tuple[Tensor, np.ndarray], test: tuple[Tensor, np.ndarray]) -> dict[str, float]:
    learner.module.eval()
    with torch.no_grad():
        read = [torch.cat([learner.features(part) for part in pixels.split(500)]) for pixels, _ in (train, test)]
    return probe((read[0], train[1]), (read[1], test[1]))


def untrained(name: str, seed: int, train: Any, test: Any) -> dict[str, float]:
    torch.manual_seed(seed)
    return scored(SIDES[name](), train, test)


def run(name: str, seed: int, rate: float, budget: float, train: Any, test: Any) -> dict[str, float]:
    """Train for a budget of CPU seconds; the number of steps and the scores."""
    torch.manual_seed(seed)
    learner = SIDES[name]()
    learner.module.train()
    optimizer = torch.optim.AdamW(
        [each for each in learner.module.parameters() if each.requires_grad], rate, (0.9, 0.95), weight_decay=0.05
    )
    generator, steps, start = torch.Generator().manual_seed(seed), 0, time.process_time()
    while (share := (time.process_time() - start) / budget) < 1:
        index = torch.randint(len(train[0]), (BATCH,), generator=generator)
        optimizer.param_groups[0]["lr"] = rate * min(10 * share, (1 + math.cos(math.pi * share)) / 2)
        optimizer.zero_grad()
        learner.loss(train[0][index], generator).backward()
        optimizer.step()
        steps += 1
    return {"steps": steps, **scored(learner, train, test)}


if __name__ == "__main__":
    CLI(main, as_positional=False)
