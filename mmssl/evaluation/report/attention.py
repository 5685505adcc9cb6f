"""What the last block's heads of attention read of a sample, and where in its drawing that lies."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.tokens import Tokens

Blank = Callable[[Tensor], np.ndarray]  # which tokens (rows * N,) are shown -> which parts of the drawing are blank


def asks_class_token(model: MMSSLModel) -> bool:
    """Whether it is the class token whose weights are shown; with causal attention it reads itself alone."""
    return bool(model.config.class_token and not model.config.causal_attention)


@torch.inference_mode()
def attention_to_tokens(model: MMSSLModel, batch: Batch) -> Tensor:
    """Weights (heads, rows, N) of the last block from the class token to the tokens of each row.

    Where that is of no use, the mean of what the valid tokens read. Padding has weight 0; what is missing to 1 goes to
    class and register tokens.
    """
    kind, first = model.config._attn_implementation, model.encoder.num_prefix_tokens
    model.set_attn_implementation("eager")  # the only one that returns weights
    try:
        out = model.eval()(**batch, output_attentions=True)
    finally:
        model.set_attn_implementation(kind)
    weights, valid = out.attentions[-1].float(), out.token_mask[:, first:]
    if asks_class_token(model):
        read = weights[:, :, 0, first:]
    else:
        queries = valid[:, None, :, None].float()
        read = (weights[:, :, first:, first:] * queries).sum(dim=2) / queries.sum(dim=2).clamp(min=1)
    return read.transpose(0, 1)


def over_drawing(modality: Modality, tokens: Tokens, weights: Tensor, blank: Callable[..., np.ndarray]) -> np.ndarray:
    """Weights of the parts of one sample's drawing, (heads, *parts), NaN where no token lies.

    A part that several tokens cover has the mean of their weights.

    Args:
        modality: which draws.
        tokens: of one sample, which may have several rows.
        weights: (heads, rows, N).
        blank: which parts of a drawing are blank.
    """
    content = tokens.content.float()

    def blanks(shown: Tensor) -> np.ndarray:
        hidden = ~shown.view(tokens.valid.shape + (1,) * (content.dim() - 2))
        return blank(modality.drawings(replace(tokens, content=content.masked_fill(hidden, torch.nan)))[0])

    maps = tokens_of_parts(blanks, tokens.valid.flatten())
    flat = weights.flatten(1).cpu().numpy()
    found = np.stack([np.where(each >= 0, flat[:, np.maximum(each, 0)], np.nan) for each in maps])
    count = (~np.isnan(found)).sum(axis=0)
    return np.where(count, np.nansum(found, axis=0) / np.maximum(count, 1), np.nan)


def stretched(weights: np.ndarray) -> np.ndarray:
    """The least of what is known of each head (heads, *parts) as 0, the greatest as 1."""
    flat = weights.reshape(len(weights), -1)
    low, high = (pick(flat, axis=1).reshape(-1, *[1] * (weights.ndim - 1)) for pick in (np.nanmin, np.nanmax))
    return (weights - low) / np.maximum(high - low, 1e-12)


def tokens_of_parts(blanks: Blank, valid: Tensor) -> list[np.ndarray]:
    """Which token each part of a drawing shows, -1 where it shows none; several maps where tokens overlap.

    No modality is asked: the bits of a token's number say whether it is shown, and what is not blank then tells them.
    So it takes two drawings for each bit. Where tokens overlap, every second one is looked at, and so on.
    """
    numbers = valid.nonzero().squeeze(1)
    step = 1
    while True:
        maps = [of_these(blanks, valid, numbers[first::step]) for first in range(min(step, len(numbers)))]
        if all(each is not None for each in maps):
            return [each for each in maps if each is not None]
        step *= 2


def of_these(blanks: Blank, valid: Tensor, own: Tensor) -> np.ndarray | None:
    """Which of these tokens each part shows. None: two of them overlap."""

    def hidden(members: Tensor) -> np.ndarray:
        shown = torch.zeros_like(valid)
        shown[own[members]] = True
        return blanks(shown)

    order = torch.arange(len(own), device=own.device)
    empty = hidden(order >= 0)
    place = np.zeros(empty.shape, dtype=np.int64)
    for bit in range(max(len(own) - 1, 0).bit_length()):
        is_set = (order >> bit) % 2 == 1
        with_bit, without = ~hidden(is_set), ~hidden(~is_set)
        if (with_bit & without).any():
            return None
        place += with_bit.astype(np.int64) << bit
    return np.where(empty, -1, own.cpu().numpy()[np.where(empty, 0, place)])
