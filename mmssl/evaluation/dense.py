"""What frozen features of single places are worth, where the elements of samples (pixels, points) have labels.

* "prompt": segmentation by one prompting token, without training, and "objects": similarity within objects beside that
  between them (Wu et al., "Masked momentum contrastive learning for zero-shot semantic understanding", 2023).
* "dense_knn", "dense_linear": nearest neighbour and linear layer on features of several layers at each element
  (Hermosilla et al., "Masked Scene Modeling", CVPR 2025, who put the levels of a decoder side by side).

A token is of the class that most of its elements have, the elements whose share of it is the greatest of all tokens.
An object is what has one label in one sample; label 0 is the background and no object. Class and register tokens have
no place, and no part in it.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler, normalize
from torch import Tensor, nn

from mmssl.data import DataArguments, Samples, load_samples
from mmssl.data.builtin import BUILTIN
from mmssl.evaluation.models import AnyModel
from mmssl.evaluation.scores import Score
from mmssl.evaluation.splits import readable
from mmssl.modalities.base import Batch, Modality
from mmssl.tokens import Tokens

BACKGROUND = 0
LEVELS = 4  # layers whose features are read at each element, where none are named
FIT, TEST = 10_000, 30_000  # elements that probes are fitted and tested on, as many of each sample, but at least one
CANDIDATES = 100  # thresholds to choose from
BINS = 50

Prompt = tuple[np.ndarray, np.ndarray, np.ndarray]  # of the other tokens: similarity, elements inside, and outside


@dataclass
class Scene:
    """What the protocols read of one sample; features are lists with an array for each row of the table.

    Attributes:
        classes: (C,) the labels that elements have, in order.
        counts: (N, C) how many elements of each label lie at each token; those without a label are left out.
        token_labels: (N,) what most elements of a token are, -1 where most have no label.
        tokens: (N, F) features of the tokens.
        labels: (K,) labels of the elements that probes read, a random part of those that have one.
        elements: (K, F) features at these elements.
    """

    classes: np.ndarray
    counts: np.ndarray
    token_labels: np.ndarray
    tokens: list[np.ndarray]
    labels: np.ndarray
    elements: list[np.ndarray]

    def cosines(self, row: int) -> np.ndarray:
        """(N, N) of the tokens' features, rounded so that equal features are equally similar."""
        unit = normalize(self.tokens[row].astype(np.float64))
        return (unit @ unit.T).round(12)


@dataclass
class Measured:
    """What a protocol found: values by the names of their metrics, and how many it was fitted and tested on."""

    values: dict[str, float]
    n_train: int
    n_test: int


