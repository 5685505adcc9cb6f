"""Small additions to a frozen encoder: what is trained, what is saved, teachers, processes, exact resume."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from mmssl import MMSSLModel
from mmssl.modeling import make_modality
from mmssl.objectives.self_distillation import SelfDistillation
from mmssl.training import ModelArguments, TrainArguments, load_objective
from mmssl.training.peft_layers import add_peft_layers, merge_peft_layers
from mmssl.training.setup import make_optimizer
from mmssl.training.warm_start import WarmStart
from tests.training.test_processes import launch
from tests.training.test_resume import assert_same_weights, exact
from tests.training.test_warm_start import LATENT, MASKED, assert_equal, config, of, run
from tests.training.tiny import metrics

peft = pytest.importorskip("peft")
KINDS = ["lora", "ia3"]
DISTILLED: Any = partial(
    SelfDistillation,
    prototypes=8,
    projector_hidden_size=16,
    projector_size=8,
    freeze_prototypes=0.0,
    momentum=(0.5, 0.5),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    run(folder)
    return folder


def adapted(base: Path, kind: Any, **options: Any) -> MMSSLModel:
    own = config(**options)
    start, model = WarmStart(str(base), own), MMSSLModel(own)
    start.load_model(model)
    names = [name for name, (what, _) in start.outcomes.items() if what == "loaded"]
    add_peft_layers(model, ModelArguments(str(base), kind, lora_rank=4), names)
    return model


def picture() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("kind", KINDS)
def test_additions_begin_as_nothing_and_are_merged_without_a_trace(base: Path, kind: str) -> None:
    model, plain = adapted(base, kind).eval(), AutoModel.from_pretrained(base)
    before = plain(**picture()).last_hidden_state
    torch.testing.assert_close(model(**picture()).last_hidden_state, before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    trained = model(**picture()).last_hidden_state
    assert (trained - before).abs().max() > 0.1
    merge_peft_layers(model)
    torch.testing.assert_close(model(**picture()).last_hidden_state, trained, atol=1e-5, rtol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}


def test_lora_is_the_product_of_two_narrow_matrices(base: Path) -> None:
    """W + alpha / rank * B A, for each linear layer of the blocks; by hand."""
    model = adapted(base, "lora")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in layers} == {"qkv", "proj", "fc1", "fc2"} and len(layers) == 8
    layer = layers["encoder.layers.1.mlp.fc1"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 16) and b.shape == (64, 4)
    torch.nn.init.normal_(b)
    expected = layer.base_layer.weight + 16 / 4 * b @ a
    merge_peft_layers(model)
    torch.testing.assert_close(model.get_parameter("encoder.layers.1.mlp.fc1.weight"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_checkpoint_lacks_is_trained_as_a_whole(base: Path, kind: str) -> None:
    """A third block, and a projection of patches of another layout."""
    model = adapted(base, kind, num_hidden_layers=3, image={"patch_size": (1, 4)})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    additions = {name for name in trained if "lora_" in name or "ia3_" in name}
    new = {f"encoder.layers.2.{name}" for name, _ in model.encoder.layers[2].named_parameters()}
    # The bias of the projection does not depend on the layout, but begins anew with it.
    assert trained - additions == new | {"modalities.image.projection.weight", "modalities.image.projection.bias"}
    assert additions and not any(name.startswith("encoder.layers.2.") for name in additions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [MASKED, LATENT, DISTILLED], ids=["masked", "latent", "distilled"])
def test_a_run_leaves_a_plain_model(tmp_path: Path, base: Path, kind: str, objective: Any) -> None:
    """Only the linear layers of the blocks have changed; teachers, whose additions have followed, are merged too."""
    image = {"horizontal_flip": 0.5}
    run(tmp_path, objective, image=image, model={"init_from": str(base), "peft_type": kind}, max_train_steps=6)
    saved, before = load_file(tmp_path / "model.safetensors"), load_file(base / "model.safetensors")
    assert saved.keys() == before.keys()
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    linear = ("qkv", "proj", "fc1", "fc2") if kind == "lora" else ("qkv", "fc2")
    expected = {name for name in saved if name.startswith("encoder.layers") and name.split(".")[-2] in linear}
    weights = {name for name in expected if name.endswith("weight")}
    assert weights <= changed <= (weights if kind == "lora" else expected)  # factors scale the biases of qkv too
    loaded = load_objective(tmp_path)
    assert_equal(AutoModel.from_pretrained(tmp_path).state_dict(), loaded.trained.state_dict())
    if objective is not MASKED:
        student, teacher = of(loaded.state_dict(), "model."), of(loaded.state_dict(), "teacher.module.")
        assert student.keys() == teacher.keys()
        different = {name for name in student if not torch.equal(student[name], teacher[name])}
        assert different and different <= expected


def test_a_teacher_follows_the_additions(base: Path) -> None:
    """With a momentum of a half: halfway between what it was and the student."""
    objective = LATENT(adapted(base, "lora"), momentum=(0.5, 0.5))
    name = "encoder.layers.0.attention.qkv.lora_B.default.weight"
    with torch.no_grad():
        objective.model.get_parameter(name).fill_(1.0)
    objective.after_step(0.0)
    assert torch.equal(objective.teacher.module.get_parameter(name), torch.full((48, 4), 0.5))
    frozen = "encoder.layers.0.attention.qkv.base_layer.weight"
    assert torch.equal(objective.teacher.module.get_parameter(frozen), objective.model.get_parameter(frozen))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [MASKED, LATENT], ids=["masked", "latent"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_parameter_gets_a_gradient(base: Path, kind: str, objective: Any, checkpointing: bool) -> None:
    """One without would stop distributed training at its second step."""
    module = objective(adapted(base, kind)).train()
    if checkpointing:
        module.model.activation_checkpointing_enable()
    module(picture(), torch.Generator().manual_seed(0)).loss.backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_factors_do_not_decay(base: Path) -> None:
    """They begin at 1, where nothing is changed; decay would take them to 0, where nothing is left."""
    module = MASKED(adapted(base, "ia3"))
    optimizer = make_optimizer(module, TrainArguments(weight_decay=0.3))
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    factors = [parameter for name, parameter in module.named_parameters() if "ia3_" in name]
    assert factors and decayed and not any(id(factor) in decayed for factor in factors)


@pytest.mark.parametrize("objective", [MASKED, LATENT], ids=["masked", "latent"])
def test_resumed_run_is_equal_to_the_bit(tmp_path: Path, base: Path, objective: Any) -> None:
    """Also where the weights that it began with are gone."""
    source = tmp_path / "source"
    shutil.copytree(base, source)
    flags: dict[str, Any] = {"model": {"init_from": str(source), "peft_type": "lora"}, "checkpointing_steps": 3}
    whole = run(tmp_path / "whole", objective, max_train_steps=5, **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(source)
    again = run(tmp_path / "cut", objective, max_train_steps=5, resume_from_checkpoint="latest", **flags)
    assert exact(again) == exact(whole)
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(ValueError, match="checkpoint of a run with peft_type, whose additions are not merged yet"):
        WarmStart(str(tmp_path / "cut" / "step_3"), config())
    with pytest.raises(ValueError, match=r"model\.peft_type: 'lora' in the checkpoint, None now"):
        run(tmp_path / "cut", objective, model={"init_from": str(source)}, resume_from_checkpoint="latest")


def test_it_needs_weights_to_add_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"peft_type lora: found no init_from"):
        ModelArguments(peft_type="lora")
    options = {"sampling_rate": 8000, "num_mels": 20, "n_fft": 200, "win_length": 200, "hop_length": 80}
    assert make_modality("speech", options)
    with pytest.raises(ValueError, match=r"init_from has no weights of the blocks"):
        add_peft_layers(MMSSLModel(config()), ModelArguments("x", "lora"), ["modalities.image.projection.weight"])


def test_without_peft_it_says_what_to_install(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft_type lora needs peft: pip install 'mmssl\[peft\]'"):
        adapted(base, "lora")


@pytest.mark.slow
def test_two_processes_train(tmp_path: Path, base: Path) -> None:
    """A parameter without a gradient would stop them at the second step; one of them saves a plain model."""
    launch("tests.training.test_peft_layers", str(tmp_path / "run"), str(base))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert len(metrics(tmp_path / "run")) == 3
    plain, saved = (AutoModel.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "run"))
    assert plain.keys() == saved.keys() and any(not torch.equal(plain[name], saved[name]) for name in plain)


if __name__ == "__main__":
    run(Path(sys.argv[1]), LATENT, model={"init_from": sys.argv[2], "peft_type": "lora"}, max_train_steps=3)
    assert PartialState().num_processes == 2
