"""Pictures of what masked reconstruction does."""

from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmssl.modalities.base import Batch, Modality
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.tokens import Tokens


@torch.inference_mode()
def reconstructed(
    objective: MaskedReconstruction, modality: Modality, clean: Tokens, seed: int = 0
) -> dict[str, Tokens]:
    """Tokens as they are ("original"), as the encoder reads them ("seen", hidden content is NaN) and "reconstructed".

    Only what was hidden or altered differs from the original in a reconstruction.

    Args:
        objective: the trained objective, decoder and head included.
        modality: the one of its modalities that made the tokens.
        clean: the tokens of a few samples.
        seed: chooses what is hidden.
    """
    objective.eval()
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
    contents = {"original": clean.content, "seen": seen, "reconstructed": restored}
    return {title: replace(clean, content=content) for title, content in contents.items()}


@torch.inference_mode()
def draw_reconstructions(objective: MaskedReconstruction, batch: Batch, path: str | Path, seed: int = 0) -> Path:
    """Draw each sample of a batch as it is, as the encoder sees it, and as it is reconstructed.

    Args:
        objective: the trained objective, decoder and head included.
        batch: a few samples, collated.
        path: the picture to write; its ending chooses the format.
        seed: chooses what is hidden.
    """
    modality = objective.model.modality_of(batch)
    columns = reconstructed(objective, modality, modality.tokenize(batch), seed)

    count = len(columns["original"].content)
    figure = Figure(figsize=(1.6 * count, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, count, squeeze=False)
    for row, (title, tokens) in zip(axes, columns.items(), strict=True):
        pictures = modality.picture(tokens).cpu()
        row[0].set_ylabel(title)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.nan_to_num(0.75), aspect="auto", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=120)
    return Path(path)
