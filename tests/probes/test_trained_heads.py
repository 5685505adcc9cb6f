"""Tests of heads that are trained on all tokens or all layers: what they find, what they may see, when they stop."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit
from torch import nn

from mmssl.probes import Task
from mmssl.probes.trained_heads import AttentiveHead, WeightedLayersHead, attentive, trained, weighted_layers
from tests.probes.synthetic import make, measured

KINDS = [AttentiveHead, WeightedLayersHead]
PROBES = [attentive, weighted_layers]


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less steps, where it does not matter how good a head becomes."""
    monkeypatch.setattr("mmssl.probes.trained_heads.STEPS", 60)


def needle(count: int, seed: int, tokens: int = 12, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """One token of each sample, at any place, has a mark and carries the class; those of the others are drawn."""
    rng = np.random.default_rng(seed)
    means = np.eye(width)[1:5]
    labels, place = rng.integers(4, size=count), rng.integers(tokens, size=count)
    of_token = rng.integers(4, size=(count, tokens))
    of_token[np.arange(count), place] = labels
    features = means[of_token] * 2 + 0.2 * rng.standard_normal((count, tokens, width))
    features[np.arange(count), place, 0] += 3
    return features, labels


def task_of(source: Callable, **options: int) -> Task:
    (train, labels), (test, test_labels) = source(400, 0, **options), source(300, 1, **options)
    return Task(train, labels, test, test_labels)


def layered(count: int, seed: int, layer: int = 2, layers: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Noise, but in one layer."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=count)
    features = rng.standard_normal((count, layers, 8))
    features[:, layer] += 3 * np.eye(8)[labels]
    return features, labels


def test_attention_is_that_of_one_query_with_its_projections_multiplied_out() -> None:
    """torch's cross-attention of one learned query and a linear head: the same outputs and the same attention."""
    torch.manual_seed(0)
    width, heads, outputs = 8, 4, 3
    full, last = (
        nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64),
        nn.Linear(width, outputs).double(),
    )
    query, tokens = torch.randn(1, 1, width).double(), torch.randn(5, 6, width).double()
    nn.init.normal_(full.in_proj_bias)
    nn.init.normal_(full.out_proj.bias)
    missing = torch.zeros(5, 6, dtype=torch.bool)
    missing[1, 4:], missing[3, 0] = True, True
    expected, weights = full(query.expand(5, -1, -1), tokens, tokens, missing, average_attn_weights=False)

    to_query, to_key, to_value = full.in_proj_weight.chunk(3)
    query_bias, _, value_bias = full.in_proj_bias.chunk(3)
    each = width // heads
    queries = (query[0, 0] @ to_query.T + query_bias).view(heads, 1, each) @ to_key.view(heads, each, width)
    values = [
        last.weight @ full.out_proj.weight[:, h * each : (h + 1) * each] @ to_value[h * each : (h + 1) * each]
        for h in range(heads)
    ]
    head = AttentiveHead((6, width), outputs).double()
    with torch.no_grad():
        head.queries.copy_(queries[:, 0] * (width / each) ** 0.5)
        head.head.weight.copy_(torch.cat(values, dim=1))
        head.head.bias.copy_(last(full.out_proj(value_bias)))
        tokens[missing] = torch.nan
        torch.testing.assert_close(head.attention(tokens), weights[:, :, 0])
        torch.testing.assert_close(head(tokens), last(expected[:, 0]))


def test_attentive_finds_the_one_token_that_carries_the_class() -> None:
    """Which the mean of all tokens hides."""
    task = task_of(needle)
    means = task.train.mean(axis=1), task.train_labels, task.test.mean(axis=1), task.test_labels
    assert measured("linear", *means) < 0.7 < 0.97 < attentive(task)["accuracy"].mean()
    head, _ = trained(AttentiveHead, task)
    features = torch.from_numpy((task.test - task.train.mean(axis=(0, 1))) / task.train.std(axis=(0, 1))).float()
    found = head.attention(features).mean(dim=1).argmax(dim=1)
    assert (found.numpy() == task.test[:, :, 0].argmax(axis=1)).mean() > 0.9


def test_missing_tokens_get_no_attention_and_change_nothing(shorter: None) -> None:
    task = task_of(needle)
    rng = np.random.default_rng(0)
    for features in (task.train, task.test):
        features[rng.random(features.shape[:2]) < 0.3] = np.nan
        features[:, 0] = np.nan_to_num(features[:, 0])
    _, guesses = trained(AttentiveHead, task)

    def padded(features: np.ndarray) -> np.ndarray:
        return np.pad(features, ((0, 0), (0, 7), (0, 0)), constant_values=np.nan)

    head, same = trained(
        AttentiveHead, Task(padded(task.train), task.train_labels, padded(task.test), task.test_labels)
    )
    assert (guesses == same).mean() > 0.97  # up to rounding
    tokens = torch.from_numpy(padded(task.test)).float()
    weights = head.attention(tokens)
    assert (weights[tokens.isnan().any(dim=2)[:, None].expand_as(weights)] == 0).all()
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(300, 4))
    unpadded = head(torch.from_numpy(task.test).float())
    torch.testing.assert_close(head(tokens), unpadded)
    assert weights.isfinite().all() and unpadded.isfinite().all()


