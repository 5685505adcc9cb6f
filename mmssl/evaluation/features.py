"""Frozen features of a whole data set."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.data import PreparedSamples
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel

Extractor = Callable[[Batch], Tensor]


@torch.inference_mode()
def extract(dataset: PreparedSamples, extractors: Sequence[Extractor], device: torch.device | str) -> list[np.ndarray]:
    """What each extractor returns for all batches, (samples, F), in the order of the data set, which is read once."""
    rows: list[list[Tensor]] = [[] for _ in extractors]
    for batch in DataLoader(dataset, batch_size=256, collate_fn=dataset.collate):
        inputs = {name: value.to(device) for name, value in batch["inputs"].items()}
        for collected, extractor in zip(rows, extractors, strict=True):
            collected.append(extractor(inputs).float().cpu())
    return [torch.cat(collected).numpy() for collected in rows]


def pooled(model: MMSSLModel) -> Extractor:
    """The mean of the encoder's output over the valid tokens, with dropout off."""
    model.eval()
    return lambda batch: model(**batch).pooler_output
