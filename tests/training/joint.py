"""A joint run of a few seconds: images and speech, in this process or in several."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from accelerate import PartialState

from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.base import Batch
from mmssl.modalities.image import Image
from mmssl.modalities.speech import Speech
from mmssl.objectives.base import ObjectiveOutput
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import Source, TrainArguments, pretrain
from tests.training.tiny import metrics

SPEECH = Speech(sampling_rate=8000, num_mels=20, n_fft=200, win_length=200, hop_length=80)


class Watched(MaskedReconstruction):
    """Notes the modality of each batch, and what else a step has changed than it should."""

    seen: ClassVar[list[str]] = []
    wrong: ClassVar[list[str]] = []
    before: ClassVar[dict[str, torch.Tensor]] = {}

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        self.seen.append(self.model.modality_of(batch).name)
        self.before.update({name: value.detach().clone() for name, value in self.named_parameters()})
        return super().forward(batch, generator)

    def after_step(self, progress: float) -> None:
        """A step of images must leave alone what belongs to speech, and change everything else."""
        others = {name for name in self.model.adapters if name != self.seen[-1]}
        for name, value in self.named_parameters():
            if torch.equal(value, self.before[name]) != bool(others & set(name.split("."))):
                self.wrong.append(f"{name} in a step of {self.seen[-1]}")


def sounds(folder: Path, count: int) -> Path:
    """Files of short chords, if they are not there."""
    if folder.exists():
        return folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        tones = np.sin(np.outer(generator.uniform(1, 2, 3), np.arange(1600 + 80 * number)))
        soundfile.write(folder / f"{number:02}.wav", tones.mean(axis=0) / 2, 8000)
    return folder


def run_joint(
    output_dir: Path, weight: float = 1.0, objective: type[MaskedReconstruction] = MaskedReconstruction, **train: Any
) -> list[dict[str, float]]:
    """Pretrain on 60 digits in batches of 8 and on 20 sounds in batches of 4; returns the lines of metrics.jsonl.

    Masks, dropout and stochastic depth all draw random numbers.
    """
    flags = {"max_train_steps": 12, "per_device_train_batch_size": 8, "logging_steps": 1, **train}
    folder = sounds(output_dir.parent / "sounds", 20)
    pretrain(
        Image(image_size=8, patch_size=2, num_channels=1, normalize_target=False),
        partial(objective, mask_ratio=0.5, views=False, decoder_layers=1, decoder_hidden_size=16),
        EncoderConfig(16, 2, 2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.1),
        DataArguments("digits", max_samples=60),
        TrainArguments(str(output_dir), learning_rate=1e-2, warmup_ratio=0.0, min_learning_rate=1e-3, **flags),
        also=[Source(SPEECH, DataArguments(str(folder)), weight, per_device_train_batch_size=4)],
    )
    return metrics(output_dir)


def main(output_dir: Path, train: dict[str, Any]) -> None:
    run_joint(output_dir, objective=Watched, **train)
    state = PartialState()
    assert state.num_processes == 2, f"found {state.num_processes} processes"
    notes = {"seen": Watched.seen, "wrong": Watched.wrong}
    (output_dir / f"watched{state.process_index}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
