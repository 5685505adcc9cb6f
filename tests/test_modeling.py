"""The Hugging Face side: save, load, processors, and what a user gets wrong."""

import copy
import dataclasses
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchaudio.functional import resample
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor, BatchFeature

from mmssl import MMSSLConfig, MMSSLFeatureExtractor, MMSSLModel, MMSSLProcessor
from mmssl.discovery import names
from mmssl.encoder import EncoderConfig
from mmssl.modeling import make_modality
from tests.matrix.cases import MODALITIES

IMAGE: dict[str, Any] = {"image_size": (8, 12), "patch_size": 4, "num_channels": 1, "alteration_ratio": (0.2, 0.4)}
SPEECH: dict[str, Any] = {
    "sampling_rate": 8000,
    "num_mels": 8,
    "n_fft": 256,
    "win_length": 256,
    "hop_length": 128,
    "crop_scale": (0.5, 1.0),
    "view_noise": (10.0, 20.0),
}
BOTH = {"image": IMAGE, "speech": SPEECH}
NUM_PREFIX = 3
LENGTHS = (1500, 900)  # samples of the two clips


def make_config(**options: Any) -> MMSSLConfig:
    defaults: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "class_token": True,
        "num_register_tokens": 2,
        "layer_scale_init": 0.1,
        "modalities": BOTH,
    }
    return MMSSLConfig(**{**defaults, **options})


