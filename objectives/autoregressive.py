"""Autoregressive prediction: from what came so far, say what a later token contains.

With an encoder in which each token reads itself and those before it alone:

    loss = mean over tokens i of d(head(encode(x)_i), target(x)_(i + shift))

* Chung et al., "An unsupervised autoregressive model for speech representation learning" (APC), Interspeech 2019: a
  frame a few steps later, by its absolute error. ``shift=3``, distance "l1". Its recurrent network is a transformer
  here, as in Chung and Glass, 2020.
* Chen et al., "Generative pretraining from pixels" (iGPT), ICML 2020: the next one in reading order. ``shift=1``. Its
  tokens are single pixels of 512 colours and its distance cross-entropy; here they are what the modality says.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, global_mean
from mmssl.tokens import Tokens, gather, indices_of


class Autoregressive(Objective):
    """Predict the content of the token ``shift`` tokens later in the row.

    The encoder must have been made with ``causal_attention``, which its config keeps: a saved model reads in the same
    direction as in training.

    Args:
        model: the model to train.
        shift: tokens from the one that predicts to the one that is predicted (iGPT: 1; APC: 3). Where contents of
            neighbours overlap, so many that these two do not.
        views: train on one random view of each sample in place of the sample itself.
    """

    references: ClassVar = (
        'Chung et al., "An unsupervised autoregressive model for speech representation learning" (APC), '
        "Interspeech 2019",
        'Chen et al., "Generative pretraining from pixels" (iGPT), ICML 2020',
    )

    def __init__(self, model: MMSSLModel, shift: int = 1, views: bool = True):
        super().__init__(model)
        for modality in model.adapters.values():
            if not modality.aligned:
                raise ValueError(
                    f"Autoregressive needs tokens in an order that means something, which those of {modality.name} "
                    "have not; what works: modalities whose tokens lie at places that all samples share"
                )
        if not model.config.causal_attention:
            raise ValueError(
                "Autoregressive: found an encoder with causal_attention=False, whose tokens read what they are to "
                "predict; expected True: set it under `encoder`"
            )
        if shift < 1:
            raise ValueError(f"shift: found {shift}; expected at least 1")
        if views:
            self.require("view", "views=True", "views=False")
        self.shift, self.views = shift, views
        self.reconstruction_heads = nn.ModuleDict(
            {name: modality.reconstruction_head(model.config.hidden_size) for name, modality in model.adapters.items()}
        )
        self.init_heads(model.config)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        if self.views:
            batch = modality.view(batch, generator).batch
        tokens = modality.tokenize(batch)
        prediction, target, where, encoded = self.predict(modality, tokens)
        loss, weight = modality.reconstruction_loss(prediction, target, where)
        return ObjectiveOutput(global_mean(loss, weight), embedding=tokens.pool(encoded.detach()))

    def predict(self, modality: Modality, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row predictions and targets (B, M, *V) in order, which of them count (B, M), and all outputs."""
        encoded = self.model.encode(modality, tokens).tokens
        index, valid = indices_of(tokens.valid)  # padding may lie between tokens; it is no step of the way
        if index.shape[1] <= self.shift:
            raise ValueError(
                f"found a batch of rows of at most {index.shape[1]} tokens, and shift={self.shift}; expected a longer "
                "one, or a smaller shift"
            )
        prediction = self.reconstruction_heads[modality.name](gather(encoded, index[:, : -self.shift]))
        target = gather(modality.target(tokens), index[:, self.shift :])
        return prediction, target, valid[:, self.shift :], encoded
