"""Runs that begin with the weights of others: what is taken over, what is not, what is said of it, exact resume."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.base import Objective
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.latent_prediction import LatentPrediction
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.objectives.weighted_sum import Sum
from mmssl.training import ModelArguments, TrainArguments, pretrain
from mmssl.training.warm_start import WarmStart
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics
from tests.training.tiny import run as run_tiny

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "normalize_target": False}
ENCODER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "class_token": True}
DECODER: dict[str, Any] = {"decoder_layers": 1, "decoder_hidden_size": 16}
MASKED: Any = partial(MaskedReconstruction, mask_ratio=0.5, views=False, **DECODER)
LATENT: Any = partial(
    LatentPrediction, views=False, predictor_layers=1, predictor_hidden_size=8, predictor_attention_heads=2
)


def run(
    output_dir: Path,
    objective: Any = MASKED,
    encoder: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **train: Any,
) -> list[dict[str, float]]:
    """Pretrain on 40 digits, for 4 steps unless told, with dropout."""
    flags = {"max_train_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2, **train}
    pretrain(
        Image(**IMAGE | (image or {})),
        objective,
        EncoderConfig(**ENCODER | {"hidden_dropout_prob": 0.1} | (encoder or {})),
        DataArguments("digits", max_samples=40),
        TrainArguments(str(output_dir), **flags),
        model=ModelArguments(**model or {}),
    )
    return metrics(output_dir)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of masked reconstruction, with a checkpoint."""
    folder = tmp_path_factory.mktemp("base") / "run"
    run(folder, checkpointing_steps=4)
    return folder


def config(image: dict[str, Any] | None = None, **encoder: Any) -> MMSSLConfig:
    return MMSSLConfig(modalities={"image": IMAGE | (image or {})}, **ENCODER | encoder)


def begin(init_from: Path, own: MMSSLConfig, objective: Any = MASKED) -> tuple[WarmStart, Objective]:
    start = WarmStart(str(init_from), own)
    model = MMSSLModel(own)
    start.load_model(model)
    module = objective(model)
    start.load_heads(module)
    return start, module


def of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_and_its_last_checkpoint_are_the_same_beginning(base: Path) -> None:
    """All of the model, and of the objective, which is of the same class."""
    saved = load_file(base / "model.safetensors") | load_file(base / "objective.safetensors")
    for folder in (base, base / "step_4"):
        start, module = begin(folder, config())
        own = module.state_dict()
        assert {what for what, _ in start.outcomes.values()} == {"loaded"}
        assert_equal({name.removeprefix("model."): value for name, value in own.items()}, saved)
        assert start.found.steps == 4


