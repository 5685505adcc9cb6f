"""Frozen features of a whole data set: of samples, or of tokens where labels are of tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmssl.data import PreparedSamples, Samples
from mmssl.evaluation.models import AnyModel
from mmssl.modalities.base import Batch, Modality

Extractor = Callable[[Batch], Tensor]
Pooling = Literal["mean", "max", "sum", "mean_max", "mean_rows", "flatten", "cls"]


def features_of(
    samples: Samples,
    modality: Modality,
    models: Sequence[AnyModel],
    pooling: Pooling,
    device: torch.device | str,
    reads: str = "pooled",
) -> list[np.ndarray]:
    """Raw features and those of each model.

    Args:
        samples: what is read.
        modality: which reads it.
        models: encoders.
        pooling: from tokens to samples.
        device: of the models.
        reads: "pooled": (samples, F), or (valid tokens, F) where labels are of tokens; "layers": the same of each
            layer, (samples, layers, F), of raw features a single one; "tokens": all tokens of each sample, (samples,
            tokens, F), NaN where a sample has fewer, class and register tokens left out.

    Raises:
        ValueError: a sample has another number of tokens than of token labels; names it. Or all tokens of samples are
            asked for where labels are of tokens.
    """
    dataset = PreparedSamples(samples, modality)
    if samples.token_labels is None:
        raw = raw_sequences(modality) if reads == "tokens" else modality.raw_features
        encoded = {
            "pooled": lambda model: pooled(model, pooling),
            "layers": lambda model: layers(model, pooling),
            "tokens": sequences,
        }[reads]
        found = extract(dataset, [raw, *map(encoded, models)], device)
        if reads == "layers":
            found[0] = found[0][:, None]
        return found
    if reads != "pooled":
        raise ValueError(f"found labels of tokens, and a protocol that reads {reads} of samples; use another one")
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
    if any(len({row.shape[1:] for row in collected if row.dim() == 2}) > 1 for collected in rows):
        raise ValueError("pooling: found flatten, and samples of different lengths; use mean, max or mean_max")
    return [joined(collected).numpy() for collected in rows]


def joined(batches: list[Tensor]) -> Tensor:
    """All batches, one after the other; of tokens (B, N, F), those with fewer are filled up with NaN."""
    if batches[0].dim() == 3:
        most = max(batch.shape[1] for batch in batches)
        batches = [nn.functional.pad(batch, (0, 0, 0, most - batch.shape[1]), value=torch.nan) for batch in batches]
    return torch.cat(batches)


def pooled(model: AnyModel, pooling: Pooling = "mean") -> Extractor:
    """The encoder's output over the tokens of each sample, with dropout off; padding never counts.

    Args:
        model: the encoder.
        pooling: "mean", the model's ``pooler_output``, "max" or "sum", (B, D); "mean_max", both side by side, (B, 2 D);
            "mean_rows", the means of a sample's rows (the channels of a series) side by side; or "flatten", all of its
            tokens side by side, (B, N D), class and register tokens too, which the others leave out; "cls" is the class
            token alone, (B, D), the mean of those of a sample's rows.
    """
    check_class_token(model, pooling)
    model.eval()
    prefix = model.encoder.num_prefix_tokens

    def read(batch: Batch) -> Tensor:
        out = model(**batch)
        if pooling == "mean":
            return out.pooler_output
        return pool(out.last_hidden_state, out.token_mask, len(out.pooler_output), prefix, pooling)

    return read


def layers(model: AnyModel, pooling: Pooling = "mean") -> Extractor:
    """The pooled input of the first block and the pooled output of each one, (B, layers + 1, F), with dropout off."""
    check_class_token(model, pooling)
    model.eval()
    prefix = model.encoder.num_prefix_tokens

    def read(batch: Batch) -> Tensor:
        out = model(**batch, output_hidden_states=True)
        hidden = [*out.hidden_states[:-1], out.last_hidden_state]
        if len(widths := sorted({each.shape[-1] for each in hidden})) > 1:
            raise ValueError(
                f"layers: found outputs of {', '.join(map(str, widths))} features; expected all of one width"
            )
        samples = len(out.pooler_output)
        return torch.stack([pool(each, out.token_mask, samples, prefix, pooling) for each in hidden], dim=1)

    return read


def check_class_token(model: AnyModel, pooling: str) -> None:
    """Refuse to read a class token that a model does not have."""
    if pooling == "cls" and not model.config.class_token:
        raise ValueError("pooling: found cls, but the encoder has no class token; use mean, max, sum or mean_max")


def pool(hidden: Tensor, mask: Tensor, samples: int, prefix: int, pooling: Pooling) -> Tensor:
    """From the hidden state of a layer (rows, prefix + N, D) to samples (B, F)."""
    if pooling == "cls":
        return hidden[:, 0].float().reshape(samples, -1, hidden.shape[-1]).mean(dim=1)
    first = 0 if pooling == "flatten" else prefix
    # The rows of a sample that has several follow one another.
    valid = mask[:, first:].reshape(samples, -1, 1)
    hidden = hidden[:, first:].float().reshape(samples, valid.shape[1], -1)
    if pooling == "flatten":
        if not valid.all():
            raise ValueError("pooling: found flatten, and samples of different lengths; use mean, max or mean_max")
        return hidden.flatten(1)
    if pooling == "mean_rows":
        hidden, valid = (each.unflatten(1, (-1, mask.shape[1] - prefix)) for each in (hidden, valid))
        return ((hidden * valid).sum(dim=2) / valid.sum(dim=2).clamp(min=1)).flatten(1)
    total = (hidden * valid).sum(dim=1)
    if pooling == "sum":
        return total
    mean = total / valid.sum(dim=1).clamp(min=1)
    if pooling == "mean":
        return mean
    largest = hidden.masked_fill(~valid, -torch.inf).amax(dim=1)
    return largest if pooling == "max" else torch.cat([mean, largest], dim=1)


def sequences(model: AnyModel) -> Extractor:
    """The encoder's output for all tokens of each sample, (B, N, D), NaN for padding, with dropout off."""
    model.eval()
    prefix = model.encoder.num_prefix_tokens

    def read(batch: Batch) -> Tensor:
        out = model(**batch)
        hidden = out.last_hidden_state[:, prefix:].float()
        hidden = hidden.masked_fill(~out.token_mask[:, prefix:, None], torch.nan)
        return hidden.reshape(len(out.pooler_output), -1, hidden.shape[-1])

    return read


def raw_sequences(modality: Modality) -> Extractor:
    """The contents of all tokens of each sample, (B, N, F), NaN for padding."""

    def read(batch: Batch) -> Tensor:
        tokens = modality.tokenize(batch)
        content = tokens.content.float().flatten(2).nan_to_num().masked_fill(~tokens.valid[..., None], torch.nan)
        samples = len(content) if tokens.sample is None else int(tokens.sample.max()) + 1
        return content.reshape(samples, -1, content.shape[-1])

    return read


def token_states(model: AnyModel) -> Extractor:
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
