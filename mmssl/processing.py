"""The Hugging Face side of data preparation: ``AutoProcessor`` and ``AutoFeatureExtractor`` load these classes."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, FeatureExtractionMixin, ProcessorMixin

from mmssl.modeling import make_modality


class MMSSLFeatureExtractor(FeatureExtractionMixin):
    """Raw samples to a batch, by the very code that prepared them in training.

    Args:
        modalities: options of each modality, as in the model's config.
    """

    def __init__(self, modalities: dict[str, dict[str, Any]] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.modalities = modalities or {}
        self._modalities = {name: make_modality(name, options) for name, options in self.modalities.items()}
        self.model_input_names = [name for modality in self._modalities.values() for name in modality.inputs]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_modalities"}

    def __call__(self, samples: Any, modality: str | None = None, **kwargs) -> BatchFeature:
        """Prepare one sample or a list of samples.

        Args:
            samples: what the modality's ``prepare`` takes: a path, bytes, a PIL image, an array, a record.
            modality: which modality they are of; needed where the model has several.
            kwargs: ``sampling_rate`` of arrays of sound; ``return_tensors`` may only be "pt".
        """
        if kwargs.pop("return_tensors", "pt") not in ("pt", None):
            raise ValueError('return_tensors: only "pt" (PyTorch) is supported')
        if modality is None:
            if len(self._modalities) != 1:
                raise ValueError(f"pass modality=; the model has: {', '.join(self._modalities)}")
            (modality,) = self._modalities
        if modality not in self._modalities:
            raise ValueError(f"found modality {modality!r}; the model has: {', '.join(self._modalities)}")
        chosen = self._modalities[modality]
        samples = list(samples) if isinstance(samples, Sequence) and not isinstance(samples, str | bytes) else [samples]
        rate = kwargs.pop("sampling_rate", None)
        if kwargs:
            raise ValueError(f"unknown argument: {', '.join(sorted(kwargs))}")
        if rate is not None:
            if not hasattr(chosen, "sampling_rate"):
                raise ValueError(f"sampling_rate: {modality} has none; leave it out")
            samples = [{"array": sample, "sampling_rate": rate} for sample in samples]
        return BatchFeature(chosen.collate([chosen.excerpt(chosen.prepare(sample), None) for sample in samples]))


class MMSSLProcessor(ProcessorMixin):
    """What ``AutoProcessor`` returns: the feature extractor under its usual name."""

    def __init__(self, feature_extractor: MMSSLFeatureExtractor):
        super().__init__(feature_extractor)

    def __call__(self, samples: Any, modality: str | None = None, **kwargs) -> BatchFeature:
        """See ``MMSSLFeatureExtractor``."""
        return self.feature_extractor(samples, modality=modality, **kwargs)
