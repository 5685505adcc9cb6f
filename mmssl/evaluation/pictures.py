"""Pictures of what masked reconstruction does."""

from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmssl.modalities.base import Batch
from mmssl.objectives.masked_reconstruction import MaskedReconstruction


@torch.inference_mode()
def draw_reconstructions(objective: MaskedReconstruction, batch: Batch, path: str | Path, seed: int = 0) -> Path:
    """Draw each sample of a batch as it is, as the encoder sees it, and as it is reconstructed.

    Args:
        objective: the trained objective, decoder and head included.
        batch: a few samples, collated.
        path: the picture to write; its ending chooses the format.
        seed: chooses what is hidden.
    """
    objective.eval()
    modality = objective.model.modality_of(batch)
    clean = modality.tokenize(batch)
    out = objective.reconstruct(modality, clean, torch.Generator(device=clean.content.device).manual_seed(seed))
    if out.index is None:
        where = out.where.reshape(out.where.shape + (1,) * (clean.content.dim() - out.where.dim()))
        seen = out.seen.content
        restored = torch.where(where, modality.content_of(out.prediction, clean), clean.content)
    else:
        rows = torch.arange(len(clean.content), device=out.index.device)[:, None]
        predicted = modality.content_of(out.prediction, clean.select(out.index, out.where))
        restored = clean.content.clone()
        restored[rows, out.index] = predicted.to(restored.dtype)
        hidden = torch.zeros_like(clean.valid)
        hidden[rows, out.index] = out.where
        hidden = hidden.reshape(hidden.shape + (1,) * (restored.dim() - hidden.dim()))
        seen = clean.content.masked_fill(hidden, torch.nan)
        restored = torch.where(hidden, restored, clean.content)
    columns = {"original": clean.content, "seen": seen, "reconstructed": restored}

    count = len(clean.content)
    figure = Figure(figsize=(1.6 * count, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, count, squeeze=False)
    for row, (title, content) in zip(axes, columns.items(), strict=True):
        pictures = modality.picture(replace(clean, content=content)).cpu()
        row[0].set_ylabel(title)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.nan_to_num(0.75), aspect="auto", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=120)
    return Path(path)
