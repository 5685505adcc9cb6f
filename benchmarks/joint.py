"""Train several modalities jointly and each one alone with as many steps of it; probe both on the same data.

    python benchmarks/joint.py                                          # examples/recipes/joint.yaml, three seeds
    python benchmarks/joint.py --train.max_train_steps 20 --seeds 0     # whether it works
    python benchmarks/joint.py --append                                 # ... and add the scores to docs/results.jsonl

Other flags are those of ``mmssl pretrain``. Alone, a modality has the same encoder and objective, the same batches and
its own warm-up and decay of the learning rate over its steps.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from results import append
from rich.console import Console
from rich.table import Table

from mmssl.cli import pretrain_parser, with_source
from mmssl.evaluation import Score, evaluate
from mmssl.training import Source, TrainArguments, pretrain
from mmssl.training.checkpoint import step_folders
from mmssl.training.streams import draw

ROOT = Path(__file__).parents[1]
JOINT, ALONE = "joint", "joint_alone"


def main() -> None:
    parser = pretrain_parser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", nargs="+", default=["knn", "linear"])
    parser.add_argument("--append", action="store_true", help="Add the scores to docs/results.jsonl.")
    flags = with_source(sys.argv[1:])
    if not any(flag.partition("=")[0] == "--config" for flag in flags):
        flags = ["--config", str(ROOT / "examples" / "recipes" / "joint.yaml"), *flags]
    config = parser.parse_args(flags)
    given = parser.instantiate(config)
    if given.train.max_train_steps is None:
        sys.exit("joint.py: set train.max_train_steps, which is shared out among the modalities")
    sources = {source.modality.name: source for source in (Source(given.modality, given.data), *given.also)}
    weights = {name: source.weight for name, source in sources.items()}

    runs: dict[tuple[str, str], list[Path]] = {}
    for seed in config.seeds:
        train = in_folder(replace(given.train, seed=seed), f"joint/seed{seed}")
        joint = pretrain(given.modality, given.objective, given.encoder, given.data, train, given.also)
        drawn = [draw(weights, seed, step) for step in range(given.train.max_train_steps)]
        for name, source in sources.items():
            runs.setdefault((JOINT, name), []).append(joint)
            if name in drawn:
                batch_size = source.per_device_train_batch_size or given.train.per_device_train_batch_size
                train = replace(
                    given.train, seed=seed, max_train_steps=drawn.count(name), per_device_train_batch_size=batch_size
                )
                train = in_folder(train, f"{name}/seed{seed}")
                alone = pretrain(source.modality, given.objective, given.encoder, source.data, train)
                runs.setdefault((ALONE, name), []).append(alone)

    scores = {
        (recipe, name): evaluate(folders, sources[name].data, protocols=config.protocol, modality=name)
        for (recipe, name), folders in runs.items()
    }
    print_table(scores, config.protocol)
    if config.append:
        for (recipe, name), found in scores.items():
            append(found, runs[recipe, name], name, str(sources[name].data.source), recipe)


def in_folder(train: TrainArguments, name: str) -> TrainArguments:
    """The same run in a folder of its own; what an earlier call has left there is gone on with."""
    folder = Path(train.output_dir) / name
    return replace(train, output_dir=str(folder), resume_from_checkpoint="latest" if step_folders(folder) else None)


def print_table(scores: dict[tuple[str, str], list[Score]], protocols: list[str]) -> None:
    table = Table("modality", "features", *protocols)
    for name in dict.fromkeys(name for _, name in scores):
        shown = {
            "raw features": (JOINT, "raw"),
            "untrained encoder": (JOINT, "untrained"),
            "alone": (ALONE, "pretrained"),
            "joint": (JOINT, "pretrained"),
        }
        for label, (recipe, row) in shown.items():
            values = {score.protocol: score.values for score in scores.get((recipe, name), []) if score.row == row}
            table.add_row(name, label, *(cell(values.get(protocol, [])) for protocol in protocols))
        table.add_section()
    Console().print(table)


def cell(values: list[float]) -> str:
    if not values:
        return "no step"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