def measure_dense(
    rows: dict[str, list[AnyModel | None]],
    adapter: Modality,
    samples: tuple[Samples, Samples],
    protocols: Sequence[str],
    layers: Sequence[int] | None = None,
) -> list[Score]:
    """Every protocol on the features of every row.

    Args:
        rows: the models of each row, one for each seed; None for raw features: the contents of tokens, and for the
            probes of elements their own values, with the contents of tokens around them.
        adapter: the modality that reads the samples.
        samples: those that probes are fitted and thresholds chosen on, and those that they are tested on.
        protocols: names of ``DENSE_PROTOCOLS``.
        layers: blocks of the encoder, from 1, whose features the probes of elements read side by side. None: four,
            evenly spaced up to the last one.

    Returns:
        A score for each protocol, metric and row.

    Raises:
        ValueError: not as many labels as elements, or of one class; no objects; an unknown layer.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [model for members in rows.values() for model in members if model is not None]
    depth = models[0].config.num_hidden_layers
    layers = evenly_spaced(depth) if layers is None else layers
    if not layers or not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers: found {list(layers)}; expected some of 1 to {depth}")
    for each in models:
        nn.Module.to(each.eval(), device)
    probed = any(protocol in ELEMENTWISE for protocol in protocols)
    fit, held_out = (
        read_scenes(part, adapter, models, layers if probed else (), most, device)
        for part, most in zip(samples, (FIT, TEST), strict=True)
    )
    numbers = iter(range(1, len(models) + 1))
    seeds = {row: [0 if model is None else next(numbers) for model in members] for row, members in rows.items()}
    scores: dict[tuple[str, str, str], Score] = {}
    for row, members in seeds.items():
        for protocol in protocols:
            for number in members:
                found = DENSE_PROTOCOLS[protocol](fit, held_out, number)
                for metric, value in found.values.items():
                    new = Score(protocol, row, [], found.n_train, found.n_test, metric)
                    scores.setdefault((row, protocol, metric), new).values.append(value)
    return list(scores.values())


def evenly_spaced(depth: int) -> list[int]:
    """Up to four of the layers 1 to ``depth``, the last one among them."""
    return sorted({math.ceil(depth * level / LEVELS) for level in range(1, LEVELS + 1)})


def dense_pair(
    data: DataArguments, test: DataArguments | None, modality: Modality, may_hold_out: bool = True
) -> tuple[Samples, Samples]:
    """Samples to fit and to test on, whose elements have labels.

    Without test data: the split "test" of data that come with the packages, and of others a fifth that is held out.

    Raises:
        ValueError: no labels of elements, a modality without elements, or no test data where none may be held out.
    """
    if not modality.offers("spread"):
        raise ValueError(f"{modality.name} has no elements over which features could be spread; use other protocols")
    train_samples = with_dense_labels(data, modality, "data")
    if test is not None and test.source is not None:
        return train_samples, with_dense_labels(test, modality, "test")
    if data.source in BUILTIN and data.split == "train":
        return train_samples, with_dense_labels(replace(data, split="test"), modality, "test")
    if not may_hold_out:
        raise ValueError(
            "test: found none, and a model that learned from labels, perhaps from those that would be held out; give "
            "labelled samples that it has not read"
        )
    if len(train_samples) < 2:
        raise ValueError("data: found one sample, none of which could be held out; give a test source")
    fit, held_out = train_test_split(np.arange(len(train_samples)), test_size=0.2, random_state=0)
    return train_samples.select(fit), train_samples.select(held_out)


def with_dense_labels(arguments: DataArguments, modality: Modality, name: str) -> Samples:
    samples = readable(load_samples(arguments, modality), arguments, modality)
    if samples.dense_labels is None:
        raise ValueError(
            f"{name}: found no labels of elements in {arguments.source}; name a column of masks, arrays or images, in "
            f"{name}.label_column"
        )
    return samples


@torch.inference_mode()
def read_scenes(
    samples: Samples,
    modality: Modality,
    models: Sequence[AnyModel],
    layers: Sequence[int],
    most: int,
    device: torch.device | str,
) -> list[Scene]:
    """Raw features and those of each model, of tokens and of ``most`` elements in all; without layers of none.

    One sample at a time: features of all elements of many samples would not fit into memory.
    """
    rng = np.random.default_rng(0)
    return [
        read_scene(
            modality, labelled_sample(samples, modality, i), models, layers, max(1, most // len(samples)), rng, device
        )
        for i in range(len(samples))
    ]


def labelled_sample(samples: Samples, modality: Modality, number: int) -> dict[str, Tensor]:
    """Prepared, with the labels of the elements that are read of it."""
    assert samples.dense_labels is not None
    try:
        sample = modality.labelled(samples.values[number], samples.dense_labels[number])
        return modality.excerpt(sample, None)
    except (ValueError, OSError) as error:
        raise ValueError(f"{samples.name(number)}: {error}") from error


def read_scene(
    modality: Modality,
    sample: dict[str, Tensor],
    models: Sequence[AnyModel],
    layers: Sequence[int],
    most: int,
    rng: np.random.Generator,
    device: torch.device | str,
) -> Scene:
    """What the protocols need of one sample, ``most`` of its elements at most."""
    batch = {name: value.to(device) for name, value in modality.collate([sample]).items()}
    tokens = modality.tokenize(batch)
    states = [states_of(model, batch) for model in models]
    labels = sample["labels"].flatten().numpy()
    classes, counts, token_labels = labels_of_tokens(
        labels, nearest_tokens(modality, tokens, batch), tokens.valid.shape[1]
    )
    valid = tokens.valid[0]
    contents = [tokens.content.flatten(2), *(each[-1] for each in states)]
    known = np.flatnonzero(labels >= 0)
    chosen = np.sort(rng.permutation(known)[:most])
    dense = []
    if layers:
        # Each layer at length 1: the last ones are the longest, and alone would decide which element is the nearest.
        levels = [
            torch.cat([nn.functional.normalize(each[layer].float(), dim=-1) for layer in layers], dim=-1)
            for each in states
        ]
        own, around = modality.elements(batch)[0], modality.spread(contents[0].float(), tokens, batch)[0]
        dense = [torch.cat([own, around], dim=-1), *(modality.spread(each, tokens, batch)[0] for each in levels)]
    return Scene(
        classes=classes,
        counts=counts[valid.numpy(force=True)],
        token_labels=token_labels[valid.numpy(force=True)],
        tokens=[features[0, valid].float().numpy(force=True) for features in contents],
        labels=labels[chosen],
        elements=[each.flatten(0, -2)[chosen].float().numpy(force=True) for each in dense],
    )


def states_of(model: AnyModel, batch: Batch) -> list[Tensor]:
    """(B, N, D) what goes into the first block and what comes out of each, without class and register tokens."""
    out = model(**batch, output_hidden_states=True)
    prefix = model.encoder.num_prefix_tokens
    return [state[:, prefix:] for state in (*out.hidden_states[:-1], out.last_hidden_state)]


def nearest_tokens(modality: Modality, tokens: Tokens, batch: Batch) -> np.ndarray:
    """Of one sample, (E,) the token that has the greatest share in each element."""
    each_alone = torch.eye(tokens.valid.shape[1], device=tokens.valid.device)
    (shares,) = modality.spread(each_alone[None], tokens, batch)
    return shares.flatten(0, -2).argmax(dim=-1).numpy(force=True)


def labels_of_tokens(labels: np.ndarray, nearest: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``classes``, ``counts`` and ``token_labels`` of so many tokens, of labels and nearest tokens (E,)."""
    classes, number = np.unique(labels, return_inverse=True)
    counts = np.zeros((length, len(classes)), dtype=np.int64)
    np.add.at(counts, (nearest, number), 1)
    token_labels = np.where(counts.any(axis=1), classes[counts.argmax(axis=1)], -1)
    known = classes >= 0
    return classes[known], counts[:, known], token_labels


