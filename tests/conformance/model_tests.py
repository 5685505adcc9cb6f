"""Our models as transformers' own tests want to be told of them. ``test_conformance`` puts this beside those tests."""

import unittest
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from mmssl import MMSSLConfig, MMSSLForSequenceClassification, MMSSLModel
from tests.test_modeling_common import ModelTesterMixin, floats_tensor

# What tells those tests which model has no loss, and which one takes labels of what shape.
MODEL_MAPPING_NAMES["mmssl"] = MMSSLModel.__name__
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["mmssl"] = MMSSLForSequenceClassification.__name__


class ModelTester:
    """The attributes that the mixin reads, and a small model with a batch."""

    batch_size, hidden_size, num_hidden_layers, num_attention_heads, is_training = 8, 32, 2, 2, True
    seq_length: int  # tokens with the class token
    modalities: dict[str, dict[str, Any]]

    def prepare_config_and_inputs_for_common(self) -> tuple[MMSSLConfig, dict[str, Tensor]]:
        config = MMSSLConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            class_token=True,
            modalities=self.modalities,
        )
        return config, self.inputs()

    def inputs(self) -> dict[str, Tensor]:
        raise NotImplementedError


class ImageTester(ModelTester):
    seq_length = 1 + 4
    modalities = {"image": {"image_size": 8, "patch_size": 4}}

    def inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": floats_tensor([self.batch_size, 3, 8, 8])}


class SeriesTester(ModelTester):
    """Series of 20, 16 and 12 steps, padded."""

    seq_length = 1 + 5
    modalities = {"time_series": {"patch_length": 4, "num_channels": 1, "channel_mean": [0.0], "channel_std": [1.0]}}

    def inputs(self) -> dict[str, Tensor]:
        length = 20 - 4 * (torch.arange(self.batch_size) % 3)
        mask = (torch.arange(20) < length[:, None]).long()
        series = floats_tensor([self.batch_size, 20, 1]) * mask[..., None]
        return {"series": series, "observed_mask": mask[..., None], "attention_mask": mask}


class ModelTests(ModelTesterMixin):
    all_model_classes = (MMSSLModel, MMSSLForSequenceClassification)
    test_can_init_all_missing_weights_before_2023 = True  # it asks for the year of a copyright line, which we have not
    tester_class: ClassVar[type[ModelTester]]

    def setUp(self) -> None:
        self.model_tester = self.tester_class()


class ImageModelTest(ModelTests, unittest.TestCase):
    tester_class = ImageTester


class SeriesModelTest(ModelTests, unittest.TestCase):
    tester_class = SeriesTester
    additional_model_inputs = ["observed_mask", "attention_mask"]
