"""Score checkpoints beside raw features and untrained encoders, on the same probe."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import train_test_split
from transformers import AutoModel

from mmssl.data import DataArguments, PreparedSamples, Samples, load_samples
from mmssl.data.sources import BUILTIN
from mmssl.evaluation.features import extract, pooled
from mmssl.evaluation.protocols import PROTOCOLS
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLModel


@dataclass
class Score:
    """One row of one protocol.

    Attributes:
        protocol: name of the protocol.
        row: "raw" features, "untrained" encoder or "pretrained" encoder.
        values: one accuracy for each seed; a single one for raw features, which have none.
        n_train: labelled samples that the probe was fitted on.
        n_test: samples that it was tested on.
    """

    protocol: str
    row: str
    values: list[float]
    n_train: int
    n_test: int


def evaluate(
    checkpoints: Sequence[str | Path],
    data: DataArguments,
    test: DataArguments | None = None,
    protocols: Sequence[str] = ("knn", "linear", "few_shot"),
    modality: str | None = None,
) -> list[Score]:
    """Probe frozen features of checkpoints that differ in their seed alone.

    Args:
        checkpoints: folders or Hub names of pretrained models, one for each seed.
        data: labelled samples that the probes are fitted on.
        test: labelled samples that they are tested on. None: the split "test" of data that come with the packages, and
            of others a stratified fifth that is held out.
        protocols: names of ``PROTOCOLS``.
        modality: which modality of a model that has several.

    Raises:
        ValueError: no labels, an unknown protocol, or classes in the test data that the training data lack.
    """
    if unknown := set(protocols) - set(PROTOCOLS):
        raise ValueError(f"protocols: found {', '.join(sorted(unknown))}; expected some of {', '.join(PROTOCOLS)}")
    if not checkpoints:
        raise ValueError("checkpoints: found none; expected at least one folder or Hub name")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [load_model(checkpoint) for checkpoint in checkpoints]
    if any(model.config.modalities != models[0].config.modalities for model in models):
        raise ValueError("checkpoints: their modalities have other options; expected seeds of one recipe")
    untrained = [fresh(model, seed) for seed, model in enumerate(models)]
    for model in (*models, *untrained):
        torch.nn.Module.to(model, device)
    names = list(models[0].adapters)
    if (modality is None and len(names) > 1) or (modality is not None and modality not in names):
        raise ValueError(f"modality: found {modality}; the model has {', '.join(names)}: say which one the data are of")
    adapter = models[0].adapters[modality or names[0]]
    train_samples, test_samples = labelled_pair(data, test, adapter)
    labels, test_labels = check_labels(train_samples, "data"), check_labels(test_samples, "test")

    rows = ["raw"] + ["untrained"] * len(models) + ["pretrained"] * len(models)
    extractors = [adapter.raw_features, *(pooled(model) for model in (*untrained, *models))]
    fits = extract(PreparedSamples(train_samples, adapter), extractors, device)
    held_out = extract(PreparedSamples(test_samples, adapter), extractors, device)
    scores = {
        (row, protocol): Score(protocol, row, [], len(labels), len(test_labels))
        for row in dict.fromkeys(rows)
        for protocol in protocols
    }
    for row, features, test_features in zip(rows, fits, held_out, strict=True):
        for protocol in protocols:
            try:
                score = PROTOCOLS[protocol](features, labels, test_features, test_labels)
            except ValueError as error:
                fewest = np.unique(labels, return_counts=True)[1].min()
                raise ValueError(f"protocol {protocol}: {error} (the rarest class has {fewest} samples)") from error
            scores[row, protocol].values.append(score)
    return list(scores.values())


def load_model(checkpoint: str | Path) -> MMSSLModel:
    """A pretrained model from a folder or the Hub."""
    path = Path(checkpoint)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds no model (no config.json); expected the folder of a finished run, or a Hub name"
        )
    try:
        model = AutoModel.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(f"{checkpoint}: no such folder, and no model on the Hub ({error})") from error
    if not isinstance(model, MMSSLModel):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}; expected a model that mmssl has pretrained")
    return model


def fresh(model: MMSSLModel, seed: int) -> MMSSLModel:
    """The same architecture with start values of another seed."""
    with torch.random.fork_rng(), model.device:
        torch.manual_seed(seed)
        return MMSSLModel(copy.deepcopy(model.config))


def labelled_pair(data: DataArguments, test: DataArguments | None, modality: Modality) -> tuple[Samples, Samples]:
    """Training and test samples; checks that both have the same classes."""
    train_samples = readable(load_samples(data, modality), data, modality)
    if test is not None and test.source is not None:
        test_samples = readable(load_samples(test, modality), test, modality)
    elif data.source in BUILTIN and data.split == "train":
        test_samples = load_samples(replace(data, split="test"), modality)
    else:
        labels = check_labels(train_samples, "data")
        fit, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        train_samples, test_samples = train_samples.select(fit), train_samples.select(held_out)
    occurring = {train_samples.classes[label] for label in np.unique(check_labels(train_samples, "data"))}
    labels = check_labels(test_samples, "test")
    if missing := {test_samples.classes[label] for label in np.unique(labels)} - occurring:
        raise ValueError(f"test: classes {', '.join(sorted(missing)[:10])} do not occur in the training data")
    position = {name: number for number, name in enumerate(train_samples.classes)}
    test_samples.labels = np.array([position[test_samples.classes[label]] for label in labels])
    return train_samples, test_samples


def readable(samples: Samples, arguments: DataArguments, modality: Modality) -> Samples:
    """With ``on_error="skip"``, the samples that can be read: a substitute would have another one's label."""
    if arguments.on_error == "raise":
        return samples
    dataset = PreparedSamples(samples, modality, "skip")
    return samples.select(np.array([i for i in range(len(samples)) if not dataset[i][1]], dtype=int))


def check_labels(samples: Samples, name: str) -> np.ndarray:
    """The labels.

    Raises:
        ValueError: there are none, or they are of one class.
    """
    if samples.labels is None:
        raise ValueError(
            f"{name}: found no labels; expected a folder with a sub-folder for each class, or a label_column"
        )
    if len(np.unique(samples.labels)) < 2:
        raise ValueError(f"{name}: found one class only; a probe needs at least two")
    return samples.labels


def print_scores(scores: Sequence[Score], title: str) -> None:
    """A table with a line for each row and a column for each protocol: accuracy, with its spread over seeds."""
    protocols = list(dict.fromkeys(score.protocol for score in scores))
    labels = {"raw": "raw features", "untrained": "untrained encoder", "pretrained": "pretrained encoder"}
    table = Table(
        title=f"{title}\naccuracy on {scores[0].n_test:,} samples, probes fitted on {scores[0].n_train:,}", min_width=60
    )
    table.add_column("features")
    for protocol in protocols:
        table.add_column(protocol, justify="right")
    for row, label in labels.items():
        cells = []
        for protocol in protocols:
            (values,) = [score.values for score in scores if (score.row, score.protocol) == (row, protocol)]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        table.add_row(label, *cells)
    Console().print(table)
