"""Tests of the evaluation at single places: which tokens and elements count, what is chosen on what, the measures."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score, roc_auc_score
from torch import nn

from mmssl.data import DataArguments, PreparedSamples, Samples
from mmssl.evaluation import dense
from mmssl.evaluation.dense import (
    DENSE_PROTOCOLS,
    Scene,
    auc,
    dense_knn,
    dense_linear,
    dense_pair,
    evenly_spaced,
    iou,
    labelled_sample,
    labels_of_tokens,
    nearest_tokens,
    objects,
    prompt,
    read_scene,
    read_scenes,
    states_of,
)
from mmssl.evaluation.evaluate import evaluate
from mmssl.modalities.base import Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel

PATCH = 2
IMAGE: dict[str, Any] = {"image_size": (8, 12), "patch_size": PATCH, "num_channels": 1}
CLOUD: dict[str, Any] = {"num_points": 40, "num_groups": 6, "group_size": 8, "num_channels": 1, "normalize": False}
TOKENS = [[0, 1, 1, 0, 2, 2], [0, 1, 1, 0, 2, 2], [0, 0, 1, 0, 0, 2], [0, 0, 0, 0, 0, 0]]
TWO = np.kron(np.array(TOKENS), np.ones((PATCH, PATCH)))

NOTHING = np.zeros(0), np.zeros((0, 0)), np.zeros(0)  # of tokens


@pytest.fixture(autouse=True)
def few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "FIT", 300)
    monkeypatch.setattr(dense, "TEST", 400)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The thresholds that are chosen."""
    found: list[float] = []
    best = dense.best_threshold

    def spy(samples: Any) -> float:
        found.append(best(samples))
        return found[-1]

    monkeypatch.setattr(dense, "best_threshold", spy)
    return found


