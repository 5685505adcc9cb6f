"""mmssl: self-supervised pretraining of transformer encoders on unlabelled data of any modality.

After ``import mmssl``, ``AutoConfig``, ``AutoModel``, ``AutoProcessor`` and ``AutoFeatureExtractor`` of transformers
load its checkpoints, and so do the ``AutoModelFor...`` classes of the tasks in ``mmssl.task_models``.
"""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    AutoProcessor,
)

from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.task_models import (
    MMSSLForForecasting,
    MMSSLForSemanticSegmentation,
    MMSSLForSequenceClassification,
    MMSSLForTokenClassification,
)
from mmssl.version import __version__

__all__ = [
    "MMSSLConfig",
    "MMSSLFeatureExtractor",
    "MMSSLForForecasting",
    "MMSSLForSemanticSegmentation",
    "MMSSLForSequenceClassification",
    "MMSSLForTokenClassification",
    "MMSSLModel",
    "MMSSLProcessor",
    "__version__",
    "pretrain",
]

AutoConfig.register("mmssl", MMSSLConfig, exist_ok=True)
AutoModel.register(MMSSLConfig, MMSSLModel, exist_ok=True)
AutoFeatureExtractor.register(MMSSLConfig, MMSSLFeatureExtractor, exist_ok=True)
AutoProcessor.register(MMSSLConfig, MMSSLProcessor, exist_ok=True)
for auto in (
    AutoModelForSequenceClassification,
    AutoModelForImageClassification,
    AutoModelForAudioClassification,
    AutoModelForVideoClassification,
):
    auto.register(MMSSLConfig, MMSSLForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MMSSLConfig, MMSSLForTokenClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(MMSSLConfig, MMSSLForSemanticSegmentation, exist_ok=True)
AutoModelForTimeSeriesPrediction.register(MMSSLConfig, MMSSLForForecasting, exist_ok=True)


def __getattr__(name: str) -> Any:
    """``mmssl.pretrain``, loaded when it is first used: importing mmssl stays light."""
    if name == "pretrain":
        return import_module("mmssl.training").pretrain
    raise AttributeError(f"module 'mmssl' has no attribute {name!r}")
