"""ShED: say of each token whether its content belongs where it lies.

Tamkin et al., "DABS: a domain-agnostic benchmark for self-supervised learning", NeurIPS Datasets and Benchmarks 2021. A
few tokens of each sample change their embedded contents among themselves, and their places stay:

    loss = mean over valid tokens i of binary cross-entropy(linear(encode(shuffled x)_i), 1 if i has another's content)
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, global_mean
from mmssl.tokens import Tokens, gather


class ShuffledEmbeddingDetection(Objective):
    """Tell tokens whose content was exchanged with that of others from those that were left alone.

    Args:
        model: the model to train.
        shuffle_ratio: share of the valid tokens of each row that change contents, at least two (DABS: 0.15).
    """

    references: ClassVar = (
        'Tamkin et al., "DABS: a domain-agnostic benchmark for self-supervised learning", NeurIPS Datasets '
        "and Benchmarks 2021",
    )

    def __init__(self, model: MMSSLModel, shuffle_ratio: float = 0.15):
        super().__init__(model)
        if not 0 < shuffle_ratio < 1:
            raise ValueError(f"shuffle_ratio: found {shuffle_ratio}; expected a share between 0 and 1, both excluded")
        self.shuffle_ratio = shuffle_ratio
        self.head = nn.Linear(model.config.hidden_size, 1)
        self.init_heads(model.config)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        tokens = modality.tokenize(batch)
        content = modality.embed(tokens)
        shuffled = gather(content, self.sources(tokens, generator))
        moved = (shuffled != content).any(dim=-1)  # of two tokens of equal content nobody can say that they moved
        encoded = self.model.encode(modality, tokens, shuffled).tokens
        logits = self.head(encoded).squeeze(-1).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, moved.float(), reduction="none")
        metrics = detection_metrics(logits.detach()[tokens.valid], moved[tokens.valid])
        return ObjectiveOutput(global_mean(loss, tokens.valid.float()), metrics, tokens.pool(encoded.detach()))

    def sources(self, tokens: Tokens, generator: torch.Generator) -> Tensor:
        """(B, N) long: from which token of its row each gets its content.

        Of n valid tokens ``round(n * shuffle_ratio)``, at least two, pass theirs on in one random cycle, so that none
        keeps its own. The others do; so does the only token of a row, and padding.
        """
        count = tokens.valid.sum(dim=1, keepdim=True)
        several = (count * self.shuffle_ratio).round().long().clamp(min=2).minimum(count)
        noise = torch.rand(tokens.valid.shape, generator=generator, device=tokens.valid.device)
        order = noise.masked_fill(~tokens.valid, torch.inf).argsort(dim=1)  # the first ones are those that move
        number = torch.arange(order.shape[1], device=order.device)
        following = torch.where(number < several, (number + 1) % several.clamp(min=1), number)
        return torch.empty_like(order).scatter_(1, order, order.gather(1, following))


def detection_metrics(logits: Tensor, moved: Tensor) -> dict[str, Tensor]:
    """Of (n,) tokens: who says always no has an accuracy of 1 - ``share_moved``, and an ``auc`` of a half.

    auc: of all pairs of a moved and another token, the share in which the moved one has the greater logit.
    """
    rank = logits.argsort().argsort()
    there, others = moved.sum(), (~moved).sum()
    before = (rank * moved).sum() - there * (there - 1) // 2
    return {
        "accuracy": ((logits > 0) == moved).float().mean(),
        "share_moved": moved.float().mean(),
        "auc": before / (there * others).clamp(min=1),
    }