def make(modalities: dict[str, dict[str, Any]], seed: int = 0, **config: Any) -> MMSSLModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, **config}
    model = MMSSLModel(MMSSLConfig(modalities=modalities, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model.eval()


def save(folder: Path, *seeds: int, modalities: dict[str, dict[str, Any]] | None = None) -> list[Path]:
    scenes = {"image": {"image_size": 32, "patch_size": 4, "num_channels": 1}}
    for seed in seeds:
        make(modalities or scenes, seed, num_hidden_layers=2).save_pretrained(folder / f"seed_{seed}")
    return [folder / f"seed_{seed}" for seed in seeds]


def scene_of(labels: np.ndarray, features: np.ndarray) -> Scene:
    """A picture of these labels, whose tokens have these features; its elements are all that have a label."""
    image = Image(labels.shape, PATCH, 1)
    batch = image.collate([image.prepare(np.zeros(labels.shape, dtype=np.uint8))])
    tokens = image.tokenize(batch)
    flat = labels.astype(np.int64).flatten()
    labelled = labels_of_tokens(flat, nearest_tokens(image, tokens, batch), len(features))
    (spread,) = image.spread(torch.from_numpy(features)[None].float(), tokens, batch)
    known = flat >= 0
    return Scene(*labelled, [features], flat[known], [spread.flatten(0, 1).numpy()[known]])


def majority(labels: np.ndarray) -> np.ndarray:
    """Labels of the patches, rows first; of equally frequent ones the lowest."""
    rows, columns = labels.shape
    patches = [labels[y : y + PATCH, x : x + PATCH] for y in range(0, rows, PATCH) for x in range(0, columns, PATCH)]
    return np.array([int(np.bincount(patch.astype(int).flatten() + 1).argmax()) - 1 for patch in patches])


def random_scene(seed: int, none: bool = True) -> tuple[np.ndarray, np.ndarray, Scene]:
    """Labels that no patch border cuts, some without a label; and features that know a little of them."""
    rng = np.random.default_rng(seed)
    labels = TWO.copy()
    flipped = rng.random(labels.shape) < 0.2
    labels[flipped] = rng.integers(-1 if none else 0, 3, np.count_nonzero(flipped))
    features = rng.normal(size=(24, 4)) + 1.5 * np.eye(4)[majority(labels)]
    return labels, features, scene_of(labels, features)


# What counts.


def test_tokens_are_labelled_by_most_of_their_elements() -> None:
    labels, _, scene = random_scene(0)
    np.testing.assert_array_equal(scene.token_labels, majority(labels))
    for token in range(24):
        y, x = divmod(token, 6)
        patch = labels[PATCH * y : PATCH * (y + 1), PATCH * x : PATCH * (x + 1)]
        assert scene.counts[token].tolist() == [(patch == label).sum() for label in range(3)]


def test_labels_may_be_any_numbers_and_tokens_may_have_no_elements() -> None:
    """As the numbers of instances in large masks: as many columns as labels, and no more."""
    labels, nearest = np.array([26_001_000, -1, 7, 7, -1, -1]), np.array([0, 0, 1, 1, 3, 3])
    classes, counts, token_labels = labels_of_tokens(labels, nearest, 4)
    assert classes.tolist() == [7, 26_001_000] and counts.tolist() == [[0, 1], [2, 0], [0, 0], [0, 0]]
    assert token_labels.tolist() == [-1, 7, -1, -1]
    features = np.random.default_rng(0).normal(size=(24, 4))
    small, large = scene_of(TWO, features), scene_of(np.where(TWO == 2, 26_001_000, TWO), features)
    assert prompt([small], [small], 0) == prompt([large], [large], 0)


def test_perfect_features() -> None:
    scene = scene_of(TWO, np.eye(3)[majority(TWO)])
    assert prompt([scene], [scene], 0).values == {"IoU": 1.0, "AUC": 1.0}
    assert objects([], [scene], 0).values == {"overlap": 0.0, "AUC": 1.0}


def test_constant_features() -> None:
    scene = scene_of(TWO, np.ones((24, 5)) * np.linspace(0.1, 3, 24)[:, None])  # of one direction
    assert prompt([scene], [scene], 0).values["AUC"] == 0.5
    assert objects([], [scene], 0).values == {"overlap": 1.0, "AUC": 0.5}


def slow_prompt(
    scenes: list[tuple[np.ndarray, np.ndarray]], threshold: float, area: bool = False
) -> tuple[float, float, int]:
    """Element by element: the mask of each prompt at the size of the picture, without the prompt's own patch."""
    means, count = [], 0
    for labels, features in scenes:
        of_token, of_object = majority(labels), []
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        for label in sorted(set(of_token) - {-1, 0}):
            found = []
            for token in np.flatnonzero(of_token == label):
                similarity = np.kron((unit @ unit[token]).reshape(4, 6), np.ones((PATCH, PATCH)))
                own = np.kron((np.arange(24) == token).reshape(4, 6), np.ones((PATCH, PATCH))).astype(bool)
                counted = ~own & (labels >= 0)
                truth, guess = (labels == label)[counted], (similarity >= threshold)[counted]
                ranked = roc_auc_score(truth, similarity[counted].round(12)) if area else 0.0
                found.append(((truth & guess).sum() / (truth | guess).sum(), ranked))
            count += len(found)
            of_object.append(np.mean(found, axis=0))
        means.append(np.mean(of_object, axis=0))
    return *np.mean(means, axis=0), count


def test_prompts_against_masks_of_elements(chosen: list[float]) -> None:
    """IoU at the threshold that is best on other scenes, of those that are tried."""
    fit, test = [random_scene(seed) for seed in (0, 1)], [random_scene(seed) for seed in (2, 3, 4)]
    found = prompt([each[2] for each in fit], [each[2] for each in test], 0)
    overlap, area, count = slow_prompt([each[:2] for each in test], chosen[0], area=True)
    assert found.values == pytest.approx({"IoU": overlap, "AUC": area}, abs=1e-9)
    assert found.n_test == count and found.n_train == slow_prompt([each[:2] for each in fit], 0.0)[2]
    reached = slow_prompt([each[:2] for each in fit], chosen[0])[0]
    others = [slow_prompt([each[:2] for each in fit], threshold)[0] for threshold in np.linspace(-1, 1, 41)]
    assert max(others) - 0.02 < reached  # the grids differ
    assert reached > slow_prompt([each[:2] for each in fit], 0.0)[0] + 0.02
    assert 0.2 < overlap < 0.95 and 0.6 < area < 0.98


def test_the_threshold_does_not_know_the_test_labels(chosen: list[float]) -> None:
    fit = [random_scene(seed)[2] for seed in (0, 1)]
    labels, features, scene = random_scene(2)
    shuffled = scene_of(np.random.default_rng(0).permutation(labels.flatten()).reshape(labels.shape), features)
    first, second = (prompt(fit, [each], 0).values["IoU"] for each in (scene, shuffled))
    assert chosen[0] == chosen[1] and abs(first - second) > 0.1
    prompt([shuffled], [scene], 0)
    assert chosen[2] != chosen[0]


def test_a_prompt_alone_in_its_object_is_left_out() -> None:
    """Nothing is left of the object to be found."""
    labels = np.where(TWO == 2, 0, TWO)
    labels[6:, 10:] = 2  # one patch
    scene = scene_of(labels, np.random.default_rng(0).normal(size=(24, 4)))
    assert prompt([scene], [scene], 0).n_test == (majority(labels) == 1).sum()


def test_a_token_as_similar_as_the_threshold_is_taken() -> None:
    """Of four tokens with 4 elements of the object and 4 others."""
    tokens = np.array([0.9, 0.5, 0.5, 0.2]), np.array([2, 0, 1, 1]), np.array([0, 3, 0, 1])
    found = iou(tokens, np.array([0.95, 0.9, 0.6, 0.5, 0.2, 0.1]))
    np.testing.assert_allclose(found, [0, 2 / 4, 2 / 4, 3 / 7, 4 / 8, 4 / 8])


def test_auc_of_weighted_scores_with_ties() -> None:
    rng = np.random.default_rng(0)
    score, positive, negative = rng.integers(0, 6, 30) / 7, rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    truth, weights = np.repeat([1, 0], 30), np.concatenate([positive, negative])
    expected = roc_auc_score(truth, np.tile(score, 2), sample_weight=weights)
    assert auc(score, positive, negative) == pytest.approx(expected, abs=1e-12)
    assert abs(expected - 0.5) > 0.01


def test_pairs_of_tokens_by_a_loop() -> None:
    """Of two scenes together; one with a single object does not count."""
    scenes = [random_scene(seed) for seed in (0, 1)]
    alone = scene_of(np.where(TWO == 2, 0, TWO), np.random.default_rng(5).normal(size=(24, 4)))
    within: list[float] = []
    between: list[float] = []
    for labels, features, _ in scenes:
        of_token = majority(labels)
        for i in range(24):
            for j in range(i):
                if of_token[i] > 0 and of_token[j] > 0:
                    cosine = features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j])
                    (within if of_token[i] == of_token[j] else between).append(cosine)
    every = np.array(within + between)
    edges = np.linspace(every.min(), every.max(), 51)
    overlap = 0.0
    for low, high in itertools.pairwise(edges):
        last = high == edges[-1]
        shares = [np.mean([low <= c < high or (last and c == high) for c in part]) for part in (within, between)]
        overlap += min(shares)
    area = np.mean([[(one > other) + (one == other) / 2 for other in between] for one in within])
    found = objects([], [*(each[2] for each in scenes), alone], 0)
    assert found.values == pytest.approx({"overlap": overlap, "AUC": area}, abs=0.02)
    assert found.values["AUC"] == pytest.approx(area, abs=1e-9)
    assert (found.n_train, found.n_test) == (0, len(every))
    assert 0.05 < overlap < 0.9


