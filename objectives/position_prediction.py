"""Position prediction: MP3 asks each token, from contents alone, where it lies.

The encoder is told no places, and keys and values of all its layers come from one random part M of the tokens:

    loss = mean over tokens i of cross-entropy(linear(layer norm(encode(x, read M)_i)), place of i)

Zhai et al., "Position prediction as an effective pretraining strategy" (MP3), ICML 2022. All tokens ask and are asked,
those that nobody reads too.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.modalities.base import Batch, Modality, nearest
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, global_mean
from mmssl.tokens import Tokens


class PositionPrediction(Objective):
    """Predict the place of each token from what it and a part of the others contain.

    Args:
        model: the model to train. Its layers get no places in training; afterwards it adds them, as any model does.
        mask_ratio: share of the valid tokens that no token reads, from 0 to below 1.
        views: train on one random view of each sample in place of the sample itself.
    """

    references: ClassVar = ('Zhai et al., "Position prediction as an effective pretraining strategy" (MP3), ICML 2022',)

    def __init__(self, model: MMSSLModel, mask_ratio: float = 0.75, views: bool = True):
        super().__init__(model)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio: found {mask_ratio}; expected a share from 0 to below 1")
        self.require("places", "a place for each token to predict", "modalities whose tokens have an order in common")
        if views:
            self.require("view", "views=True", "views=False")
        self.mask_ratio, self.views = mask_ratio, views

        width, eps = model.config.hidden_size, model.config.layer_norm_eps
        self.place_heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(width, eps=eps), nn.Linear(width, modality.num_places))
                for name, modality in model.adapters.items()
            }
        )
        self.init_heads(model.config)
        for name, weight in self.place_heads.named_parameters():
            if name.endswith("1.weight"):
                nn.init.normal_(weight, std=0.01)  # so that the first guess is an even one
        for modality in model.adapters.values():
            modality.position.requires_grad_(False)  # it is not used, and without a gradient DDP would stop

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        if self.views:
            batch = modality.view(batch, generator).batch
        tokens = modality.tokenize(batch)
        logits, encoded = self.predict(modality, tokens, self.context(tokens, generator))
        places = modality.places(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), places.flatten(), reduction="none").view_as(places)
        right = (logits.argmax(dim=-1) == places)[tokens.valid]
        metrics = {"accuracy": right.float().mean(), "chance": loss.new_tensor(1 / modality.num_places)}
        return ObjectiveOutput(global_mean(loss, tokens.valid.float()), metrics, tokens.pool(encoded.detach()))

    def context(self, tokens: Tokens, generator: torch.Generator) -> Tensor:
        """(B, N) bool: of n valid tokens of a row ``round(n * (1 - mask_ratio))``, at least one, at random."""
        noise = torch.rand(tokens.valid.shape, generator=generator, device=tokens.valid.device)
        return nearest(noise, tokens.valid, 1 - self.mask_ratio, tokens.valid)

    def predict(self, modality: Modality, tokens: Tokens, context: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N, places) in full precision, and the encoder's outputs (B, N, D) that they are of."""
        encoded = self.model.encode(modality, tokens, places=False, context=context).tokens
        return self.place_heads[modality.name](encoded).float(), encoded