def prompt(fit: Sequence[Scene], test: Sequence[Scene], row: int) -> Measured:
    """Segmentation by one prompting token, without training: what is similar to it by cosine is taken for its object.

    IoU of elements, at the one threshold that is best on the samples to fit on; and AUC of the similarity, which needs
    none. Means over the prompts of an object, then over objects, then over samples. The prompt and its elements do not
    count; prompts beside which their object, or everything else, has no elements are left out.
    """
    given, held_out = prompts_of(fit, row, "data"), prompts_of(test, row, "test")
    threshold = best_threshold(given)
    overlap = mean_of_means(held_out, lambda prompt: iou(prompt, np.array([threshold])))
    area = mean_of_means(held_out, lambda prompt: np.array([auc(*prompt)]))
    return Measured({"IoU": float(overlap[0]), "AUC": float(area[0])}, *map(number_of_prompts, (given, held_out)))


def prompts_of(scenes: Sequence[Scene], row: int, name: str) -> list[list[list[Prompt]]]:
    """The prompts of each object of each sample that has any.

    Raises:
        ValueError: no sample has one.
    """
    found: list[list[list[Prompt]]] = []
    for scene in scenes:
        cosines, objects = scene.cosines(row), list[list[Prompt]]()
        for label in np.unique(scene.token_labels[scene.token_labels > BACKGROUND]):
            inside = scene.counts[:, np.searchsorted(scene.classes, label)]
            outside = scene.counts.sum(axis=1) - inside
            prompts: list[Prompt] = []
            for token in np.flatnonzero(scene.token_labels == label):
                others = np.arange(len(cosines)) != token
                if inside[others].any() and outside[others].any():
                    prompts.append((cosines[token, others], inside[others], outside[others]))
            if prompts:
                objects.append(prompts)
        if objects:
            found.append(objects)
    if not found:
        raise ValueError(
            f"{name}: found no object; expected tokens most of whose elements have the same label above 0, which is "
            "the background, and other labels beside them (of 8 bits, 255 is none)"
        )
    return found


def number_of_prompts(samples: list[list[list[Prompt]]]) -> int:
    return sum(len(prompts) for objects in samples for prompts in objects)


def mean_of_means(samples: list[list[list[Prompt]]], measure: Callable[[Prompt], np.ndarray]) -> np.ndarray:
    """The mean over prompts, then over objects, then over samples."""
    return np.mean(
        [
            np.mean([np.mean([measure(prompt) for prompt in prompts], axis=0) for prompts in objects], axis=0)
            for objects in samples
        ],
        axis=0,
    )


def best_threshold(samples: list[list[list[Prompt]]]) -> float:
    """Of the quantiles of all similarities, which suit any scale, the one with the greatest IoU."""
    similarities = np.concatenate([prompt[0] for objects in samples for prompts in objects for prompt in prompts])
    thresholds = np.unique(np.quantile(similarities, np.linspace(0, 1, CANDIDATES)))
    return float(thresholds[mean_of_means(samples, lambda prompt: iou(prompt, thresholds)).argmax()])


