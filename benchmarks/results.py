"""Make docs/results.md from docs/results.jsonl: ``python benchmarks/results.py``; with ``--check``, only compare."""

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
KEY = ("modality", "data", "recipe")
ROWS = {"raw": "raw features", "untrained": "untrained encoder", "pretrained": "pretrained encoder"}
HEADER = """# Results

Made by `python benchmarks/results.py` from `results.jsonl`, each line of which was appended by the script that
measured it. Accuracies on test data: mean ± standard deviation over seeds, of start values, data order, masks and
views. Raw features have no seed. What a probe chooses (neighbours, distance, penalty) it chooses on a part of its
training data. Of lines that differ only in when they were measured, the last one counts.
"""


def main() -> None:
    lines = [json.loads(line) for line in (DOCS / "results.jsonl").read_text().splitlines()]
    page = render(lines)
    if "--check" in sys.argv[1:]:
        if (DOCS / "results.md").read_text() != page:
            sys.exit("docs/results.md does not agree with docs/results.jsonl; run: python benchmarks/results.py")
    else:
        (DOCS / "results.md").write_text(page)


def render(lines: list[dict[str, Any]]) -> str:
    """The whole page."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in KEY), {})[line["protocol"], line["row"]] = line
    parts = [HEADER]
    for (modality, data, recipe), cells in sorted(groups.items()):
        protocols = list(dict.fromkeys(protocol for protocol, _ in cells))
        any_line = next(line for (_, row), line in cells.items() if row == "pretrained")
        parts.append(f"## {modality}: {data}, recipe `{recipe}`\n")
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
            f"{any_line['device']}; {any_line['seeds']} seeds; {probes}; commit {any_line['commit']}.\n"
        )
        parts.append("| features | " + " | ".join(protocols) + " |\n|---|" + "---|" * len(protocols))
        for row, label in ROWS.items():
            parts.append(f"| {label} | " + " | ".join(cell(cells[protocol, row]) for protocol in protocols) + " |")
        parts.append(f"\n```bash\n{any_line['command']}\n```\n")
    return "\n".join(parts)


def cell(line: dict[str, Any]) -> str:
    return f"{line['mean']:.3f}" + ("" if line["std"] is None else f" ± {line['std']:.3f}")


if __name__ == "__main__":
    main()
