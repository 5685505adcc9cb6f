"""The health of a run: what is measured, what is concluded, and that measuring changes nothing."""

import json
import random
import re
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments, PreparedSamples, Samples, load_samples
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.monitors import relative_spread, similarities
from mmssl.objectives.latent_prediction import LatentPrediction
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.objectives.vicreg import VICReg
from mmssl.training import TrainArguments, pretrain
from mmssl.training.health import MOST, Health, ProbeSet, choose, judge, probed, scores
from mmssl.training.speed import Work
from mmssl.training.streams import Stream
from tests.training.joint import run_joint
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics, run

OPTIONS: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "crop_scale": (0.5, 1.0)}
PROJECTOR: dict[str, Any] = {"projector_hidden_size": 64, "projector_size": 32}
OBJECTIVES: dict[str, Any] = {
    "MAE": partial(MaskedReconstruction, decoder_layers=1, decoder_hidden_size=16, decoder_attention_heads=2),
    "VICReg": partial(VICReg, **PROJECTOR),
    "VICReg without what keeps features apart": partial(
        VICReg, variance_weight=0.0, covariance_weight=0.0, **PROJECTOR
    ),
    "a JEPA without a slow teacher": partial(
        LatentPrediction,
        predictor_layers=1,
        predictor_hidden_size=16,
        predictor_attention_heads=2,
        momentum=(0.0, 0.0),
    ),
}


def digits_run(folder: Path, objective: str, steps: int, **train: Any) -> list[dict[str, Any]]:
    flags: dict[str, Any] = {"per_device_train_batch_size": 64, "learning_rate": 3e-3, "health_steps": 50, **train}
    pretrain(
        Image(**OPTIONS),
        OBJECTIVES[objective],
        EncoderConfig(32, 2, 2),
        DataArguments("digits"),
        TrainArguments(str(folder), max_train_steps=steps, **flags),
    )
    return metrics(folder)


def health_of(line: dict[str, Any]) -> dict[str, Any]:
    """What a line holds of health, but how long it took."""
    return {name: value for name, value in line.items() if name.startswith("health/") and "seconds" not in name}


# What is concluded.

START = {"step": 0, "std": 0.5, "rank": 21.0, "knn": 0.3, "linear": 0.5, "guess": 0.1}


@pytest.mark.parametrize(
    ("now", "warmup", "verdict", "why"),
    [
        ({}, 0, "healthy", ""),
        ({"step": 49}, 0, "too early", "before step 50"),
        ({"step": 50}, 0, "healthy", ""),
        ({"step": 199}, 200, "too early", "before step 200"),
        ({"step": 49, "std": 0.0}, 0, "too early", "before step 50"),
        ({"std": 0.02}, 0, "collapsing", r"samples differ hardly any more \(std 0.02, 0.5 at the start\): lower train"),
        ({"std": 0.03}, 0, "healthy", ""),
        ({"std": 0.09, "loss_over_trivial": 1.0}, 0, "collapsing", "samples differ hardly"),
        ({"std": 0.09, "loss_over_trivial": 0.9}, 0, "healthy", ""),
        ({"std": 0.11, "loss_over_trivial": 1.0}, 0, "too early", "the loss is 1 times what predicting the mean"),
        ({"std": float("nan"), "rank": float("nan")}, 0, "collapsing", "samples differ hardly"),
        ({"rank": 7.0, "knn": 0.3}, 0, "collapsing", r"few directions \(rank 7, 21 at the start\): raise the weight"),
        ({"rank": 8.0, "knn": 0.3}, 0, "healthy", ""),
        ({"rank": 7.0, "knn": 0.4}, 0, "healthy", ""),
        ({"rank": 7.0, "loss_over_trivial": 0.5}, 0, "healthy", ""),
        ({"rank": 7.0, "loss_over_trivial": 1.0}, 0, "collapsing", "few directions"),
        ({"knn": 0.19, "linear": 0.29}, 0, "collapsing", "labels are told far worse .*knn 0.190, 0.300 at the start"),
        ({"knn": 0.19, "linear": 0.31}, 0, "healthy", ""),
        ({"knn": 0.21, "linear": 0.29}, 0, "healthy", ""),
        ({"loss_over_trivial": 0.96}, 0, "too early", "the loss is 0.96 times"),
    ],
)
def test_verdict_on_a_history(now: dict[str, float], warmup: int, verdict: str, why: str) -> None:
    history = [START, START | {"step": 30, "std": 1e-9}, START | {"step": 1000} | now]
    found = judge(history, warmup)
    assert found.verdict == verdict
    assert re.search(why, found.why)


