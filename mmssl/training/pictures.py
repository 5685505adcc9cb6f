"""Pictures for the trackers while a run trains: samples, a map of their embeddings, and how alike they are."""

from typing import Any

import numpy as np
from accelerate import Accelerator
from sklearn.decomposition import PCA
from torch import Tensor

from mmssl.figures import PALETTE, color_of, cosine_pairs, draw_map, draw_samples, draw_similarities, pixels_of, unit
from mmssl.modalities.base import Modality
from mmssl.tokens import Tokens


def draw_pictures(
    modality: Modality, shown: dict[str, Tokens], features: Tensor, labels: np.ndarray | None, views: Any
) -> dict[str, np.ndarray]:
    """Pixels (height, width, 3) of each picture, by its name; those of features only where all of them are finite.

    Args:
        modality: what the samples are.
        shown: a few samples, and what the objective makes of them.
        features: (n, D) of more of them.
        labels: (n,) of these, if they have any.
        views: features (m, D) of one view and of another one of some samples, if there are views.
    """
    found = {"samples": draw_samples(modality, shown)}
    if features.isfinite().all():
        vectors = features.numpy()
        quantities = labels if labels is not None and labels.dtype.kind == "f" else None
        groups = [("", PALETTE[0], np.arange(len(vectors)))]
        if labels is not None and quantities is None:
            classes = np.unique(labels)
            groups = [(str(c), color_of(i, len(classes)), np.flatnonzero(labels == c)) for i, c in enumerate(classes)]
        found["map"] = draw_map({"PCA": PCA(2, random_state=0).fit_transform(unit(vectors))}, groups, quantities)
        if pairs := cosine_pairs(vectors, labels, views and (views[0].numpy(), views[1].numpy())):
            found["similarities"] = draw_similarities(pairs)
    return {name: pixels_of(figure) for name, figure in found.items()}


def log_pictures(accelerator: Accelerator, pictures: dict[str, np.ndarray], step: int) -> None:
    """Give them to the trackers that take any; called by the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: each[None] for name, each in pictures.items()}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [each] for name, each in pictures.items()}, step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(each) for name, each in pictures.items()}, step)
