"""What the matrix needs to know of each modality and each objective: a tiny one, and a few samples of it."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mmssl.discovery import find_all, names
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.objectives.base import Objective


def images(count: int) -> list[Any]:
    from sklearn.datasets import load_digits

    return [image.astype(np.float32) / 16 for image in load_digits().images[:count]]


def sounds(count: int) -> list[Any]:
    """Chords that swell and fade, and differ in pitch and length."""
    generator = np.random.default_rng(0)
    clips = []
    for number in range(count):
        time = np.arange(1600 + 160 * number) / 8000
        tones = [np.sin(2 * np.pi * pitch * time) for pitch in generator.uniform(200, 3000, 3)]
        swells = [1.1 + np.sin(2 * np.pi * rate * time) for rate in generator.uniform(2, 8, 3)]
        clips.append(np.sum(np.multiply(tones, swells), axis=0).astype(np.float32))
    return clips


def clouds(count: int) -> list[Any]:
    """Ellipsoids with an intensity, of different shapes and numbers of points."""
    generator = np.random.default_rng(0)
    spheres = [generator.normal(size=(48 + 8 * number, 4)) for number in range(count)]
    for points in spheres:
        points[:, :3] *= generator.uniform(0.3, 1.0, 3) / np.linalg.norm(points[:, :3], axis=1, keepdims=True)
    return spheres


def graphs(count: int) -> list[Any]:
    """Rings with random chords, of different sizes, with random features."""
    generator = np.random.default_rng(0)
    made = []
    for nodes in range(8, 8 + count):
        ring = np.stack([np.arange(nodes), np.roll(np.arange(nodes), 1)])
        chords = generator.integers(nodes, size=(2, 4))
        made.append({"x": generator.normal(size=(nodes, 12)), "edge_index": np.concatenate([ring, chords], axis=1)})
    return made


TABLE: list[dict[str, Any]] = [
    {"name": "size", "kind": "numerical", "mean": 1.0, "std": 2.0, "min": -8.0, "max": 9.0, "missing": 0.1},
    {"name": "colour", "kind": "categorical", "categories": ["blue", "green", "red"], "missing": 0.1},
    {"name": "weight", "kind": "numerical", "mean": 0.0, "std": 1.0, "min": -5.0, "max": 5.0, "missing": 0.0},
    {"name": "word", "kind": "categorical", "buckets": 5, "missing": 0.0},
    {"name": "age", "kind": "numerical", "mean": 40.0, "std": 20.0, "min": 0.0, "max": 99.0, "missing": 0.0},
    {"name": "yes", "kind": "categorical", "categories": [False, True], "missing": 0.0},
]


def rows(count: int) -> list[Any]:
    """Rows of a table with columns of every kind."""
    generator = np.random.default_rng(0)
    return [
        {
            "size": generator.normal(1, 2),
            "colour": str(generator.choice(["blue", "green", "red"])),
            "weight": generator.normal(),
            "word": f"word {generator.integers(30)}",
            "age": int(generator.integers(80)),
            "yes": bool(generator.integers(2)),
        }
        for _ in range(count)
    ]


def series(count: int) -> list[Any]:
    """A wave and the same one smaller and later, of different pitches and lengths, the second with a gap."""
    generator = np.random.default_rng(0)
    made = []
    for steps in range(33, 33 + 3 * count, 3):
        time = np.arange(steps) - [[0], [5]]
        made.append(np.sin(generator.uniform(0.1, 0.5) * time) * [[5.0], [0.1]] + [[0.0], [100.0]])
        made[-1][1, 9:15] = np.nan
    return made


def clips(count: int) -> list[Any]:
    """Digits that go round to the right, each at a speed of its own."""
    speeds = np.arange(count) % 3 + 1
    return [
        np.stack([np.roll(digit, speed * time, axis=1) for time in range(4)])
        for digit, speed in zip(images(count), speeds, strict=True)
    ]


MODALITIES: dict[str, tuple[dict[str, Any], Callable[[int], list[Any]]]] = {
    "image": (
        {"image_size": 8, "patch_size": 2, "num_channels": 1, "normalize_target": False, "horizontal_flip": 0.5},
        images,
    ),
    "speech": (
        {
            "sampling_rate": 8000,
            "num_mels": 20,
            "n_fft": 200,
            "win_length": 200,
            "hop_length": 80,
            "crop_scale": [0.8, 1],
        },
        sounds,
    ),
    "point_cloud": (
        {"num_points": 128, "num_groups": 12, "group_size": 8, "num_channels": 1, "drop": 0.2, "scale": [0.8, 1.2]},
        clouds,
    ),
    "graph": ({"num_features": 12, "random_walk_steps": 4, "drop_edges": 0.1, "mask_features": 0.1}, graphs),
    "tabular": ({"schema": TABLE, "corruption_ratio": 0.2}, rows),
    "time_series": (
        {"patch_length": 8, "jitter": 0.02, "scale": [0.8, 1.2], "time_warp": 0.1, "crop_scale": [0.9, 1.0]},
        series,
    ),
    "video": (
        {
            "num_frames": 4,
            "frame_stride": 1,
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "normalize_target": False,
            "horizontal_flip": 0.5,
        },
        clips,
    ),
}
SMALL_DECODER = {"decoder_hidden_size": 16, "decoder_attention_heads": 2}
SMALL_PREDICTOR = {"predictor_layers": 1, "predictor_hidden_size": 16, "predictor_attention_heads": 2}
SMALL_PROJECTOR = {"projector_layers": 2, "projector_hidden_size": 16, "projector_size": 16}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "MaskedReconstruction": [
        {"corruption": "drop", "decoder_layers": 1, **SMALL_DECODER},
        {"corruption": "drop", "mask_ratio": 0.6, "predict_ratio": 0.5, "decoder_layers": 1, **SMALL_DECODER},
        {"corruption": "replace", "decoder_layers": 0, "mask_style": "block", "masks_per_sample": 2},
        {
            "corruption": "replace",
            "mask_ratio": 0.5,
            "mask_token_space": "input",
            "replace_ratio": 0.3,
            "remask": True,
            "decoder_layers": 1,
            **SMALL_DECODER,
        },
        {"corruption": "alter", "decoder_layers": 1, "head_layers": 1, "head_norm": True, **SMALL_DECODER},
    ],
    "LatentPrediction": [
        {**SMALL_PREDICTOR},
        {
            "num_targets": [2],
            "target_scale": [[0.2, 0.5]],
            "context": "first",
            "context_scale": [0.2, 0.4],
            "distance": "l2",
            "normalize_target": False,
            **SMALL_PREDICTOR,
        },
        {
            "num_targets": [1, 1],
            "target_blocks": [3, 1],
            "target_scale": [[0.15, 0.15], [0.5, 0.5]],
            "context": "complement",
            "distance": "l1",
            **SMALL_PREDICTOR,
        },
        {
            "num_targets": [3],
            "target_scale": [[0.3, 0.3]],  # of a graph's nodes: with more, some keep no neighbour to tell them apart by
            "target_style": "random",
            "context": "complement",
            "average_layers": [1, 2],
            "distance": "l2",
            **SMALL_PREDICTOR,
        },
    ],
    "Contrastive": [
        {"temperature": 0.3, **SMALL_PROJECTOR, "projector_layers": 1},
        {
            "temperature": 0.5,
            "projector_hidden_size": 32,
            "projector_size": 32,
            "predictor_layers": 2,
            "momentum": [0.9, 1.0],
            "scale_by_temperature": True,
        },
        {
            "temperature": 0.3,
            "momentum": [0.9, 0.9],
            "queue_size": 10,
            "hard_negatives": 4,
            "mixed_negatives": 2,
            "query_mixed_negatives": 1,
            "extrapolation": 2.0,
            "interpolation": 1.6,
            **SMALL_PROJECTOR,
        },
    ],
    "GroupOrdering": [
        {"num_negatives": 3, "steepness": 3.0, **SMALL_PROJECTOR},  # its loss has a least value, which falls with this
        {"num_views": 3, "num_negatives": 2, "steepness": 3.0, **SMALL_PROJECTOR},
    ],
    "BarlowTwins": [
        {"redundancy_weight": 0.05, **SMALL_PROJECTOR},
        {"redundancy_weight": 0.05, "mix_weight": 2.0, **SMALL_PROJECTOR},
    ],
    "VICReg": [{**SMALL_PROJECTOR}],
    "SelfDistillation": [
        {**SMALL_PROJECTOR},
        {"prototypes": 8, "local_views": 2, "local_scale": [0.3, 0.6], "freeze_prototypes": 0.0, **SMALL_PROJECTOR},
        {
            "prototypes": 8,
            "token_weight": 1.0,
            "mask_style": "block",
            "teacher_temperature": [0.01, 0.01],  # the loss cannot go below the entropy of what the teacher says
            "freeze_prototypes": 0.0,
            "mask_ratio": 0.2,
            **SMALL_PROJECTOR,
        },
    ],
    "PositionPrediction": [{"mask_ratio": 0.5}],
    "TransformPrediction": [
        {"pretext": "rotation", "head_widths": [16]},
        {"pretext": "order", "head_widths": []},
        {"pretext": "up", "head_widths": [16]},
    ],
    "Autoregressive": [{"shift": 2}],
    "BagOfWords": [
        {"words": 12, "crop_scale": [0.3, 0.6]},
        {"words": 6, "layers": [1, 2], "crops": 1, "crop_scale": [0.5, 0.5], "momentum": [0.9, 1.0]},
    ],
    "EmbeddingMixup": [{"alpha": 0.3, "projector_size": 16}],
    "FeatureMatching": [{"teacher": ""}],  # `build` puts in an untrained one
    "ShuffledEmbeddingDetection": [{"shuffle_ratio": 0.2}],
    "SupReMix": [  # its loss has a least value, the higher the further apart samples are that are mixed
        {"temperature": 0.3, "mixed_positives": 2, "mixed_negatives": 2, "window": 1.0, **SMALL_PROJECTOR},
        {
            "temperature": 0.5,
            "mixed_positives": 2,
            "mixed_negatives": 1,
            "window": 1.0,
            "tolerance": 0.2,
            "magnify": 0.0,
            **SMALL_PROJECTOR,
        },
    ],
    "Sum": [
        {
            "terms": {
                "pixels": {
                    "class_path": "MaskedReconstruction",
                    "init_args": {"decoder_layers": 1, **SMALL_DECODER},
                },
                "latents": {"class_path": "LatentPrediction", "init_args": SMALL_PREDICTOR},
            },
            "weights": {"latents": 0.5},
        },
    ],
}


def with_its_masks(modality: str, options: dict[str, Any]) -> dict[str, Any]:
    """These options of an objective, with random masks where the modality has no others."""
    styles = make_modality(modality, {}).mask_styles
    return options if options.get("mask_style", "random") in styles else options | {"mask_style": "random"}


ALL = [
    (modality, objective, with_its_masks(modality, options))
    for modality in names("modalities")
    for objective in find_all("objectives", Objective)
    for options in OBJECTIVES.get(objective, [])
]


def refused(modality: str, objective: str, options: dict[str, Any]) -> bool:
    """Whether the modality lacks what these options of an objective need."""
    chosen = make_modality(modality, MODALITIES[modality][0])
    if objective == "PositionPrediction" and not chosen.offers("places"):
        return True
    if objective == "TransformPrediction" and options["pretext"] not in chosen.pretexts:
        return True
    if objective in ("Autoregressive", "EmbeddingMixup") and not chosen.aligned:
        return True
    if options.get("mix_weight") and not chosen.aligned:
        return True
    return options.get("corruption") == "alter" and not chosen.offers("alter")


CELLS = [cell for cell in ALL if not refused(*cell)]
REFUSED = [cell for cell in ALL if refused(*cell)]
IDS = [f"{modality}-{objective}-{number}" for number, (modality, objective, _) in enumerate(CELLS)]


def build(modality: str, objective: str, options: dict[str, Any], **config: Any) -> tuple[Objective, Modality]:
    """A tiny objective over a tiny model, in training mode, and a modality for the data side."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "class_token": True, **config}
    sizes["causal_attention"] = objective == "Autoregressive"
    model = MMSSLModel(MMSSLConfig(modalities={modality: MODALITIES[modality][0]}, **sizes))
    if options.get("teacher") == "":
        options = options | {"teacher": untrained(modality, sizes["hidden_size"])}
    adapter = make_modality(modality, MODALITIES[modality][0])
    module = find_all("objectives", Objective)[objective](model, **options).train()
    if module.needs_labels:
        collate = adapter.collate
        adapter.collate = lambda samples: collate(samples) | {"labels": labels(len(samples))}  # type: ignore
    return module, adapter


@functools.cache
def untrained(modality: str, width: int) -> str:
    """Folder of a saved model of this width, the same in each process."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = MMSSLModel(MMSSLConfig(modalities={modality: MODALITIES[modality][0]}, **sizes))
    model.config.architectures = ["MMSSLModel"]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})  # of several processes, each its own
    return folder


def labels(count: int) -> torch.Tensor:
    """Quantities that are all different."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def make_batch(adapter: Modality, count: int) -> dict[str, Any]:
    samples = MODALITIES[adapter.name][1](count)
    return adapter.collate([adapter.excerpt(adapter.prepare(sample), None) for sample in samples])