def iou(prompt: Prompt, thresholds: np.ndarray) -> np.ndarray:
    """(T,) intersection over union of a prompt's object and the elements of tokens as similar as each threshold."""
    similarity, inside, outside = prompt
    order = np.argsort(-similarity)
    taken = np.searchsorted(-similarity[order], -thresholds, side="right")  # how many reach the threshold
    right, wrong = (np.append(0, np.cumsum(counts[order]))[taken] for counts in (inside, outside))
    return right / (inside.sum() + wrong)


def auc(score: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve of scores (n,) that so many positives and negatives (n,) have.

    How often, of one of each, the positive one scores higher; equally high counts half.
    """
    levels = np.unique(score, return_inverse=True)[1]
    positives, negatives = (np.bincount(levels, weights=counts) for counts in (positive, negative))
    lower = np.cumsum(negatives) - negatives / 2
    return float((positives * lower).sum() / (positives.sum() * negatives.sum()))


def objects(fit: Sequence[Scene], test: Sequence[Scene], row: int) -> Measured:
    """Cosines of two tokens of one object beside those of two objects of the same sample; nothing is fitted.

    "overlap" of their two histograms, the sum of the lower shares of each of 50 bins from the least to the greatest
    cosine: 0 is best, 1 worst; and AUC, how often a pair of one object is the more similar one. All pairs of samples
    with two objects or more count alike.
    """
    within, between = [], []
    for scene in test:
        thing = np.flatnonzero(scene.token_labels > BACKGROUND)
        label = scene.token_labels[thing]
        first, second = np.triu_indices(len(thing), k=1)
        if (same := label[first] == label[second]).all():
            continue
        cosine = scene.cosines(row)[thing[first], thing[second]]
        within.append(cosine[same])
        between.append(cosine[~same])
    if not sum(map(len, within)):
        raise ValueError(
            "test: found no pair of tokens of one object beside one of two objects; expected samples with several "
            "labels above 0, which is the background"
        )
    one, two = np.concatenate(within), np.concatenate(between)
    both = np.concatenate([one, two])
    shares = [np.histogram(cosines, BINS, (both.min(), both.max()))[0] / len(cosines) for cosines in (one, two)]
    area = auc(both, np.repeat([1, 0], [len(one), len(two)]), np.repeat([0, 1], [len(one), len(two)]))
    return Measured({"overlap": float(np.minimum(*shares).sum()), "AUC": area}, 0, len(both))


def dense_knn(fit: Sequence[Scene], test: Sequence[Scene], row: int) -> Measured:
    """Each element gets the label of the training element of greatest cosine: the nearest one at length 1."""
    return probe_elements(make_pipeline(Normalizer(), KNeighborsClassifier(1, algorithm="brute")), fit, test, row)


def dense_linear(fit: Sequence[Scene], test: Sequence[Scene], row: int) -> Measured:
    """Logistic regression on standardised features of elements, C = 1, at most 300 iterations."""
    return probe_elements(make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)), fit, test, row)


def probe_elements(probe: BaseEstimator, fit: Sequence[Scene], test: Sequence[Scene], row: int) -> Measured:
    """Mean over the classes that occur in the test of their IoU over all its elements, and accuracy over these."""
    features, held_out = (np.concatenate([scene.elements[row] for scene in scenes]) for scenes in (fit, test))
    labels, expected = (np.concatenate([scene.labels for scene in scenes]) for scenes in (fit, test))
    for name, found in (("data", labels), ("test", expected)):
        if len(classes := np.unique(found)) < 2:
            raise ValueError(
                f"{name}: the labels of elements are {', '.join(map(str, classes)) or 'all none'}; a probe needs at "
                "least two different ones (of 8 bits, 255 is none)"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        guesses = probe.fit(features, labels).predict(held_out)
    mean = jaccard_score(expected, guesses, labels=np.unique(expected), average="macro")
    return Measured({"mIoU": float(mean), "accuracy": accuracy_score(expected, guesses)}, len(labels), len(expected))


DENSE_PROTOCOLS: dict[str, Callable[[Sequence[Scene], Sequence[Scene], int], Measured]] = {
    "prompt": prompt,
    "objects": objects,
    "dense_knn": dense_knn,
    "dense_linear": dense_linear,
}
ELEMENTWISE = ("dense_knn", "dense_linear")  # these read elements, the others tokens
