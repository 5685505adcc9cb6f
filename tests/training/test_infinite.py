"""The schedules that a run can be made longer with: "wsd" against transformers, "infinite" against its paper."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_wsd_schedule

from mmssl.training import TrainArguments
from mmssl.training.checkpoint import find_checkpoint, step_folders
from mmssl.training.schedule import anneal_step, check_length, infinite, rate_at, wsd
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import run

PEAK, CONSTANT, LEAST = 1e-3, 1e-4, 1e-5
INFINITE: dict[str, Any] = {
    "lr_scheduler_type": "infinite",
    "learning_rate": PEAK,
    "constant_learning_rate": CONSTANT,
    "min_learning_rate": LEAST,
    "warmup_ratio": 0.05,
    "cooldown_until": 0.15,
    "constant_until": 0.8,
}
WSD: dict[str, Any] = {"lr_scheduler_type": "wsd", "learning_rate": PEAK, "min_learning_rate": LEAST}


def rates(train: TrainArguments, total: int, planned: int | None = None) -> list[float]:
    return [rate_at(step, train, total, planned or total) for step in range(total + 1)]


def test_infinite_is_that_of_the_paper() -> None:
    """Its four lines written out; our warm-up is one step ahead of the paper's, which begins at 0."""
    expected = []
    for n in range(1001):
        if n < 50:
            expected.append(PEAK * (n + 1) / 50)
        elif n < 150:
            expected.append(CONSTANT + (PEAK - CONSTANT) / 2 * (1 + math.cos(math.pi * (n - 50) / 100)))
        elif n < 800:
            expected.append(CONSTANT)
        else:
            expected.append(CONSTANT * math.exp(math.log(LEAST / CONSTANT) * (n - 800) / 200))
    assert rates(TrainArguments(**INFINITE), 1000) == pytest.approx(expected, rel=1e-12)


def test_infinite_has_no_jumps() -> None:
    found = rates(TrainArguments(**INFINITE), 1000)
    assert max(abs(after - before) for before, after in pairwise(found)) <= PEAK / 50 * (1 + 1e-9)
    for turn in (50, 150, 800):
        assert abs(found[turn] - found[turn - 1]) < PEAK / 50


def test_the_ends_of_the_phases_are_exact() -> None:
    found = rates(TrainArguments(**INFINITE), 1000)
    assert found[49] == PEAK and set(found[150:801]) == {CONSTANT}
    assert abs(found[1000] - LEAST) < 1e-12
    assert infinite(1200, 50, 150, 800, 1000, PEAK, CONSTANT, LEAST) == pytest.approx(LEAST, abs=1e-12)


@pytest.mark.parametrize("options", [INFINITE, WSD], ids=["infinite", "wsd"])
def test_a_longer_run_has_the_same_rates_until_the_anneal(options: dict[str, Any]) -> None:
    train = TrainArguments(**options)
    short, long = rates(train, 1000), rates(train, 2000, planned=1000)
    anneal = anneal_step(train, 1000)
    assert anneal == 800 and anneal_step(train, 2000) == 1600
    assert long[: anneal + 1] == short[: anneal + 1]
    assert len(set(long[150:1601])) == 1 and long[1601] < long[1600]
    assert long[2000] == pytest.approx(LEAST, abs=1e-12)


def test_a_later_task_begins_at_the_constant() -> None:
    later = rates(TrainArguments(**INFINITE | {"warmup_ratio": 0.0, "cooldown_until": 0.0}), 1000)
    assert set(later[:801]) == {CONSTANT} and later[1000] == pytest.approx(LEAST, abs=1e-12)


def test_the_constant_is_a_tenth_of_the_peak_unless_told() -> None:
    assert rate_at(500, TrainArguments(**INFINITE | {"constant_learning_rate": None}), 1000, 1000) == PEAK / 10


def test_wsd_equals_that_of_transformers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_wsd_schedule(optimizer, 10, 20, num_training_steps=100, decay_type="linear", min_lr_ratio=0.1)
    for step in range(100):
        if step >= 10:  # theirs starts its warm-up at its least rate
            assert wsd(step, 10, 80, 100, 0.3, 0.03) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [wsd(step, 4, 80, 100, 1.0) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_learning_rate": 0.0}, r"found min_learning_rate 0\.0.* such as 1e-05"),
        ({"warmup_ratio": 0.2}, r"found 0\.2 and 0\.15 and 0\.8; expected 0 <= warmup_ratio <= cooldown_until <="),
        ({"constant_until": 1.0}, r"constant_until < 1"),
        (
            {"lr_scheduler_type": "wsd", "warmup_ratio": 0.9},
            r"found 0\.9 and 0\.8; expected 0 <= warmup_ratio <= c",
        ),
    ],
)
def test_phases_out_of_order_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainArguments(**INFINITE | options)


@pytest.mark.parametrize(
    ("step", "before", "total", "message"),
    [
        (900, 1000, 2000, "stands at step 900; resume from step_800"),
        (900, 2000, 1000, "stands at step 900; choose more steps"),
        (100, 1000, 150, "which began with 1000 steps, warms up and cools down"),
    ],
)
def test_a_length_that_moves_the_anneal_into_the_past_is_refused(
    step: int, before: int, total: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_length(TrainArguments(**INFINITE), step, 1000, before, total)


def test_lengths_that_leave_the_past_as_it_was_are_let_pass() -> None:
    train = TrainArguments(**INFINITE)
    for step, before, total in ((800, 1000, 2000), (900, 1000, 1000), (500, 1000, 700)):
        check_length(train, step, 1000, before, total)
    check_length(TrainArguments(), 900, 1000, 1000, 2000)  # a cosine is stretched, as it always was


SHORT: dict[str, Any] = INFINITE | {"warmup_ratio": 0.1, "cooldown_until": 0.3, "constant_until": 0.6}


def test_the_checkpoint_before_the_anneal_is_kept_and_makes_the_run_longer(tmp_path: Path) -> None:
    """Whatever the limit; learning rates of the longer run are those of the shorter one up to there."""
    first = run(tmp_path, max_train_steps=10, checkpointing_steps=2, checkpoints_total_limit=1, **SHORT)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_6", "step_10"]
    assert find_checkpoint("latest", tmp_path).name == "step_10"
    assert "kept" in json.loads((tmp_path / "step_6" / "run.json").read_text())
    with pytest.raises(ValueError, match="resume from step_6, which was kept for this"):
        run(tmp_path, max_train_steps=20, resume_from_checkpoint="latest", **SHORT)
    kept = str(tmp_path / "step_6")
    longer = run(tmp_path, max_train_steps=20, resume_from_checkpoint=kept, checkpoints_total_limit=1, **SHORT)
    assert exact(longer[:6]) == exact(first[:6])
    assert [line["learning_rate"] for line in longer[3:13]] == [CONSTANT] * 10  # step 13 is the first of the anneal
    assert longer[13]["learning_rate"] == pytest.approx(CONSTANT * (LEAST / CONSTANT) ** (1 / 8))
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_6", "step_12"]


def test_a_resumed_run_has_the_same_tail(tmp_path: Path) -> None:
    """From the constant part, and from the middle of the anneal."""
    whole = run(tmp_path / "whole", max_train_steps=10, checkpointing_steps=4, checkpoints_total_limit=None, **SHORT)
    for step in (4, 8):
        cut = tmp_path / f"cut{step}"
        shutil.copytree(tmp_path / "whole", cut)
        again = run(cut, max_train_steps=10, resume_from_checkpoint=str(cut / f"step_{step}"), **SHORT)
        assert exact(again) == exact(whole)
        assert_same_weights(cut, tmp_path / "whole")
