"""Score checkpoints beside raw features and untrained encoders, on the same probe."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from mmssl.data import DataArguments, Samples
from mmssl.evaluation.dense import DENSE_PROTOCOLS, dense_pair, measure_dense
from mmssl.evaluation.features import Pooling, features_of
from mmssl.evaluation.models import AnyModel, fresh, learned_labels, load_model, pick_modality
from mmssl.evaluation.scores import Score
from mmssl.evaluation.splits import check_labels, labelled_pair, positions
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig
from mmssl.probes import (
    CROSS_VALIDATED,
    FOLDS,
    PROTOCOLS,
    RAW_ONLY,
    READS,
    UNFITTED,
    Points,
    Task,
    default_protocols,
    quantities,
)

# Flags that seeds of one recipe may differ in: where and when a run stopped, resumed or wrote changes no number of it.
NO_RECIPE = (
    "seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dataloader_num_workers", "report_to",
    "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "health_steps", "push_to_hub", "hub_model_id",
    "hub_private_repo",
)  # fmt: skip


def evaluate(
    checkpoints: Sequence[str | Path],
    data: DataArguments,
    test: DataArguments | None = None,
    protocols: Sequence[str] | None = None,
    modality: str | None = None,
    pooling: Pooling = "mean",
    layers: Sequence[int] | None = None,
    baselines: bool = True,
) -> list[Score]:
    """Probe frozen features of checkpoints: of one recipe over seeds, or of several recipes beside each other.

    Args:
        checkpoints: folders or Hub names of pretrained models. Those that differ in their seed alone are one row.
        data: labelled samples, or samples whose tokens have labels, that the probes are fitted on.
        test: those that they are tested on. None: the published split of tokens or the split "test" of data that come
            with the packages, and of others a stratified fifth of the labels that is held out.
        protocols: names of ``PROTOCOLS``, or of ``DENSE_PROTOCOLS`` where elements of samples have labels. None: "knn",
            "linear" and, where each class has ten labels or there are a hundred quantities, "few_shot".
        modality: which modality of a model that has several.
        pooling: from tokens to samples: "mean", "max", "sum", "mean_max"; "mean_rows", that of each channel of a
            series; "cls", the class token; or "flatten", all tokens side by side. Raw features are the modality's own.
        layers: blocks of the encoder, from 1, that dense protocols of elements read side by side. None: four, evenly
            spaced up to the last one.
        baselines: the rows of raw features and of untrained encoders too. Without only where others stand beside.

    Raises:
        ValueError: no labels, an unknown protocol, classes in the test data that the training data lack, a pooling
            for labels of tokens, or no test data for a model that was pretrained on labels.
    """
    dense = set(protocols or ()) & set(DENSE_PROTOCOLS)
    if unknown := set(protocols or ()) - set(DENSE_PROTOCOLS if dense else PROTOCOLS):
        others = f"{', '.join(PROTOCOLS)}; or, by themselves, of {', '.join(DENSE_PROTOCOLS)}"
        raise ValueError(f"protocols: found {', '.join(sorted(unknown))}; expected some of {others}")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling: found {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    if not checkpoints:
        raise ValueError("checkpoints: found none; expected at least one folder or Hub name")
    may_hold_out = not any(learned_labels(checkpoint) for checkpoint in checkpoints)
    recipes = {name: [load_model(one) for one in members] for name, members in by_recipe(checkpoints).items()}
    names = {recipe: pick_modality(models[0], modality) for recipe, models in recipes.items()}
    kinds = {
        "raw": {recipe: str(models[0].adapters[names[recipe]].options()) for recipe, models in recipes.items()},
        "untrained": {recipe: models[0].config.to_json_string() for recipe, models in recipes.items()},
    }
    scores: list[Score] = []
    for recipe, models in recipes.items():
        rows: dict[str, list[AnyModel | None]] = {}
        if baselines and is_first(kinds["raw"], recipe):
            rows[row_name("raw", recipe, kinds["raw"])] = [None]
        if baselines and is_first(kinds["untrained"], recipe):
            row = row_name("untrained", recipe, kinds["untrained"])
            rows[row] = [fresh(model, seed) for seed, model in enumerate(models)]
        rows["pretrained" if len(recipes) == 1 else f"pretrained {recipe}"] = list(models)
        adapter = models[0].adapters[names[recipe]]
        if dense:
            samples = dense_pair(data, test, adapter, may_hold_out)
            scores += measure_dense(rows, adapter, samples, list(protocols or ()), layers)
        else:
            scores += measure(rows, adapter, labelled_pair(data, test, adapter, may_hold_out), protocols, pooling)
    return scores


def measure(
    rows: dict[str, list[AnyModel | None]],
    adapter: Modality,
    samples: tuple[Samples, Samples],
    protocols: Sequence[str] | None,
    pooling: Pooling,
) -> list[Score]:
    """Every protocol on the features of every row.

    Args:
        rows: the models of each row, one for each seed; None for raw features.
        adapter: the modality that reads the samples.
        samples: those that probes are fitted on, and those that they are tested on.
        protocols: names of ``PROTOCOLS``; None: the default ones.
        pooling: from tokens to samples.
    """
    train, test = samples
    if train.token_labels is not None and pooling != "mean":
        raise ValueError(f"pooling: found {pooling}, but the labels are of tokens, which are not pooled; leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [model for members in rows.values() for model in members if model is not None]
    for each in models:
        torch.nn.Module.to(each, device)
    labels, test_labels = check_labels(train, "data"), check_labels(test, "test")
    fit, choose, held_out = (
        positions(each, split) for each, split in ((train, "train"), (train, "validation"), (test, "test"))
    )
    protocols = default_protocols(labels[fit]) if protocols is None else protocols
    everything = len(fit) + len(choose) + len(held_out)
    sizes = {name: (len(fit), len(held_out)) for name in protocols}
    sizes |= dict.fromkeys(UNFITTED, (0, len(held_out)))
    sizes |= dict.fromkeys(CROSS_VALIDATED, (everything - everything // FOLDS, everything))

    points: dict[tuple[str, str], list[Points]] = {}
    for reads in dict.fromkeys(READS.get(name, "pooled") for name in protocols):
        found = features_of(train, adapter, models, pooling, device, reads)
        test_found = found if test is train else features_of(test, adapter, models, pooling, device, reads)
        pairs = list(zip(found, test_found, strict=True))
        encoded = iter(pairs[1:])
        for row, members in rows.items():
            for model in members:
                features, test_features = pairs[0] if model is None else next(encoded)
                validation = (features[choose], labels[choose]) if len(choose) else None
                task = Task(features[fit], labels[fit], test_features[held_out], test_labels[held_out], validation)
                for name in protocols:
                    if READS.get(name, "pooled") == reads and (model is None or name not in RAW_ONLY):
                        points.setdefault((row, name), []).append(probe(name, task))
    return [
        Score(name, row, [float(each[metric].mean()) for each in seeds], *sizes[name], metric, mean_of(seeds, metric))
        for row in rows
        for name in protocols
        if (seeds := points.get((row, name)))
        for metric in seeds[0]
    ]


def probe(name: str, task: Task) -> Points:
    """A protocol, whose errors say what was probed."""
    try:
        return PROTOCOLS[name](task)
    except ValueError as error:
        fewest = np.unique(task.train_labels, return_counts=True)[1].min()
        about = "" if quantities(task.train_labels) else f" (the rarest class has {fewest} labels)"
        raise ValueError(f"protocol {name}: {error}{about}") from error


def mean_of(seeds: list[Points], metric: str) -> np.ndarray:
    return np.mean([each[metric] for each in seeds], axis=0)


def by_recipe(checkpoints: Sequence[str | Path]) -> dict[str, list[str | Path]]:
    """Checkpoints that differ in their seed alone go together, under a name for them."""
    recipes: dict[str, list[str | Path]] = {}
    for checkpoint in checkpoints:
        recipes.setdefault(recipe_of(checkpoint), []).append(checkpoint)
    more = {1: "", 2: " and another seed"}
    return {
        f"{members[0]}{more.get(len(members), f' and {len(members) - 1} other seeds')}": members
        for members in recipes.values()
    }


def recipe_of(checkpoint: str | Path) -> str:
    """What a run was but for its seed; of a model of mmssl without a record its configuration; of others their name."""
    record, config = (Path(checkpoint) / name for name in ("run.json", "config.json"))
    if record.is_file():
        run = json.loads(record.read_text())
        run["train"] = {key: value for key, value in run["train"].items() if key not in NO_RECIPE}
        kept = ("modality", "objective", "encoder", "data", "also", "train", "model", "steps")
        return json.dumps([run.get(key) for key in kept])
    own = config.is_file() and json.loads(config.read_text()).get("model_type") == MMSSLConfig.model_type
    return config.read_text() if own else str(checkpoint)


def row_name(kind: str, recipe: str, kinds: dict[str, str]) -> str:
    """A baseline that all recipes share goes without a name."""
    return kind if len(set(kinds.values())) == 1 else f"{kind} {recipe}"


def is_first(kinds: dict[str, str], recipe: str) -> bool:
    """Whether the baseline of a recipe is not yet in the table."""
    return next(name for name, kind in kinds.items() if kind == kinds[recipe]) == recipe
