"""Draw a recipe's loss and probe scores over its steps, from runs of several seeds and the checkpoints they kept.

    python benchmarks/curve.py runs/mae_cifar10 --output docs/images/mae_cifar10.png \
        --probe.source "$MMSSL_DATA/images/cifar10_jpg/train.parquet" --probe.max_samples 10000 \
        --test.source "$MMSSL_DATA/images/cifar10_jpg/test.parquet" --test.max_samples 2000

The folder is the ``output_dir`` of ``benchmarks/accuracy.py``. Step 0 is the untrained encoder.
"""

import json
import sys
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file

from mmssl.cli import with_source
from mmssl.data import DataArguments, PreparedSamples
from mmssl.evaluation.evaluate import fresh
from mmssl.evaluation.features import extract, pooled
from mmssl.evaluation.splits import check_labels, labelled_pair
from mmssl.probes import PROTOCOLS, Task
from mmssl.training import load_objective
from mmssl.training.checkpoint import step_folders


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=str, help="Folder of the seeds.")
    parser.add_argument("--output", type=str, required=True, help="Picture to write.")
    parser.add_argument("--protocol", nargs="+", default=["knn", "linear"])
    parser.add_class_arguments(DataArguments, "probe", help="Labelled samples for the probes.")
    parser.add_class_arguments(DataArguments, "test", help="Labelled samples that they are tested on.")
    config = parser.instantiate(parser.parse_args(with_source(sys.argv[1:])))
    seeds = sorted(Path(config.runs).glob("seed*"))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)

    found: dict[str, dict[int, list[float]]] = {protocol: {} for protocol in config.protocol}
    for number, run in enumerate(seeds):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1, label=run.name)
        objective = load_objective(run)
        (modality,) = objective.model.adapters.values()
        fit, test = labelled_pair(config.probe, config.test, modality)
        labels, test_labels = check_labels(fit, "probe"), check_labels(test, "test")
        checkpoints = {int(folder.name.removeprefix("step_")): folder for folder in step_folders(run)}
        for step, folder in {0: None, **checkpoints}.items():
            model = fresh(objective.model, number)
            if folder is not None:
                objective.load_state_dict(load_file(folder / "model.safetensors"))
                model = objective.model
            (features,) = extract(PreparedSamples(fit, modality), [pooled(model)], "cpu")
            (test_features,) = extract(PreparedSamples(test, modality), [pooled(model)], "cpu")
            for protocol in config.protocol:
                task = Task(features, labels, test_features, test_labels)
                score = float(next(iter(PROTOCOLS[protocol](task).values())).mean())
                found[protocol].setdefault(step, []).append(score)
                print(run.name, step, protocol, round(score, 4), flush=True)
    for protocol, by_step in found.items():
        steps = sorted(by_step)
        means = [np.mean(by_step[step]) for step in steps]
        spread = [np.std(by_step[step], ddof=1) if len(by_step[step]) > 1 else 0.0 for step in steps]
        scores.errorbar(steps, means, yerr=spread, marker="o", capsize=3, label=protocol)
    losses.set(xlabel="optimiser steps", ylabel="loss")
    scores.set(xlabel="optimiser steps (0: untrained)", ylabel=f"accuracy, mean and deviation of {len(seeds)} seeds")
    losses.legend()
    scores.legend()
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=110)


if __name__ == "__main__":
    main()
