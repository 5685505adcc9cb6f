"""Tests of the three rows beside each other: which samples, which labels and which features a probe gets to see."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel

from mmssl.cli import evaluate_command
from mmssl.data import DataArguments, PreparedSamples, Samples
from mmssl.evaluation import PROTOCOLS, Score, evaluate, print_scores
from mmssl.evaluation.features import extract, pooled
from mmssl.evaluation.models import fresh, load_model
from mmssl.evaluation.splits import labelled_pair
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.probes import Points, Task

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "image_mean": 0.0, "image_std": 1.0}
DIGITS = DataArguments("digits", max_samples=60)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Adds the protocol "spy", which notes what it gets; its score is the number of the call."""
    found: list[Task] = []

    def spy(task: Task) -> Points:
        found.append(task)
        return {"accuracy": np.full(2, float(len(found)))}

    monkeypatch.setitem(PROTOCOLS, "spy", spy)
    return found


def make(seed: int, modalities: dict[str, dict[str, Any]] | None = None, **config: Any) -> MMSSLModel:
    """A small model, all of whose parameters are away from their start values."""
    torch.manual_seed(100 + seed)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **config}
    model = MMSSLModel(MMSSLConfig(modalities=modalities or {"image": IMAGE}, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


def save(folder: Path, *seeds: int, **config: Any) -> list[Path]:
    for seed in seeds:
        make(seed, **config).save_pretrained(folder / f"seed_{seed}")
    return [folder / f"seed_{seed}" for seed in seeds]


def pictures(folder: Path, counts: dict[str, int], first: int = 0) -> dict[int, str]:
    """Grey images in one sub-folder a class (directly in the folder for ""), each of a shade of its own.

    Returns:
        The class of each shade.
    """
    classes: dict[int, str] = {}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            shade = first + len(classes)
            PILImage.new("L", (8, 8), shade).save(folder / name / f"{shade:03}.png")
            classes[shade] = name
    return classes


def shades(raw: np.ndarray) -> list[int]:
    """Which images these raw features are of."""
    assert (raw == raw[:, :1]).all()
    return np.round(raw[:, 0] * 255).astype(int).tolist()


def mean_of_tokens(model: MMSSLModel, raw: np.ndarray) -> np.ndarray:
    """Features written out: dropout off, prefix tokens left out, one image at a time."""
    model.eval()
    with torch.no_grad():
        images = torch.from_numpy(raw).reshape(-1, 1, 1, 8, 8)
        hidden = [model(pixel_values=image).last_hidden_state for image in images]
    prefix = int(model.config.class_token)
    return torch.stack([each[0, prefix:].mean(dim=0) for each in hidden]).numpy()


def test_the_rows_of_digits(tmp_path: Path, calls: list[Task]) -> None:
    """Pixels, untrained and pretrained encoders, on the first digits of the two splits; dropout is off."""
    folders = save(tmp_path, 0, 1, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, class_token=True)
    scores = evaluate(folders, DIGITS, protocols=["spy"])
    assert scores == [
        Score("spy", "raw", [1.0], 60, 60),
        Score("spy", "untrained", [2.0, 3.0], 60, 60),
        Score("spy", "pretrained", [4.0, 5.0], 60, 60),
    ]

    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    train, test = order[:1437][:60], order[1437:][:60]
    raw_train, raw_test = ((digits.data[index] / 16).astype(np.float32) for index in (train, test))
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(MMSSLModel(MMSSLConfig.from_pretrained(folders[0])))
    models += [AutoModel.from_pretrained(folder) for folder in folders]
    expected = [(raw_train, raw_test)]
    expected += [(mean_of_tokens(model, raw_train), mean_of_tokens(model, raw_test)) for model in models]
    for call, (fit, held_out) in zip(calls, expected, strict=True):
        np.testing.assert_allclose(call.train, fit, atol=2e-5)
        np.testing.assert_allclose(call.test, held_out, atol=2e-5)
        np.testing.assert_array_equal(call.train_labels, digits.target[train])
        np.testing.assert_array_equal(call.test_labels, digits.target[test])
    for one, other in ((1, 2), (1, 3), (2, 4), (3, 4)):
        assert np.abs(calls[one].train - calls[other].train).max() > 0.1


def test_values_are_those_of_the_protocols(tmp_path: Path, calls: list[Task]) -> None:
    """One value for each checkpoint and protocol, and a single one of raw features."""
    data = DataArguments("digits", max_samples=120)
    scores = evaluate(save(tmp_path, 0, 1), data, protocols=["spy", "knn", "linear"])
    found = {(score.row, score.protocol): score.values for score in scores}
    assert len(found) == len(scores) == 9
    for row, given in {"raw": calls[:1], "untrained": calls[1:3], "pretrained": calls[3:]}.items():
        for name in ("knn", "linear"):
            expected = [PROTOCOLS[name](call)["accuracy"].mean() for call in given]
            assert found[row, name] == expected
    assert all(len(found["raw", name]) == 1 < len(found["untrained", name]) == 2 for name in ("knn", "linear"))


def test_the_protocols_that_are_the_default(tmp_path: Path) -> None:
    """few_shot where each class has ten labels; of the first 160 digits some class has fewer."""
    folders = save(tmp_path, 0)
    for count, names in ((300, ["knn", "linear", "few_shot"]), (160, ["knn", "linear"])):
        data = DataArguments("digits", max_samples=count)
        labels = load_digits().target[np.random.RandomState(0).permutation(1797)[:count]]
        assert (np.bincount(labels).min() >= 10) == ("few_shot" in names)
        assert [score.protocol for score in evaluate(folders, data)] == names * 3
    with pytest.raises(ValueError, match=r"protocol few_shot: found [0-9] labels of a class; expected at least 10"):
        evaluate(folders, data, protocols=["few_shot"])


def test_two_evaluations_give_the_same_features(tmp_path: Path, calls: list[Task]) -> None:
    """Dropout, stochastic depth and the global random state have no influence."""
    folders = save(tmp_path, 0, hidden_dropout_prob=0.5, drop_path_rate=0.5, num_hidden_layers=2)
    for seed in range(2):
        torch.manual_seed(seed)
        evaluate(folders, DIGITS, protocols=["spy"])
    for first, second in zip(calls[:3], calls[3:], strict=True):
        np.testing.assert_array_equal(first.train, second.train)
        np.testing.assert_array_equal(first.test, second.test)


def test_untrained_encoders_have_the_start_values_of_their_seed() -> None:
    """Those of a model made under that seed; the global random state has no part in it and stays as it is."""
    model = make(0, class_token=True)
    states: list[dict[str, Tensor]] = []
    for seed in (0, 1, 1):
        torch.manual_seed(7 + len(states))
        before = torch.get_rng_state()
        untrained = fresh(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(seed)
        expected = MMSSLModel(MMSSLConfig.from_dict(model.config.to_dict())).state_dict()
        states.append(untrained.state_dict())
        assert states[-1].keys() == expected.keys() == model.state_dict().keys()
        assert all(torch.equal(states[-1][key], expected[key]) for key in expected)
        assert untrained.config is not model.config
    weight = "encoder.layers.0.attention.qkv.weight"
    assert torch.equal(states[1][weight], states[2][weight])
    assert not torch.equal(states[0][weight], states[1][weight])
    assert not torch.equal(states[0][weight], model.state_dict()[weight])


def test_a_folder_is_split_by_class_and_the_same_for_every_row(tmp_path: Path, calls: list[Task]) -> None:
    """A fifth of each class is held out; no image is in both parts, and none is lost."""
    classes = pictures(tmp_path / "data", {"apple": 25, "bread": 10, "cheese": 5})
    folders = save(tmp_path, 0)
    scores = evaluate(folders, DataArguments(str(tmp_path / "data")), protocols=["spy"])
    assert {(score.n_train, score.n_test) for score in scores} == {(32, 8)}
    raw, untrained, pretrained = calls
    fit, held_out = shades(raw.train), shades(raw.test)
    assert sorted(fit + held_out) == list(classes)
    assert np.bincount(raw.train_labels).tolist() == [20, 8, 4]
    assert np.bincount(raw.test_labels).tolist() == [5, 2, 1]
    names = sorted(set(classes.values()))
    assert [names[label] for label in raw.train_labels] == [classes[shade] for shade in fit]
    assert [names[label] for label in raw.test_labels] == [classes[shade] for shade in held_out]
    torch.manual_seed(0)
    start = MMSSLModel(MMSSLConfig.from_pretrained(folders[0]))
    for call, model in ((untrained, start), (pretrained, AutoModel.from_pretrained(folders[0]))):
        np.testing.assert_allclose(call.train, mean_of_tokens(model, raw.train), atol=2e-5)
        np.testing.assert_allclose(call.test, mean_of_tokens(model, raw.test), atol=2e-5)
        np.testing.assert_array_equal(call.train_labels, raw.train_labels)
        np.testing.assert_array_equal(call.test_labels, raw.test_labels)


def test_the_test_split_of_digits_is_itself_split(tmp_path: Path, calls: list[Task]) -> None:
    """Data that are the test split have no other one: nothing of the training split comes in."""
    scores = evaluate(save(tmp_path, 0), DataArguments("digits", split="test"), protocols=["spy"])
    assert {(score.n_train, score.n_test) for score in scores} == {(288, 72)}
    digits = load_digits()
    own = digits.data[np.random.RandomState(0).permutation(1797)[1437:]] / 16
    found = np.concatenate([calls[0].train, calls[0].test])
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, own.tolist()))


def test_an_explicit_test_source_is_used_as_it_is(tmp_path: Path, calls: list[Task]) -> None:
    classes = pictures(tmp_path / "data", {"apple": 6, "bread": 4})
    others = pictures(tmp_path / "other", {"apple": 2, "bread": 3}, first=100)
    data, test = DataArguments(str(tmp_path / "data")), DataArguments(str(tmp_path / "other"))
    scores = evaluate(save(tmp_path, 0), data, test, protocols=["spy"])
    assert {(score.n_train, score.n_test) for score in scores} == {(10, 5)}
    assert shades(calls[0].train) == list(classes)
    assert shades(calls[0].test) == list(others)
    assert calls[0].test_labels.tolist() == [0, 0, 1, 1, 1]


def test_an_explicit_test_source_goes_before_the_test_split(tmp_path: Path, calls: list[Task]) -> None:
    test = DataArguments("digits", split="train", max_samples=25)
    assert evaluate(save(tmp_path, 0), DIGITS, test, protocols=["spy"])[0].n_test == 25
    np.testing.assert_array_equal(calls[0].test, calls[0].train[:25])


def test_test_arguments_without_a_source_are_none(tmp_path: Path, calls: list[Task]) -> None:
    """What the command passes where no --test flag was given."""
    for test in (None, DataArguments()):
        evaluate(save(tmp_path, 0), DIGITS, test, protocols=["spy"])
    np.testing.assert_array_equal(calls[0].test, calls[3].test)


def test_classes_of_the_test_folder_go_by_name(tmp_path: Path, calls: list[Task]) -> None:
    """A test folder without "apple", whose own numbers would begin at "bread"."""
    pictures(tmp_path / "data", {"apple": 3, "bread": 3, "cheese": 3})
    pictures(tmp_path / "other", {"bread": 2, "cheese": 1})
    data, test = DataArguments(str(tmp_path / "data")), DataArguments(str(tmp_path / "other"))
    evaluate(save(tmp_path, 0), data, test, protocols=["spy"])
    for call in calls:
        assert call.test_labels.tolist() == [1, 1, 2]
        assert call.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def found(names: Sequence[str], classes: Sequence[str]) -> Samples:
    """Samples of these classes, which are numbered in the order of ``classes``."""
    labels = np.array([list(classes).index(name) for name in names])
    return Samples(list(names), "sample {}".format, labels, list(classes))


def test_classes_that_are_numbered_differently_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "train": found(["cat", "dog", "emu"], ["cat", "dog", "emu"]),
        "test": found(["dog", "emu", "cat", "emu"], ["emu", "cat", "dog"]),
    }
    module = importlib.import_module("mmssl.evaluation.splits")
    monkeypatch.setattr(module, "load_samples", lambda arguments, modality: sources[arguments.source])
    train, test = labelled_pair(DataArguments("train"), DataArguments("test"), Image(**IMAGE))
    assert train.labels is not None and test.labels is not None
    assert [train.classes[label] for label in train.labels] == train.values
    assert [train.classes[label] for label in test.labels] == test.values


