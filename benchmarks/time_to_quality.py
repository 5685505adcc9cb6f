"""Quality by CPU time: our recipes beside those of peers.

    pip install -e ".[bench]"
    python benchmarks/time_to_quality.py --field images --data "$MMSSL_DATA/images/cifar10_jpg" --explore true
    python benchmarks/time_to_quality.py --field images --data "$MMSSL_DATA/images/cifar10_jpg" \
        --output docs/time_to_quality.json

A field is a data set and those who learn from it: quality_images.py, quality_graphs.py (Cora), quality_series.py
(NATOPS). All sides train on one thread for a budget of CPU seconds in which views and steps count, the learning rate
warmed up over the first tenth of the budget and brought down to 0 by a cosine. The same probes then read the features,
beside raw ones and untrained encoders. Learning rates are chosen for each side alike, by what is held out from
training.
"""

import json
import math
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import CLI
from quality import Data, Field, Scores
from rich.console import Console
from rich.table import Table


def main(
    field: Literal["images", "graphs", "series"],
    data: str,
    side: tuple[str, ...] = (),
    budget: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    rates: dict[str, float] | None = None,
    explore: bool = False,
    output: str = "",
) -> None:
    """Compare.

    Args:
        field: what is learned from.
        data: its folder or file.
        side: which sides. Empty: all.
        budget: CPU seconds of a run; each is a run of its own. Empty: the field's.
        seeds: of start values, batches and views.
        rates: learning rate of each side; 1e-3 where none is given.
        explore: try all learning rates with the first seed, on what is held out. A budget as long as the run's itself
            is the one to choose by: the best rate of a third of it may be another.
        output: JSON file that the numbers of these sides are written to, beside those of others that it has.
    """
    torch.set_num_threads(1)
    about: Field = import_module(f"quality_{field}").FIELD
    read = about.read(data, explore)
    budget = budget or about.budget
    every: dict[str, Any] = json.loads(Path(output).read_text()) if output and Path(output).is_file() else {}
    found = every.setdefault(field, {})
    found["raw"] = {"0": [read.score(read.raw)]}
    for name in side or tuple(about.sides):
        make = about.sides[name]
        scores: dict[str, list[Scores]] = {"0": [run(make, seed, 0.0, 0.0, about, read) for seed in seeds]}
        for rate in about.rates if explore else ((rates or {}).get(name, 1e-3),):
            for seconds in budget:
                key = f"{seconds:.0f} at {rate}"
                for seed in seeds[:1] if explore else seeds:
                    scores.setdefault(key, []).append(run(make, seed, rate, seconds, about, read))
                    print(name, key, scores[key][-1], flush=True)
        found[name] = scores
        if output and not explore:
            Path(output).write_text(json.dumps(every, indent=1))
    kinds = list(found["raw"]["0"][0])
    show = Table("side", "learning rate", "CPU seconds", "steps", *kinds)
    for name, scores in found.items():
        for key, runs in scores.items():
            trained, _, at = key.partition(" at ")
            show.add_row(name, at, trained, *(spread(runs, what) for what in ("steps", *kinds)))
    Console().print(show)


def spread(runs: list[Scores], what: str) -> str:
    values = [run[what] for run in runs if run.get(what)]
    if not values:
        return ""
    digits = 0 if what == "steps" else 3
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def run(make: Callable[[], Any], seed: int, rate: float, budget: float, about: Field, data: Data) -> Scores:
    """Train for a budget of CPU seconds; the number of steps and the scores."""
    torch.manual_seed(seed)
    learner = make()
    learner.module.train()
    trained = [each for each in learner.module.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, **about.optimizer)
    generator, steps, start = torch.Generator().manual_seed(seed), 0, time.process_time()
    while budget and (share := (time.process_time() - start) / budget) < 1:
        optimizer.param_groups[0]["lr"] = rate * min(10 * share, (1 + math.cos(math.pi * share)) / 2)
        optimizer.zero_grad()
        learner.loss(data.draw(generator), generator).backward()
        optimizer.step()
        steps += 1
    learner.module.eval()
    return {"steps": steps, **data.score(learner.features)}


if __name__ == "__main__":
    CLI(main, as_positional=False)