# Probes of elements.


def test_probes_of_elements_against_loops() -> None:
    """The nearest training element by cosine; IoU of each class of the test, of a class that is never guessed too."""
    rng = np.random.default_rng(0)
    train, held_out = rng.normal(size=(60, 3)), rng.normal(size=(80, 3))
    labels, expected = rng.integers(0, 4, 60), rng.integers(1, 6, 80)  # 5 only in the test, 0 only in training
    scenes = [
        [Scene(*NOTHING, [], y[part], [x[part]]) for part in (np.s_[:20], np.s_[20:])]
        for x, y in ((train, labels), (held_out, expected))
    ]
    lengths = np.linalg.norm(held_out, axis=1)[:, None] * np.linalg.norm(train, axis=1)
    guesses = labels[(held_out @ train.T / lengths).argmax(axis=1)]
    values = []
    for label in range(1, 6):
        union = sum(g == label or e == label for g, e in zip(guesses, expected, strict=True))
        values.append(sum(g == label == e for g, e in zip(guesses, expected, strict=True)) / union)
    found = dense_knn(scenes[0], scenes[1], 0)
    assert found.values == pytest.approx({"mIoU": np.mean(values), "accuracy": np.mean(guesses == expected)})
    assert (guesses == 0).any() and found.values["mIoU"] > 0
    assert found.values["mIoU"] != pytest.approx(jaccard_score(expected, guesses, average="macro", zero_division=0))
    assert (found.n_train, found.n_test) == (60, 80)


def test_the_linear_probe_separates_what_a_line_does() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) * [1, 1e-3]  # standardised, the second one counts as much
    labels = (x[:, 1] > 0).astype(np.int64)
    scenes = [Scene(*NOTHING, [], labels[part], [x[part]]) for part in (np.s_[:150], np.s_[150:])]
    assert dense_linear(scenes[:1], scenes[1:], 0).values["accuracy"] > 0.95


# What is read.


