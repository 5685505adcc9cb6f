"""What probes are fitted on, choose on and are tested on: samples, or tokens where labels are of tokens."""

from dataclasses import replace

import numpy as np
from sklearn.model_selection import train_test_split

from mmssl.data import DataArguments, PreparedSamples, Samples, load_samples
from mmssl.data.builtin import BUILTIN
from mmssl.modalities.base import Modality
from mmssl.probes import quantities

SPLITS = ("train", "validation", "test")


def labelled_pair(
    data: DataArguments, test: DataArguments | None, modality: Modality, may_hold_out: bool = True
) -> tuple[Samples, Samples]:
    """Training and test samples, labels of both numbered alike.

    Where tokens have labels and there are no other samples to test on, both are the same samples, and their
    ``token_splits`` say which token is for what: the published split, or a stratified fifth held out for the test.

    Raises:
        ValueError: no labels, all the same, classes in the test data that the training data lack, or no test data where
            none may be held out, as the model may have learned these labels.
    """
    train_samples = readable(load_samples(data, modality), data, modality)
    labels = check_labels(train_samples, "data")
    if test is not None and test.source is not None:
        test_samples = readable(load_samples(test, modality), test, modality)
    elif train_samples.token_splits is not None:
        test_samples = train_samples
    elif data.source in BUILTIN and data.split == "train":
        test_samples = load_samples(replace(data, split="test"), modality)
    elif not may_hold_out:
        raise ValueError(
            "test: found none, and a model that learned from labels, perhaps from those that would be held out; give "
            "labelled samples that it has not read"
        )
    else:
        known = np.arange(len(labels)) if quantities(labels) else np.flatnonzero(labels >= 0)
        classes = None if quantities(labels) else labels[known]
        fit, held_out = train_test_split(known, test_size=0.2, random_state=0, stratify=classes)
        if train_samples.token_labels is None:
            train_samples, test_samples = train_samples.select(fit), train_samples.select(held_out)
        else:
            splits = np.full(len(labels), "train", dtype="<U10")
            splits[held_out] = "test"
            train_samples = replace(train_samples, token_splits=apart(splits, train_samples))
            test_samples = train_samples
    return train_samples, numbered_like(train_samples, test_samples)


def numbered_like(train_samples: Samples, test_samples: Samples) -> Samples:
    """The test samples, with each class numbered as in the training samples, where it must occur."""
    labels, test_labels = check_labels(train_samples, "data"), check_labels(test_samples, "test")
    if (train_samples.token_labels is None) != (test_samples.token_labels is None):
        raise ValueError("test: either these or the training data have labels of tokens; expected both or neither")
    if quantities(labels) != quantities(test_labels):
        raise ValueError("test: either these or the training data have quantities as labels; expected both or neither")
    if quantities(labels):
        return test_samples
    fit, held_out = positions(train_samples, "train"), positions(test_samples, "test")
    for name, split, found in (("data", "train", fit), ("test", "test", held_out)):
        if not len(found):
            raise ValueError(f"{name}: found no labelled token in the split {split}; token_splits must have some")
    number = {class_name(train_samples, label): label for label in np.unique(labels[fit])}
    occurring = {class_name(test_samples, label) for label in np.unique(test_labels[held_out])}
    if missing := occurring - set(number):
        raise ValueError(f"test: classes {', '.join(sorted(missing)[:10])} do not occur in the training data")
    if test_samples is train_samples:
        return train_samples
    renumbered = np.full(len(test_labels), -1)
    renumbered[held_out] = [number[class_name(test_samples, label)] for label in test_labels[held_out]]
    if test_samples.token_labels is None:
        return replace(test_samples, labels=renumbered, classes=train_samples.classes)
    return replace(test_samples, token_labels=apart(renumbered, test_samples), classes=train_samples.classes)


def class_name(samples: Samples, label: int) -> str:
    return samples.classes[label] if len(samples.classes) else str(label)


def apart(values: np.ndarray, samples: Samples) -> list[np.ndarray]:
    """What all tokens have, sample by sample."""
    return np.split(values, np.cumsum([len(labels) for labels in samples.token_labels or ()])[:-1])


def readable(samples: Samples, arguments: DataArguments, modality: Modality) -> Samples:
    """With ``on_error="skip"``, the samples that can be read: a substitute would have another one's label."""
    if arguments.on_error == "raise":
        return samples
    dataset = PreparedSamples(samples, modality, "skip")
    return samples.select(np.array([i for i in range(len(samples)) if not dataset[i][1]], dtype=int))


def check_labels(samples: Samples, name: str) -> np.ndarray:
    """The labels of all samples, or of all tokens of one sample after the other, -1 where a token has none.

    Raises:
        ValueError: there are none, they are of one class, or splits of tokens do not fit their labels.
    """
    labels = samples.labels if samples.token_labels is None else np.concatenate(samples.token_labels)
    if labels is None or (not quantities(labels) and (labels < 0).all()):
        raise ValueError(
            f"{name}: found no labels; expected a folder with a sub-folder for each class, or a label_column"
        )
    if quantities(labels):
        if len(np.unique(labels)) < 2:
            raise ValueError(f"{name}: all labels are {labels[0]}; a probe needs at least two different ones")
        return labels
    if len(np.unique(labels[labels >= 0])) < 2:
        raise ValueError(f"{name}: found one class only; a probe needs at least two")
    if samples.token_labels is not None and samples.token_splits is not None:
        for i, (own, splits) in enumerate(zip(samples.token_labels, samples.token_splits, strict=True)):
            if len(own) != len(splits):
                raise ValueError(f"{samples.name(i)}: found {len(own)} token labels and {len(splits)} token_splits")
        if unknown := set(np.unique(np.concatenate(samples.token_splits))) - {*SPLITS, ""}:
            raise ValueError(
                f"{name}: found the token_splits {', '.join(sorted(unknown))}; expected {', '.join(SPLITS)}"
            )
    return labels


def positions(samples: Samples, split: str) -> np.ndarray:
    """Where the labelled samples or tokens of a split stand among all; without splits, all are for train and test."""
    if samples.token_labels is None:
        return np.arange(0 if split == "validation" else len(samples))
    known = np.concatenate(samples.token_labels) >= 0
    if samples.token_splits is None:
        return np.flatnonzero(known & (split != "validation"))
    return np.flatnonzero(known & (np.concatenate(samples.token_splits) == split))
