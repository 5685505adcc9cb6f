"""Tests of features by pooling and of labels of tokens: which tokens, which labels and which split a probe gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from mmssl.data import DataArguments, PreparedSamples, Samples
from mmssl.evaluation import PROTOCOLS, Score, evaluate
from mmssl.evaluation.features import Pooling, extract, pooled
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.probes import READS, Points, Task

pytest.importorskip("torchaudio", reason="torchaudio is not installed")

MELS, HOP = 8, 100
SPEECH: dict[str, Any] = {"sampling_rate": 4000, "num_mels": MELS, "n_fft": 128, "win_length": 128, "hop_length": HOP}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1}
LENGTHS = (2400, 700, 1500, 1100)  # samples of sound: 25, 8, 16 and 12 tokens
Given = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None]


def make(modality: str = "speech", **config: Any) -> MMSSLModel:
    torch.manual_seed(100)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "class_token": True}
    options = {"speech": SPEECH, "image": IMAGE}[modality]
    model = MMSSLModel(MMSSLConfig(modalities={modality: options}, num_register_tokens=2, **shape, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model.eval()


def clips(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(-0.5, 0.5, length).astype(np.float32) for length in lengths]


def alone(model: MMSSLModel, clip: np.ndarray) -> tuple[Tensor, Tensor]:
    """Contents and encoder output of one clip's tokens, without padding, class and register tokens: (N, F), (N, D)."""
    (modality,) = model.adapters.values()
    batch = modality.collate([modality.prepare(clip)])
    with torch.no_grad():
        tokens, out = modality.tokenize(batch), model(**batch)
    assert bool(tokens.valid.all()) and len(tokens.content[0]) == 1 + len(clip) // HOP
    return tokens.content[0], out.last_hidden_state[0, 3:]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """What the protocol "spy" was given; its score is the number of the call."""
    found: list[Given] = []

    def spy(task: Task) -> Points:
        found.append((task.train, task.train_labels, task.test, task.test_labels, task.validation))
        return {"accuracy": np.full(2, float(len(found)))}

    monkeypatch.setitem(PROTOCOLS, "spy", spy)
    return found


# ---- Pooling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "slow"),
    [
        ("mean", lambda hidden: hidden.mean(dim=0)),
        ("max", lambda hidden: hidden.amax(dim=0)),
        ("sum", lambda hidden: hidden.sum(dim=0)),
        ("mean_max", lambda hidden: torch.cat([hidden.mean(dim=0), hidden.amax(dim=0)])),
    ],
)
def test_pooling_is_over_the_valid_tokens_of_each_clip(pooling: Pooling, slow: Callable[[Tensor], Tensor]) -> None:
    """One clip at a time, where there is no padding; class and register tokens are left out; dropout is off."""
    model = make(hidden_dropout_prob=0.3)
    expected = torch.stack([slow(alone(model, clip)[1]) for clip in clips()])
    (modality,) = model.adapters.values()
    dataset = PreparedSamples(Samples(clips(), "clip {}".format), modality)
    model.train()
    (found,) = extract(dataset, [pooled(model, pooling)], "cpu")
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)
    assert found.dtype == np.float32 and not model.training


@pytest.mark.parametrize("pooling", ["mean", "max", "mean_max"])
def test_several_rows_of_a_sample_are_brought_together(pooling: Pooling, monkeypatch: pytest.MonkeyPatch) -> None:
    """A modality that reads each sample in two rows: the same tokens twice have the same mean and maximum."""
    model, tokenize = make("image"), Image.tokenize
    (modality,) = model.adapters.values()
    dataset = PreparedSamples(Samples(list(np.random.default_rng(0).random((3, 8, 8))), str), modality)
    (expected,) = extract(dataset, [pooled(model, pooling)], "cpu")
    monkeypatch.setattr(Image, "tokenize", lambda self, batch: tokenize(self, batch).repeat(2))
    (found,) = extract(dataset, [pooled(model, pooling)], "cpu")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_flatten_puts_all_tokens_of_a_sample_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """With class and register tokens; of a sample in two rows, one row after the other."""
    model, tokenize = make("image"), Image.tokenize
    (modality,) = model.adapters.values()
    images = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    dataset = PreparedSamples(Samples(list(images), str), modality)
    (found,) = extract(dataset, [pooled(model, "flatten")], "cpu")
    with torch.no_grad():
        for row, image in zip(found, images, strict=True):
            hidden = model(**modality.collate([modality.prepare(image)])).last_hidden_state
            np.testing.assert_allclose(row, hidden.flatten().numpy(), atol=1e-5)
    monkeypatch.setattr(Image, "tokenize", lambda self, batch: tokenize(self, batch).repeat(2))
    (twice,) = extract(dataset, [pooled(model, "flatten")], "cpu")
    np.testing.assert_allclose(twice, np.concatenate([found, found], axis=1), atol=1e-5)