def test_features_are_standardised_by_tokens_that_are_there(shorter: None) -> None:
    """So their scale and origin do not matter."""
    task = task_of(needle)
    for features in (task.train, task.test):
        features[:, -3:] = np.nan
    scale, origin = 10.0 ** np.arange(-4, 4), np.linspace(-5, 5, 8)
    moved = Task((task.train + origin) * scale, task.train_labels, (task.test + origin) * scale, task.test_labels)
    _, guesses = trained(AttentiveHead, task)
    assert (trained(AttentiveHead, moved)[1] == guesses).mean() > 0.97


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_weighted_layers_finds_the_layer_that_carries_the_class(layer: int) -> None:
    """Though its numbers are a thousandth of those of the others."""
    task = task_of(layered, layer=layer)
    for features in (task.train, task.test):
        features[:, layer] /= 1000
    head, guesses = trained(WeightedLayersHead, task)
    weights = head.weights.softmax(dim=0).detach().numpy()
    assert weights.argmax() == layer and weights[layer] > 2 * np.delete(weights, layer).max()
    assert (guesses == task.test_labels).mean() > 0.9


def test_one_layer_is_a_linear_probe() -> None:
    train, labels, test, test_labels = make(noise=1.5, train=400, test=400)
    task = Task(train[:, None], labels, test[:, None], test_labels)
    assert weighted_layers(task)["accuracy"].mean() == pytest.approx(
        measured("linear", train, labels, test, test_labels), abs=0.04
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_epoch_counts_and_of_equal_ones_the_last(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after one epoch, two, three, ... : each either is the best so far, or the best one comes back."""
    monkeypatch.setattr("mmssl.probes.trained_heads.EPOCHS", 1)
    train, labels, test, test_labels = make(noise=3.0, train=150, test=40)
    train, test = (np.stack([each, each[:, ::-1]], axis=1) for each in (train, test))
    task = Task(train, labels, test, test_labels, (test, test_labels))  # so that guesses are those that it is chosen by
    states, scores = [], []
    for steps in range(1, 40):
        monkeypatch.setattr("mmssl.probes.trained_heads.STEPS", steps)
        head, guesses = trained(kind, task)
        states.append(nn.utils.parameters_to_vector(head.parameters()).detach())
        scores.append((guesses == test_labels).mean())
    assert (np.diff(scores) >= 0).all() and scores[-1] > scores[0]
    kept = [torch.equal(one, other) for one, other in itertools.pairwise(states)]
    assert 0 < sum(kept) < len(kept)
    assert all(score == other for score, other, same in zip(scores, scores[1:], kept, strict=False) if same)
    equal = [not same for score, other, same in zip(scores, scores[1:], kept, strict=False) if score == other]
    assert any(equal)  # an epoch that is as good takes the place


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_it_depends_on_what_is_tested_or_on_global_seeds(kind, shorter: None) -> None:
    task = task_of(needle)
    rng = np.random.default_rng(0)
    found = []
    others = (
        (task.test, rng.permutation(task.test_labels)),
        (9 * task.test[::-1], task.test_labels),
        (task.test[:7], task.test_labels[:7]),
    )
    for seed, (test, test_labels) in enumerate(others):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        head, _ = trained(kind, Task(task.train, task.train_labels, test, test_labels))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(nn.utils.parameters_to_vector(head.parameters()).detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_without_validation_data_a_fifth_is_held_out(kind, shorter: None) -> None:
    train, labels = needle(120, 0)
    test, test_labels = needle(200, 1)
    ((inner, outer),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(train, labels)
    _, guesses = trained(kind, Task(train, labels, test, test_labels))
    explicit = Task(train[inner], labels[inner], test, test_labels, (train[outer], labels[outer]))
    np.testing.assert_array_equal(guesses, trained(kind, explicit)[1])


@pytest.mark.parametrize("probe", PROBES)
def test_classes_go_by_their_labels(probe, shorter: None) -> None:
    """Labels with gaps, and a validation class that no training sample has."""
    task = task_of(needle)
    names = np.array([3, 7, 12, 90])
    validation = task.test[:50], task.test_labels[:50]
    expected = probe(Task(task.train, task.train_labels, task.test, task.test_labels, validation))["accuracy"]
    strange = np.concatenate([validation[0], task.test[:5]]), np.concatenate([names[validation[1]], [55] * 5])
    found = probe(Task(task.train, names[task.train_labels], task.test, names[task.test_labels], strange))["accuracy"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("probe", PROBES)
def test_quantities_are_regressed_in_any_unit(probe) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((700, 3, 6))
    labels = (
        features[:, 1] @ np.arange(6.0) + 3 * features[:, 1, 5]
        if probe is weighted_layers
        else features.mean(axis=1) @ np.arange(6.0)
    )
    scores = [
        probe(Task(features[:500], unit * labels[:500] + 40, features[500:], unit * labels[500:] + 40))["R²"].mean()
        for unit in (1.0, 1e3)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.02) and 0.85 < scores[0] < 1


def test_what_is_not_there_is_refused() -> None:
    task = task_of(needle)
    task.test[3] = np.nan
    with pytest.raises(ValueError, match="found 1 samples without any token"):
        attentive(task)
    with pytest.raises(ValueError, match="NaN"):
        weighted_layers(task)
    task = task_of(needle)
    task.train[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        attentive(task)


def test_rows_of_pixels_of_digits() -> None:
    """Eight rows as tokens, without their place: better than their mean. All pixels as a layer: a linear probe."""
    pixels, labels = load_digits(return_X_y=True)
    rows = pixels.reshape(-1, 8, 8)
    found = attentive(Task(rows[:1000], labels[:1000], rows[1000:], labels[1000:]))["accuracy"].mean()
    mean = measured("linear", rows[:1000].mean(axis=1), labels[:1000], rows[1000:].mean(axis=1), labels[1000:])
    assert mean + 0.05 < found < 0.95
    whole = pixels[:, None]
    flat = weighted_layers(Task(whole[:1000], labels[:1000], whole[1000:], labels[1000:]))["accuracy"].mean()
    assert flat == pytest.approx(
        measured("linear", pixels[:1000], labels[:1000], pixels[1000:], labels[1000:]), abs=0.03
    )
