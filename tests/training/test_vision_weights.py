"""Weights of transformers' own models: our hidden states are theirs, on the same picture."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.pixels import pair
from mmssl.positions import NoPositions
from mmssl.training import ModelArguments, TrainArguments, pretrain
from mmssl.training.warm_start import WarmStart
from tests.training.tiny import metrics

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE: dict[str, Any] = {"image_size": 12, "patch_size": 4, "num_channels": 3}
LEARNED: dict[str, Any] = {"position_embedding": "learned"}
CLIP: dict[str, Any] = {**IMAGE, "num_frames": 4, "tubelet_size": 2}


def shaken(model: PreTrainedModel) -> Any:
    """No weight at a start value of 0 or 1, which could be right by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ours(folder: Path, modality: str, options: dict[str, Any], **encoder: Any) -> tuple[MMSSLModel, WarmStart]:
    config = MMSSLConfig(modalities={modality: options}, **SHAPE | {"layer_norm_eps": 1e-12} | encoder)
    start, model = WarmStart(str(folder), config), MMSSLModel(config)
    start.load_model(model)
    return model.eval(), start


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_states(model: MMSSLModel, inputs: dict[str, Tensor], states: Any, last: Tensor) -> None:
    """The output of every block, and the last one after the final norm."""
    found = model(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(states) == 4
    for one, two in zip((*found.hidden_states[:3], found.last_hidden_state), (*states[:3], last), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert last.abs().mean() > 0.1


def table(rows: int, columns: int, width: int) -> Tensor:
    """MAE's table by a loop: of a patch, sines and cosines of its column, and then of its row."""
    places = []
    for row in range(rows):
        for column in range(columns):
            angles = [[at / 10_000 ** (k / (width // 4)) for k in range(width // 4)] for at in (column, row)]
            places.append(torch.cat([f(torch.tensor(each)) for each in angles for f in (torch.sin, torch.cos)]))
    return torch.stack(places)


@pytest.mark.parametrize(("bias", "act"), [(True, "gelu"), (False, "relu")])
@torch.no_grad()
def test_a_vit_with_fixed_places(tmp_path: Path, bias: bool, act: str) -> None:
    """As of MoCo v3. Its class token has a place, which ours has not: the two are added up."""
    theirs = shaken(ViTModel(ViTConfig(**SHAPE, **IMAGE, qkv_bias=bias, hidden_act=act), add_pooling_layer=False))
    theirs.embeddings.position_embeddings[0, 1:] = table(3, 3, 32)
    theirs.save_pretrained(tmp_path)
    model, start = ours(tmp_path, "image", IMAGE, class_token=True, qkv_bias=bias, hidden_act=act)
    picture = pixels(2, 3, 12, 12)
    out = theirs(picture, output_hidden_states=True)
    assert_same_states(model, {"pixel_values": picture}, out.hidden_states, out.last_hidden_state)
    assert {what for what, _ in start.outcomes.values()} == {"loaded"}
    assert start.found.remarks[0][:2] == ("places", "the same")


@pytest.mark.parametrize("size", [12, (8, 20)])
@torch.no_grad()
def test_a_vit_with_learned_places(tmp_path: Path, size: Any) -> None:
    """Of a classifier, whose head is left out."""
    theirs = shaken(ViTForImageClassification(ViTConfig(**SHAPE, **IMAGE | {"image_size": size})))
    theirs.save_pretrained(tmp_path)
    model, start = ours(tmp_path, "image", {**IMAGE, "image_size": size, **LEARNED}, class_token=True)
    assert [(what, status) for what, status, _ in start.found.remarks] == [
        ("places", "learned"),
        ("classifier.bias, classifier.weight", "left out"),
    ]
    assert set(start.outcomes.values()) == {("loaded", "")}
    picture = pixels(2, 3, *pair(size))
    out = theirs.vit(picture, output_hidden_states=True)
    assert_same_states(model, {"pixel_values": picture}, out.hidden_states, out.last_hidden_state)


@torch.no_grad()
def test_without_the_option_learned_places_are_left_out_and_it_is_named(tmp_path: Path) -> None:
    """Everything else is theirs: without its places, theirs says what ours says without ours."""
    theirs = shaken(ViTModel(ViTConfig(**SHAPE, **IMAGE), add_pooling_layer=False))
    theirs.save_pretrained(tmp_path)
    model, start = ours(tmp_path, "image", IMAGE, class_token=True)
    assert start.outcomes["modalities.image.position.grid_tokens"] == ("left out", "no such weight here")
    assert start.outcomes["modalities.image.projection.bias"][1] == "position_embedding was learned, is sincos"
    assert "--modality.position_embedding learned" in start.found.remarks[0][2]
    theirs.embeddings.position_embeddings[0, 1:] = 0
    model.adapters["image"].position = NoPositions(32)
    picture = pixels(2, 3, 12, 12)
    torch.testing.assert_close(
        model(pixel_values=picture).last_hidden_state, theirs(picture).last_hidden_state, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_learned_places_go_over_to_another_size(tmp_path: Path) -> None:
    """A model for larger pictures begins as what the one for smaller pictures makes of large ones."""
    shaken(ViTModel(ViTConfig(**SHAPE, **IMAGE))).save_pretrained(tmp_path)
    small, _ = ours(tmp_path, "image", {**IMAGE, **LEARNED}, class_token=True)
    large, start = ours(tmp_path, "image", {**IMAGE, "image_size": (24, 16), **LEARNED}, class_token=True)
    what, why = start.outcomes["modalities.image.position.grid_tokens"]
    assert what == "adapted" and why.endswith("at these places; image_size was [12, 12], is [24, 16]")
    table = small.state_dict()["modalities.image.position.grid_tokens"]
    expected = nn.functional.interpolate(table.movedim(-1, 0)[None], (6, 4), mode="bilinear")[0].movedim(0, -1)
    found = large.state_dict()["modalities.image.position.grid_tokens"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    picture = pixels(2, 3, 24, 16)
    found, before = (model(pixel_values=picture).last_hidden_state for model in (large, small))
    torch.testing.assert_close(found, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position_embedding", ["sincos", "index", "learned"])
@torch.no_grad()
def test_learned_places_begin_as_those_of_a_run(tmp_path: Path, position_embedding: str) -> None:
    """Whatever these were: of clips of the same length and of longer ones the output is what it was."""
    torch.manual_seed(0)
    options = {"video": {**CLIP, "position_embedding": position_embedding}}
    old = shaken(MMSSLModel(MMSSLConfig(modalities=options, **SHAPE, layer_norm_eps=1e-12)))
    old.save_pretrained(tmp_path)
    for frames in (4, 8):
        drawn = torch.random.get_rng_state()
        start = WarmStart(
            str(tmp_path),
            MMSSLConfig(modalities={"video": {**CLIP, "num_frames": frames, **LEARNED}}, **SHAPE, layer_norm_eps=1e-12),
        )
        model = MMSSLModel(start.config)
        torch.random.set_rng_state(drawn)
        start.load_model(model)
        assert torch.equal(torch.random.get_rng_state(), drawn)
        same = position_embedding == "learned" and frames == 4
        assert start.outcomes["modalities.video.position.grid_tokens"][0] == ("loaded" if same else "adapted")
        clip = pixels(2, 3, frames, 12, 12)
        found, expected = (each.eval()(pixel_values_videos=clip).last_hidden_state for each in (model, old))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_dinov2(tmp_path: Path, registers: int) -> None:
    """Class token, registers, patches: in the order of ours. Its mask token is left out."""
    shape: dict[str, Any] = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    shape |= {**IMAGE, "mlp_ratio": 2, "layer_norm_eps": 1e-5}
    theirs: Any = Dinov2Model(Dinov2Config(**shape))
    if registers:
        theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=registers))
    theirs = shaken(theirs)
    theirs.save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "class_token": True,
        "num_register_tokens": registers,
        "layer_norm_eps": 1e-5,
        "intermediate_size": 64,
    }
    model, start = ours(tmp_path, "image", {**IMAGE, **LEARNED}, **options, layer_scale_init=1.0)
    assert set(start.outcomes.values()) == {("loaded", "")}
    assert [what for what, *_ in start.found.remarks] == ["places", "mask token"]
    assert model.state_dict()["encoder.layers.0.scale1.scale"].std() > 0.1
    picture = pixels(2, 3, 12, 12)
    out = theirs(picture, output_hidden_states=True)
    assert_same_states(model, {"pixel_values": picture}, out.hidden_states, out.last_hidden_state)
    with pytest.raises(ValueError, match="has another shape") as error:
        ours(tmp_path, "image", {**IMAGE, **LEARNED})
    for flag in ("intermediate_size 64", "layer_norm_eps 1e-05", "class_token true", "layer_scale_init 1.0"):
        assert f"--encoder.{flag}" in str(error.value)
    assert ("--encoder.num_register_tokens 3 (found 0)" in str(error.value)) == bool(registers)


@pytest.mark.parametrize(
    ("absolute", "mean_pooling", "scale"), [(True, False, 0.1), (False, True, 0.1), (True, True, 0.0)]
)
@torch.no_grad()
def test_data2vec_vision(tmp_path: Path, absolute: bool, mean_pooling: bool, scale: float) -> None:
    """Without a bias of relative places; and without absolute ones, none at all."""
    theirs = shaken(
        Data2VecVisionModel(
            Data2VecVisionConfig(
                **SHAPE,
                **IMAGE,
                use_absolute_position_embeddings=absolute,
                use_mean_pooling=mean_pooling,
                layer_scale_init_value=scale,
                use_mask_token=True,
            )
        )
    )
    theirs.save_pretrained(tmp_path)
    options = {"class_token": True, "final_norm": not mean_pooling, "layer_scale_init": scale or None}
    model, start = ours(tmp_path, "image", {**IMAGE, **LEARNED}, **options)
    assert set(start.outcomes.values()) == {("loaded", "")}
    assert model.state_dict()["modalities.image.position.grid_tokens"].any() == absolute
    picture = pixels(2, 3, 12, 12)
    out = theirs(picture, output_hidden_states=True)
    assert_same_states(model, {"pixel_values": picture}, out.hidden_states, out.last_hidden_state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Dinov2Config(use_swiglu_ffn=True), "use_swiglu_ffn is true: its feed-forward is gated"),
        (Dinov2WithRegistersConfig(use_swiglu_ffn=True), "use_swiglu_ffn is true"),
        (Data2VecVisionConfig(use_relative_position_bias=True), "use_relative_position_bias is true"),
        (Data2VecVisionConfig(use_shared_relative_position_bias=True), "use_shared_relative_position_bias is true"),
        (ASTConfig(), "its tokens are patches of a spectrogram"),
        (ASTConfig(frequency_stride=16, time_stride=16), "its tokens are patches of a spectrogram"),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
def test_what_cannot_be_the_same_is_refused_before_it_is_read(tmp_path: Path, config: Any, message: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"init_from: .*\({config.model_type}\) cannot be the encoder here: {message}"
    ):
        ours(tmp_path, "image", IMAGE)


@pytest.mark.parametrize("kind", [ViTMAEModel, ViTMAEForPreTraining])
@torch.no_grad()
def test_vit_mae(tmp_path: Path, kind: Any) -> None:
    theirs = shaken(
        kind(ViTMAEConfig(**SHAPE, **IMAGE, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_attention_heads=2))
    )
    getattr(theirs, "vit", theirs).embeddings.position_embeddings[0] = nn.functional.pad(table(3, 3, 32), (0, 0, 1, 0))
    theirs.save_pretrained(tmp_path)
    model, start = ours(tmp_path, "image", IMAGE, class_token=True)
    picture, order = pixels(2, 3, 12, 12), torch.arange(9.0).expand(2, -1)  # patches stay where they are
    out = getattr(theirs, "vit", theirs)(picture, noise=order, output_hidden_states=True)
    assert_same_states(model, {"pixel_values": picture}, out.hidden_states, out.last_hidden_state)
    status = {what: status for what, status, _ in start.found.remarks}
    assert status["places"] == "the same" and len(status) == 1 + (kind is ViTMAEForPreTraining)


@torch.no_grad()
def test_vit_mae_with_places_that_have_learned(tmp_path: Path) -> None:
    theirs = shaken(ViTMAEModel(ViTMAEConfig(**SHAPE, **IMAGE, mask_ratio=0.0)))
    theirs.save_pretrained(tmp_path)
    model, start = ours(tmp_path, "image", {**IMAGE, **LEARNED}, class_token=True)
    assert start.found.remarks[0][:2] == ("places", "learned")
    picture, order = pixels(2, 3, 12, 12), torch.arange(9.0).expand(2, -1)
    out = theirs(picture, noise=order, output_hidden_states=True)
    assert_same_states(model, {"pixel_values": picture}, out.hidden_states, out.last_hidden_state)


@pytest.mark.parametrize("kind", [VideoMAEModel, VideoMAEForPreTraining])
@pytest.mark.parametrize(("mean_pooling", "bias"), [(True, True), (False, True), (False, False)])
@torch.no_grad()
def test_videomae(tmp_path: Path, kind: Any, mean_pooling: bool, bias: bool) -> None:
    """But for its places, which are of the token's number: with ours instead, it says what our model says."""
    small: dict[str, Any] = {
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    config = VideoMAEConfig(**SHAPE, **CLIP, **small, use_mean_pooling=mean_pooling, qv_bias=bias)
    theirs = shaken(kind(config))
    theirs.save_pretrained(tmp_path)
    options = {**CLIP, "position_embedding": "index"}
    model, start = ours(tmp_path, "video", options, final_norm=not mean_pooling, qkv_bias=bias)
    assert start.found.remarks[0][:2] == ("places", "of the token's number")
    # Of VideoMAE alone, the key has no bias: ours begins at 0.
    assert set(start.outcomes.values()) == {("loaded", "")}
    base = getattr(theirs, "videomae", theirs)
    clip = pixels(2, 3, 4, 12, 12)
    out = base(clip.transpose(1, 2), output_hidden_states=True)
    assert_same_states(model, {"pixel_values_videos": clip}, out.hidden_states, out.last_hidden_state)


def test_options_that_make_another_model_are_refused_with_the_flags(tmp_path: Path) -> None:
    shaken(ViTModel(ViTConfig(**SHAPE, **IMAGE))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has another shape") as error:
        ours(tmp_path, "image", IMAGE, layer_norm_eps=1e-6)
    assert "--encoder.layer_norm_eps 1e-12 (found 1e-06) --encoder.class_token true (found false)" in str(error.value)


def test_fewer_blocks_other_channels_and_another_size(tmp_path: Path) -> None:
    shaken(ViTModel(ViTConfig(**SHAPE, **IMAGE))).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    options = {"image_size": 24, "patch_size": 4, "num_channels": 1, "image_mean": 0.1, "image_std": 0.5}
    model, start = ours(tmp_path, "image", options, class_token=True, num_hidden_layers=2)
    assert start.outcomes["modalities.image.projection.weight"] == (
        "adapted",
        "each of 1 channels has the mean of 3, times 3/1",
    )
    assert start.outcomes["modalities.image.projection.bias"] == (
        "loaded",
        "image_size was [12, 12], is [24, 24], num_channels was 3, is 1, image_mean was [0.5, 0.5, 0.5], is [0.1], "
        "image_std was [0.5, 0.5, 0.5], is [0.5], position_embedding was learned, is sincos",
    )
    assert start.outcomes["encoder.layers.2.mlp.fc1.bias"] == ("left out", "no such weight here")
    assert model(pixel_values=pixels(1, 1, 24, 24)).last_hidden_state.shape == (1, 37, 32)


def test_a_run_begins_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shaken(ViTMAEModel(ViTMAEConfig(**SHAPE, **IMAGE | {"num_channels": 1}))).save_pretrained(tmp_path / "mae")
    pretrain(
        Image(**IMAGE | {"num_channels": 1, "image_size": 8}),
        partial(MaskedReconstruction, views=False, decoder_layers=1, decoder_hidden_size=16),
        EncoderConfig(**SHAPE, class_token=True, layer_norm_eps=1e-12),
        DataArguments("digits", max_samples=16),
        TrainArguments(str(tmp_path / "run"), max_train_steps=2, per_device_train_batch_size=8, logging_steps=1),
        model=ModelArguments(init_from=str(tmp_path / "mae")),
    )
    assert len(metrics(tmp_path / "run")) == 2
    printed = capsys.readouterr().out
    assert "ViTMAEModel" in printed and "places" in printed and "the checkpoint has no objective" in printed
    started = json.loads((tmp_path / "run" / "run.json").read_text())["started_from"]
    assert started["kind"] == "transformers' ViTMAEModel" and started["remarks"]["places"].startswith("learned")