def picture_samples(count: int = 3, seed: int = 0) -> Samples:
    """Pictures whose grey tells the label: 40 times it plus 10; where there is none, 255."""
    rng = np.random.default_rng(seed)
    labels = [rng.integers(-1, 4, (8, 12)) for _ in range(count)]
    images = [np.where(each < 0, 255, 10 + 40 * each).astype(np.uint8) for each in labels]
    return Samples(images, "picture {}".format, dense_labels=labels)


def cloud_samples(count: int = 3) -> Samples:
    """Clouds with more points than are read at one time; the fourth channel is the label."""
    rng = np.random.default_rng(0)
    labels = [rng.integers(-1, 4, 50 + 10 * number) for number in range(count)]
    clouds = [np.column_stack([rng.normal(size=(len(each), 3)), each]) for each in labels]
    return Samples(clouds, "cloud {}".format, dense_labels=labels)


def the_model(name: str, **config: Any) -> tuple[MMSSLModel, Modality]:
    model = make({name: IMAGE if name == "image" else CLOUD}, **config)
    return model, model.adapters[name]


@pytest.mark.parametrize("name", ["image", "point_cloud"])
def test_labels_stay_with_their_elements(name: str) -> None:
    """Read from the elements' own values, through resizing and subsampling; what has no label is not read."""
    model, modality = the_model(name)
    samples = picture_samples() if name == "image" else cloud_samples()
    for scene, most in zip(read_scenes(samples, modality, [model], [1], 90, "cpu"), (31, 31, 31), strict=True):
        own = scene.elements[0]
        told = (own[:, 0] * 0.5 + 0.5) * 255 / 40 - 0.25 if name == "image" else own[:, 3]
        np.testing.assert_allclose(told, scene.labels, atol=1e-4)
        assert len(scene.labels) <= most and (scene.labels >= 0).all() and len(np.unique(scene.labels)) > 2


@pytest.mark.parametrize("name", ["image", "point_cloud"])
def test_features_are_those_of_the_layers(name: str) -> None:
    """Of every element: interpolated outputs of blocks at length 1; class and register tokens left out."""
    model, modality = the_model(name, class_token=True, num_register_tokens=2)
    samples = picture_samples() if name == "image" else cloud_samples()
    sample = labelled_sample(samples, modality, 1)
    scene = read_scene(modality, sample, [model], [1, 3], 1000, np.random.default_rng(0), "cpu")
    batch = modality.collate([modality.excerpt(modality.prepare(samples.values[1]), None)])
    tokens = modality.tokenize(batch)
    with torch.no_grad():
        out = model.encode(modality, tokens, keep_layers=[1])
    np.testing.assert_allclose(scene.tokens[0], tokens.content[0].flatten(1), atol=1e-6)
    np.testing.assert_allclose(scene.tokens[1], out.tokens[0], atol=1e-5)
    levels = torch.cat([nn.functional.normalize(each, dim=-1) for each in (out.layers[0], out.tokens)], dim=-1)
    expected = modality.spread(levels, tokens, batch)[0].flatten(0, -2)
    known = sample["labels"].flatten() >= 0
    np.testing.assert_allclose(scene.elements[1], expected[known], atol=1e-5)
    np.testing.assert_array_equal(scene.labels, sample["labels"].flatten()[known])


def test_states_are_those_of_the_tokens() -> None:
    model, modality = the_model("image", class_token=True)
    batch = PreparedSamples(picture_samples(), modality).collate(
        [PreparedSamples(picture_samples(), modality)[i] for i in range(2)]
    )["inputs"]
    with torch.no_grad():
        states, out = states_of(model, batch), model(**batch)
    assert len(states) == 4 and {state.shape for state in states} == {(2, 24, 16)}
    assert torch.equal(states[-1], out.last_hidden_state[:, 1:])


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (12, [3, 6, 9, 12])]
)
def test_layers_that_are_read(depth: int, layers: list[int]) -> None:
    assert evenly_spaced(depth) == layers


# The whole.


