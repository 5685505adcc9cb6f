"""Frozen features of a whole data set."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.data import PreparedSamples
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel


@torch.inference_mode()
def extract(dataset: PreparedSamples, features: Callable[[Batch], Tensor], device: torch.device | str) -> np.ndarray:
    """What ``features`` returns for each batch, (samples, F), in the order of the data set."""
    loader = DataLoader(dataset, batch_size=256, collate_fn=dataset.collate)
    rows = []
    for batch in loader:
        inputs = {name: value.to(device) for name, value in batch["inputs"].items()}
        rows.append(features(inputs).float().cpu())
    return torch.cat(rows).numpy()


def pooled(model: MMSSLModel) -> Callable[[Batch], Tensor]:
    """The mean of the encoder's output over the valid tokens, with dropout off."""
    model.eval()
    return lambda batch: model(**batch).pooler_output
