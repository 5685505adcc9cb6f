"""Tests of fine-tuning: it learns what can be learned, of classes and of quantities, and never looks at test labels."""

import copy
import json
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from mmssl.cli import COMMANDS
from mmssl.data import DataArguments, Samples, load_samples
from mmssl.evaluation import finetuning
from mmssl.evaluation.finetuning import Batches, Learner, finetune, parameter_groups
from mmssl.modalities.base import Batch, Modality, View
from mmssl.modalities.tabular import Tabular
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A class and a quantity that follow from two numbers, and a shuffled copy of the class."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 2))
    kind = np.where(x[:, 0] > x[:, 1], "above", "below")
    noise = rng.permutation(kind)
    lines = ["a,b,kind,noise,sum,part"]
    lines += [
        f"{a},{b},{kind[i]},{noise[i]},{100 + 10 * (a + b)},{'test' if i >= 300 else 'train'}"
        for i, (a, b) in enumerate(x.tolist())
    ]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    return tmp_path / "table.csv"


@pytest.fixture
def checkpoint(tmp_path: Path, table: Path) -> Path:
    modality = make_modality("tabular", {"ignore_columns": ["kind", "noise", "sum", "part"]})
    modality.fit(load_samples(DataArguments(str(table)), modality))
    torch.manual_seed(0)
    model = MMSSLModel(MMSSLConfig(modalities={"tabular": modality.options()}, **SHAPE))
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def part(table: Path, label: str, name: str) -> DataArguments:
    return DataArguments(str(table), label_column=label, filter=f"part={name}")


@pytest.mark.parametrize(("label", "metric"), [("kind", "accuracy"), ("sum", "R²")])
def test_what_follows_from_the_columns_is_learned(checkpoint: Path, table: Path, label: str, metric: str) -> None:
    data, test = part(table, label, "train"), part(table, label, "test")
    scores = finetune([checkpoint], data, test, epochs=30, learning_rate=5e-3, pooling="flatten")
    assert [score.row for score in scores] == ["untrained", "pretrained"]
    for score in scores:
        assert score.metric == metric and (score.n_train, score.n_test) == (300, 100)
        assert 0.9 < score.values[0] <= 1.0
        assert score.points is not None and score.points.shape == (100,)
        assert score.points.mean() == pytest.approx(score.values[0])


def test_what_is_shuffled_is_not_learned(checkpoint: Path, table: Path) -> None:
    (_, score) = finetune([checkpoint], part(table, "noise", "train"), part(table, "noise", "test"), epochs=5)
    assert 0.3 < score.values[0] < 0.7


def test_test_labels_have_no_part_in_it(checkpoint: Path, table: Path, tmp_path: Path, monkeypatch) -> None:
    """With each label of the test part turned round, the same is learned, and as many are right as were wrong."""
    learned: list[dict[str, Tensor]] = []
    learn = Learner.learn

    def spy(self: Learner, *arguments: Any) -> None:
        learn(self, *arguments)
        learned.append(copy.deepcopy(self.state_dict()))

    monkeypatch.setattr(Learner, "learn", spy)
    lines = table.read_text().splitlines()
    turned = {"above": "below", "below": "above"}
    other = [lines[0], *(",".join([*(f := line.split(","))[:2], turned[f[2]], *f[3:]]) for line in lines[1:])]
    (tmp_path / "turned.csv").write_text("\n".join(other))
    data = part(table, "kind", "train")
    one = finetune([checkpoint], data, part(table, "kind", "test"), epochs=2)
    two = finetune([checkpoint], data, part(tmp_path / "turned.csv", "kind", "test"), epochs=2)
    for before, after in zip(one, two, strict=True):
        assert after.values[0] == pytest.approx(1 - before.values[0])
        assert before.points is not None and after.points is not None
        assert (after.points == 1 - before.points).all()
    assert len(learned) == 4
    for mine, turned_round in zip(learned[:2], learned[2:], strict=True):
        assert mine and all(torch.equal(mine[name], turned_round[name]) for name in mine)


def test_the_command_prints_and_writes(checkpoint: Path, table: Path, tmp_path: Path, capsys) -> None:
    outputs = [tmp_path / f"scores{ending}" for ending in (".json", ".md", ".tex")]
    flags = ["--data", str(table), "--data.label_column", "kind", "--epochs", "1", "--freeze_encoder", "true"]
    flags += ["--augment.corruption_ratio", "0.5", "--output", *map(str, outputs)]
    COMMANDS["finetune"]([str(checkpoint), *flags])
    assert "linear head" in capsys.readouterr().out
    found = json.loads(outputs[0].read_text())
    assert [each["row"] for each in found["scores"]] == ["untrained", "pretrained"]
    assert [(each["row"], each["other"]) for each in found["comparisons"]] == [("pretrained", "untrained")]
    assert all("linear head" in output.read_text() for output in outputs)


