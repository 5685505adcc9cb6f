"""Pictures of what an objective makes of samples."""

from pathlib import Path

import torch

from mmssl.figures import draw_samples
from mmssl.modalities.base import Batch
from mmssl.objectives.base import Objective


@torch.inference_mode()
def draw_reconstructions(objective: Objective, batch: Batch, path: str | Path, seed: int = 0) -> Path | None:
    """Draw each sample of a batch as it is, as the encoder sees it, and as it is reconstructed.

    Returns None, and draws nothing, where the objective reconstructs nothing.

    Args:
        objective: the trained objective, decoder and head included.
        batch: a few samples, collated.
        path: the picture to write; its ending chooses the format.
        seed: chooses what is hidden.
    """
    modality, tensor = objective.model.modality_of(batch), next(iter(batch.values()))
    generator = torch.Generator(device=tensor.device).manual_seed(seed)
    columns = objective.eval().shown(modality, modality.tokenize(batch), generator)
    if len(columns) == 1:
        return None
    draw_samples(modality, columns).savefig(path, dpi=120)
    return Path(path)
