"""A run of a few seconds, in this process or in another one that may be killed."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, pretrain


def run(output_dir: Path, mask_ratio: float = 0.5, queue: bool = False, **train: Any) -> list[dict[str, float]]:
    """Pretrain on 60 digits for 12 steps, 7.5 batches an epoch, and return the lines of metrics.jsonl.

    Views, masks, dropout and stochastic depth all draw random numbers. With a queue, the objective is one with a
    teacher and a queue of keys; without, masked reconstruction.
    """
    masked = partial(MaskedReconstruction, mask_ratio=mask_ratio, decoder_layers=1, decoder_hidden_size=16)
    contrastive = partial(Contrastive, projector_hidden_size=16, projector_size=8, momentum=(0.9, 1.0), queue_size=20)
    flags = {
        "max_train_steps": 12,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        **train,
    }
    pretrain(
        Image(image_size=8, patch_size=2, num_channels=1, normalize_target=False, crop_scale=(0.5, 1.0)),
        contrastive if queue else masked,
        EncoderConfig(16, 2, 2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.1),
        DataArguments("digits", max_samples=60),
        TrainArguments(str(output_dir), **flags),
    )
    return metrics(output_dir)


def metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