def test_labels_of_tokens_are_refused(tmp_path: Path) -> None:
    MMSSLModel(MMSSLConfig(modalities={"graph": {"num_features": 64}}, **SHAPE)).save_pretrained(tmp_path / "graph")
    with pytest.raises(ValueError, match="found labels of tokens; fine-tuning is of samples"):
        finetune([tmp_path / "graph"], DataArguments("digits_graph"))


def batches_of(table: Path, label: str) -> Batches:
    """All rows in one batch."""
    others = [name for name in ("kind", "noise", "sum", "part") if name != label]
    modality = make_modality("tabular", {"ignore_columns": others})
    samples = load_samples(DataArguments(str(table), label_column=label), modality)
    modality.fit(samples)
    return Batches(samples, modality, 400)


def learner_of(batches: Batches, **shape: Any) -> Learner:
    torch.manual_seed(0)
    options = {batches.modality.name: batches.modality.options()}
    return Learner(MMSSLModel(MMSSLConfig(modalities=options, **SHAPE | shape)), "mean", batches, seed=0)


@pytest.mark.parametrize("label", ["kind", "sum"])
def test_points_are_those_of_scikit_learn(table: Path, label: str) -> None:
    """Sample by sample, by an untrained head that errs."""
    batches = batches_of(table, label)
    learner = learner_of(batches).eval()
    guesses = []
    for value in batches.samples.values:
        with torch.no_grad():
            out = learner(batches.modality.collate([batches.modality.prepare(value)]))[0]
        mean, std = batches.labels.mean(), batches.labels.std()
        guesses.append(float(out) * std + mean if label == "sum" else int(out.argmax()))
    metric = r2_score if label == "sum" else accuracy_score
    points = learner.points(batches)
    assert points.shape == (400,)
    assert points.mean() == pytest.approx(metric(batches.labels, guesses), abs=1e-5)
    if label == "kind":
        assert points.tolist() == [float(a == b) for a, b in zip(batches.labels, guesses, strict=True)]


SMALL = {"image_size": 8, "patch_size": 4, "num_channels": 1}
PREFIX = {"class_token": True, "num_register_tokens": 2}


@pytest.fixture
def images() -> Batches:
    values = np.random.default_rng(0).random((6, 8, 8)).astype(np.float32)
    return Batches(
        Samples(list(values), "image {}".format, np.arange(6) % 2, ["a", "b"]), make_modality("image", SMALL), 4
    )


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("prefix", [{}, PREFIX], ids=["no prefix", "prefix"])
def test_layer_decay_follows_the_names(images: Batches, norm: str, prefix: dict[str, Any]) -> None:
    """Every parameter once, at rate * decay ** (layers above it), told from its name alone."""
    learner = learner_of(images, num_hidden_layers=3, norm_position=norm, layer_scale_init=0.1, **prefix)
    groups = parameter_groups(learner, learning_rate=0.5, weight_decay=0.2, layer_decay=0.75)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    times = Counter(id(parameter) for group in groups for parameter in group["params"])
    above = {"embedding": 4, "layers.0": 3, "layers.1": 2, "layers.2": 1, "head": 0}
    seen = Counter[str]()
    for name, parameter in learner.named_parameters():
        layer = "embedding"
        if "layers." in name:
            layer = name[name.index("layers.") :][: len("layers.0")]
        elif name.startswith("head.") or (norm == "pre" and name.startswith("model.encoder.norm.")):
            layer = "head"
        decays = name.endswith(".weight") and "norm" not in name
        seen[layer] += 1
        group = found[id(parameter)]
        assert times.pop(id(parameter)) == 1
        assert group["lr"] == pytest.approx(0.5 * 0.75 ** above[layer]), name
        assert group["weight_decay"] == (0.2 if decays else 0.0), name
    assert not times and seen.keys() == above.keys()


def test_without_layer_decay_all_rates_are_one(images: Batches) -> None:
    groups = parameter_groups(learner_of(images), learning_rate=0.5, weight_decay=0.2, layer_decay=1.0)
    assert {group["lr"] for group in groups} == {0.5}