def test_rows_and_metrics_of_digit_scenes(tmp_path: Path) -> None:
    data = DataArguments("digit_scenes", max_samples=8)
    scores = evaluate(save(tmp_path, 0, 1), data, protocols=list(DENSE_PROTOCOLS))
    found = {(score.protocol, score.metric, score.row): score for score in scores}
    metrics = [("prompt", "IoU"), ("prompt", "AUC"), ("objects", "overlap"), ("objects", "AUC")]
    metrics += [(name, metric) for name in ("dense_knn", "dense_linear") for metric in ("mIoU", "accuracy")]
    assert set(found) == {(*each, row) for each in metrics for row in ("raw", "untrained", "pretrained")}
    assert len(found) == len(scores)
    for (_, _, row), score in found.items():
        assert len(score.values) == (1 if row == "raw" else 2)
        assert all(0 <= value <= 1 for value in score.values) and score.n_test > 0
    assert found["prompt", "AUC", "untrained"].values != found["prompt", "AUC", "pretrained"].values
    again = evaluate(save(tmp_path, 0), data, protocols=list(DENSE_PROTOCOLS), baselines=False)
    assert {score.row for score in again} == {"pretrained"}
    for score in again:
        assert score.values == found[score.protocol, score.metric, "pretrained"].values[:1]


def test_a_cloud_is_measured_alike(tmp_path: Path) -> None:
    clouds = {"point_cloud": {"num_points": 256, "num_groups": 32, "group_size": 8}}
    data = DataArguments("shape_scenes", max_samples=6)
    scores = evaluate(save(tmp_path, 0, modalities=clouds), data, protocols=list(DENSE_PROTOCOLS))
    assert len(scores) == 24


def test_what_is_tested_on() -> None:
    """The split of that name, or a fifth; nothing where the model may have learned the labels."""
    image = Image(32, 8, 1)
    train, test = dense_pair(DataArguments("digit_scenes", max_samples=5), None, image)
    assert (train.name(0), test.name(0)) == ("digit_scenes train, picture 0", "digit_scenes test, picture 0")
    own = DataArguments("digit_scenes", split="test", max_samples=10)
    train, test = dense_pair(own, None, image)
    names = {part.name(i) for part in (train, test) for i in range(len(part))}
    assert (len(train), len(test), len(names)) == (8, 2, 10)
    with pytest.raises(ValueError, match="learned from labels"):
        dense_pair(own, None, image, may_hold_out=False)
    train, test = dense_pair(own, DataArguments("digit_scenes", max_samples=3), image, may_hold_out=False)
    assert (len(train), len(test), test.name(0)) == (10, 3, "digit_scenes train, picture 0")


# Wrong input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"protocols": ["prompt", "knn"]},
            r"found knn; expected some of knn, .*; or, by themselves, of prompt, objects",
        ),
        ({"layers": [0]}, r"layers: found \[0\]; expected some of 1 to 2"),
        ({"layers": [1, 3]}, r"layers: found \[1, 3\]"),
        ({"layers": []}, r"layers: found \[\]"),
        ({"data": DataArguments("digits")}, "data: found no labels of elements in digits; name a column"),
        ({"test": DataArguments("digits")}, "test: found no labels of elements in digits"),
        ({"checkpoints": []}, "checkpoints: found none"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = DataArguments("digit_scenes", max_samples=4)
    given = {"checkpoints": save(tmp_path, 0), "data": data, "protocols": ["prompt", "dense_knn"], **options}
    with pytest.raises(ValueError, match=message):
        evaluate(**given)


def test_a_modality_without_elements(tmp_path: Path) -> None:
    folders = save(tmp_path, 0, modalities={"time_series": {}})
    with pytest.raises(ValueError, match="time_series has no elements over which features could be spread"):
        evaluate(folders, DataArguments("digit_scenes"), protocols=["prompt"])


def test_a_mask_of_another_size_names_the_sample() -> None:
    samples = picture_samples()
    samples.dense_labels = [np.zeros((8, 12)), np.zeros((12, 8)), np.zeros((8, 12))]
    modality = Image(**IMAGE)
    with pytest.raises(ValueError, match=r"picture 1: found an image of 8x12 pixels and labels of shape \(12, 8\)"):
        read_scenes(samples, modality, [], [1], 100, "cpu")


def test_labels_that_nothing_can_be_measured_with() -> None:
    features = np.random.default_rng(0).normal(size=(24, 4))
    background, one, none = (scene_of(labels, features) for labels in (TWO * 0, TWO.clip(0, 1), TWO * 0 - 1))
    good = scene_of(TWO, features)
    for scenes, name in (([good], "test"), ([background], "data")):
        with pytest.raises(ValueError, match=f"{name}: found no object"):
            prompt(scenes, [background], 0)
    with pytest.raises(ValueError, match="test: found no pair"):
        objects([], [scene_of(np.where(TWO == 2, 0, TWO), features), background], 0)
    with pytest.raises(ValueError, match="data: the labels of elements are 0; a probe needs"):
        dense_knn([background], [one], 0)
    with pytest.raises(ValueError, match="test: the labels of elements are all none"):
        dense_linear([one], [none], 0)
