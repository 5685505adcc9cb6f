"""The settings of the benchmark of every objective on every modality are whole, and are flags that there are."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmssl.cli import pretrain_parser
from mmssl.discovery import find_all, names
from mmssl.objectives.base import Objective

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTINGS = yaml.safe_load((BENCHMARKS / "matrix.yaml").read_text())


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("matrix")


def test_every_modality_and_every_objective_is_in_it() -> None:
    assert set(SETTINGS["modalities"]) == set(names("modalities"))
    classes = {about["run"]["objective"]["class_path"] for about in SETTINGS["objectives"].values()}
    # A sum is of others; these two need labels, and a model that is pretrained already.
    assert classes == set(find_all("objectives", Objective)) - {"Sum", "SupReMix", "FeatureMatching"}


@pytest.mark.parametrize("modality", SETTINGS["modalities"])
def test_every_cell_is_made_of_flags_that_there_are(matrix: Any, modality: str) -> None:
    parser = pretrain_parser()
    for name, about in SETTINGS["objectives"].items():
        cell = parser.parse_object(matrix.flags_of(SETTINGS, modality, name))
        assert cell.objective.class_path.endswith(about["run"]["objective"]["class_path"])
        assert cell.train.max_train_steps == SETTINGS["common"]["train"]["max_train_steps"]
        assert cell.data.source == SETTINGS["modalities"][modality]["run"]["data"]["source"]


def test_later_settings_win_and_another_class_brings_its_own_options(matrix: Any) -> None:
    first = {"a": {"x": 1, "y": 2}, "b": {"class_path": "One", "init_args": {"x": 1}}}
    assert matrix.merged(first, {"a": {"y": 3}})["a"] == {"x": 1, "y": 3}
    assert matrix.merged(first, {"b": {"init_args": {"y": 2}}})["b"]["init_args"] == {"x": 1, "y": 2}
    assert matrix.merged(first, {"b": {"class_path": "Two"}})["b"] == {"class_path": "Two"}
    assert first["a"] == {"x": 1, "y": 2}


def test_what_an_objective_sets_for_one_modality_applies(matrix: Any) -> None:
    for name, about in SETTINGS["objectives"].items():
        assert set(about) <= {"run", "modalities"}, name
        for modality, own in about.get("modalities", {}).items():
            cell = matrix.flags_of(SETTINGS, modality, name)
            assert matrix.merged(cell, own) == cell
