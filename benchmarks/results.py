"""Make docs/results.md from docs/results.jsonl: ``python benchmarks/results.py``; with ``--check``, only compare."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.evaluation import Score

DOCS = Path(__file__).parents[1] / "docs"
KEY = ("modality", "data", "recipe")
ROWS = {"raw": "raw features", "untrained": "untrained encoder", "pretrained": "pretrained encoder"}
HEADER = """# Results

Made by `python benchmarks/results.py` from `results.jsonl`, each line of which was appended by the script that
measured it. Accuracies on test data, or R² where labels are quantities: mean ± standard deviation over seeds, of start
values, data order, masks and views. Raw features have no seed. What a probe chooses (neighbours, distance, penalty,
epoch) it chooses on published validation data, or else on a part of its training data: [evaluation](evaluation.md). Of
lines that differ only in when they were measured, the last one counts.
"""
MATRIX = """## Every objective on every modality

`python benchmarks/matrix.py`: the same small encoder and 300 steps for each cell, with
the settings of `benchmarks/matrix.yaml`; the best of a column in bold. Empty or not there: refused, as `mmssl list`
says, or not measured yet.
"""


def main() -> None:
    lines = [json.loads(line) for line in (DOCS / "results.jsonl").read_text().splitlines()]
    page = render(lines)
    if "--check" in sys.argv[1:]:
        if (DOCS / "results.md").read_text() != page:
            sys.exit("docs/results.md does not agree with docs/results.jsonl; run: python benchmarks/results.py")
    else:
        (DOCS / "results.md").write_text(page)


def append(
    scores: Sequence[Score], runs: Sequence[Path], modality: str, data: str, recipe: str, pooling: str = "mean"
) -> None:
    """Add what the calling script has measured on these finished runs, the seeds of one recipe."""
    records = [json.loads((run / "run.json").read_text()) for run in runs]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=DOCS, capture_output=True, text=True, check=True).stdout.strip()
    with (DOCS / "results.jsonl").open("a") as file:
        for score in scores:
            line = {
                "modality": modality,
                "data": data,
                "objective": next(iter(records[-1]["objective"])),
                "recipe": recipe,
                "protocol": score.protocol + ("" if pooling == "mean" else f", {pooling} pooling"),
                "row": score.row,
                "metric": score.metric,
                "mean": round(float(np.mean(score.values)), 4),
                "std": round(float(np.std(score.values, ddof=1)), 4) if len(score.values) > 1 else None,
                "seeds": len(score.values),
                "n_train": score.n_train,
                "n_test": score.n_test,
                "steps": records[-1]["steps"],
                "minutes": round(float(np.mean([record["minutes"] for record in records])), 1),
                "device": records[-1]["device"],
                "command": command(),
                "commit": commit,
            }
            file.write(json.dumps(line) + "\n")


def command() -> str:
    """The command line, with the folder of the data as the variable that users set."""
    data = os.environ.get("MMSSL_DATA")
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    text = " ".join(f'"{word}"' if set(word) & set(" *!") else word for word in words)  # variables stay variables
    return text.replace(data.rstrip("/"), "$MMSSL_DATA") if data else text


def render(lines: list[dict[str, Any]]) -> str:
    """The whole page."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    matrix = [line for line in lines if line["recipe"] == "matrix"]
    for line in lines:
        if line in matrix:
            continue
        groups.setdefault(tuple(line[key] for key in KEY), {})[line["protocol"], line["row"]] = line
    parts = [HEADER, *(matrix_tables(matrix) if matrix else [])]
    for (modality, data, recipe), cells in sorted(groups.items()):
        protocols = list(dict.fromkeys(protocol for protocol, _ in cells))
        any_line = next(line for (_, row), line in cells.items() if row == "pretrained")
        parts.append(f"## {modality}: {data}, recipe `{recipe}`\n")
        metric = "" if any_line["metric"] == "accuracy" else f"{any_line['metric']}; "
        sizes: dict[tuple[int, int], list[str]] = {}
        for (protocol, row), line in cells.items():
            if row == "pretrained":
                sizes.setdefault((line["n_train"], line["n_test"]), []).append(protocol)
        probes = "; ".join(
            f"probes{' (' + ', '.join(names) + ')' if len(sizes) > 1 else ''} fitted on {n_train:,} samples, tested on "
            f"{n_test:,}"
            for (n_train, n_test), names in sizes.items()
        )
        parts.append(
            f"{any_line['objective']}, {any_line['steps']:,} steps, {any_line['minutes']} minutes a seed on "
            f"{any_line['device']}; {any_line['seeds']} seeds; {metric}{probes}; commit {any_line['commit']}.\n"
        )
        parts.append("| features | " + " | ".join(protocols) + " |\n|---|" + "---|" * len(protocols))
        others = {row: row for _, row in cells if row not in ROWS}  # further baselines, by their own names
        for row, label in (ROWS | others).items():
            found = [cells.get((protocol, row)) for protocol in protocols]
            parts.append(f"| {label} | " + " | ".join(cell(line) if line else "" for line in found) + " |")
        parts.append(f"\n```bash\n{any_line['command']}\n```\n")
    return "\n".join(parts)


def matrix_tables(lines: list[dict[str, Any]]) -> list[str]:
    """A table for each protocol, with a row for each objective and a column for each modality, the best in bold."""
    cells = {(line["protocol"], line["row"], line["modality"]): line for line in lines}
    data = {line["modality"]: f"{line['modality']}: {line['data']}" for line in lines}
    parts = [MATRIX]
    for protocol in dict.fromkeys(line["protocol"] for line in lines):
        parts.append(f"| {protocol} | " + " | ".join(data.values()) + " |\n|---|" + "---|" * len(data))
        best = {
            modality: max(line["mean"] for key, line in cells.items() if key[::2] == (protocol, modality))
            for modality in data
        }
        for row in dict.fromkeys([*ROWS, *(line["row"] for line in lines)]):
            found = [cells.get((protocol, row, modality)) for modality in data]
            if any(found):
                texts = [cell(line) if line else "" for line in found]
                texts = [
                    f"**{text}**" if line and line["mean"] == best[line["modality"]] else text
                    for line, text in zip(found, texts, strict=True)
                ]
                parts.append(f"| {ROWS.get(row, row)} | " + " | ".join(texts) + " |")
        parts.append("")
    return parts


def cell(line: dict[str, Any]) -> str:
    return f"{line['mean']:.3f}" + ("" if line["std"] is None else f" ± {line['std']:.3f}")


if __name__ == "__main__":
    main()
