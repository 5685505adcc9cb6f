"""Score checkpoints beside raw features and untrained encoders, on the same probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmssl.data import DataArguments
from mmssl.evaluation.features import Pooling, features_of
from mmssl.evaluation.models import fresh, learned_labels, load_model, pick_modality
from mmssl.evaluation.splits import check_labels, labelled_pair, positions
from mmssl.probes import DEFAULT_PROTOCOLS, FOLDS, PROTOCOLS, RAW_ONLY, quantities


@dataclass
class Score:
    """One row of one protocol.

    Attributes:
        protocol: name of the protocol.
        row: "raw" features, "untrained" encoder or "pretrained" encoder.
        values: one for each seed; a single one for raw features, which have none.
        n_train: labelled samples, or tokens, that the probe was fitted on, with what it held out of them to choose on.
        n_test: samples, or tokens, that it was tested on. In cross-validation all of them, each once.
        metric: what the values are: "accuracy" or, where labels are quantities, "R²".
    """

    protocol: str
    row: str
    values: list[float]
    n_train: int
    n_test: int
    metric: str = "accuracy"


def evaluate(
    checkpoints: Sequence[str | Path],
    data: DataArguments,
    test: DataArguments | None = None,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    modality: str | None = None,
    pooling: Pooling = "mean",
    baselines: bool = True,
) -> list[Score]:
    """Probe frozen features of checkpoints that differ in their seed alone.

    Args:
        checkpoints: folders or Hub names of pretrained models, one for each seed.
        data: labelled samples, or samples whose tokens have labels, that the probes are fitted on.
        test: those that they are tested on. None: the published split of tokens or the split "test" of data that come
            with the packages, and of others a stratified fifth of the labels that is held out.
        protocols: names of ``PROTOCOLS``.
        modality: which modality of a model that has several.
        pooling: from tokens to samples: "mean", "max", "sum", "mean_max"; "mean_rows", that of each channel of a
            series; or "flatten", all tokens side by side. Raw features are the modality's own.
        baselines: the rows of raw features and of untrained encoders too. Without only where others stand beside.

    Raises:
        ValueError: no labels, an unknown protocol, classes in the test data that the training data lack, a pooling
            for labels of tokens, or no test data for a model that was pretrained on labels.
    """
    if unknown := set(protocols) - set(PROTOCOLS):
        raise ValueError(f"protocols: found {', '.join(sorted(unknown))}; expected some of {', '.join(PROTOCOLS)}")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling: found {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    if not checkpoints:
        raise ValueError("checkpoints: found none; expected at least one folder or Hub name")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [load_model(checkpoint) for checkpoint in checkpoints]
    if any(model.config.modalities != models[0].config.modalities for model in models):
        raise ValueError("checkpoints: their modalities have other options; expected seeds of one recipe")
    untrained = [fresh(model, seed) for seed, model in enumerate(models)] if baselines else []
    for model in (*models, *untrained):
        torch.nn.Module.to(model, device)
    adapter = models[0].adapters[pick_modality(models[0], modality)]
    may_hold_out = not any(learned_labels(checkpoint) for checkpoint in checkpoints)
    train_samples, test_samples = labelled_pair(data, test, adapter, may_hold_out)
    if train_samples.token_labels is not None and pooling != "mean":
        raise ValueError(f"pooling: found {pooling}, but the labels are of tokens, which are not pooled; leave it out")
    labels, test_labels = check_labels(train_samples, "data"), check_labels(test_samples, "test")
    fit, choose, held_out = (
        positions(samples, split)
        for samples, split in ((train_samples, "train"), (train_samples, "validation"), (test_samples, "test"))
    )
    everything = len(fit) + len(choose) + len(held_out)
    sizes = {protocol: (len(fit), len(held_out)) for protocol in protocols}
    sizes["svm"] = sizes["svm_standardized"] = everything - everything // FOLDS, everything  # ten folds

    rows = ["raw"] + ["untrained"] * len(untrained) + ["pretrained"] * len(models)
    found = features_of(train_samples, adapter, (*untrained, *models), pooling, device)
    test_found = found
    if test_samples is not train_samples:
        test_found = features_of(test_samples, adapter, (*untrained, *models), pooling, device)
    if not baselines:
        rows, found, test_found = rows[1:], found[1:], test_found[1:]
    scores = {
        (row, protocol): Score(protocol, row, [], *sizes[protocol], "R²" if quantities(labels) else "accuracy")
        for row in dict.fromkeys(rows)
        for protocol in protocols
        if row == "raw" or protocol not in RAW_ONLY
    }
    for row, features, test_features in zip(rows, found, test_found, strict=True):
        validation = (features[choose], labels[choose]) if len(choose) else None
        given = features[fit], labels[fit], test_features[held_out], test_labels[held_out], validation
        for protocol in protocols:
            if (row, protocol) not in scores:
                continue
            try:
                score = PROTOCOLS[protocol](*given)
            except ValueError as error:
                fewest = np.unique(labels[fit], return_counts=True)[1].min()
                about = "" if quantities(labels) else f" (the rarest class has {fewest} labels)"
                raise ValueError(f"protocol {protocol}: {error}{about}") from error
            scores[row, protocol].values.append(score)
    return list(scores.values())


def print_scores(scores: Sequence[Score], title: str) -> None:
    """A table with a line for each row and a column for each protocol: the score, with its spread over seeds."""
    protocols = list(dict.fromkeys(score.protocol for score in scores))
    labels = {"raw": "raw features", "untrained": "untrained encoder", "pretrained": "pretrained encoder"}
    sizes: dict[tuple[int, int], list[str]] = {}
    for score in scores:
        if score.protocol not in (same := sizes.setdefault((score.n_test, score.n_train), [])):
            same.append(score.protocol)
    lines = [
        f"{', '.join(names)}: " * (len(sizes) > 1)
        + f"{scores[0].metric} on {n_test:,} labels, probes fitted on {n_train:,}"
        for (n_test, n_train), names in sizes.items()
    ]
    table = Table(title="\n".join([title, *lines]), min_width=60)
    table.add_column("features")
    for protocol in protocols:
        table.add_column(protocol, justify="right", overflow="fold")
    for row in dict.fromkeys(score.row for score in scores):
        cells = []
        for protocol in protocols:
            values = [v for score in scores if (score.row, score.protocol) == (row, protocol) for v in score.values]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        table.add_row(labels.get(row, row), *cells)
    Console().print(table)