def test_mean_rows_puts_the_means_of_channels_side_by_side() -> None:
    """Series of different lengths, one channel of one series at a time."""
    torch.manual_seed(0)
    options = {"time_series": {"patch_length": 4, "num_channels": 2}}
    model = MMSSLModel(MMSSLConfig(modalities=options, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    (modality,) = model.adapters.values()
    series = [np.random.default_rng(steps).standard_normal((2, steps)) for steps in (12, 20, 33)]
    dataset = PreparedSamples(Samples(series, str), modality)
    (found,) = extract(dataset, [pooled(model, "mean_rows")], "cpu")
    assert found.shape == (3, 32)
    for row, each in zip(found, series, strict=True):
        hidden = model(**modality.collate([modality.prepare(each)])).last_hidden_state.detach()
        np.testing.assert_allclose(row, np.concatenate([channel.mean(0) for channel in hidden.numpy()]), atol=1e-5)


def test_flatten_refuses_samples_of_different_lengths() -> None:
    model = make()
    (modality,) = model.adapters.values()
    dataset = PreparedSamples(Samples(clips(), "clip {}".format), modality)
    with pytest.raises(ValueError, match="pooling: found flatten, and samples of different lengths; use mean"):
        extract(dataset, [pooled(model, "flatten")], "cpu")


def test_evaluate_pools_as_it_is_told(tmp_path: Path, seen: list[Given]) -> None:
    make("image").save_pretrained(tmp_path)
    poolings: tuple[Pooling, ...] = ("mean", "max", "mean_max")
    for pooling in poolings:
        evaluate([tmp_path], DataArguments("digits", max_samples=60), protocols=["spy"], pooling=pooling)
    raw, encoded = [given[0] for given in seen[::3]], [given[0] for given in seen[2::3]]
    assert len({rows.tobytes() for rows in raw}) == 1  # raw features are the modality's own
    np.testing.assert_array_equal(np.hstack(encoded[:2]), encoded[2])


# ---- Labels of tokens -----------------------------------------------------------------------------------------------


def words(seed: int = 0, splits: bool = True) -> Samples:
    """Clips whose tokens are of three classes; some tokens have no label, and some labels no split."""
    rng = np.random.default_rng(seed)
    counts = [1 + length // HOP for length in LENGTHS]
    labels = [rng.integers(-1, 3, count) for count in counts]
    names = np.array(["train", "validation", "test", ""])
    return Samples(
        clips(seed=seed),
        "clip {}".format,
        classes=["noun", "verb", "word"],
        token_labels=labels,
        token_splits=[names[rng.choice(4, count, p=[0.4, 0.2, 0.3, 0.1])] for count in counts] if splits else None,
    )


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, Samples]:
    """What stands behind the names of sources."""
    found: dict[str, Samples] = {}
    monkeypatch.setattr("mmssl.evaluation.splits.load_samples", lambda arguments, modality: found[arguments.source])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path)
    return tmp_path


def rows_of(samples: Samples, folder: Path) -> list[np.ndarray]:
    """Raw, untrained and pretrained features of all tokens, one clip at a time."""
    pretrained = AutoModel.from_pretrained(folder)
    torch.manual_seed(0)
    untrained = MMSSLModel(MMSSLConfig.from_pretrained(folder)).eval()
    raw = torch.cat([alone(pretrained, clip)[0] for clip in samples.values])
    states = [torch.cat([alone(model, clip)[1] for clip in samples.values]) for model in (untrained, pretrained)]
    return [each.numpy() for each in (raw, *states)]


def test_published_splits_of_tokens(folder: Path, sources: dict[str, Samples], seen: list[Given]) -> None:
    """Each row gets the labelled tokens of each split, of clips that are padded, with their own labels."""
    samples = sources["words"] = words()
    assert samples.token_labels is not None and samples.token_splits is not None
    labels, splits = np.concatenate(samples.token_labels), np.concatenate(samples.token_splits)
    where = {name: (splits == name) & (labels >= 0) for name in ("train", "validation", "test")}
    scores = evaluate([folder], DataArguments("words"), protocols=["spy", "svm"])
    sizes = {name: int(mask.sum()) for name, mask in where.items()}
    assert min(sizes.values()) >= 5 and sum(sizes.values()) < (labels >= 0).sum() < len(labels)
    total = sum(sizes.values())
    assert scores[::2] == [
        Score("spy", row, [number], sizes["train"], sizes["test"])
        for number, row in enumerate(("raw", "untrained", "pretrained"), 1)
    ]
    assert {(score.n_train, score.n_test) for score in scores[1::2]} == {(total - total // 10, total)}
    for given, features in zip(seen, rows_of(samples, folder), strict=True):
        train, train_labels, test, test_labels, validation = given
        assert validation is not None
        found = {"train": (train, train_labels), "validation": validation, "test": (test, test_labels)}
        for name, (values, numbers) in found.items():
            np.testing.assert_allclose(values, features[where[name]], atol=2e-4)
            np.testing.assert_array_equal(numbers, labels[where[name]])


def test_tokens_without_a_published_split(folder: Path, sources: dict[str, Samples], seen: list[Given]) -> None:
    """A stratified fifth of the labelled tokens is held out, the same for each row; none is lost or in both parts."""
    samples = sources["words"] = words(splits=False)
    assert samples.token_labels is not None
    labels = np.concatenate(samples.token_labels)
    (raw, *_) = rows_of(samples, folder)
    for _ in range(2):
        torch.manual_seed(len(seen)), np.random.seed(len(seen))
        evaluate([folder], DataArguments("words"), protocols=["spy"])
    for given in seen:
        np.testing.assert_array_equal(given[1], seen[0][1])
        np.testing.assert_array_equal(given[3], seen[0][3])
        assert given[4] is None
    train, train_labels, test, test_labels, _ = seen[0]
    assert len(test) == -(-(labels >= 0).sum() // 5)
    counts, held_out = np.bincount(labels[labels >= 0]), np.bincount(test_labels)
    assert np.abs(held_out - counts / 5).max() < 1
    nearest = [int(np.abs(raw - row).max(axis=1).argmin()) for row in np.concatenate([train, test])]
    assert sorted(nearest) == np.flatnonzero(labels >= 0).tolist()
    np.testing.assert_array_equal(labels[nearest], np.concatenate([train_labels, test_labels]))
    assert samples.token_splits is None  # what was loaded stays as it is


def test_one_sample_with_many_tokens(tmp_path: Path, sources: dict[str, Samples]) -> None:
    """The dark half and the light half of one picture: raw pixels know it, and all protocols run."""
    options: dict[str, Any] = {"image_size": 32, "patch_size": 2, "num_channels": 1}
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    MMSSLModel(MMSSLConfig(modalities={"image": options}, **shape)).save_pretrained(tmp_path)
    light = np.arange(256) % 16 >= 8
    picture = np.where(np.arange(32) >= 16, 0.9, 0.1).astype(np.float32) * np.ones((32, 1), np.float32)
    sources["picture"] = Samples([picture], str, classes=["dark", "light"], token_labels=[light.astype(int)])
    elsewhere = ("few_shot", "low_label", "kernel_ridge", *READS)  # few labels; quantities; layers or tokens of samples
    names = [name for name in PROTOCOLS if name not in elsewhere]
    scores = evaluate([tmp_path], DataArguments("picture"), protocols=names)
    assert {score.protocol for score in scores} == set(names)
    assert {value for score in scores if score.row == "raw" for value in score.values} == {1.0}
    assert {(score.n_train, score.n_test) for score in scores} == {(204, 52), (0, 52), (231, 256)}
    for name in READS:
        with pytest.raises(ValueError, match=f"found labels of tokens, and a protocol that reads {READS[name]}"):
            evaluate([tmp_path], DataArguments("picture"), protocols=[name])


def test_tokens_of_another_source_go_by_the_name_of_their_class(
    folder: Path, sources: dict[str, Samples], seen: list[Given]
) -> None:
    """Without splits all labelled tokens count; other numbers of the same classes are no matter."""
    sources["fit"], sources["other"] = words(splits=False), words(1, splits=False)
    sources["other"].classes = ["word", "noun", "verb"]
    evaluate([folder], DataArguments("fit"), DataArguments("other"), protocols=["spy"])
    labels, other = (np.concatenate(sources[name].token_labels or []) for name in ("fit", "other"))
    for given, features, held_out in zip(
        seen, rows_of(sources["fit"], folder), rows_of(sources["other"], folder), strict=True
    ):
        np.testing.assert_allclose(given[0], features[labels >= 0], atol=2e-4)
        np.testing.assert_allclose(given[2], held_out[other >= 0], atol=2e-4)
        np.testing.assert_array_equal(given[1], labels[labels >= 0])
        np.testing.assert_array_equal(given[3], np.array([2, 0, 1])[other[other >= 0]])
        assert given[4] is None
    sources["fit"].token_splits = words().token_splits
    evaluate([folder], DataArguments("fit"), DataArguments("other"), protocols=["spy"])
    assert seen[3][4] is not None and len(seen[3][0]) < len(seen[0][0]) and len(seen[3][2]) == len(seen[0][2])


def cut(samples: Samples) -> None:
    assert samples.token_labels is not None
    samples.token_labels = [samples.token_labels[0], samples.token_labels[1][:-1], *samples.token_labels[2:]]
    samples.token_splits = None


def shift(samples: Samples) -> None:
    """As many labels as tokens altogether, but not of the right clips."""
    assert samples.token_labels is not None
    samples.token_labels, samples.token_splits = samples.token_labels[::-1], None


def relabel(samples: Samples, old: str, new: str) -> None:
    assert samples.token_splits is not None
    samples.token_splits = [np.where(splits == old, new, splits) for splits in samples.token_splits]


def without_verbs(samples: Samples) -> None:
    assert samples.token_splits is not None and samples.token_labels is not None
    samples.token_splits = [
        np.where((splits == "train") & (labels == 1), "", splits)
        for splits, labels in zip(samples.token_splits, samples.token_labels, strict=True)
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "clip 1: found 8 tokens and 7 token labels"),
        (shift, "clip 0: found 25 tokens and 12 token labels"),
        (lambda samples: relabel(samples, "validation", "val"), "token_splits val; expected train, validation, test"),
        (lambda samples: relabel(samples, "test", ""), "test: found no labelled token in the split test"),
        (lambda samples: relabel(samples, "train", ""), "data: found no labelled token in the split train"),
        (without_verbs, "classes verb do not occur in the training data"),
        (lambda s: setattr(s, "token_splits", s.token_splits[::-1]), "clip 0: found 25 token labels and 12 token_spl"),
        (lambda s: setattr(s, "token_labels", [0 * each - 1 for each in s.token_labels]), "data: found no labels"),
        (lambda s: setattr(s, "token_labels", [0 * each for each in s.token_labels]), "data: found one class only"),
    ],
)
def test_labels_of_tokens_that_do_not_fit(
    damage: Callable[[Samples], Any], message: str, folder: Path, sources: dict[str, Samples]
) -> None:
    damage(samples := words())
    sources["words"] = samples
    with pytest.raises(ValueError, match=message):
        evaluate([folder], DataArguments("words"), protocols=["knn"])


def test_pooling_of_labelled_tokens_and_a_mixture_of_labels_are_refused(
    folder: Path, sources: dict[str, Samples]
) -> None:
    sources["words"] = words()
    sources["clips"] = Samples(clips(), str, np.array([0, 1, 0, 1]), ["a", "b"])
    with pytest.raises(ValueError, match="pooling: found max, but the labels are of tokens"):
        evaluate([folder], DataArguments("words"), protocols=["knn"], pooling="max")
    for data, test in (("words", "clips"), ("clips", "words")):
        with pytest.raises(ValueError, match="labels of tokens; expected both or neither"):
            evaluate([folder], DataArguments(data), DataArguments(test), protocols=["knn"])
