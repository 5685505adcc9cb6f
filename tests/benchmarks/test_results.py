"""docs/results.md says what docs/results.jsonl holds."""

import json
import subprocess
import sys
from pathlib import Path

from mmssl.probes import RAW_ONLY

ROOT = Path(__file__).parents[2]
FIELDS = {
    "modality", "data", "objective", "recipe", "protocol", "row", "metric", "mean", "std", "seeds", "n_train", "n_test",
    "steps", "minutes", "device", "command", "commit",
}  # fmt: skip


def test_page_agrees_with_the_measurements() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "results.py", "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


def test_every_measurement_is_whole_and_has_its_baselines() -> None:
    lines = [json.loads(line) for line in (ROOT / "docs" / "results.jsonl").read_text().splitlines()]
    assert lines
    rows: dict[tuple[str, ...], set[str]] = {}
    for line in lines:
        assert set(line) == FIELDS
        assert line["mean"] <= 1 or line["metric"].startswith("MSE")
        assert line["seeds"] >= 3 or line["row"] in ("raw", "2-hop average")  # which have no seed
        command = "" if line["recipe"] == "matrix" else line["command"]  # whose rows come one after the other
        rows.setdefault((line["data"], line["recipe"], line["protocol"], command), set()).add(line["row"])
    for (_, recipe, protocol, _), found in rows.items():
        if recipe == "matrix":
            assert found > {"raw", "untrained"}
        else:
            assert found >= {"raw", "untrained", "pretrained"} or protocol.split(",")[0] in RAW_ONLY
