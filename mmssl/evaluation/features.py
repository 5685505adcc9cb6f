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
Pooling = Literal["mean", "max", "sum", "mean_max", "mean_rows", "flatten"]


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
    if len({row.shape[1:] for row in rows[-1]}) > 1:
        raise ValueError("pooling: found flatten, and samples of different lengths; use mean, max or mean_max")
    return [torch.cat(collected).numpy() for collected in rows]


def pooled(model: MMSSLModel, pooling: Pooling = "mean") -> Extractor:
    """The encoder's output over the tokens of each sample, with dropout off; padding never counts.

    Args:
        model: the encoder.
        pooling: "mean", the model's ``pooler_output``, "max" or "sum", (B, D); "mean_max", both side by side, (B, 2 D);
            "mean_rows", the means of a sample's rows (the channels of a series) side by side; or "flatten", all of its
            tokens side by side, (B, N D), class and register tokens too, which the others leave out.
    """
    model.eval()
    prefix = model.encoder.num_prefix_tokens

    def read(batch: Batch) -> Tensor:
        out = model(**batch)
        if pooling == "mean":
            return out.pooler_output
        first = 0 if pooling == "flatten" else prefix
        samples, width = len(out.pooler_output), out.last_hidden_state.shape[-1]
        # The rows of a sample that has several follow one another.
        hidden = out.last_hidden_state[:, first:].float().reshape(samples, -1, width)
        valid = out.token_mask[:, first:].reshape(samples, -1, 1)
        if pooling == "flatten":
            if not valid.all():
                raise ValueError("pooling: found flatten, and samples of different lengths; use mean, max or mean_max")
            return hidden.flatten(1)
        if pooling == "mean_rows":
            hidden, valid = (each.unflatten(1, (-1, out.token_mask.shape[1] - prefix)) for each in (hidden, valid))
            return ((hidden * valid).sum(dim=2) / valid.sum(dim=2).clamp(min=1)).flatten(1)
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