def test_classes_that_the_training_data_lack_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "data", {"apple": 3, "bread": 3})
    pictures(tmp_path / "other", {"apple": 3, "zebra": 3})
    data, test = DataArguments(str(tmp_path / "data")), DataArguments(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="zebra"):
        evaluate(save(tmp_path, 0), data, test)


def test_classes_that_max_samples_has_cut_off_the_training_data_are_refused(tmp_path: Path) -> None:
    """Training samples of "cheese" exist, but no probe was fitted on one."""
    pictures(tmp_path / "data", {"apple": 3, "bread": 3, "cheese": 3})
    data = DataArguments(str(tmp_path / "data"), max_samples=6)
    with pytest.raises(ValueError, match="cheese"):
        evaluate(save(tmp_path, 0), data, DataArguments(str(tmp_path / "data")), protocols=["knn"])


def test_classes_that_max_samples_has_cut_off_the_test_data_do_not_matter(tmp_path: Path, calls: list[Task]) -> None:
    pictures(tmp_path / "data", {"apple": 3, "bread": 3})
    pictures(tmp_path / "other", {"apple": 3, "bread": 3, "zebra": 3})
    test = DataArguments(str(tmp_path / "other"), max_samples=6)
    assert evaluate(save(tmp_path, 0), DataArguments(str(tmp_path / "data")), test, protocols=["spy"])[0].n_test == 6


