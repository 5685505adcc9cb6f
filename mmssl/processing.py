"""The Hugging Face side of data preparation: ``AutoProcessor`` and ``AutoFeatureExtractor`` load these classes."""

from collections.abc import Sequence
from typing import Any, cast

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

    @property
    def sampling_rate(self) -> int:
        """Samples per second that sound is read at, for transformers' pipelines."""
        rates = [each.sampling_rate for each in self._modalities.values() if hasattr(each, "sampling_rate")]
        if len(rates) != 1:
            raise AttributeError(f"sampling_rate: found {len(rates)} modalities with one; expected 1")
        return cast(int, rates[0])

    def __call__(self, samples: Any = None, modality: str | None = None, images: Any = None, **kwargs) -> BatchFeature:
        """Prepare one sample or a list of samples.

        Args:
            samples: what the modality's ``prepare`` takes: a path, bytes, a PIL image, an array, a record.
            modality: which modality they are of; needed where the model has several that take such arguments.
            images: samples, under the name by which transformers' pipelines pass images.
            kwargs: ``sampling_rate`` of arrays of sound; ``return_tensors`` may only be "pt".
        """
        if kwargs.pop("return_tensors", "pt") not in ("pt", None):
            raise ValueError('return_tensors: only "pt" (PyTorch) is supported')
        if (samples is None) == (images is None):
            raise ValueError("found neither or both of samples and images; expected one of them")
        fits = list(self._modalities)
        if len(fits) > 1 and images is not None:
            fits = [name for name in fits if self._modalities[name].inputs[0] == "pixel_values"]
        elif len(fits) > 1 and kwargs.get("sampling_rate") is not None:
            fits = [name for name in fits if hasattr(self._modalities[name], "sampling_rate")]
        samples = samples if images is None else images
        if modality is None:
            if len(fits) != 1:
                raise ValueError(f"pass modality=; the model has: {', '.join(self._modalities)}")
            (modality,) = fits
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

    def __call__(self, samples: Any = None, modality: str | None = None, **kwargs) -> BatchFeature:
        """See ``MMSSLFeatureExtractor``."""
        return self.feature_extractor(samples, modality=modality, **kwargs)
