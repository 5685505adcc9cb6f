"""Tests of tables of scores, and of what paired tests say of their rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from mmssl.data import DataArguments
from mmssl.evaluation import Score, evaluate
from mmssl.evaluation.evaluate import recipe_of
from mmssl.evaluation.scores import compare
from mmssl.evaluation.tables import cells, checked, print_scores, write_scores
from mmssl.modeling import MMSSLConfig, MMSSLModel

RNG = np.random.default_rng(0)


def score(row: str, points: np.ndarray | None, protocol: str = "knn", metric: str = "accuracy") -> Score:
    values = [0.5] if points is None else [float(points.mean())]
    return Score(protocol, row, values, 10, 20, metric, points)


def save(folder: Path, seed: int, hidden_size: int = 16, patch_size: int = 4, **run: object) -> Path:
    """A small model, and the record of the run that would have made it."""
    image = {"image_size": 8, "patch_size": patch_size, "num_channels": 1}
    config = MMSSLConfig(
        modalities={"image": image}, hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2
    )
    MMSSLModel(config).save_pretrained(folder)
    record = {"modality": {"image": image}, "encoder": {"hidden_size": hidden_size}, **run}
    (folder / "run.json").write_text(json.dumps(record | {"train": {"seed": seed, "output_dir": str(folder)}}))
    return folder


def test_a_comparison_is_the_t_test_of_the_differences() -> None:
    """Written out: mean and standard error of the differences, and Student's distribution."""
    raw, own = RNG.integers(0, 2, 200).astype(float), RNG.integers(0, 2, 200).astype(float)
    (found,) = compare([score("raw", raw), score("pretrained", own)])
    difference = own - raw
    error = difference.std(ddof=1) / np.sqrt(200)
    reach = t.ppf(0.975, 199) * error
    assert (found.row, found.other, found.protocol) == ("pretrained", "raw", "knn")
    expected = (difference.mean(), difference.mean() - reach, difference.mean() + reach)
    np.testing.assert_allclose((found.difference, found.low, found.high), expected, rtol=1e-9)
    assert found.p_value == pytest.approx(ttest_1samp(difference, 0).pvalue)


def test_rows_are_compared_within_a_metric_and_each_pair_once() -> None:
    points = RNG.random(30)
    rows = ["raw", "untrained", "pretrained a", "pretrained b"]
    scores = [score(row, points + i, name) for i, row in enumerate(rows) for name in ("knn", "linear")]
    pairs = [(each.row, each.other, each.protocol) for each in compare(scores)]
    assert len(pairs) == len(set(pairs)) == 10
    assert {(row, other) for row, other, _ in pairs} == {
        ("pretrained a", "raw"),
        ("pretrained a", "untrained"),
        ("pretrained b", "raw"),
        ("pretrained b", "untrained"),
        ("pretrained b", "pretrained a"),
    }


def test_a_recipe_is_compared_with_the_baselines_that_have_its_name() -> None:
    """Raw features are shared, c has the shape of a; b has an untrained encoder of its own."""
    rows = ["raw", "untrained a", "pretrained a", "untrained b", "pretrained b", "pretrained c"]
    pairs = {(each.row, each.other) for each in compare([score(row, RNG.random(30)) for row in rows])}
    own = {("pretrained a", "untrained a"), ("pretrained b", "untrained b")}
    unnamed = {("pretrained c", "untrained a"), ("pretrained c", "untrained b")}
    before = {("pretrained b", "pretrained a"), ("pretrained c", "pretrained a"), ("pretrained c", "pretrained b")}
    assert pairs == own | unnamed | before | {(f"pretrained {name}", "raw") for name in "abc"}


@pytest.mark.parametrize("shift, p_value", [(0.0, 1.0), (0.5, 0.0)])
def test_rows_that_differ_everywhere_by_the_same(shift: float, p_value: float) -> None:
    points = RNG.integers(0, 2, 50).astype(float)
    (found,) = compare([score("raw", points), score("pretrained", points + shift)])
    assert (found.difference, found.low, found.high, found.p_value) == (shift, shift, shift, p_value)


def test_what_was_not_tested_on_the_same_things_is_not_compared() -> None:
    own = score("pretrained", RNG.random(20))
    for other in (score("raw", RNG.random(19)), score("raw", None), score("raw", RNG.random(20), metric="NMI")):
        assert compare([other, own]) == []
    assert compare([score("raw", np.ones(1)), score("pretrained", np.zeros(1))]) == []


def test_half_of_the_interval_of_an_accuracy_is_that_of_the_binomial() -> None:
    points = np.repeat([0.0, 1.0], [300, 700])
    assert score("raw", points).half_width == pytest.approx(1.96 * np.sqrt(0.3 * 0.7 / 999), rel=1e-9)
    assert np.isnan(score("raw", None).half_width) and np.isnan(score("raw", np.ones(1)).half_width)


