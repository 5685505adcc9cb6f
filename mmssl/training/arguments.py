"""Flags of a training run, named as in Hugging Face's own scripts."""

import math
from dataclasses import dataclass
from typing import Literal

from mmssl.data import DataArguments
from mmssl.modalities.base import Modality


@dataclass
class Source:
    """Samples of one modality, and how often they are trained on.

    Attributes:
        modality: what the samples are, and how they become tokens.
        data: where they come from.
        weight: how often an optimiser step is of this modality, relative to the first one, whose weight is 1.
        per_device_train_batch_size: samples of a batch on each device. None: as many as of the first modality.
    """

    modality: Modality
    data: DataArguments
    weight: float = 1.0
    per_device_train_batch_size: int | None = None

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight of {self.modality.name}: found {self.weight}; expected a number above 0")


@dataclass
class TrainArguments:
    """How to train. Number of processes, devices and mixed precision are ``accelerate launch``'s.

    Attributes:
        output_dir: folder of the run: checkpoints, metrics.jsonl, and at the end the model and its processor.
        overwrite_output_dir: delete an earlier run in that folder.
        per_device_train_batch_size: samples of a batch on each device.
        gradient_accumulation_steps: batches per optimiser step.
        num_train_epochs: passes over the data; in a joint run, over those of the first modality, on the average.
        max_train_steps: optimiser steps; wins over num_train_epochs.
        learning_rate: peak learning rate, as it is: not scaled by the batch size.
        min_learning_rate: learning rate at the last step.
        lr_scheduler_type: how the learning rate falls after the warm-up.
        warmup_ratio: share of the steps that the learning rate rises over.
        weight_decay: decoupled weight decay of weight matrices; biases, norms and learned tokens have none.
        final_weight_decay: weight decay at the last step, reached as a half cosine (the JEPAs). None: as at the first.
        adam_beta1: AdamW's decay rate of the mean of the gradient.
        adam_beta2: AdamW's decay rate of the mean of its square.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: gradients are clipped to this norm. None: not clipped.
        seed: start values, order of the data, views, masks and dropout all follow from it.
        dataloader_num_workers: processes per device and modality that prepare samples. 0: none but the main one.
        logging_steps: optimiser steps between two lines of metrics.jsonl.
        checkpointing_steps: optimiser steps between two checkpoints. None: none but the model at the end.
        checkpoints_total_limit: how many checkpoints are kept, the newest ones. None: all.
        resume_from_checkpoint: folder of a checkpoint, or "latest" for the newest of output_dir.
        attn_implementation: attention function: "sdpa", "eager", "flash_attention_2", "flex_attention", ...
        activation_checkpointing: recompute the encoder's blocks in the backward pass: less memory, more time.
        report_to: trackers of accelerate ("tensorboard", "trackio", "wandb", ...) beside metrics.jsonl.
    """

    output_dir: str = "runs/pretrain"
    overwrite_output_dir: bool = False
    per_device_train_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 100.0
    max_train_steps: int | None = None
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    lr_scheduler_type: Literal["cosine", "linear"] = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = None
    seed: int = 0
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    attn_implementation: str = "sdpa"
    activation_checkpointing: bool = False
    report_to: str | list[str] | None = None

    # A resumed run may differ in these. A new number of steps stretches the schedule from there on.
    FREE = (
        "output_dir", "overwrite_output_dir", "num_train_epochs", "max_train_steps", "dataloader_num_workers",
        "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
        "activation_checkpointing", "report_to",
    )  # fmt: skip