def make_model(**options: Any) -> MMSSLModel:
    """In evaluation mode, and with no parameter at its start value, which loading could restore by chance."""
    torch.manual_seed(0)
    model = MMSSLModel(make_config(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_processor(modalities: dict[str, dict[str, Any]] = BOTH) -> MMSSLProcessor:
    return MMSSLProcessor(MMSSLFeatureExtractor(modalities))


def raw_samples(modality: str) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    if modality == "image":
        return [random.random((8, 12), dtype=np.float32) for _ in LENGTHS]
    return [random.standard_normal(length).astype(np.float32) for length in LENGTHS]


def make_batch(modality: str) -> BatchFeature:
    return make_processor()(raw_samples(modality), modality=modality)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What nobody writes to is NaN, where it may be anything, also zero, by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


each_modality = pytest.mark.parametrize("modality", ["image", "speech"])


# Save and load


@each_modality
def test_loaded_through_the_auto_classes_everything_is_equal_to_the_bit(modality: str, tmp_path: Path) -> None:
    model, processor = make_model(), make_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "processor_config.json"}

    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MMSSLModel
    assert not loaded.training
    assert type(AutoConfig.from_pretrained(tmp_path)) is MMSSLConfig
    samples, batch = raw_samples(modality), make_batch(modality)
    for auto in (AutoProcessor, AutoFeatureExtractor):
        again = auto.from_pretrained(tmp_path)(samples, modality=modality)
        assert set(again) == set(batch)
        assert all(torch.equal(again[name], batch[name]) for name in batch)
    with torch.no_grad():
        expected, found = model(**batch), loaded(**batch)
    for name in ("last_hidden_state", "pooler_output", "token_mask"):
        assert torch.equal(found[name], expected[name])
    assert expected.last_hidden_state.isfinite().all()


def test_a_feature_extractor_saved_alone_is_loaded(tmp_path: Path) -> None:
    make_processor().feature_extractor.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is MMSSLFeatureExtractor
    batch, again = make_batch("speech"), loaded(raw_samples("speech"), modality="speech")
    assert torch.equal(again["input_values"], batch["input_values"])
    assert loaded.model_input_names == ["pixel_values", "input_values", "attention_mask"]


@each_modality
def test_loads_in_bfloat16_and_takes_what_the_processor_returns(modality: str, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    batch = make_batch(modality)
    with torch.no_grad():
        expected, found = model(**batch), loaded(**batch)
    assert found.last_hidden_state.dtype == torch.bfloat16
    kept = expected.token_mask
    similarity = torch.cosine_similarity(
        found.last_hidden_state.float()[kept], expected.last_hidden_state[kept], dim=-1
    )
    assert similarity.min() > 0.999


def test_loads_with_a_device_map(tmp_path: Path) -> None:
    model, batch = make_model(), make_batch("image")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("name", names("modalities"))
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_buffers_are_the_same_after_loading(name: str, tmp_path: Path) -> None:
    """from_pretrained builds on the meta device, and leaves buffers that are not in the checkpoint to chance."""
    model = MMSSLModel(make_config(hidden_size=48, modalities={name: MODALITIES[name][0]}))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    expected, found = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert set(found) == set(expected)
    for buffer in expected:
        assert torch.equal(found[buffer], expected[buffer]), buffer
    # Tables are computed from coords at each call. A buffer outside the checkpoint needs a line in `_init_weights`.
    assert sorted(set(expected) - set(model.state_dict())) == []


def check_start_value(name: str, value: Tensor, config: MMSSLConfig) -> None:
    """The distribution that the config asks for, by the kind of parameter."""
    kind = name.rpartition(".")[2]
    if kind == "prefix_tokens":
        assert 0.7 * config.initializer_range < value.std() < 1.4 * config.initializer_range, name
    elif kind == "scale":
        assert config.layer_scale_init is not None
        assert torch.equal(value, torch.full_like(value, config.layer_scale_init)), name
    elif kind == "bias":
        assert not value.any(), name
    elif "norm" in name:
        assert torch.equal(value, torch.ones_like(value)), name
    elif config.initializer == "normal":
        assert value.std().item() == pytest.approx(config.initializer_range, rel=0.2), name
    else:
        limit = math.sqrt(6 / sum(value.shape))
        assert value.abs().max() <= limit, name
        assert value.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.2), name


@pytest.mark.parametrize("initializer", ["xavier_uniform", "normal"])
def test_start_values(initializer: str) -> None:
    torch.manual_seed(0)
    config = make_config(initializer=initializer, initializer_range=0.05)
    for name, value in MMSSLModel(config).named_parameters():
        check_start_value(name, value.detach(), config)


EVERYTHING_BUT_ONE = "everything but one"


@pytest.mark.parametrize(
    "missing",
    [
        ["encoder.prefix_tokens"],
        ["encoder.layers.1.scale1.scale", "encoder.layers.0.attention.qkv.weight"],
        ["modalities.image.projection.weight"],
        ["modalities.speech.projection.bias", "encoder.norm.weight", "encoder.layers.0.norm1.bias"],
        EVERYTHING_BUT_ONE,
    ],
    ids=str,
)
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_a_checkpoint_with_missing_keys_gets_start_values_there_and_keeps_the_rest(
    missing: list[str] | str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    if missing == EVERYTHING_BUT_ONE:
        missing = sorted(set(saved) - {"encoder.layers.0.mlp.fc1.bias"})
    assert set(missing) <= set(saved)
    save_file({name: value for name, value in saved.items() if name not in missing}, file, metadata={"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, value in loaded.named_parameters():
        if name in missing:
            assert value.isfinite().all(), name
            check_start_value(name, value.detach(), loaded.config)
        else:
            assert torch.equal(value, saved[name]), name


LEARNED = {name: {"position_embedding": "learned"} for name in ("image", "video", "tabular")} | {
    "graph": {"random_walk_steps": 4, "encoding_gate": 0.5}
}


@pytest.mark.parametrize("name", names("modalities"))
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_every_parameter_of_a_modality_has_start_values_where_a_checkpoint_lacks_it(name: str, tmp_path: Path) -> None:
    options = {**MODALITIES[name][0], **LEARNED.get(name, {})}
    shape: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = MMSSLModel(MMSSLConfig(modalities={name: options}, **shape))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if not key.startswith("modalities.")}
    save_file(kept, file, metadata={"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path)
    for (key, value), start in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert value.isfinite().all(), key
        assert value.std(unbiased=False).item() == pytest.approx(start.std(unbiased=False).item(), rel=0.5), key
        if value.numel() == 1:
            assert torch.equal(value, start), key
    for (key, found), begun in zip(loaded.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(found, begun), key


def by_pickle(model: MMSSLModel) -> MMSSLModel:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: MMSSLModel) -> MMSSLModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save], ids=lambda function: function.__name__)
@torch.no_grad()
def test_copies_are_equal_and_independent(duplicate: Callable[[MMSSLModel], MMSSLModel]) -> None:
    model, batch = make_model(), make_batch("speech")
    before = model(**batch).last_hidden_state
    other = duplicate(model)
    assert torch.equal(other(**batch).last_hidden_state, before)
    for parameter in other.parameters():
        parameter.zero_()
    other.set_attn_implementation("eager")
    assert torch.equal(model(**batch).last_hidden_state, before)
    assert model.encoder.config is model.config
    assert other.encoder.config is other.config


# Options


def test_the_config_keeps_every_option_of_the_encoder(tmp_path: Path) -> None:
    changed: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "hidden_act": "relu",
        "position_every_block": True,
        "residual": False,
        "feed_forward": False,
        "norm_position": "post",
        "final_norm": False,
        "layer_norm_eps": 1e-5,
        "qkv_bias": False,
        "layer_scale_init": 1e-4,
        "drop_path_rate": 0.1,
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "causal_attention": True,
        "class_token": True,
        "num_register_tokens": 5,
        "initializer": "normal",
        "initializer_range": 0.01,
    }
    for field in dataclasses.fields(EncoderConfig):  # a new option belongs into this test
        assert changed[field.name] != field.default
    MMSSLConfig(**changed, modalities=BOTH).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in changed} == changed


def test_options_of_the_modalities_survive_json_in_config_model_and_processor(tmp_path: Path) -> None:
    """Whatever JSON does to tuples: each part builds modalities with equal options, those that were asked for."""
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    expected = {name: make_modality(name, options).options() for name, options in BOTH.items()}
    for name, options in BOTH.items():
        for option, value in options.items():
            assert expected[name][option] == ((4, 4) if option == "patch_size" else value)
    assert make_config().modalities == expected
    assert AutoConfig.from_pretrained(tmp_path).modalities == expected
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert {name: modality.options() for name, modality in model.modalities.items()} == expected
    rebuilt = processor.feature_extractor.modalities.items()
    assert {name: make_modality(name, options).options() for name, options in rebuilt} == expected


@pytest.mark.parametrize("name", names("modalities"))
def test_default_options_survive_json(name: str) -> None:
    options = make_modality(name, {}).options()
    assert make_modality(name, json.loads(json.dumps(options))).options() == options


# Forward


@each_modality
@torch.no_grad()
def test_pooled_output_is_the_mean_of_the_valid_tokens_without_prefix(modality: str) -> None:
    model, batch = make_model(), make_batch(modality)
    out = model(**batch)
    count = [6, 6] if modality == "image" else [1 + length // SPEECH["hop_length"] for length in LENGTHS]
    assert out.token_mask.sum(dim=1).tolist() == [NUM_PREFIX + number for number in count]
    for row, number in enumerate(count):
        assert out.token_mask[row, : NUM_PREFIX + number].all()
        expected = out.last_hidden_state[row, NUM_PREFIX : NUM_PREFIX + number].mean(dim=0)
        torch.testing.assert_close(out.pooler_output[row], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@torch.no_grad()
def test_a_clip_alone_equals_the_clip_in_a_padded_batch(norm_position: str) -> None:
    model, processor = make_model(norm_position=norm_position), make_processor()
    batch = make_batch("speech")
    batch["input_values"] = batch["input_values"].masked_fill(batch["attention_mask"] == 0, 1e3)  # never read
    together = model(**batch)
    for row, clip in enumerate(raw_samples("speech")):
        alone = model(**processor(clip, modality="speech"))
        found = together.last_hidden_state[row, together.token_mask[row]]
        torch.testing.assert_close(found, alone.last_hidden_state[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], atol=1e-5, rtol=0)


@each_modality
def test_each_batch_goes_to_its_own_modality(modality: str) -> None:
    """A model of two modalities gives what a model of this one with the same weights gives, and trains it alone."""
    both, alone = make_model(), make_model(modalities={modality: BOTH[modality]})
    alone.load_state_dict(both.state_dict(), strict=False)
    batch = make_batch(modality)
    out = both(**batch).last_hidden_state
    assert torch.equal(out, alone(**batch).last_hidden_state)
    out.square().sum().backward()
    parts: dict[str, Any] = dict(both.modalities.items())
    for name, part in parts.items():
        assert (part.projection.weight.grad is not None) == (name == modality)
    assert alone.main_input_name == next(iter(batch))


@each_modality
@torch.no_grad()
def test_hidden_states_are_the_input_and_the_output_of_each_block(modality: str) -> None:
    model, batch = make_model(num_hidden_layers=3), make_batch(modality)
    out = model(**batch, output_hidden_states=True)
    adapter: Any = model.modalities[modality]
    tokens = adapter.tokenize(dict(batch))
    content, position = adapter.embed(tokens), adapter.position(tokens.coords)
    layers = model.encoder(content, position, tokens.valid, keep_layers=(1, 2, 3)).layers
    assert len(out.hidden_states) == 4
    for found, expected in zip(out.hidden_states, [content + position, *layers], strict=True):
        torch.testing.assert_close(found[:, NUM_PREFIX:], expected)
    torch.testing.assert_close(model.encoder.norm(out.hidden_states[-1]), out.last_hidden_state)
    assert model(**batch).hidden_states is None


@torch.no_grad()
def test_attentions_of_eager_attention(tmp_path: Path) -> None:
    """Equal to the softmax of the scores, zero at padding; the output is that of sdpa."""
    make_model().save_pretrained(tmp_path)
    model, batch = AutoModel.from_pretrained(tmp_path, attn_implementation="eager"), make_batch("speech")
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2
    for layer, hidden, found in zip(model.encoder.layers, out.hidden_states, out.attentions, strict=False):
        query, key, _ = layer.attention.qkv(layer.norm1(hidden)).unflatten(-1, (3, 2, 16)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(16)
        expected = scores.masked_fill(~out.token_mask[:, None, None], -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert not found[1, :, :, ~out.token_mask[1]].any()
    model.set_attn_implementation("sdpa")
    kept = out.token_mask
    torch.testing.assert_close(
        model(**batch).last_hidden_state[kept], out.last_hidden_state[kept], atol=1e-5, rtol=1e-5
    )


@each_modality
def test_activation_checkpointing_changes_neither_loss_nor_gradients(modality: str) -> None:
    batch = make_batch(modality)
    results, calls = [], []
    for checkpointed in (False, True):
        model = make_model(drop_path_rate=0.3, hidden_dropout_prob=0.1).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        called: list[int] = []
        model.encoder.layers[0].mlp.register_forward_hook(lambda *_, called=called: called.append(1))
        torch.manual_seed(0)
        loss = model(**batch).last_hidden_state.square().mean()
        loss.backward()
        used = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        results.append({"loss": loss.detach(), **used})
        calls.append(len(called))
    assert calls == [1, 2]  # with it, a block is computed once more on the way back
    plain, checkpointed_result = results
    assert set(plain) == set(checkpointed_result)
    for name, value in plain.items():
        assert torch.equal(value, checkpointed_result[name]), name


# The processor


@each_modality
def test_the_processor_prepares_and_collates_as_training_does(modality: str) -> None:
    samples, own = raw_samples(modality), make_modality(modality, BOTH[modality])
    expected = own.collate([own.prepare(sample) for sample in samples])
    named = make_processor()
    alone = make_processor({modality: BOTH[modality]})
    calls = [
        named(samples, modality=modality),
        named(tuple(samples), modality=modality, return_tensors="pt"),
        alone(samples),
    ]
    for found in calls:
        assert set(found) == set(expected) == set(own.inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    one = alone(samples[0])
    assert all(torch.equal(one[name], value) for name, value in own.collate([own.prepare(samples[0])]).items())


def test_the_processor_resamples_sound_of_another_rate() -> None:
    processor, own = make_processor({"speech": SPEECH}), make_modality("speech", SPEECH)
    waves = raw_samples("speech")
    found = processor(waves, sampling_rate=12_000)
    expected = own.collate([own.prepare(resample(torch.from_numpy(wave), 12_000, 8000)) for wave in waves])
    assert found["attention_mask"].sum(dim=1).tolist() == [1000, 600]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    same = processor(waves, sampling_rate=8000)
    assert torch.equal(same["input_values"], processor(waves)["input_values"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass modality=.*image, speech"),
        ({"modality": "video"}, "'video'.*image, speech"),
        ({"modality": "image", "sample_rate": 3}, "sample_rate"),
        ({"modality": "image", "return_tensors": "np"}, "return_tensors.*pt"),
        ({"modality": "image", "sampling_rate": 8000}, "sampling_rate"),
    ],
    ids=["no modality", "wrong modality", "unknown argument", "numpy", "rate of images"],
)
def test_the_processor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_processor()(raw_samples("image"), **arguments)


# What a user gets wrong


def test_an_unknown_modality_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'smell'") as error:
        make_config(modalities={"smell": {}})
    assert all(name in str(error.value) for name in names("modalities"))


@pytest.mark.parametrize("loader", [AutoConfig, AutoModel])
def test_an_unknown_option_in_a_file_is_refused_by_name(loader: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["modalities"]["image"]["patchsize"] = 4
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"'image': patchsize;.*\bpatch_size\b"):
        loader.from_pretrained(tmp_path)


def test_an_unknown_option_of_the_processor_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'speech': mels;.*\bnum_mels\b"):
        MMSSLFeatureExtractor({"speech": {"mels": 3}})


@pytest.mark.parametrize("modalities", [None, {}])
def test_a_model_without_modalities_is_refused(modalities: dict | None) -> None:
    with pytest.raises(ValueError, match=r"no modality.*modalities="):
        MMSSLModel(make_config(modalities=modalities))


@pytest.mark.parametrize("found", [["pixels"], ["pixel_values", "labels"], ["input_values"], []])
def test_a_batch_of_unknown_inputs_is_refused_with_found_and_expected(found: list[str]) -> None:
    with pytest.raises(ValueError, match="found inputs") as error:
        make_model()(**{name: torch.zeros(1, 1, 8, 12) for name in found})
    for name in [*found, "pixel_values", "input_values", "attention_mask"]:
        assert f"'{name}'" in str(error.value)