def test_lower_layers_move_less(images: Batches) -> None:
    """A factor so small that one layer below the head nothing can move."""
    learner = learner_of(images, num_hidden_layers=2)
    before = copy.deepcopy(learner.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(learner, 1e-2, 0.0, layer_decay=1e-12))
    learner.points = lambda batches: np.array([next(counter)])  # type: ignore[method-assign]  # the last epoch is kept
    counter = count()
    learner.learn(images, images, 2, optimizer)
    after = learner.state_dict()
    moved = {name for name, value in after.items() if not torch.allclose(value, before[name], rtol=0, atol=1e-9)}
    assert moved == {"head.weight", "head.bias", "model.encoder.norm.weight", "model.encoder.norm.bias"}


def test_rates_and_decays_are_those_of_the_flags(checkpoint: Path, table: Path, monkeypatch) -> None:
    made: list[list[dict]] = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups: list[dict]):
            super().__init__(groups)
            made.append([{name: group[name] for name in ("lr", "weight_decay")} for group in groups])

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    flags = ["--learning_rate", "0.01", "--weight_decay", "0.3", "--layer_decay", "0.5", "--epochs", "1"]
    COMMANDS["finetune"]([str(checkpoint), "--data", str(table), "--data.label_column", "kind", *flags])
    assert len(made) == 2  # an embedding, one block, a head
    for groups in made:
        assert {group["lr"] for group in groups} == {0.01, 0.005, 0.0025}
        assert {group["weight_decay"] for group in groups} == {0.3, 0.0}


def test_a_frozen_encoder_stays_as_it_is_to_the_bit(monkeypatch) -> None:
    """One with dropout, and with the batch norms of point clouds, whose statistics are no parameters."""
    clouds = np.random.default_rng(0).random((8, 32, 3)).astype(np.float32)
    modality = make_modality("point_cloud", {"num_points": 32, "num_groups": 4, "group_size": 8})
    batches = Batches(Samples(list(clouds), "cloud {}".format, np.arange(8) % 2, ["a", "b"]), modality, 4)
    learner = learner_of(batches, hidden_dropout_prob=0.5)
    learner.freeze_encoder(batches)
    groups = parameter_groups(learner, 1e-2, 0.0, 1.0)
    assert {id(each) for group in groups for each in group["params"]} == {
        id(each) for each in learner.head.parameters()
    }
    before = copy.deepcopy(learner.state_dict())
    assert any("running_mean" in name for name in before)
    counter = count()
    learner.points = lambda batches: np.array([next(counter)])  # type: ignore[method-assign]
    learner.learn(batches, batches, 2, torch.optim.AdamW(groups))
    moved = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}
    batch, _ = next(batches.in_order(torch.device("cpu")))
    assert torch.equal(learner.train()(batch), learner.eval()(batch))  # without dropout


def test_a_head_on_a_frozen_encoder_is_logistic_regression(table: Path, monkeypatch) -> None:
    """Its optimum is the one that scikit-learn finds on standardised features; classes overlap, so there is one."""
    batches = batches_of(table, "kind")
    batches.samples = batches.samples.select(np.arange(120))
    x = np.array([[float(row["a"]), float(row["b"])] for row in batches.samples.values])
    noise = np.random.default_rng(1).standard_normal((120, 2))
    labels = (x[:, 0] - x[:, 1] + 1.5 * noise[:, 0] + 0.3 > 0).astype(int)
    batches.samples.labels = labels
    place = torch.tensor([[3.0, 0.5], [-1.0, 2.0]])  # features of unlike sizes, away from zero
    monkeypatch.setattr(finetuning, "pooled", lambda model, pooling: lambda batch: batch["cells"][:, :2] @ place + 7)
    learner = learner_of(batches)
    learner.freeze_encoder(batches)
    counter = count()
    learner.points = lambda batches: np.array([next(counter)])  # type: ignore[method-assign]
    learner.learn(batches, batches, 250, torch.optim.AdamW(parameter_groups(learner, 0.1, 0.0, 1.0)))

    (batch, _) = next(batches.in_order(torch.device("cpu")))
    features = (batch["cells"][:, :2] @ place + 7).double().numpy()
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    best = LogisticRegression(C=np.inf, tol=1e-8).fit(features, labels)
    weight, bias = (value.detach().double().numpy() for value in (learner.head.weight, learner.head.bias))
    np.testing.assert_allclose(weight[1] - weight[0], best.coef_[0], atol=3e-4)
    np.testing.assert_allclose(bias[1] - bias[0], best.intercept_[0], atol=3e-4)
    assert np.abs(best.coef_).min() > 0.1


