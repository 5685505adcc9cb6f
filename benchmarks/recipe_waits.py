"""Which share of its time a recipe waits for samples, as it stands and when it neither keeps them nor reads ahead.

    python benchmarks/recipe_waits.py
    python benchmarks/recipe_waits.py --recipes "[mae_cifar10]" --options "[--data.source=FOLDER]"

Medians over the lines of the log, without the first one, whose steps are slow. Runs of both kinds alternate.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from jsonargparse import CLI
from rich.console import Console
from rich.table import Table

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
OF_THE_PACKAGES = (
    "mae_digits", "scatsimclr_digits", "graphmae_digits", "tjepa_digits", "tera_spoken_digits", "point_mae_laptop",
    "videomae_moving_digits", "vjepa_moving_digits",
)  # fmt: skip
KINDS = {"neither": ["--data.cache_mb=0", "--train.dataloader_num_workers=0"], "as it stands": []}


def main(
    recipes: list[str] = list(OF_THE_PACKAGES),  # noqa: B006
    options: list[str] = [],  # noqa: B006
    steps: int = 400,
    rounds: int = 2,
) -> None:
    """Run recipes for a few steps and show how long they wait for samples.

    Args:
        recipes: names of files in examples/recipes, without their ending.
        options: further ones of ``mmssl pretrain``, for each of them.
        steps: of each run.
        rounds: runs of each kind.
    """
    shown = Table("recipe", *(f"waits, {kind}" for kind in KINDS), "samples a second: as it stands / neither")
    for recipe in recipes:
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind, own in KINDS.items():
                found[kind].append(measured(recipe, [*options, *own], steps))
        waits, rates = ([statistics.median(run[i] for run in found[kind]) for kind in KINDS] for i in (0, 1))
        shown.add_row(recipe, *(f"{100 * wait:.1f} %" for wait in waits), f"{rates[1] / rates[0]:.2f}")
    Console().print(shown)


def measured(recipe: str, options: list[str], steps: int) -> tuple[float, float]:
    """The median over log lines of the share of waiting, and of samples a second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "mmssl", "pretrain", "--config", str(RECIPES / f"{recipe}.yaml"), *options,
            "--train.output_dir", folder, "--train.overwrite_output_dir", "true", "--train.max_train_steps", str(steps),
            "--train.logging_steps", str(max(1, steps // 8)), "--train.health_steps", "null",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{recipe}: {done.stderr.strip().splitlines()[-1]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][1:]
    waits, rates = ([line[name] for line in lines] for name in ("data_wait", "samples_per_second"))
    return statistics.median(waits), statistics.median(rates)


if __name__ == "__main__":
    CLI(main, as_positional=False)
