"""Multivariate series: our recipe for the UEA archive beside transformers' PatchTST, both by masked patches."""

import numpy as np
import torch
from quality import Data, Field, Learner, labelled, ours
from torch import Tensor

from mmssl.evaluation.features import pooled
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLModel

LENGTH, CHANNELS, PATCH, WIDTH, BATCH = 51, 24, 6, 32, 32  # of NATOPS


def read(path: str, explore: bool) -> Data:
    """An npz file with X (n, channels, length), y and split; for exploring a third of the training part is held out."""
    file = np.load(path)
    series, labels, train = torch.from_numpy(file["X"]).float().mT, file["y"], file["split"] == "train"
    if explore:
        order = np.random.default_rng(0).permutation(np.flatnonzero(train))
        fit, test = order[len(order) // 3 :], order[: len(order) // 3]
    else:
        fit, test = np.flatnonzero(train), np.flatnonzero(~train)
    parts = [(series[part], labels[part]) for part in (fit, test)]
    return labelled(parts[0], parts[1], lambda samples: samples.flatten(1), BATCH)


def of_ours() -> Learner:
    learner = ours("patchtst_uea.yaml", f"--modality.patch_length={PATCH}", features=features)
    loss = learner.loss
    return Learner(learner.module, lambda series, generator: loss(batch_of(series), generator), learner.features)


def features(model: MMSSLModel, series: Tensor) -> Tensor:
    return pooled(model, "mean_rows")(batch_of(series))


def batch_of(series: Tensor) -> Batch:
    steps = torch.ones(series.shape[:2], dtype=torch.long)
    return {"series": series, "observed_mask": torch.ones_like(series), "attention_mask": steps}


def of_transformers() -> Learner:
    from transformers import PatchTSTConfig, PatchTSTForPretraining

    config = PatchTSTConfig(
        num_input_channels=CHANNELS,
        context_length=LENGTH,
        patch_length=PATCH,
        patch_stride=PATCH,
        d_model=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=4 * WIDTH,
        scaling=None,  # the level of a series may tell its class, for both sides
        random_mask_ratio=0.5,
        do_mask_input=True,
    )
    model = PatchTSTForPretraining(config)

    def features(series: Tensor) -> Tensor:
        hidden = model.model.encoder(model.model.patchifier(series)).last_hidden_state  # (B, channels, patches, D)
        return hidden.mean(dim=2).flatten(1)

    return Learner(model, lambda series, generator: model(past_values=series).loss, features)


FIELD = Field(
    read,
    {"mmssl masked patches": of_ours, "transformers PatchTST": of_transformers},
    (10.0, 20.0, 30.0),
    (5e-4, 1e-3, 2e-3, 4e-3),
    {"weight_decay": 0.0},
)