def test_a_verdict_needs_no_labels_and_no_trivial_loss() -> None:
    start = {"step": 0, "std": 0.5, "rank": 21.0}
    assert judge([start, start | {"step": 100}], 0).verdict == "healthy"
    assert judge([start, start | {"step": 100, "rank": 7.0}], 0).verdict == "collapsing"


def test_probes_that_guess_at_the_start_cannot_forget() -> None:
    start = START | {"knn": 0.1, "linear": 0.05}
    assert judge([start, start | {"step": 100, "knn": 0.02, "linear": 0.02}], 0).verdict == "healthy"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "learning_rate", "verdict"),
    [
        ("MAE", 3e-3, "healthy"),
        ("VICReg", 3e-3, "healthy"),
        ("VICReg without what keeps features apart", 3e-3, "collapsing"),
        ("a JEPA without a slow teacher", 1e-2, "collapsing"),
    ],
)
def test_verdict_on_a_real_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str, learning_rate: float, verdict: str
) -> None:
    lines = digits_run(tmp_path, objective, 120, learning_rate=learning_rate)
    found = {line["step"]: line["health/verdict"] for line in lines if "health/verdict" in line}
    assert found == {50: verdict, 100: verdict, 120: verdict}
    health = json.loads((tmp_path / "run.json").read_text())["health"]["image"]
    assert health["verdict"] == verdict and health["start"]["step"] == 0 and health["end"]["step"] == 120
    printed = [line for line in capsys.readouterr().out.splitlines() if verdict in line]
    assert [line.split(":")[0] for line in printed] == ["Step 50", "Step 100", "Step 120", "Health of the run"]


def test_five_steps_are_too_few(tmp_path: Path) -> None:
    lines = digits_run(tmp_path, "MAE", 5)
    assert [line.get("health/verdict") for line in lines] == ["too early"]
    assert json.loads((tmp_path / "run.json").read_text())["health"]["image"]["verdict"] == "too early"
    last = lines[-1]
    assert last["health/guess"] == pytest.approx(0.1, abs=0.01)
    for name in ("knn", "linear"):  # raw digits are told by nearly any probe
        assert last[f"health/{name}_raw"] > 0.85
        assert 0 <= last[f"health/{name}"] <= 1 and 0 <= last[f"health/{name}_start"] <= 1


# What is measured, and that measuring changes nothing.


