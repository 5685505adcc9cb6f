"""Feature matching: a loop, and what the paper's setting must show."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.base import Objective
from mmssl.objectives.feature_matching import FeatureMatching
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.objectives.weighted_sum import Sum
from mmssl.training import ModelArguments, TrainArguments, load_objective, pretrain
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "normalize_target": False}
ENCODER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "class_token": True}
MASKED: dict[str, Any] = {"mask_ratio": 0.5, "views": False, "decoder_layers": 1, "decoder_hidden_size": 16}


def model(seed: int = 0, image: dict[str, Any] | None = None, **options: Any) -> MMSSLModel:
    torch.manual_seed(seed)
    return MMSSLModel(MMSSLConfig(modalities={"image": IMAGE | (image or {})}, **ENCODER | options))


def pixels(count: int = 5) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))}


def loss_of(objective: Objective) -> Tensor:
    return objective(pixels(), torch.Generator().manual_seed(0)).loss


def test_loss_is_that_of_a_loop(tmp_path: Path) -> None:
    """Summed over channels, mean over samples; all tokens are read, and the pooled output is standardised."""
    teacher, student = model(1), model(2, hidden_dropout_prob=0.0)
    teacher.save_pretrained(tmp_path)
    found = loss_of(FeatureMatching(student, str(tmp_path), views=False))

    def standardised(each: MMSSLModel) -> Tensor:
        pooled = each.eval()(**pixels()).last_hidden_state[:, 1:].mean(dim=1)
        return torch.stack([(row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt() for row in pooled])

    one, two = standardised(student), standardised(teacher)
    expected = sum(((a - b) ** 2).sum().item() for a, b in zip(one, two, strict=True)) / 5
    assert found.item() == pytest.approx(expected, rel=1e-5) and expected > 1


def test_loss_is_exactly_zero_where_the_student_is_the_teacher(tmp_path: Path) -> None:
    own = model(1)
    own.save_pretrained(tmp_path)
    assert loss_of(FeatureMatching(own, str(tmp_path), views=False)) == 0.0


def test_the_teacher_stays_as_it_is_and_never_drops_out(tmp_path: Path) -> None:
    """It neither gets a gradient nor moves, and is in evaluation mode while the student is not."""
    model(1, hidden_dropout_prob=0.5).save_pretrained(tmp_path)
    objective = FeatureMatching(model(2), str(tmp_path), views=False).train()

    def digest() -> str:
        state = objective.frozen.state_dict()
        return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()

    before, first = digest(), loss_of(objective)
    assert not any(parameter.requires_grad for parameter in objective.frozen.parameters())
    assert not any(module.training for module in objective.frozen.modules()) and objective.model.training
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss_of(objective).backward()
        optimizer.step()
        objective.after_step(0.5)
    assert digest() == before and loss_of(objective) < first


def test_building_it_draws_no_numbers(tmp_path: Path) -> None:
    model(1).save_pretrained(tmp_path)
    student = model(2)
    torch.manual_seed(4)
    FeatureMatching(student, str(tmp_path), views=False)
    drawn = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"hidden_size": 32}, "has a width of 32, and the model one of 16"),
        ({"image": {"patch_size": 4}}, r"reads tokens of \{'image': \(16,\)\}; expected image, of \(4,\)"),
    ],
)
def test_teachers_of_another_kind_are_refused(tmp_path: Path, made: dict[str, Any], message: str) -> None:
    model(1, **made).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        FeatureMatching(model(2), str(tmp_path))


def test_no_teacher_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"teacher: found no model at .*expected the folder of a finished run"):
        FeatureMatching(model(2), str(tmp_path))


def test_a_teacher_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """They would be random ones."""
    model(1).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, such as encoder\.norm\.weight"):
        FeatureMatching(model(2), str(tmp_path))


def run(output_dir: Path, objective: Any, init_from: Path | None = None, **train: Any) -> list[dict[str, float]]:
    flags = {"max_train_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2, **train}
    pretrain(
        Image(**IMAGE),
        objective,
        EncoderConfig(**ENCODER, hidden_dropout_prob=0.1),
        DataArguments("digits", max_samples=40),
        TrainArguments(str(output_dir), **flags),
        model=ModelArguments(init_from=None if init_from is None else str(init_from)),
    )
    return metrics(output_dir)


def both(teacher: Path, weight: float = 1.0) -> Any:
    terms = {
        "pixels": {"class_path": "MaskedReconstruction", "init_args": MASKED},
        "features": {"class_path": "FeatureMatching", "init_args": {"teacher": str(teacher), "views": False}},
    }
    return partial(Sum, terms=terms, weights={"features": weight})


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's first two models: a pretrained one, and what further pretraining makes of it."""
    folder = tmp_path_factory.mktemp("stages")
    run(folder / "original", partial(MaskedReconstruction, **MASKED))
    run(folder / "further", partial(MaskedReconstruction, **MASKED), folder / "original", seed=1)
    return folder


def test_the_student_begins_at_the_original_and_not_at_the_teacher(tmp_path: Path, stages: Path) -> None:
    """Then the first loss is the distance of the two, above 0; it is 0 where they are the same."""
    lines = run(tmp_path / "run", both(stages / "further"), stages / "original", seed=1)
    saved = {name: MMSSLModel.from_pretrained(stages / name).eval() for name in ("original", "further")}
    assert lines[0]["features/loss"] > 0.01 and lines[0]["features/cosine"] < 1
    student = FeatureMatching(saved["original"].train(False), str(stages / "further"), views=False)
    without_dropout = loss_of(student.eval())
    assert without_dropout > 0
    assert loss_of(FeatureMatching(saved["further"], str(stages / "further"), views=False).eval()) == 0.0
    frozen = {n: v for n, v in load_file(tmp_path / "run" / "objective.safetensors").items() if ".frozen." in n}
    teacher = saved["further"].state_dict()
    assert {name.split(".module.")[1] for name in frozen} == set(teacher)
    assert all(torch.equal(value, teacher[name.split(".module.")[1]]) for name, value in frozen.items())


def test_with_a_weight_of_zero_it_is_further_pretraining_to_the_bit(tmp_path: Path, stages: Path) -> None:
    lines = run(tmp_path / "run", both(stages / "further", weight=0.0), stages / "original", seed=1)
    alone = metrics(stages / "further")
    for ours, theirs in zip(lines, alone, strict=True):  # its sum is over the parameters in another order
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    assert [line["loss"] for line in lines] == [line["loss"] for line in alone]
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", stages / "further"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_is_resumed_to_the_bit_and_loaded(tmp_path: Path, stages: Path) -> None:
    whole = run(tmp_path / "whole", both(stages / "further"), stages / "original", checkpointing_steps=4)
    cut = tmp_path / "cut"
    (tmp_path / "whole" / "step_4").rename(tmp_path / "step_4")
    cut.mkdir()
    (tmp_path / "step_4").rename(cut / "step_4")
    again = run(cut, both(stages / "further"), stages / "original", resume_from_checkpoint="latest")
    assert exact(again) == exact(whole)[4:]
    assert_same_weights(cut, tmp_path / "whole")
    loaded = load_objective(cut)
    assert isinstance(loaded, Sum) and isinstance(loaded.objectives["features"], FeatureMatching)
    assert isinstance(loaded.objectives["features"].frozen, nn.Module)