def test_seeds_of_a_recipe_are_one_row_and_recipes_stand_beside_each_other(tmp_path: Path) -> None:
    """What recipes share, raw features and untrained encoders, stands in the table once."""
    digits = DataArguments("digits", max_samples=60)
    same = [save(tmp_path / f"mae_{seed}", seed, objective={"MAE": {}}) for seed in range(2)]
    other = save(tmp_path / "dino", 0, objective={"DINO": {}})
    wider = save(tmp_path / "wide", 0, hidden_size=32, objective={"MAE": {}})
    finer = save(tmp_path / "fine", 0, patch_size=2, objective={"MAE": {}})
    rows = {score.row: score.values for score in evaluate([same[0], other, same[1]], digits, protocols=["knn"])}
    names = ["raw", "untrained", f"pretrained {same[0]} and another seed", f"pretrained {other}"]
    assert list(rows) == names and [len(values) for values in rows.values()] == [1, 2, 2, 1]
    (alone,) = [each.values for each in evaluate([other], digits, protocols=["knn"]) if each.row == "pretrained"]
    assert rows[f"pretrained {other}"] == alone
    found = [score.row for score in evaluate([other, wider], digits, protocols=["knn"])]
    kinds = ["untrained", "pretrained"]
    assert found == ["raw", *(f"{kind} {folder}" for folder in (other, wider) for kind in kinds)]
    found = [score.row for score in evaluate([other, finer], digits, protocols=["knn"])]
    assert found == [f"{kind} {folder}" for folder in (other, finer) for kind in ("raw", *kinds)]


def test_what_makes_another_recipe(tmp_path: Path) -> None:
    """Where a run began does; that it was resumed does not. Encoders of others are never seeds of each other."""
    first = save(tmp_path / "a", 0, model={"init_from": None})
    assert recipe_of(first) == recipe_of(save(tmp_path / "b", 1, model={"init_from": None}))
    assert recipe_of(first) != recipe_of(save(tmp_path / "c", 1, model={"init_from": "elsewhere"}))
    resumed = save(tmp_path / "d", 1, model={"init_from": None})
    record = json.loads((resumed / "run.json").read_text())
    record["train"]["resume_from_checkpoint"] = "latest"
    (resumed / "run.json").write_text(json.dumps(record))
    assert recipe_of(first) == recipe_of(resumed)
    for name in ("e", "f"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "vit"}')
    assert recipe_of(tmp_path / "e") != recipe_of(tmp_path / "f")


TABLE = [
    Score("knn", "raw", [0.25], 10, 20, points=np.repeat([0.0, 1.0], [15, 5])),
    Score("retrieval", "raw", [0.125], 10, 20, "mAP"),
    Score("knn", "pretrained a_b", [0.5, 0.75], 10, 20, points=np.ones(20)),
]


def test_the_forms_of_a_table(tmp_path: Path) -> None:
    half = 1.96 * np.sqrt(0.25 * 0.75 / 19)
    assert cells(TABLE) == [
        ["features", "knn", "retrieval mAP"],
        ["raw features", f"0.250 ({half:.3f})", "0.125"],
        ["pretrained encoder a_b", "0.625 ± 0.177", ""],
    ]
    for name in ("t.md", "t.tex", "t.json"):
        write_scores(TABLE, tmp_path / name)
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0] == "| features | knn | retrieval mAP |" and lines[1] == "| --- | ---: | ---: |"
    assert lines[3] == "| pretrained encoder a_b | 0.625 ± 0.177 |  |" and len(lines) == 4
    tex = (tmp_path / "t.tex").read_text()
    assert r"pretrained encoder a\_b & 0.625 $\pm$ 0.177 &  \\" in tex and tex.count(r"\hline") == 3
    assert tex.startswith(r"\begin{tabular}{lrr}") and tex.endswith("\\end{tabular}\n")
    found = json.loads((tmp_path / "t.json").read_text())
    assert [each["values"] for each in found["scores"]] == [[0.25], [0.125], [0.5, 0.75]]
    assert found["scores"][0]["half_width"] == pytest.approx(half) and found["scores"][1]["half_width"] is None
    (comparison,) = found["comparisons"]
    assert (comparison["row"], comparison["difference"]) == ("pretrained a_b", 0.75)


@pytest.mark.parametrize("name, message", [("scores.csv", "ends in .json, .md or .tex"), ("no/t.md", "no folder")])
def test_where_a_table_cannot_be_written(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        checked(tmp_path / name)


def test_many_protocols_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("raw", "untrained", "pretrained")
    for count, first in ((6, "features"), (7, "protocol")):
        print_scores([Score(f"p{n}", row, [n / 10], 10, 20) for row in rows for n in range(count)], "title")
        printed = [line.replace("┃", "│").split("│") for line in capsys.readouterr().out.splitlines()]
        table = [[cell.strip() for cell in line[1:-1]] for line in printed if len(line) > 2]
        assert table[0][0] == first
    assert table[0][1:] == ["raw features", "untrained encoder", "pretrained encoder"]
    assert table[1:] == [[f"p{n}", *[f"{n / 10:.3f}"] * 3] for n in range(7)]
