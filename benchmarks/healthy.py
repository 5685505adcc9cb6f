"""Draw what runs of benchmarks/matrix.py logged: a picture for each objective, its loss and its metrics over the steps.

    python benchmarks/healthy.py runs/matrix/image docs/images/objectives

A line is a seed. The pictures are what docs/objectives shows of a healthy run.
"""

import json
from pathlib import Path

from jsonargparse import CLI
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OF_ANY_RUN = {
    *("step", "epoch", "learning_rate", "grad_norm"),
    *("samples_per_second", "tokens_per_second", "data_wait", "mfu", "memory_gib"),
}


def main(runs: Path, output: Path) -> None:
    """Draw.

    Args:
        runs: a folder of benchmarks/matrix.py, with a folder for each objective.
        output: folder to write the pictures to.
    """
    for folder in sorted(path for path in runs.iterdir() if any(path.glob("seed*/metrics.jsonl"))):
        seeds = [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(folder.glob("seed*/metrics.jsonl"))
        ]
        names = [name for name in seeds[0][0] if name not in OF_ANY_RUN and not name.startswith("health/")]
        figure = Figure(figsize=(2.6 * len(names), 2.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for lines in seeds:
                axes.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1)
            axes.set_title(name.replace("_", " "), fontsize=9)
            axes.tick_params(labelsize=7)
            axes.set_xlabel("step", fontsize=8)
        figure.savefig(output / f"{folder.name.lower().replace('-', '_')}.png", dpi=80)


if __name__ == "__main__":
    CLI(main)