def test_measuring_does_not_change_a_run(tmp_path: Path) -> None:
    off, on = run(tmp_path / "off", health_steps=None), run(tmp_path / "on", health_steps=1)
    assert exact(on) == exact(off)
    assert_same_weights(tmp_path / "on", tmp_path / "off")
    assert all("health/rank" in line for line in on) and not any("health/" in name for line in off for name in line)
    assert json.loads((tmp_path / "off" / "run.json").read_text())["health"] == {}


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"health_steps": 2, "checkpointing_steps": 4, "checkpoints_total_limit": None}
    whole = digits_run(tmp_path / "whole", "VICReg", 8, logging_steps=1, **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step_8")
    (tmp_path / "cut" / "metrics.jsonl").unlink()  # what the run began with is in the checkpoint
    resumed = digits_run(tmp_path / "cut", "VICReg", 8, logging_steps=1, resume_from_checkpoint="latest", **flags)
    assert exact(resumed) == exact(whole)[4:]
    assert [bool(health_of(line)) for line in whole] == [False, True] * 4
    assert [health_of(line) for line in resumed] == [health_of(line) for line in whole[4:]]
    assert "health/knn_start" in whole[-1]
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut")]
    assert records[0]["health"] == records[1]["health"]


def test_measuring_draws_from_no_global_generator_and_keeps_modes() -> None:
    model = MMSSLModel(
        MMSSLConfig(
            modalities={"image": OPTIONS},
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_dropout_prob=0.5,
            drop_path_rate=0.5,
        )
    )
    objective = MaskedReconstruction(model, decoder_layers=1, decoder_hidden_size=16).train()
    objective.model.encoder.layers[0].eval()
    modes = [module.training for module in objective.modules()]
    weights = {name: value.clone() for name, value in objective.state_dict().items()}
    data = PreparedSamples(load_samples(DataArguments("digits"), Image(**OPTIONS)), Image(**OPTIONS), seed=0)
    stream = Stream(data, None, 32, 1.0)  # type: ignore[arg-type]
    health = Health(Accelerator(), objective, {"image": stream}, TrainArguments(health_steps=1), 10)
    states: list[Any] = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore
    health.begin(0)
    first = health.measure(1)
    torch.manual_seed(7)  # what others draw does not matter either
    second = health.measure(2)
    torch.set_rng_state(states[0])
    health.measure(3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()  # type: ignore
    assert states[2] == random.getstate()
    assert health_of(first) == health_of(second) and first["health/rank"] == first["health/rank_start"]
    assert [module.training for module in objective.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in objective.state_dict().items())


def test_each_modality_of_a_joint_run_is_measured(tmp_path: Path) -> None:
    last = run_joint(tmp_path, max_train_steps=2)[-1]
    for name in ("image", "speech"):
        assert last[f"health/rank/{name}"] > 1 and last[f"health/verdict/{name}"] == "too early"
    assert set(json.loads((tmp_path / "run.json").read_text())["health"]) == {"image", "speech"}


def test_relative_spread_is_0_of_one_direction_and_1_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(1, 24, generator=generator)
    scale = torch.rand(50, 1, generator=generator) + 0.5
    assert relative_spread(direction * scale).item() == pytest.approx(0, abs=1e-6)
    anywhere = torch.randn(4000, 24, generator=generator)
    assert relative_spread(anywhere * torch.rand(4000, 1, generator=generator)).item() == pytest.approx(1, abs=0.02)


def test_similarities_equal_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 7, generator=generator).double()
    cosine = [[float(a @ b / (a.norm() * b.norm())) for b in second] for a in first]
    same = np.mean([cosine[i][i] for i in range(5)])
    other = np.mean([cosine[i][j] for i in range(5) for j in range(5) if i != j])
    assert list(map(float, similarities(first, second))) == pytest.approx([same, other], abs=1e-6)


def test_probes_score_what_is_there() -> None:
    random_ = np.random.RandomState(0)
    labels = np.arange(200) % 4
    told = np.eye(4)[labels] + 0.01 * random_.randn(200, 4)
    assert scores(told, labels) == {"knn": 1.0, "linear": 1.0}
    nothing = scores(random_.randn(200, 4), labels)
    assert all(score < 0.45 for score in nothing.values())
    quantities = told @ np.array([1.0, 2.0, 3.0, 4.0])
    assert all(score > 0.5 for score in scores(told, quantities).values())
    assert all(score < 0.1 for score in scores(random_.randn(200, 4), quantities).values())


def test_samples_are_chosen_from_a_few_classes_alike() -> None:
    labels = np.concatenate([np.repeat(np.arange(40), 30), np.full(5, 40), np.full(100, -1)])
    chosen = choose(labels, len(labels), MOST)
    classes, counts = np.unique(labels[chosen], return_counts=True)
    assert len(classes) == 10 and set(counts) == {25} and classes.min() == 0 and classes.max() == 39
    assert len(np.unique(chosen)) == 250
    assert list(choose(None, 7, 3)) == [0, 3, 6] and list(choose(None, 2, 3)) == [0, 1]
    assert list(choose(np.zeros(7, int), 7, 3)) == [0, 3, 6]  # one class is nothing to be told
    assert probed(np.zeros(50, int)) is None and probed(np.array([0, 1] * 2)) is None
    assert probed(np.full(50, 0.5)) is None and probed(np.linspace(0, 1, 50)) is not None


def test_unreadable_samples_are_left_out() -> None:
    values: list[Any] = [np.full((8, 8), number / 100, np.float32) for number in range(60)]
    values[20] = b"this is no image"
    samples = Samples(values, "image {}".format, np.arange(60) % 2, ["even", "odd"])
    probe = ProbeSet(PreparedSamples(samples, Image(**OPTIONS), "skip", seed=0), 16)
    greys = torch.cat([batch["pixel_values"] for batch in probe.batches]).mean(dim=(1, 2, 3))
    order = greys.argsort()
    expected = [number for number in range(60) if number != 20]
    pixels = [Image(**OPTIONS).prepare(values[number])["pixel_values"].mean() for number in expected]
    assert torch.allclose(greys[order], torch.stack(pixels))
    assert probe.labels is not None and probe.labels[order.numpy()].tolist() == [number % 2 for number in expected]


def test_nodes_of_one_graph_are_measured() -> None:
    pytest.importorskip("torch_geometric")
    from mmssl.modalities.graph import Graph

    modality = Graph()
    samples = load_samples(DataArguments("digits_graph"), modality)
    modality.fit(samples)
    probe = ProbeSet(PreparedSamples(samples, modality), 1)
    assert probe.labels is not None and len(probe.rows) == len(probe.labels) == 250
    assert (probe.labels == load_digits().target[probe.rows]).all()
    assert probe.raw_features().shape == (250, 64)


# What every line of metrics.jsonl holds.


def test_speeds_and_memory_of_a_line(tmp_path: Path) -> None:
    for line in run(tmp_path, max_train_steps=3, gradient_accumulation_steps=2):
        assert line["tokens_per_second"] == pytest.approx(16 * line["samples_per_second"])  # 4 x 4 patches
        assert 0 < line["mfu"] < 1 and 0.05 < line["memory_gib"] < 100
        assert line["loss_over_trivial"] > 0


def test_operations_of_a_product_are_counted_once() -> None:
    """Forwards 2 n d e of them, backwards the same for the weight, and none for what needs no gradient."""
    x, weight = torch.ones(5, 7), torch.ones(7, 11, requires_grad=True)
    tokens = SimpleNamespace(valid=torch.tensor([[True, True], [True, False]]))
    adapter = SimpleNamespace(tokenize=lambda batch: tokens)
    objective = SimpleNamespace(model=SimpleNamespace(adapters={"any": adapter}))
    work = Work(Accelerator(), objective)  # type: ignore[arg-type]
    for times in (1, 2):
        with work.counted("any", {"x": x}):
            for _ in range(times):
                (x @ weight).sum().backward()
    assert work.flops == {"any": 4 * 5 * 7 * 11} and work.tokens == {"any": 3}
    assert work.peak > 1e8


def test_counting_operations_does_not_change_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = run(tmp_path / "counted")

    def not_counted(self: Work, modality: str, inputs: Any) -> Any:
        self.flops[modality] = self.tokens[modality] = 1
        return nullcontext()

    monkeypatch.setattr(Work, "counted", not_counted)
    assert exact(run(tmp_path / "not")) == exact(counted)
    assert_same_weights(tmp_path / "counted", tmp_path / "not")


def tiny_model() -> MMSSLModel:
    torch.manual_seed(0)
    options = OPTIONS | {"normalize_target": False}
    return MMSSLModel(
        MMSSLConfig(modalities={"image": options}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))}