def test_a_run_begins_there_and_says_so(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learning rate 1e-30: after a step, the weights are still those that it began with."""
    run(tmp_path / "next", model={"init_from": str(base)}, max_train_steps=1, learning_rate=1e-30)
    assert_same_weights(tmp_path / "next", base)
    record = json.loads((tmp_path / "next" / "run.json").read_text())
    assert record["model"] == {"init_from": str(base)}
    begun = record["started_from"]
    assert begun["source"] == str(base) and begun["kind"] == "model of a run" and begun["steps"] == 4
    assert begun["weights"]["encoder.layers.1.mlp.fc2.weight"] == "loaded"
    assert begun["weights"]["objective.decoder_mask_token"] == "loaded"
    printed = capsys.readouterr().out
    assert f"Weights from {base}" in printed.replace("\n", "") and "encoder.layers" in printed and "loaded" in printed


def test_reading_weights_draws_no_numbers(tmp_path: Path, base: Path) -> None:
    """Heads begin as without them; also where weights are missing, and were filled in to be thrown away."""
    weights = load_file(base / "model.safetensors")
    del weights["encoder.layers.0.mlp.fc1.weight"]
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)
    alone = LATENT(MMSSLModel(config()))
    torch.manual_seed(0)
    model = MMSSLModel(config())
    start = WarmStart(str(tmp_path), config())
    start.load_model(model)
    assert start.outcomes["encoder.layers.0.mlp.fc1.weight"] == ("new", "not in the checkpoint")
    assert_equal(of(LATENT(model).state_dict(), "predictor"), of(alone.state_dict(), "predictor"))


def test_without_it_a_run_begins_nowhere(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=1)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["started_from"] is None and record["model"] == {"init_from": None}


def test_of_more_and_fewer_blocks(base: Path) -> None:
    saved = load_file(base / "model.safetensors")
    start, module = begin(base, config(num_hidden_layers=3))
    own = module.model.state_dict()
    assert_equal({name: own[name] for name in saved}, saved)
    assert {name for name, (what, _) in start.outcomes.items() if what == "new"} == {
        name for name in own if name.startswith("encoder.layers.2.")
    }
    start, module = begin(base, config(num_hidden_layers=1))
    assert_equal(module.model.state_dict(), {n: v for n, v in saved.items() if not n.startswith("encoder.layers.1.")})
    left = {name for name, (what, why) in start.outcomes.items() if (what, why) == ("left out", "no such weight here")}
    assert left == {name for name in saved if name.startswith("encoder.layers.1.")}


def test_another_size_of_images_is_said(base: Path) -> None:
    start, _ = begin(base, config({"image_size": 12}))
    assert start.outcomes["modalities.image.projection.weight"] == (
        "loaded",
        "image_size was [8, 8], is [12, 12]",
    )


def test_patches_of_another_layout_are_left_out(base: Path) -> None:
    """Also where they have as many pixels."""
    start, module = begin(base, config({"patch_size": (1, 4)}))
    assert start.outcomes["modalities.image.projection.weight"] == ("left out", "of another patch_size")
    saved = load_file(base / "model.safetensors")
    assert not torch.equal(
        module.model.state_dict()["modalities.image.projection.weight"], saved["modalities.image.projection.weight"]
    )


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_that_are_all_equal_are_embedded_as_before(tmp_path: Path, base: Path, channels: int) -> None:
    """From one to several, and from these to one more: by the modality itself, of the same grey picture."""
    statistics = {"image_mean": 0.5, "image_std": 0.5}
    old = AutoModel.from_pretrained(base)
    start, module = begin(base, config({"num_channels": channels, **statistics}))
    grey = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert start.outcomes["modalities.image.projection.weight"][0] == "adapted"

    def embedded(model: MMSSLModel, count: int) -> Tensor:
        modality = model.adapters["image"]
        return modality.embed(modality.tokenize({"pixel_values": grey.expand(-1, count, -1, -1)}))

    torch.testing.assert_close(embedded(module.model, channels), embedded(old, 1))
    module.model.save_pretrained(tmp_path)
    _, further = begin(tmp_path, config({"num_channels": channels + 1, **statistics}))
    torch.testing.assert_close(embedded(further.model, channels + 1), embedded(old, 1))


@pytest.mark.parametrize(("class_token", "registers"), [(True, 2), (False, 1)])
def test_class_and_register_tokens_go_to_their_like(base: Path, class_token: bool, registers: int) -> None:
    """One register in the place of the class token has its shape, and is not meant."""
    saved = load_file(base / "model.safetensors")["encoder.prefix_tokens"]
    start, module = begin(base, config(class_token=class_token, num_register_tokens=registers))
    own = module.model.state_dict()["encoder.prefix_tokens"]
    assert start.outcomes["encoder.prefix_tokens"][0] == "adapted"
    assert torch.equal(own[:, :1], saved) == class_token


@pytest.mark.parametrize(
    ("encoder", "flags"),
    [
        ({"hidden_size": 32}, "--encoder.hidden_size 16 (found 32) --encoder.intermediate_size 64 (found 128)"),
        ({"num_attention_heads": 4}, "--encoder.num_attention_heads 2 (found 4)"),
        (
            {"layer_norm_eps": 1e-3, "qkv_bias": False},
            "--encoder.layer_norm_eps 1e-06 (found 0.001) --encoder.qkv",
        ),
        ({"layer_scale_init": 0.1}, "--encoder.layer_scale_init none"),
    ],
)
def test_blocks_of_another_shape_are_refused_with_the_flags(base: Path, encoder: dict[str, Any], flags: str) -> None:
    with pytest.raises(ValueError, match="has another shape") as error:
        WarmStart(str(base), config(**encoder))
    assert flags in str(error.value)


@pytest.mark.parametrize("with_heads", [True, False])
def test_a_name_on_the_hub(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, with_heads: bool) -> None:
    """What was downloaded before is there without a network; the objective's weights may be there or not."""
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--digits"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(base, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("step_*"))
    if not with_heads:
        (repository / "snapshots" / commit / "objective.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start, module = begin(Path("someone/digits"), config())
    assert_equal(module.model.state_dict(), load_file(base / "model.safetensors"))
    heads = {what for name, (what, _) in start.outcomes.items() if name.startswith("objective.")}
    assert heads == {"loaded" if with_heads else "new"} and start.found.steps == 4


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for wrong in (tmp_path, tmp_path / "nowhere", base / "step_3"):
        with pytest.raises(ValueError, match=r"init_from: found no model at .*expected the folder of a finished run"):
            WarmStart(str(wrong), config())
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    BertModel(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of the type bert; expected one of mmssl, vit, vit_mae, videomae"):
        WarmStart(str(tmp_path), config())


def test_other_modalities_begin_anew(base: Path) -> None:
    speech = {"sampling_rate": 8000, "num_mels": 20, "n_fft": 200, "win_length": 200, "hop_length": 80}
    own = MMSSLConfig(modalities={"speech": speech}, **ENCODER)
    start, module = begin(base, own)
    saved, weights = load_file(base / "model.safetensors"), module.model.state_dict()
    assert_equal(of(weights, "encoder."), of(saved, "encoder."))
    whats = {name: what for name, (what, _) in start.outcomes.items() if name.startswith("modalities.")}
    assert {name.split(".")[1]: what for name, what in whats.items()} == {"image": "left out", "speech": "new"}


def test_another_objective_begins_anew_with_teachers_like_the_student(base: Path) -> None:
    start, module = begin(base, config(), LATENT)
    saved = load_file(base / "model.safetensors")
    assert_equal(module.model.state_dict(), saved)
    assert_equal(module.teacher.module.state_dict(), saved)  # type: ignore[union-attr]
    heads = {name: about for name, about in start.outcomes.items() if name.startswith("objective.predictor")}
    assert heads and set(heads.values()) == {("new", "its objective is MaskedReconstruction")}
    start, module = begin(base, config(), partial(MASKED, decoder_hidden_size=8))
    assert start.outcomes["objective.decoder_input.weight"] == ("new", "shape (16, 16) there, (8, 16) here")


def test_teachers_of_heads_become_copies_of_them(tmp_path: Path) -> None:
    """Also where the checkpoint's teachers were not: their momentum is near 1, and the learning rate large."""
    contrastive = partial(Contrastive, projector_hidden_size=16, projector_size=8, momentum=(0.99, 1.0), queue_size=16)
    image = {"crop_scale": (0.5, 1.0)}
    run(tmp_path, contrastive, image=image)
    heads = load_file(tmp_path / "objective.safetensors")
    assert not torch.equal(heads["projector.0.0.weight"], heads["teacher_projector.module.0.0.weight"])
    start, module = begin(tmp_path, config(image), contrastive)
    own = module.state_dict()
    assert_equal(of(own, "projector."), of(heads, "projector."))
    assert_equal(of(own, "teacher_projector.module."), of(own, "projector."))
    assert_equal(of(own, "teacher.module."), of(own, "model."))
    assert start.outcomes["objective.queue.features"] == ("left out", "what it remembers begins anew")
    assert heads["queue.pointer"] == 32 % 16 and not torch.equal(own["queue.features"], heads["queue.features"])


def test_the_saved_teacher_is_where_the_student_begins(tmp_path: Path) -> None:
    """I-JEPA's papers evaluate the teacher: it is the run's model, of a finished run and of a checkpoint."""
    run(tmp_path, partial(LATENT, momentum=(0.9, 0.9)), checkpointing_steps=4)
    teacher = load_file(tmp_path / "model.safetensors")
    for folder in (tmp_path, tmp_path / "step_4"):
        _, module = begin(folder, config(), LATENT)
        assert_equal(module.model.state_dict(), teacher)
        assert_equal(of(module.state_dict(), "teacher.module."), teacher)
        assert_equal(
            of(module.state_dict(), "predictor."), of(load_file(tmp_path / "objective.safetensors"), "predictor.")
        )


def test_terms_of_a_sum_find_the_objective_of_their_class(tmp_path: Path, base: Path) -> None:
    """From an objective to a sum that it is a term of, and back."""
    options = {"mask_ratio": 0.5, "views": False, **DECODER}
    latent = {"class_path": "LatentPrediction", "init_args": LATENT.keywords}
    terms = {"latents": latent, "pixels": {"class_path": "MaskedReconstruction", "init_args": options}}
    _, module = begin(base, config(), partial(Sum, terms=terms))
    heads = load_file(base / "objective.safetensors")
    assert_equal(of(module.state_dict(), "objectives.pixels."), heads)
    run(tmp_path, partial(Sum, terms=terms))
    _, alone = begin(tmp_path, config())
    trained = of(load_file(tmp_path / "objective.safetensors"), "objectives.pixels.")
    assert_equal({name: v for name, v in alone.state_dict().items() if not name.startswith("model.")}, trained)


def test_a_resumed_run_does_not_read_it_again(tmp_path: Path, base: Path) -> None:
    """It is gone by then; losses and weights are those of the undisturbed run, to the bit."""
    source = tmp_path / "source"
    shutil.copytree(base, source)
    flags: dict[str, Any] = {"model": {"init_from": str(source)}, "max_train_steps": 8, "checkpointing_steps": 5}
    whole = run(tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(source)
    again = run(tmp_path / "cut", resume_from_checkpoint="latest", **flags)
    assert exact(again) == exact(whole)
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
    assert first["started_from"] == second["started_from"] and first["started_from"]["source"] == str(source)


def test_an_infinite_run_goes_on_elsewhere_from_before_its_anneal(tmp_path: Path) -> None:
    """The weights before the anneal, and from the first step on, exactly the constant learning rate."""
    infinite: dict[str, Any] = {
        "lr_scheduler_type": "infinite",
        "constant_learning_rate": 3e-4,
        "min_learning_rate": 1e-5,
        "warmup_ratio": 0.2,
        "cooldown_until": 0.4,
    }
    run(tmp_path / "first", max_train_steps=5, **infinite)
    kept = tmp_path / "first" / "step_4"
    start, module = begin(kept, config())
    assert not torch.equal(
        module.model.state_dict()["encoder.norm.weight"],
        load_file(tmp_path / "first" / "model.safetensors")["encoder.norm.weight"],
    )
    assert {what for what, _ in start.outcomes.values()} == {"loaded"}
    later = infinite | {"warmup_ratio": 0.0, "cooldown_until": 0.0}
    lines = run(tmp_path / "second", model={"init_from": str(kept)}, max_train_steps=5, **later)
    assert [line["learning_rate"] for line in lines] == [3e-4] * 5


def test_a_checkpoint_says_which_of_its_weights_are_the_model(tmp_path: Path) -> None:
    run_tiny(tmp_path, queue=True, max_train_steps=2, checkpointing_steps=2)
    assert json.loads((tmp_path / "step_2" / "run.json").read_text())["trained"] == "model."
