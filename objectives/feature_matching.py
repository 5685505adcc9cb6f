"""Feature matching with a frozen model: self-distillation for further pretraining (Lee, Kang et al., ICLR 2023).

    loss = mean over samples of || LN(h(x)) - LN(h_teacher(x)) ||^2

where h is the pooled output of the encoder for the whole sample, LN is layer norm without parameters, and the squares
are summed over channels, not averaged. The paper's further pretraining has two runs, of masked reconstruction both. The
first goes on from a pretrained model on the data at hand, and becomes the teacher. The second goes on from the same
pretrained model, not from the teacher, and has this loss beside its reconstruction.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, represent, views_of
from mmssl.teacher import Teacher


class FeatureMatching(Objective):
    """Match what a frozen model says of whole samples; as a term of Sum, beside what the model is trained for.

    Args:
        model: the model to train.
        teacher: folder of the finished run, or name on the Hub, of the model to match; of the same width as this one.
        views: on one random view of each sample, the same for both, in place of the sample itself.
    """

    references: ClassVar = (
        'Lee, Kang et al., "Self-distillation for further pre-training of transformers", ICLR 2023',
    )

    def __init__(self, model: MMSSLModel, teacher: str, views: bool = True):
        super().__init__(model)
        if views:
            self.require("view", "views=True", "views=False")
        self.teacher, self.views = teacher, views
        load: Any = MMSSLModel.from_pretrained  # with information, it returns two things
        attention = model.config._attn_implementation
        try:
            frozen, info = load(teacher, dtype=torch.float32, attn_implementation=attention, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"teacher: found no model at {teacher} ({str(error).splitlines()[0]}); expected the folder of a "
                "finished run, or a name on the Hub"
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"teacher: {teacher} lacks weights, such as {missing[0]}; expected those of a finished run"
            )
        if frozen.config.hidden_size != model.config.hidden_size:
            raise ValueError(
                f"teacher: {teacher} has a width of {frozen.config.hidden_size}, and the model one of "
                f"{model.config.hidden_size}; expected the same"
            )
        for name, modality in model.adapters.items():
            if name not in frozen.adapters or frozen.adapters[name].content_shape != modality.content_shape:
                shapes = {key: other.content_shape for key, other in frozen.adapters.items()}
                raise ValueError(
                    f"teacher: {teacher} reads tokens of {shapes}; expected {name}, of {modality.content_shape}"
                )
        self.frozen = Teacher(frozen, (1.0, 1.0))

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        tokens = views_of(modality, batch, generator, count=1)[0] if self.views else modality.tokenize(batch)
        own = represent(self.model, modality, tokens)
        with torch.no_grad():
            other = represent(self.frozen.module, modality, tokens)
        student, teacher = (nn.functional.layer_norm(each.float(), each.shape[-1:]) for each in (own, other))
        loss = (student - teacher).square().sum(dim=-1).mean()
        metrics = {"cosine": nn.functional.cosine_similarity(student.detach(), teacher).mean()}
        return ObjectiveOutput(loss, metrics, own.detach())
