"""Tests of fine-tuning: it learns what can be learned, of classes and of quantities, and never looks at test labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmssl.cli import COMMANDS
from mmssl.data import DataArguments, load_samples
from mmssl.evaluation.finetuning import finetune
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
    again = finetune([checkpoint], data, test, epochs=30, learning_rate=5e-3, pooling="flatten")
    assert again == scores  # to the bit: nothing is drawn from the global generator


def test_what_is_shuffled_is_not_learned(checkpoint: Path, table: Path) -> None:
    (_, score) = finetune([checkpoint], part(table, "noise", "train"), part(table, "noise", "test"), epochs=5)
    assert 0.3 < score.values[0] < 0.7


def test_test_labels_have_no_part_in_it(checkpoint: Path, table: Path, tmp_path: Path) -> None:
    """With each label of the test part turned round, as many are right as were wrong."""
    lines = table.read_text().splitlines()
    turned = {"above": "below", "below": "above"}
    other = [lines[0], *(",".join([*(f := line.split(","))[:2], turned[f[2]], *f[3:]]) for line in lines[1:])]
    (tmp_path / "turned.csv").write_text("\n".join(other))
    data = part(table, "kind", "train")
    one = finetune([checkpoint], data, part(table, "kind", "test"), epochs=2)
    two = finetune([checkpoint], data, part(tmp_path / "turned.csv", "kind", "test"), epochs=2)
    for before, after in zip(one, two, strict=True):
        assert after.values[0] == pytest.approx(1 - before.values[0])


def test_the_command_prints_and_writes(checkpoint: Path, table: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "scores.json"
    flags = ["--data", str(table), "--data.label_column", "kind", "--epochs", "1", "--output", str(output)]
    COMMANDS["finetune"]([str(checkpoint), *flags])
    assert "fine-tuned" in capsys.readouterr().out and output.read_text().count('"accuracy"') == 2


def test_labels_of_tokens_are_refused(tmp_path: Path) -> None:
    MMSSLModel(MMSSLConfig(modalities={"graph": {"num_features": 64}}, **SHAPE)).save_pretrained(tmp_path / "graph")
    with pytest.raises(ValueError, match="found labels of tokens; fine-tuning is of samples"):
        finetune([tmp_path / "graph"], DataArguments("digits_graph"))