def test_views_differ_by_epoch_and_repeat_by_seed() -> None:
    """Views are what a generator draws, put beside the number of the sample, which undoes the order."""
    modality = make_modality("tabular", {})
    rows = [{"a": float(i)} for i in range(10)]
    modality.fit(Samples(rows, "row {}".format))
    batches = Batches(Samples(rows, "row {}".format, np.arange(10.0)), modality, 4)
    excerpts: list[torch.Generator | None] = []

    def excerpt(sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        excerpts.append(generator)
        return sample

    def noise(batch: Batch, generator: torch.Generator) -> View:
        return View({**batch, "cells": torch.randn(batch["cells"].shape, generator=generator)})

    modality.excerpt = excerpt  # type: ignore[method-assign]
    viewed = make_modality("tabular", modality.options())
    viewed.view = noise  # type: ignore[method-assign]

    def drawn(views: Modality | None, seed: int, epoch: int) -> tuple[list[int], Tensor]:
        torch.manual_seed(int(torch.randint(1000, ())))  # what the global generator is at has no part in it
        found = list(batches.shuffled(torch.device("cpu"), views, seed, epoch))
        assert [len(labels) for _, labels in found] == [4, 4, 2]
        labels = torch.cat([labels for _, labels in found])
        cells = torch.cat([batch["cells"] for batch, _ in found])
        assert sorted(labels.tolist()) == list(range(10))
        return labels.long().tolist(), cells[labels.argsort()]

    order, first = drawn(viewed, 0, 0)
    assert all(generator is not None for generator in excerpts)
    again, same = drawn(viewed, 0, 0)
    assert order == again and torch.equal(first, same)
    for seed, epoch in ((0, 1), (1, 0)):
        other_order, other = drawn(viewed, seed, epoch)
        assert order != other_order
        assert not set(first.flatten().tolist()) & set(other.flatten().tolist())  # of whichever sample
    assert len({tuple(row) for row in first.tolist()}) == 10  # each batch, too, has a view of its own
    excerpts.clear()
    plain_order, plain = drawn(None, 0, 0)
    as_is = next(Batches(batches.samples, modality, 10).in_order(torch.device("cpu")))[0]["cells"]
    assert plain_order == order and torch.equal(plain, as_is)
    assert excerpts == [None] * 20


def test_only_what_is_trained_on_is_read_through_views(checkpoint: Path, table: Path, monkeypatch) -> None:
    """Of 300 samples 240 are trained on, in 2 epochs by 2 models, and two views of one batch show that they differ."""
    seen: list[int] = []
    view = Tabular.view

    def spy(self: Tabular, batch: Batch, generator: torch.Generator) -> View:
        seen.append(len(batch["cells"]))
        return view(self, batch, generator)

    monkeypatch.setattr(Tabular, "view", spy)
    data, test = part(table, "kind", "train"), part(table, "kind", "test")
    one = finetune([checkpoint], data, test, epochs=2, augment={"corruption_ratio": 0.5})
    assert sum(seen) == 2 * 2 * 240 + 2 * 64
    two = finetune([checkpoint], data, test, epochs=2, augment={"corruption_ratio": 0.5})
    assert one == two  # to the bit: nothing is drawn from the global generator
    seen.clear()
    finetune([checkpoint], data, test, epochs=2)
    assert not seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": {}}, "augment: with {} views of tabular change nothing"),
        ({"augment": {"corruption": 0.5}}, "unknown option of modality 'tabular': corruption"),
        ({"layer_decay": 0.0}, "layer_decay: found 0.0; expected a factor above 0"),
        ({"layer_decay": 1.5}, "layer_decay: found 1.5"),
        ({"layer_decay": 0.5, "freeze_encoder": True}, "layer_decay: found 0.5, and a frozen encoder"),
    ],
)
def test_wrong_flags_are_refused(checkpoint: Path, table: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetune([checkpoint], part(table, "kind", "train"), part(table, "kind", "test"), epochs=1, **options)


def test_a_modality_without_views_is_refused(checkpoint: Path, table: Path, monkeypatch) -> None:
    monkeypatch.setattr(Tabular, "view", Modality.view)
    with pytest.raises(ValueError, match="augment: tabular offers no views"):
        finetune([checkpoint], part(table, "kind", "train"), augment={"corruption_ratio": 0.5})


def test_labels_that_were_learned_are_not_held_out(checkpoint: Path, table: Path) -> None:
    (checkpoint / "run.json").write_text(json.dumps({"reads_labels": True}))
    with pytest.raises(ValueError, match="a model that learned from labels"):
        finetune([checkpoint], DataArguments(str(table), label_column="kind"))


def test_an_encoder_of_others_is_refused(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    ViTModel(ViTConfig(**shape, image_size=8, patch_size=4)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not pretrained by mmssl"):
        finetune([tmp_path], DataArguments("digits"))