@pytest.mark.parametrize(
    "counts, other, message",
    [
        ({"": 6}, None, "^data: .*no labels"),
        ({"apple": 6}, None, "^data: .*one class"),
        ({"": 6}, {"apple": 3, "bread": 3}, "^data: .*no labels"),
        ({"apple": 6}, {"apple": 3, "bread": 3}, "^data: .*one class"),
        ({"apple": 3, "bread": 3}, {"": 6}, "^test: .*no labels"),
        ({"apple": 3, "bread": 3}, {"bread": 6}, "^test: .*one class"),
    ],
)
def test_data_without_labels_or_with_one_class_are_refused(
    tmp_path: Path, counts: dict[str, int], other: dict[str, int] | None, message: str
) -> None:
    pictures(tmp_path / "data", counts)
    pictures(tmp_path / "other", other or {})
    test = DataArguments(str(tmp_path / "other")) if other else None
    with pytest.raises(ValueError, match=message):
        evaluate(save(tmp_path, 0), DataArguments(str(tmp_path / "data")), test)


def test_unknown_protocols_and_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"magic.*knn"):
        evaluate(save(tmp_path, 0), DIGITS, protocols=["knn", "magic"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no model"):
        evaluate([tmp_path / "empty"], DIGITS)


def test_encoders_of_text_are_refused(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**shape, intermediate_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a Bert and reads input_ids; expected"):
        load_model(tmp_path)


def test_the_modality_of_a_model_with_two(tmp_path: Path, calls: list[Task]) -> None:
    """It must be named, and it is the one that reads the data."""
    pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    folders = save(tmp_path, 0, modalities={"speech": {"num_mels": 8}, "image": IMAGE})
    with pytest.raises(ValueError, match=r"^modality: .*speech"):
        evaluate(folders, DIGITS, protocols=["spy"])
    with pytest.raises(ValueError, match="found a clip of 8 samples"):
        evaluate(folders, DIGITS, protocols=["spy"], modality="speech")
    scores = evaluate(folders, DIGITS, protocols=["spy"], modality="image")
    assert [score.row for score in scores] == ["raw", "untrained", "pretrained"]
    expected = mean_of_tokens(AutoModel.from_pretrained(folders[0]), calls[0].train)
    np.testing.assert_allclose(calls[2].train, expected, atol=2e-5)


def numbered(count: int) -> PreparedSamples:
    """Images of one shade each, which is their number."""
    images = np.arange(count, dtype=np.float32)[:, None, None] * np.ones((8, 8), np.float32) / 1000
    return PreparedSamples(Samples(list(images), "image {}".format), Image(**IMAGE))


def test_features_come_in_the_order_of_the_data_set() -> None:
    """More samples than one batch holds, in batches that each keep their own."""
    sizes = []

    def number(batch: dict[str, Tensor]) -> Tensor:
        sizes.append(len(batch["pixel_values"]))
        return batch["pixel_values"][:, 0, 0, :1]

    (found,) = extract(numbered(300), [number], "cpu")
    np.testing.assert_allclose(found[:, 0], np.arange(300) / 1000, rtol=1e-6)
    assert sum(sizes) == 300 and len(sizes) > 1


def test_features_do_not_depend_on_the_batch() -> None:
    dataset, model = numbered(300), make(0)
    model.train()
    (found,) = extract(dataset, [pooled(model)], "cpu")
    raw = np.stack([dataset[i][0]["pixel_values"].flatten().numpy() for i in range(300)])
    np.testing.assert_allclose(found, mean_of_tokens(model, raw), atol=2e-5)
    assert found.dtype == np.float32 and not model.training


def test_half_precision_features_become_float32() -> None:
    model = make(0).to(torch.bfloat16)  # type: ignore[arg-type]
    (found,) = extract(numbered(10), [pooled(model)], "cpu")
    assert found.dtype == np.float32 and np.isfinite(found).all()


def test_scores_are_printed_as_means_with_their_spread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line a row, one column a protocol; the spread is the standard deviation over seeds, of n - 1."""
    monkeypatch.setenv("COLUMNS", "120")
    rows: dict[str, list[list[float]]] = {
        "raw": [[0.25], [0.5]],
        "untrained": [[0.5, 0.7], [0.1, 0.3]],
        "pretrained": [[0.8, 1.0], [0.9, 0.9]],
    }
    scores = [
        Score(protocol, row, each, 1234, 567)
        for row, values in rows.items()
        for protocol, each in zip(("knn", "linear"), values, strict=True)
    ]
    print_scores(scores, "my run")
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]
    assert ["features", "knn", "linear"] in cells
    table = cells[cells.index(["features", "knn", "linear"]) + 1 :]
    assert [row for row in table if len(row) == 3] == [
        ["raw features", "0.250", "0.500"],
        ["untrained encoder", "0.600 ± 0.141", "0.200 ± 0.141"],
        ["pretrained encoder", "0.900 ± 0.141", "0.900 ± 0.000"],
    ]
    title = " ".join(lines)
    assert "my run" in title and "1,234" in title and "567" in title


def test_protocols_that_read_other_samples_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """svm goes through all samples in ten folds: nine tenths of them are fitted on, each one is tested."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setitem(PROTOCOLS, "svm", lambda task: {"accuracy": np.array([0.5])})
    scores = evaluate(save(tmp_path, 0), DataArguments("digits", max_samples=60), protocols=["knn", "svm", "linear"])
    assert {(score.protocol, score.n_train, score.n_test) for score in scores} == {
        ("knn", 60, 60),
        ("linear", 60, 60),
        ("svm", 108, 120),
    }
    capsys.readouterr()
    print_scores(scores, "my run")
    printed = capsys.readouterr().out
    assert "knn, linear: accuracy on 60 labels, probes fitted on 60" in printed
    assert "svm: accuracy on 120 labels, probes fitted on 108" in printed


def test_the_command_pools_as_it_is_told(tmp_path: Path, calls: list[Task]) -> None:
    (folder,) = save(tmp_path, 0)
    flags = [str(folder), "--data", "digits", "--data.max_samples", "60", "--protocol", "spy"]
    for more in ([], ["--pooling", "mean_max"]):
        evaluate_command([*flags, *more, "--output", str(tmp_path / "scores.json")])
    assert [call.train.shape[1] for call in calls] == [64, 16, 16, 64, 32, 32]
    assert [score["values"] for score in json.loads((tmp_path / "scores.json").read_text())["scores"]] == [
        [4.0],
        [5.0],
        [6.0],
    ]
    with pytest.raises(SystemExit):
        evaluate_command([*flags, "--pooling", "median"])


def test_without_baselines_the_pretrained_rows_are_the_same(tmp_path: Path) -> None:
    make(0).save_pretrained(tmp_path)
    with_them, alone = (evaluate([tmp_path], DIGITS, protocols=["knn"], baselines=each) for each in (True, False))
    assert [score.row for score in with_them] == ["raw", "untrained", "pretrained"]
    assert alone == with_them[2:]
