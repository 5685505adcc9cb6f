"""Transform prediction: say which of a few transforms a sample has been put through.

    loss = mean over samples of cross-entropy(head(represent(T_k(x))), k),    k drawn for each sample

* Gidaris et al., "Unsupervised representation learning by predicting image rotations" (RotNet), ICLR 2018: four quarter
  turns. All four copies of a sample share a batch there; here each sample gets one, drawn anew at each step.
* Noroozi and Favaro, "Solving jigsaw puzzles", ECCV 2016, and Xu et al., "VCOP", CVPR 2019: the order of pieces in
  space and of segments in time. Yao et al., "PRP", CVPR 2020: the speed; without its reconstruction.
* Kinakh et al., "ScatSimCLR", ICCV workshops 2021: as a second term beside contrast, with ``Sum`` and a weight of 0.3.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from mmssl.heads import mlp
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, represent


class TransformPrediction(Objective):
    """Predict from a sample's pooled representation which transform of a finite set it has been put through.

    What is trained is the mean of the valid tokens, what the model returns; it stands for the papers' average pool.

    Args:
        model: the model to train.
        pretext: which set of transforms, one that the modality offers: "rotation", "order", ... None: its first one.
        head_widths: of the head's hidden layers, with ReLU (ScatSimCLR: 512 128). Empty: a linear head.
        views: transform a random view of each sample in place of the sample itself.
    """

    references: ClassVar = (
        'Gidaris et al., "Unsupervised representation learning by predicting image rotations" (RotNet), ICLR 2018',
        'Noroozi and Favaro, "Unsupervised learning of visual representations by solving jigsaw puzzles", ECCV 2016',
        'Xu et al., "Self-supervised spatiotemporal learning via video clip order prediction" (VCOP), CVPR 2019',
        'Yao et al., "Video playback rate perception for self-supervised spatio-temporal representation '
        'learning" (PRP), CVPR 2020',
        'Kinakh et al., "ScatSimCLR: self-supervised contrastive learning with pretext task regularization '
        'for small-scale datasets", ICCV workshops 2021',
    )

    def __init__(
        self,
        model: MMSSLModel,
        pretext: str | None = None,
        head_widths: Sequence[int] = (512, 128),
        views: bool = True,
    ):
        super().__init__(model)
        self.chosen: dict[str, str] = {}
        for name, modality in model.adapters.items():
            self.chosen[name] = next(iter(modality.pretexts), "any") if pretext is None else pretext
            if self.chosen[name] not in modality.pretexts:
                offered = ", ".join(modality.pretexts) or "none"
                raise ValueError(
                    f"{type(self).__name__} with pretext={self.chosen[name]!r}: {modality.name} does not offer it, "
                    f"with these options; it offers: {offered}"
                )
        if min(head_widths, default=1) < 1:
            raise ValueError(f"head_widths: found {list(head_widths)}; expected numbers of at least 1")
        if views:
            self.require("view", "views=True", "views=False")
        self.pretext, self.head_widths, self.views = pretext, tuple(head_widths), views

        self.heads = nn.ModuleDict(
            {
                name: mlp(
                    [model.config.hidden_size, *head_widths, modality.pretexts[self.chosen[name]]], batch_norm=False
                )
                for name, modality in model.adapters.items()
            }
        )
        self.init_heads(model.config)
        last = f"{2 * len(head_widths)}.weight"
        for name, weight in self.heads.named_parameters():
            if name.endswith(last):
                nn.init.normal_(weight, std=0.01)  # so that the first guess is an even one

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        if self.views:
            batch = modality.view(batch, generator).batch
        pretext = self.chosen[modality.name]
        samples, count = batch[modality.inputs[0]], modality.pretexts[pretext]
        number = torch.randint(count, (len(samples),), generator=generator, device=samples.device)
        tokens = modality.tokenize(modality.transform(batch, pretext, number))
        embedding = represent(self.model, modality, tokens)
        logits = self.heads[modality.name](embedding).float()
        loss = nn.functional.cross_entropy(logits, number)
        metrics = {
            "accuracy": (logits.argmax(dim=-1) == number).float().mean(),
            "chance": loss.new_tensor(1 / count),
        }
        return ObjectiveOutput(loss, metrics, embedding.detach())
