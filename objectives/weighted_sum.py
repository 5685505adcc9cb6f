"""A weighted sum of objectives on one model: reconstruction and latent prediction together, say, as in GraphMAE2.

    loss = sum over terms of weight * loss of the term

* Hou et al., "GraphMAE2", WWW 2023: masked reconstruction and what a moving-average teacher says of the same nodes.
* Zhang et al., "What constitutes good contrastive learning in time-series forecasting?", 2023: forecasting, which is
  reconstruction of the last patches (``mask_style: future``), and half as much of another objective.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from mmssl.discovery import find_all, option_names
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Batch, Objective, ObjectiveOutput, Shared, split_labels
from mmssl.tokens import Tokens


class Sum(Objective):
    """Several objectives on one model, each with a weight and heads of its own; every step is of all of them.

    Terms that compare random views get the same ones, and what the model makes of a view is computed once.
    A run saves the model, or if a term saves its teacher, the teacher of the first one that does.

    Args:
        model: the model to train.
        terms: each by a name: {name: {class_path: MaskedReconstruction, init_args: {...}}}.
        weights: of the terms, by their names. A term without one weighs 1.
    """

    references: ClassVar = (
        'Hou et al., "GraphMAE2: a decoding-enhanced masked self-supervised graph learner", WWW 2023',
        'Zhang et al., "What constitutes good contrastive learning in time-series forecasting?", arXiv 2023',
    )

    def __init__(self, model: MMSSLModel, terms: dict[str, dict[str, Any]], weights: dict[str, float] | None = None):
        super().__init__(model)
        if not terms:
            raise ValueError("terms: found none; expected {name: {class_path: MaskedReconstruction, init_args: {...}}}")
        self.weights = dict.fromkeys(terms, 1.0) | (weights or {})
        if unknown := set(self.weights) - set(terms):
            raise ValueError(f"weights: found {', '.join(sorted(unknown))}; the terms are {', '.join(terms)}")
        # What a recipe says, for the record; the modules it stands for are below.
        self.terms = {name: dict(term) for name, term in terms.items()}
        self.objectives = nn.ModuleDict()
        for name, term in terms.items():
            self.objectives[name] = build(name, term, model)
        self.needs_labels = any(term.needs_labels for term in self.members())

    @property
    def trained(self) -> MMSSLModel:
        others = [term.trained for term in self.members() if term.trained is not self.model]
        return others[0] if others else self.model

    def members(self) -> list[Objective]:
        return [term for term in self.objectives.values() if isinstance(term, Objective)]

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        plain, _ = split_labels(batch)
        outputs: dict[str, ObjectiveOutput] = {}
        with Shared() as shared:
            for name, term in zip(self.objectives, self.members(), strict=True):
                shared.begin()
                outputs[name] = term(batch if term.needs_labels else plain, generator)
        loss = torch.stack([self.weights[name] * out.loss for name, out in outputs.items()]).sum()
        metrics = {f"{name}/loss": out.loss.detach() for name, out in outputs.items()}
        for name, out in outputs.items():
            metrics |= {f"{name}/{metric}": value for metric, value in out.metrics.items()}
        return ObjectiveOutput(loss, metrics, next(iter(outputs.values())).embedding)

    def shown(self, modality: Modality, tokens: Tokens, generator: torch.Generator) -> dict[str, Tokens]:
        """What the first term shows that makes anything of the samples."""
        return max((term.shown(modality, tokens, generator) for term in self.members()), key=len)

    def after_step(self, progress: float) -> None:
        for term in self.members():
            term.after_step(progress)


def build(name: str, term: dict[str, Any], model: MMSSLModel) -> Objective:
    """The objective of a term; it reaches the model without owning it, so that its weights are there once."""
    known = {key: cls for key, cls in find_all("objectives", Objective).items() if cls is not Sum}
    chosen, options = term.get("class_path"), term.get("init_args") or {}
    if set(term) - {"class_path", "init_args"} or chosen not in known:
        raise ValueError(
            f"terms.{name}: found {term}; expected a class_path, one of {', '.join(known)}, and its init_args"
        )
    if unknown := set(options) - set(option_names(known[chosen])):
        own = ", ".join(option_names(known[chosen]))
        raise ValueError(f"terms.{name}: {chosen} has no {', '.join(sorted(unknown))}; it has {own}")
    objective = known[chosen](model, **options)
    del objective.model
    object.__setattr__(objective, "model", model)
    return objective
