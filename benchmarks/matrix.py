"""Every objective on a small real data set of each modality, beside raw features and untrained encoders.

    python benchmarks/matrix.py                                            # everything: hours
    python benchmarks/matrix.py --modality image graph --objective SimCLR  # some of it
    python benchmarks/matrix.py --modality image --explore true            # probed on held-out training samples

Settings stand in benchmarks/matrix.yaml, the data under MMSSL_DATA. A cell is pretrained with three seeds and probed on
the means of its tokens; scores are appended to docs/results.jsonl cell by cell, so that what is done stays; then make
docs/results.md anew with ``python benchmarks/results.py``. Settings are chosen with ``--explore true``, which holds out
samples of the training set and records nothing.
"""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from results import append
from rich.console import Console

from mmssl.cli import pretrain_parser
from mmssl.data import DataArguments
from mmssl.evaluation import evaluate, print_scores
from mmssl.training import pretrain

SETTINGS = Path(__file__).with_suffix(".yaml")


def main() -> None:
    settings = yaml.safe_load(os.path.expandvars(SETTINGS.read_text()))
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--modality", nargs="+", default=list(settings["modalities"]))
    parser.add_argument("--objective", nargs="+", default=list(settings["objectives"]), help="Rows of the table.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", nargs="+", default=["linear", "knn"])
    parser.add_argument("--explore", type=bool, default=False, help="Probe held-out training samples, record nothing.")
    parser.add_argument("--output_dir", default="runs/matrix")
    config = parser.parse_args()
    for kind, chosen in (("modalities", config.modality), ("objectives", config.objective)):
        if unknown := set(chosen) - set(settings[kind]):
            parser.error(f"found {', '.join(sorted(unknown))}; {SETTINGS.name} has {', '.join(settings[kind])}")
    for modality in config.modality:
        about = settings["modalities"][modality]
        baselines = True
        for name in config.objective:
            cell = flags_of(settings, modality, name)
            folder = Path(config.output_dir, modality, name.replace(" ", "_"))
            shutil.rmtree(folder, ignore_errors=True)
            try:
                runs = [train(cell, folder / f"seed{seed}", seed) for seed in config.seeds]
            except (ValueError, FloatingPointError) as error:
                what = "refused" if isinstance(error, ValueError) else "broke down"
                Console().print(f"{modality}, {name}: {what}: {error}")
                continue
            data = DataArguments(**about["run"]["data"])
            test = None if config.explore else DataArguments(**about["test"])
            scores = evaluate(runs, data, test, config.protocol, pooling=about["pooling"], baselines=baselines)
            scores = [replace(score, row=name) if score.row == "pretrained" else score for score in scores]
            print_scores(scores, title=f"{modality}: {about['name']}")
            if not config.explore:
                append(scores, runs, modality, about["name"], "matrix")
            baselines = False


def flags_of(settings: dict[str, Any], modality: str, name: str) -> dict[str, Any]:
    """The flags of a cell: what is common to all, to its modality, to its objective, and its own."""
    objective = settings["objectives"][name]
    own = objective.get("modalities", {}).get(modality, {})
    return merged(settings["common"], settings["modalities"][modality]["run"], objective["run"], own)


def train(cell: dict[str, Any], folder: Path, seed: int) -> Path:
    """Pretrain one seed of a cell."""
    parser = pretrain_parser()
    cell = merged(cell, {"train": {"seed": seed, "output_dir": str(folder)}})
    given = parser.instantiate(parser.parse_object(cell))
    return pretrain(given.modality, given.objective, given.encoder, given.data, given.train)


def merged(first: Any, *others: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries in dictionaries, later ones winning; a class other than the earlier one brings its own options."""
    result = copy.deepcopy(first)
    for other in others:
        for key, value in other.items():
            old = result.get(key)
            same = isinstance(old, dict) and isinstance(value, dict)
            if same and "class_path" in value and value["class_path"] != (old or {}).get("class_path"):
                same = False
            result[key] = merged(old, value) if same else copy.deepcopy(value)
    return result


if __name__ == "__main__":
    main()
