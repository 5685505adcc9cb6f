"""mmssl: self-supervised pretraining of transformer encoders on unlabelled data of any modality.

After ``import mmssl``, ``AutoConfig``, ``AutoModel``, ``AutoProcessor`` and ``AutoFeatureExtractor`` of transformers
load its checkpoints.
"""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor

from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor
from mmssl.version import __version__

__all__ = ["MMSSLConfig", "MMSSLFeatureExtractor", "MMSSLModel", "MMSSLProcessor", "__version__"]

AutoConfig.register("mmssl", MMSSLConfig, exist_ok=True)
AutoModel.register(MMSSLConfig, MMSSLModel, exist_ok=True)
AutoFeatureExtractor.register(MMSSLConfig, MMSSLFeatureExtractor, exist_ok=True)
AutoProcessor.register(MMSSLConfig, MMSSLProcessor, exist_ok=True)
