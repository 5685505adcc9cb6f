"""Scores as a table: on the screen, in Markdown, in LaTeX, and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mmssl.evaluation.scores import Comparison, Score, compare

LABELS = {"raw": "raw features", "untrained": "untrained encoder", "pretrained": "pretrained encoder"}
LEGEND = "± deviation over seeds; of a single one (half of the 95 % interval over what was tested)"
WIDE = 7  # columns of a table on the screen
PLAIN = ("accuracy", "R²")  # metrics that go without saying


def print_scores(scores: Sequence[Score], title: str) -> None:
    """A table of rows and protocols, and what paired tests say of the rows.

    Rows are lines; where there are many protocols, these are, so that the table is not wider than the screen.
    """
    table = Table(title="\n".join([title, *sizes(scores)]), min_width=60, caption=LEGEND)
    header, *lines = cells(scores)
    if len(header) > WIDE:
        header, *lines = map(list, zip(header, *lines, strict=True))
        header[0] = "protocol"
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    if not (comparisons := compare(scores)):
        return
    tests = Table("protocol", "row", "less", "difference", "p", title="Paired tests on what was tested", min_width=60)
    for each in comparisons:
        tests.add_row(column(each), label(each.row), label(each.other), interval(each), probability(each.p_value))
    Console().print(tests)


def write_scores(scores: Sequence[Score], path: str | Path) -> None:
    """The table as its ending says: .json (with the comparisons), .md or .tex.

    Raises:
        ValueError: another ending, or no such folder.
    """
    path = checked(path)
    if path.suffix == ".json":
        found = {
            "scores": [record(score) for score in scores],
            "comparisons": [asdict(each) for each in compare(scores)],
        }
        path.write_text(json.dumps(found, indent=2) + "\n")
        return
    header, *lines = cells(scores)
    if path.suffix == ".md":
        rule = ["---", *["---:"] * (len(header) - 1)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
    else:
        body = [" & ".join(map(latex, line)) + r" \\" for line in (header, *lines)]
        columns = "l" + "r" * (len(header) - 1)
        rules = (
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            body[0],
            r"\hline",
            *body[1:],
            r"\hline",
            r"\end{tabular}",
        )
        text = "\n".join(rules)
    path.write_text(text + "\n")


def checked(path: str | Path) -> Path:
    """The path of a table, before anything is measured for it."""
    path = Path(path)
    if path.suffix not in (".json", ".md", ".tex"):
        raise ValueError(f"output: found {path}; expected a file that ends in .json, .md or .tex")
    if not path.parent.is_dir():
        raise ValueError(f"output: there is no folder {path.parent}; make it first")
    return path


def record(score: Score) -> dict:
    """A score without what it is the mean of."""
    found = asdict(score)
    del found["points"]
    return found | {"half_width": None if math.isnan(score.half_width) else score.half_width}


def cells(scores: Sequence[Score]) -> list[list[str]]:
    """The table as text, its header first."""
    columns = list(dict.fromkeys(column(score) for score in scores))
    lines = []
    for row in dict.fromkeys(score.row for score in scores):
        own = {column(score): score for score in scores if score.row == row}
        lines.append([label(row), *(shown(own[name]) if name in own else "" for name in columns)])
    return [["features", *columns], *lines]


def shown(score: Score) -> str:
    """The mean over seeds, and how far it can be trusted."""
    mean = f"{np.mean(score.values):.3f}"
    if len(score.values) > 1:
        return f"{mean} ± {np.std(score.values, ddof=1):.3f}"
    return mean if math.isnan(score.half_width) else f"{mean} ({score.half_width:.3f})"


def column(score: Score | Comparison) -> str:
    return score.protocol if score.metric in PLAIN else f"{score.protocol} {score.metric}"


def label(row: str) -> str:
    kind, _, name = row.partition(" ")
    return f"{LABELS.get(kind, kind)} {name}".strip()


def interval(found: Comparison) -> str:
    return f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def probability(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"


def sizes(scores: Sequence[Score]) -> list[str]:
    """Of how many labels each score is, a line for all protocols that have as many."""
    found: dict[tuple[int, int], list[str]] = {}
    for score in scores:
        if score.protocol not in (same := found.setdefault((score.n_test, score.n_train), [])):
            same.append(score.protocol)
    metric = next((score.metric for score in scores if score.metric in PLAIN), scores[0].metric)
    return [
        f"{', '.join(names)}: " * (len(found) > 1)
        + (f"{metric} on {n_test:,} labels, probes fitted on {n_train:,}" if n_train else f"of {n_test:,} labels")
        for (n_test, n_train), names in found.items()
    ]


def latex(text: str) -> str:
    for plain, written in (
        ("\\", r"\textbackslash "),
        ("_", r"\_"),
        ("%", r"\%"),
        ("&", r"\&"),
        ("±", r"$\pm$"),
        ("²", "$^2$"),
    ):
        text = text.replace(plain, written)
    return text
