"""Pretraining under Hugging Face Accelerate."""

from mmssl.training.arguments import ModelArguments, Source, TrainArguments
from mmssl.training.loop import pretrain
from mmssl.training.run import load_objective

__all__ = ["ModelArguments", "Source", "TrainArguments", "load_objective", "pretrain"]
