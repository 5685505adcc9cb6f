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
class ModelArguments:
    """What a run begins with, and how much of it is trained.

    Attributes:
        init_from: weights to begin with, in place of random ones: the folder of a finished run, one of a run's
            checkpoints step_<n>, or a name on the Hub; of transformers' ViT, ViTMAE and VideoMAE too. The optimiser and
            the schedule begin anew. A run that is resumed does not read them again.
        peft_type: train small additions to the frozen encoder, by peft, in place of all of it: "lora", products of two
            narrow matrices beside each linear layer of the blocks (Hu et al., 2022), or "ia3", a factor for each of
            their inner channels (Liu et al., 2022). What init_from lacks is trained as a whole, as are the objective's
            heads. At the end the additions are merged, and the run's model is like any other.
        lora_rank: width of the product, of "lora".
        lora_alpha: what is added is multiplied by lora_alpha / lora_rank.
    """

    init_from: str | None = None
    peft_type: Literal["lora", "ia3"] | None = None
    lora_rank: int = 8
    lora_alpha: int = 16

    def __post_init__(self) -> None:
        if self.peft_type and not self.init_from:
            raise ValueError(
                f"peft_type {self.peft_type}: found no init_from; the encoder stays as it is, so it must be a trained "
                "one: set --model.init_from, or leave peft_type out"
            )
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank: found {self.lora_rank}; expected at least 1")


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
        lr_scheduler_type: how the learning rate falls after the warm-up: as half a "cosine", in a "linear" way; "wsd",
            constant and then linear; "infinite", half a cosine down to a constant, and then exponential. The last two
            keep a checkpoint where their constant part ends, from which a run can be made longer or another one begun.
        warmup_ratio: share of the steps that the learning rate rises over.
        cooldown_until: of "infinite", share of the steps after which the cooldown from the peak has ended.
        constant_until: of "wsd" and "infinite", share of the steps after which the learning rate is no more constant.
        constant_learning_rate: of "infinite", what it is until then. None: a tenth of learning_rate.
        weight_decay: decoupled weight decay of weight matrices; biases, norms and learned tokens have none.
        final_weight_decay: weight decay at the last step, reached as a half cosine (the JEPAs). None: as at the first.
        adam_beta1: AdamW's decay rate of the mean of the gradient.
        adam_beta2: AdamW's decay rate of the mean of its square.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: gradients are clipped to this norm. None: not clipped.
        on_nonfinite: what to do where a loss or the gradient is not finite: "stop" the run, or "skip" the step: nothing
            changes but the data, and more than ten in a row stop it too. Its samples are named in the folder nonfinite.
        seed: start values, order of the data, views, masks and dropout all follow from it.
        dataloader_num_workers: processes per device and modality that prepare samples. 0: none but the main one.
        logging_steps: optimiser steps between two lines of metrics.jsonl.
        health_steps: optimiser steps between two looks at what features are worth, with a verdict each time; one is
            always before the first step, and one after the last. None: none at all.
        metric_for_best_model: keep, in the folder "best", the model whose "knn" or "linear" probe or "rank" was best of
            all looks at the run's health. None: the last model alone.
        checkpointing_steps: optimiser steps between two checkpoints. None: none but the model at the end.
        checkpoints_total_limit: how many checkpoints are kept, the newest ones. None: all.
        resume_from_checkpoint: folder of a checkpoint, or "latest" for the newest of output_dir.
        attn_implementation: attention function: "sdpa", "eager", "flash_attention_2", "flex_attention", ...
        activation_checkpointing: recompute the encoder's blocks in the backward pass: less memory, more time.
        report_to: trackers of accelerate ("tensorboard", "trackio", "wandb", ...) beside metrics.jsonl. These also
            get pictures with each look at health: samples and reconstructions, a map of embeddings, similarities.
        push_to_hub: upload the model to the Hugging Face Hub, at each checkpoint in the background and at the end.
        hub_model_id: where to on the Hub, "user/name"; made if it is not there.
        hub_private_repo: whether only its owner sees it. None: as it is, or as the owner's settings say.
    """

    output_dir: str = "runs/pretrain"
    overwrite_output_dir: bool = False
    per_device_train_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 100.0
    max_train_steps: int | None = None
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    lr_scheduler_type: Literal["cosine", "linear", "wsd", "infinite"] = "cosine"
    warmup_ratio: float = 0.1
    cooldown_until: float = 0.15
    constant_until: float = 0.8
    constant_learning_rate: float | None = None
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    seed: int = 0
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    health_steps: int | None = 500
    metric_for_best_model: Literal["knn", "linear", "rank"] | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    attn_implementation: str = "sdpa"
    activation_checkpointing: bool = False
    report_to: str | list[str] | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None

    # A resumed run may differ in these. A new number of steps stretches the schedule from there on.
    FREE = (
        "output_dir", "overwrite_output_dir", "num_train_epochs", "max_train_steps", "dataloader_num_workers",
        "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
        "activation_checkpointing", "report_to", "health_steps", "metric_for_best_model",
        "on_nonfinite", "data.max_failed", "push_to_hub", "hub_model_id", "hub_private_repo",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub: found no hub_model_id; expected --train.hub_model_id user/name")
        if not self.push_to_hub and (self.hub_model_id or self.hub_private_repo is not None):
            raise ValueError(
                "push_to_hub: found False, and a hub_model_id or hub_private_repo; set it to true, or leave those out"
            )
        if self.metric_for_best_model and self.health_steps is None:
            raise ValueError(
                f"metric_for_best_model {self.metric_for_best_model}: found health_steps None; expected a number, "
                "as the model is measured then"
            )
        shape, ends = self.lr_scheduler_type, [self.warmup_ratio, self.cooldown_until, self.constant_until]
        if shape == "wsd":
            ends.pop(1)
        if shape in ("wsd", "infinite") and not 0 <= ends[0] <= ends[-2] <= ends[-1] < 1:
            names = "warmup_ratio <= " + ("cooldown_until <= " if shape == "infinite" else "") + "constant_until"
            raise ValueError(
                f"lr_scheduler_type {shape}: found {' and '.join(map(str, ends))}; expected 0 <= {names} < 1"
            )
        if shape == "infinite" and not self.min_learning_rate > 0:
            raise ValueError(
                f"lr_scheduler_type infinite: found min_learning_rate {self.min_learning_rate}, which an exponential "
                f"anneal never reaches; expected a number above 0, such as {self.learning_rate / 100}"
            )
