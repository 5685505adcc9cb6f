"""Pretraining under Hugging Face Accelerate."""

from mmssl.training.arguments import TrainArguments
from mmssl.training.loop import pretrain
from mmssl.training.run import load_objective

__all__ = ["TrainArguments", "load_objective", "pretrain"]
