"""The words at the end of a run."""

from pathlib import Path

import pytest

from mmssl.data import DataArguments
from mmssl.evaluation import closing_words
from mmssl.evaluation.closing import MOST
from mmssl.training import load_objective
from tests.training.tiny import run


def test_many_samples_are_not_cut_to_the_first_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either all samples are probed or none: the first of a sorted folder would be of its first classes."""
    run(tmp_path, max_train_steps=2)
    objective, data = load_objective(tmp_path), DataArguments("digits", max_samples=300)
    closing_words(tmp_path, objective, data)
    assert "pretrained encoder" in capsys.readouterr().out and MOST > 300
    monkeypatch.setattr("mmssl.evaluation.closing.MOST", 299)
    closing_words(tmp_path, objective, data)
    printed = capsys.readouterr().out
    assert f"mmssl evaluate {tmp_path} --data digits" in printed and "pretrained encoder" not in printed