def test_trivial_loss_of_reconstruction_is_that_of_the_mean_patch() -> None:
    objective = MaskedReconstruction(tiny_model(), views=False, decoder_layers=1, decoder_hidden_size=16)
    modality, batch = objective.model.adapters["image"], pictures()
    out = objective(batch, torch.Generator().manual_seed(5))
    clean = modality.tokenize(batch)
    mask = modality.mask(clean, 0.75, torch.Generator().manual_seed(5))
    hidden = [clean.content[b, n] for b in range(6) for n in range(16) if mask.hidden[b, n]]
    mean = torch.stack(hidden).mean(dim=0)
    expected = np.mean([((patch - mean) ** 2).mean().item() for patch in hidden])
    assert out.metrics["trivial"].item() == pytest.approx(expected, rel=1e-5)


def test_trivial_loss_of_latent_prediction_is_that_of_the_mean_target() -> None:
    objective = LatentPrediction(tiny_model(), views=False, predictor_layers=1, predictor_hidden_size=16, distance="l1")
    modality, batch = objective.model.adapters["image"], pictures()
    out = objective(batch, torch.Generator().manual_seed(5))
    tokens = modality.tokenize(batch)
    wanted = objective.target(modality, tokens)
    _, targets = objective.choose(modality, tokens, torch.Generator().manual_seed(5))
    mean = wanted.flatten(0, 1).mean(dim=0)
    places = [(b, n) for b in range(6) for k in range(4) for n in range(16) if targets[b, k, n]]
    expected = np.mean([(wanted[b, n] - mean).abs().mean().item() for b, n in places])
    assert out.metrics["trivial"].item() == pytest.approx(expected, rel=1e-5)
