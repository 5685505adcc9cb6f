"""Frozen features of a whole data set: of samples, or of tokens where labels are of tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.data import PreparedSamples, Samples
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel

Extractor = Callable[[Batch], Tensor]
Pooling = Literal["mean", "max", "sum", "mean_max"]


def features_of(
    samples: Samples, modality: Modality, models: Sequence[MMSSLModel], pooling: Pooling, device: torch.device | str
) -> list[np.ndarray]:
    """Raw features and those of each model: (samples, F), or (valid tokens, F) where labels are of tokens.

    Raises:
        ValueError: a sample has another number of tokens than of token labels; names it.
    """
    dataset = PreparedSamples(samples, modality)
    if samples.token_labels is None:
        return extract(dataset, [modality.raw_features, *(pooled(model, pooling) for model in models)], device)
    extractors = [token_counts(modality), raw_tokens(modality), *(token_states(model) for model in models)]
    counts, *features = extract(dataset, extractors, device)
    if len(counts) != len(samples):
        raise ValueError(f"token labels: found {len(counts)} rows of tokens for {len(samples)} samples; expected one")
    for number, (count, labels) in enumerate(zip(counts, samples.token_labels, strict=True)):
        if count != len(labels):
            raise ValueError(
                f"{samples.name(number)}: found {int(count):,} tokens and {len(labels):,} token labels; expected one "
                "label for each token, so a sample must be read whole"
            )
    return features


@torch.inference_mode()
def extract(dataset: PreparedSamples, extractors: Sequence[Extractor], device: torch.device | str) -> list[np.ndarray]:
    """What each extractor returns for all batches, one after the other; the data set is read once, in its order."""
    rows: list[list[Tensor]] = [[] for _ in extractors]
    for batch in DataLoader(dataset, batch_size=256, collate_fn=dataset.collate):
        inputs = {name: value.to(device) for name, value in batch["inputs"].items()}
        for collected, extractor in zip(rows, extractors, strict=True):
            collected.append(extractor(inputs).float().cpu())
    return [torch.cat(collected).numpy() for collected in rows]


def pooled(model: MMSSLModel, pooling: Pooling = "mean") -> Extractor:
    """The encoder's output over the valid tokens of each sample, (B, D) or (B, 2 D), with dropout off.

    Args:
        model: the encoder.
        pooling: "mean" is the model's ``pooler_output``; "mean_max" puts mean and max side by side.
    """
    model.eval()
    prefix = model.encoder.num_prefix_tokens

    def read(batch: Batch) -> Tensor:
        out = model(**batch)
        if pooling == "mean":
            return out.pooler_output
        hidden, valid = out.last_hidden_state[:, prefix:].float(), out.token_mask[:, prefix:, None]
        if len(hidden) != len(out.pooler_output):
            raise ValueError(
                f"pooling: found {pooling}, and {len(hidden)} rows of tokens for {len(out.pooler_output)} samples; "
                "only mean brings several rows of a sample together"
            )
        if pooling == "sum":
            return (hidden * valid).sum(dim=1)
        largest = hidden.masked_fill(~valid, -torch.inf).amax(dim=1)
        return largest if pooling == "max" else torch.cat([out.pooler_output.float(), largest], dim=1)

    return read


def token_states(model: MMSSLModel) -> Extractor:
    """The encoder's output for each valid token, (valid tokens, D), row after row, with dropout off."""
    model.eval()
    prefix = model.encoder.num_prefix_tokens

    def read(batch: Batch) -> Tensor:
        out = model(**batch)
        return out.last_hidden_state[:, prefix:][out.token_mask[:, prefix:]]

    return read


def raw_tokens(modality: Modality) -> Extractor:
    """The contents of each valid token, (valid tokens, F), row after row."""

    def read(batch: Batch) -> Tensor:
        tokens = modality.tokenize(batch)
        return tokens.content[tokens.valid].flatten(1)

    return read


def token_counts(modality: Modality) -> Extractor:
    """How many valid tokens each row has, (B,)."""
    return lambda batch: modality.tokenize(batch).valid.sum(dim=1)
