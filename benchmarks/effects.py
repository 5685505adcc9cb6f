"""Effects that papers claim of their methods, looked for on scikit-learn's digits, over three seeds.

    python benchmarks/effects.py        # writes docs/effects.md

Every arm of a comparison has the same encoder, data, steps and seeds, and differs in what is compared alone.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import CLI

from mmssl.data import DataArguments
from mmssl.data.builtin import digits
from mmssl.data.guided import clusters_of, guided_order
from mmssl.encoder import EncoderConfig
from mmssl.evaluation import embed, evaluate
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective
from mmssl.objectives.contrastive import Contrastive, uniformity
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.objectives.position_prediction import PositionPrediction
from mmssl.objectives.weighted_sum import Sum
from mmssl.training import TrainArguments, pretrain

DOCS = Path(__file__).parents[1] / "docs"
DIGITS: dict[str, Any] = {"image_size": 8, "num_channels": 1, "normalize_target": False}
HEADER = """# Effects

Made by `python benchmarks/effects.py`: what papers claim of their methods, on scikit-learn's 8x8 digits, {steps} steps
of batch 128, mean ± standard deviation over {seeds} seeds. A claim of learning has more and better tables in
[results](results.md); these are about mechanisms.
"""


def main(seeds: Sequence[int] = (0, 1, 2), steps: int = 500) -> None:
    """Measure and write the page.

    Args:
        seeds: of start values, data order, views and masks.
        steps: optimiser steps of each run.
    """
    parts = [HEADER.format(steps=steps, seeds=len(seeds))]
    with tempfile.TemporaryDirectory() as folder:
        for effect in (
            harder_negatives,
            places_from_content,
            guided_batches,
            blocks_are_harder,
            scattering_for_few_samples,
        ):
            title, text, table = effect(partial(run, Path(folder), steps), seeds)
            rows = ["| " + " | ".join(row) + " |" for row in table]
            parts.append(
                "\n".join([f"## {title}\n", f"{text}\n", rows[0], "|" + "---|" * len(table[0]), *rows[1:], ""])
            )
    (DOCS / "effects.md").write_text("\n".join(parts))


def run(
    folder: Path,
    steps: int,
    name: str,
    seed: int,
    objective: Callable[..., Objective],
    patch: int = 2,
    samples: int | None = None,
    short: bool = False,
    feed_forward: int | None = None,
    **options: Any,
) -> tuple[Path, dict[str, float]]:
    """Pretrain; returns the run, and its metrics as a mean over the last fifth of the steps.

    ``samples``: of the first so many. ``short``: half the steps of half the batch. ``options`` are the modality's.
    """
    output = folder / f"{name}-{seed}"
    pretrain(
        Image(patch_size=patch, **DIGITS | options),
        objective,
        EncoderConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=feed_forward),
        DataArguments("digits", max_samples=samples),
        TrainArguments(
            str(output),
            per_device_train_batch_size=64 if short else 128,
            max_train_steps=steps // 2 if short else steps,
            learning_rate=2e-3,
            logging_steps=10,
            seed=seed,
        ),
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = lines[-len(lines) // 5 :]
    return output, {key: float(np.mean([line[key] for line in last])) for key in last[0]}


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def harder_negatives(run: Callable, seeds: Sequence[int]) -> tuple[str, str, list[list[str]]]:
    """MoCHi (Kalantidis et al., 2020)."""
    arms: dict[str, dict[str, Any]] = {
        "MoCo, queue of 512": {},
        "mixtures of negatives": {"hard_negatives": 64, "mixed_negatives": 64},
        "also with the query": {"hard_negatives": 64, "mixed_negatives": 64, "query_mixed_negatives": 64},
    }
    table = [["", "positive ranks first", "loss", "uniformity of test embeddings", "kNN"]]
    for number, (arm, options) in enumerate(arms.items()):
        objective = partial(
            Contrastive, temperature=0.1, projector_hidden_size=128, projector_size=64, momentum=(0.99, 0.99), **options
        )
        found = []
        for seed in seeds:
            path, last = run(f"mochi{number}", seed, partial(objective, queue_size=512), crop_scale=(0.4, 1.0))
            values = np.load(embed(path, DataArguments("digits", split="test"), path / "test.npz"))["embedding"]
            unit = torch.nn.functional.normalize(torch.from_numpy(values - values.mean(axis=0)), dim=1)
            (score,) = evaluate([path], DataArguments("digits"), protocols=["knn"], baselines=False)
            found.append((last["accuracy"], last["loss"], float(uniformity(unit)), score.values[0]))
        table.append([arm, *(spread(values) for values in zip(*found, strict=True))])
    return (
        "MoCHi: do mixed negatives make the task harder?",
        "Whether the positive ranks before all negatives of the queue, mixed ones left out. Uniformity (lower is more "
        "uniform) is of centred embeddings.",
        table,
    )


def places_from_content(run: Callable, seeds: Sequence[int]) -> tuple[str, str, list[list[str]]]:
    """MP3 (Zhai et al., 2022)."""
    table = [["context read", "accuracy (chance .063)", "kNN untrained", "kNN", "linear untrained", "linear"]]
    for ratio in (0.0, 0.5, 0.75):
        runs, accuracies = zip(
            *(run(f"mp3{ratio}", seed, partial(PositionPrediction, mask_ratio=ratio, views=False)) for seed in seeds),
            strict=True,
        )
        scores = evaluate(runs, DataArguments("digits"), protocols=["knn", "linear"])
        cells = {(score.protocol, score.row): spread(score.values) for score in scores if score.row != "raw"}
        accuracy = spread([last["accuracy"] for last in accuracies])
        table.append([f"{1 - ratio:.0%}", accuracy, *cells.values()])
    order = [0, 1, *(2 + list(cells).index(key) for key in (("knn", "untrained"), ("knn", "pretrained")))]
    order += [2 + list(cells).index(key) for key in (("linear", "untrained"), ("linear", "pretrained"))]
    table = [table[0], *([row[i] for i in order] for row in table[1:])]
    return "MP3: are places found from content?", "Raw pixels: kNN .986, linear .972. Blank patches look alike.", table


def guided_batches(run: Callable, seeds: Sequence[int]) -> tuple[str, str, list[list[str]]]:
    """G-SimCLR (Chakraborty et al., 2020)."""
    labels = torch.as_tensor(digits("train").labels)
    random, guided = [], []
    for seed in seeds:
        objective = partial(MaskedReconstruction, views=False, decoder_layers=1, decoder_hidden_size=32)
        path, _ = run("guide", seed, objective)
        embedded = embed(path, DataArguments("digits"), path / "train.npz")
        generator = torch.Generator().manual_seed(seed)
        order = guided_order(clusters_of(str(embedded), len(labels), 64, seed), generator)
        guided.append(same_class(labels[order]))
        random.append(same_class(labels[torch.randperm(len(labels), generator=generator)]))
    table = [["batches of 64", "pairs of one class"], ["random", spread(random)], ["guided", spread(guided)]]
    return (
        "G-SimCLR: are there fewer pairs of one class in a batch?",
        "64 clusters of masked reconstruction's embeddings, ten classes.",
        table,
    )


def same_class(labels: torch.Tensor) -> float:
    """Share of the pairs within batches of 64 whose labels agree."""
    batches = labels[: len(labels) // 64 * 64].unflatten(0, (-1, 64))
    same = (batches[:, :, None] == batches[:, None]).float().sum(dim=(1, 2)) - 64
    return float(same.mean() / (64 * 63))


def blocks_are_harder(run: Callable, seeds: Sequence[int]) -> tuple[str, str, list[list[str]]]:
    """GMML (Atito et al., 2022), by masks alone."""
    table = [["hidden", "loss"]]
    for style in ("random", "block"):
        objective = partial(
            MaskedReconstruction,
            mask_ratio=0.6,
            mask_style=style,
            views=False,
            decoder_layers=1,
            decoder_hidden_size=32,
        )
        losses = [run(f"mask-{style}", seed, objective, patch=1, max_block=0.5)[1]["loss"] for seed in seeds]
        table.append([f"{style}, 60 %", spread(losses)])
    return (
        "Are blocks harder to fill in than random patches?",
        "64 patches of one pixel; squared error of normalised pixels.",
        table,
    )


def scattering_for_few_samples(run: Callable, seeds: Sequence[int]) -> tuple[str, str, list[list[str]]]:
    """ScatSimCLR (Kinakh et al., 2021)."""
    wavelets: dict[str, Any] = {"scattering_scales": 2, "scattering_directions": 4}
    contrast: dict[str, Any] = {"temperature": 0.2, "projector_hidden_size": 128, "projector_size": 64}
    terms = {
        "contrast": {"class_path": "Contrastive", "init_args": contrast},
        "turns": {"class_path": "TransformPrediction", "init_args": {"pretext": "rotation", "head_widths": [128]}},
    }
    simclr, both = partial(Contrastive, **contrast), partial(Sum, terms=terms, weights={"turns": 0.3})
    arms: list[tuple[str, Callable[..., Objective], dict[str, Any]]] = [
        # One more unit in each feed-forward layer: about as many weights as the wider embedding of scattering has.
        ("SimCLR, pixels", simclr, {"feed_forward": 257}),
        ("SimCLR, scattering", simclr, wavelets),
        ("SimCLR and rotation, scattering", both, wavelets),
    ]
    options = {"image_size": 16, "crop_scale": (0.5, 1.0), "rotation": 10.0, "short": True}
    table = [["tokens", "trained on", "weights", "kNN", "linear"]]
    for count in (200, 1000):
        for number, (arm, objective, own) in enumerate(arms):
            paths = [
                run(f"scattering{count}-{number}", seed, objective, patch=4, samples=count, **options, **own)[0]
                for seed in seeds
            ]
            baselines = count == 200 and number < 2
            scores = evaluate(paths, DataArguments("digits"), protocols=["knn", "linear"], baselines=baselines)
            weights = f"{MMSSLModel.from_pretrained(paths[0]).num_parameters():,}"
            of = {
                row: [
                    spread(score.values) if len(score.values) > 1 else f"{score.values[0]:.3f}"
                    for score in scores
                    if score.row == row
                ]
                for row in ("raw", "untrained", "pretrained")
            }
            if baselines:
                what = arm.split(", ")[1]
                table.append([f"{what}, raw", "", "0", *of["raw"]])
                table.append([f"{what}, untrained encoder", "", weights, *of["untrained"]])
            table.append([arm, str(count), weights, *of["pretrained"]])
    return (
        "ScatSimCLR: do fixed wavelets help where there are few samples?",
        "Digits resized to 16x16, patches of 4x4, two scales and four directions; half the steps of batches of 64. "
        "Probes are fitted on all labelled training digits.",
        table,
    )


if __name__ == "__main__":
    CLI(main, as_positional=False)
