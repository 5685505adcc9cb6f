"""Encoders with heads: against heads applied by hand, transformers' own Trainer and its pipelines."""

import functools
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    BatchFeature,
    Trainer,
    TrainingArguments,
    pipeline,
)

from mmssl import (
    MMSSLConfig,
    MMSSLFeatureExtractor,
    MMSSLForForecasting,
    MMSSLForSemanticSegmentation,
    MMSSLForSequenceClassification,
    MMSSLForTokenClassification,
    MMSSLModel,
    MMSSLProcessor,
)
from mmssl.evaluation.forecasting import Forecaster, batch_of
from mmssl.modalities.time_series import TimeSeries
from tests.matrix.cases import MODALITIES

WITH_ELEMENTS = ("image", "point_cloud")
DOCS = Path(__file__).parents[1] / "docs"


def make_config(*modalities: str, **options: Any) -> MMSSLConfig:
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "class_token": True,
        "num_register_tokens": 1,
    }
    return MMSSLConfig(modalities={name: MODALITIES[name][0] for name in modalities}, **{**shape, **options})


def save_encoder(folder: Path, *modalities: str, **options: Any) -> MMSSLModel:
    """An encoder and its processor in a folder, with no parameter at its start value."""
    torch.manual_seed(0)
    model = MMSSLModel(make_config(*modalities, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    MMSSLProcessor(MMSSLFeatureExtractor(model.config.modalities)).save_pretrained(folder)
    return model


@functools.cache
def make_batch(modality: str, count: int = 3) -> BatchFeature:
    options, samples = MODALITIES[modality]
    return MMSSLFeatureExtractor({modality: options})(samples(count))


# Weights


@pytest.mark.parametrize(
    ("auto", "kind"),
    [
        (AutoModelForSequenceClassification, MMSSLForSequenceClassification),
        (AutoModelForImageClassification, MMSSLForSequenceClassification),
        (AutoModelForAudioClassification, MMSSLForSequenceClassification),
        (AutoModelForVideoClassification, MMSSLForSequenceClassification),
        (AutoModelForTokenClassification, MMSSLForTokenClassification),
        (AutoModelForSemanticSegmentation, MMSSLForSemanticSegmentation),
    ],
)
def test_an_encoder_gets_a_new_head_which_is_saved_and_loaded(auto: Any, kind: type, tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder", "image")
    loaded, info = auto.from_pretrained(tmp_path / "encoder", num_labels=5, output_loading_info=True)
    assert type(loaded) is kind
    model: Any = loaded
    assert set(info["missing_keys"]) == {"head.weight", "head.bias"}
    assert not info["unexpected_keys"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.mmssl.state_dict()[name], value), name
    assert model.head.weight.shape == (5, 24)
    assert 0 < model.head.weight.abs().max() <= (6 / 29) ** 0.5  # xavier_uniform
    assert not model.head.bias.any()

    model.save_pretrained(tmp_path / "tuned")
    again, info = auto.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not info["missing_keys"]
    batch = make_batch("image")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        alone = AutoModel.from_pretrained(tmp_path / "tuned")
        assert type(alone) is MMSSLModel
        assert torch.equal(alone(**batch).pooler_output, encoder(**batch).pooler_output)


# What heads compute


@pytest.mark.parametrize("modality", sorted(MODALITIES))
@torch.no_grad()
def test_of_any_modality_logits_are_linear_in_the_pooled_tokens(modality: str) -> None:
    torch.manual_seed(0)
    model = MMSSLForSequenceClassification(make_config(modality, num_labels=4)).eval()
    batch = make_batch(modality)
    expected = model.mmssl(**batch).pooler_output @ model.head.weight.T + model.head.bias
    out = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected)
    assert out.logits.shape == (3, 4)
    assert len(out.hidden_states) == 3
    assert out.loss is None


@torch.no_grad()
def test_losses_follow_labels_and_problem_type() -> None:
    batch = make_batch("image")

    def run(labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = MMSSLForSequenceClassification(make_config("image", **options)).eval()
        out = model(**batch, labels=labels)
        return out.loss, out.logits

    loss, logits = run(torch.tensor([2, 0, 1]), num_labels=3)
    torch.testing.assert_close(loss, -torch.log_softmax(logits, dim=1)[[0, 1, 2], [2, 0, 1]].mean())
    quantities = torch.tensor([0.5, -1.0, 3.0])
    loss, logits = run(quantities, num_labels=1)
    torch.testing.assert_close(loss, (logits[:, 0] - quantities).square().mean())
    pairs = torch.randn(3, 2)
    loss, logits = run(pairs, num_labels=2, problem_type="regression")
    torch.testing.assert_close(loss, (logits - pairs).square().mean())
    several = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    loss, logits = run(several, num_labels=2)
    chance = torch.sigmoid(logits)
    torch.testing.assert_close(loss, -(several * chance.log() + (1 - several) * (1 - chance).log()).mean())


@pytest.mark.parametrize("modality", ["graph", "image", "point_cloud", "speech"])
@torch.no_grad()
def test_tokens_are_classified_one_by_one_and_padding_does_not_count(modality: str) -> None:
    torch.manual_seed(0)
    model = MMSSLForTokenClassification(make_config(modality, num_labels=3)).eval()
    batch = make_batch(modality)
    valid = model.mmssl.adapters[modality].tokenize(batch).valid
    labels = torch.randint(3, valid.shape)
    labels[0, 1] = -100
    out = model(**batch, labels=labels)
    assert out.logits.shape == (*valid.shape, 3)
    hidden = model.mmssl(**batch).last_hidden_state[:, 2:]  # a class token and a register before them
    errors = []
    for row in range(len(valid)):
        for token in range(valid.shape[1]):
            scores = model.head.weight @ hidden[row, token] + model.head.bias
            torch.testing.assert_close(out.logits[row, token], scores)
            if valid[row, token] and labels[row, token] != -100:
                errors.append(scores.logsumexp(dim=0) - scores[labels[row, token]])
    assert modality not in ("graph", "speech") or not valid.all()
    torch.testing.assert_close(out.loss, torch.stack(errors).mean())


@pytest.mark.parametrize("modality", WITH_ELEMENTS)
@torch.no_grad()
def test_elements_are_classified_by_what_is_interpolated_at_them(modality: str) -> None:
    """Interpolating hidden states and then applying the head is the same, as their weights add up to 1."""
    torch.manual_seed(0)
    model = MMSSLForSemanticSegmentation(make_config(modality, num_labels=3)).eval()
    batch = make_batch(modality)
    own = model.mmssl.adapters[modality]
    tokens = own.tokenize(batch)
    spread = own.spread(model.mmssl(**batch).last_hidden_state[:, 2:], tokens, batch)
    elements = own.elements(batch)
    most = [max(each.shape[axis] for each in elements) for axis in range(elements[0].dim() - 1)]
    labels = torch.full((len(spread), *most), -100)
    errors = []
    generator = torch.Generator().manual_seed(0)
    for row, hidden in enumerate(spread):
        right = torch.randint(3, hidden.shape[:-1], generator=generator)
        labels[row, : len(hidden)] = right
        scores = hidden @ model.head.weight.T + model.head.bias
        errors.append(torch.nn.functional.cross_entropy(scores.flatten(0, -2), right.flatten(), reduction="none"))
    out = model(**batch, labels=labels)
    assert out.logits.shape == (len(spread), 3, *most)
    torch.testing.assert_close(out.loss, torch.cat(errors).mean(), atol=1e-5, rtol=1e-5)
    row = len(spread) - 1
    expected = (spread[row] @ model.head.weight.T + model.head.bias).movedim(-1, 0)
    torch.testing.assert_close(out.logits[row, :, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)


# Forecasting


@pytest.mark.parametrize("independent", [True, False])
@torch.no_grad()
def test_a_forecast_is_that_of_the_evaluation(independent: bool, tmp_path: Path) -> None:
    options = {"patch_length": 4, "channel_independent": independent, "num_channels": None if independent else 2}
    config = make_config(context_length=16, prediction_length=5)
    config.modalities = MMSSLConfig(modalities={"time_series": options}).modalities
    torch.manual_seed(0)
    MMSSLModel(config).save_pretrained(tmp_path)
    model = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path, context_length=16, prediction_length=5)
    assert type(model) is MMSSLForForecasting
    series, future = torch.randn(3, 16, 2) * 3 + 7, torch.randn(3, 5, 2)
    own = model.mmssl.adapters["time_series"]
    assert isinstance(own, TimeSeries)
    reference = Forecaster(own, model.mmssl, model.head.weight.numpy(), model.head.bias.numpy())
    batch = batch_of(series)
    out = model(**batch, labels=future)
    torch.testing.assert_close(out.prediction_outputs, reference(batch))
    torch.testing.assert_close(out.loss, (reference(batch) - future).square().mean())

    gap = future.clone()
    gap[1, 2:, 0] = torch.nan
    error = (reference(batch) - future).square()
    error[1, 2:, 0] = 0
    torch.testing.assert_close(model(**batch, labels=gap).loss, error.sum() / 27)

    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again(**batch).prediction_outputs, out.prediction_outputs)


def test_forecasting_says_what_is_wrong(tmp_path: Path) -> None:
    save_encoder(tmp_path, "image")
    with pytest.raises(ValueError, match="prediction_length is missing"):
        MMSSLForForecasting.from_pretrained(tmp_path, context_length=16)
    with pytest.raises(ValueError, match="found an encoder of image; forecasting needs one of series"):
        MMSSLForForecasting.from_pretrained(tmp_path, context_length=16, prediction_length=5)
    config = MMSSLConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, modalities={"time_series": {"patch_length": 4}}
    )
    model = MMSSLForForecasting(config, context_length=16, prediction_length=5)
    with pytest.raises(ValueError, match="found 12 steps; expected context_length, 16"):
        model(**batch_of(torch.randn(1, 12, 1)))
    with pytest.raises(ValueError, match=re.escape("labels: found shape (1, 4, 1); expected (1, 5, 1)")):
        model(**batch_of(torch.randn(1, 16, 1)), labels=torch.randn(1, 4, 1))


# What a user gets wrong


def test_wrong_labels_and_heads_are_refused() -> None:
    config = make_config("image", num_labels=3)
    with pytest.raises(ValueError, match=re.escape("found shape (3, 7); expected (3, 16), one for each token")):
        MMSSLForTokenClassification(config)(**make_batch("image"), labels=torch.zeros(3, 7, dtype=torch.long))
    with pytest.raises(ValueError, match=re.escape("found shape (3, 16); expected (3, 8, 8), one for each element")):
        MMSSLForSemanticSegmentation(config)(**make_batch("image"), labels=torch.zeros(3, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="graph has no elements but its tokens; use MMSSLForTokenClassification"):
        MMSSLForSemanticSegmentation(make_config("graph"))(**make_batch("graph"))
    for kind in (MMSSLForTokenClassification, MMSSLForSemanticSegmentation):
        with pytest.raises(ValueError, match=r"found num_labels=1 .*; expected at least 2 classes"):
            kind(make_config("image", num_labels=1))
        with pytest.raises(ValueError, match="problem_type=regression"):
            kind(make_config("image", num_labels=2, problem_type="regression"))
    with pytest.raises(ValueError, match=r"found inputs \['pixels'\]"):
        MMSSLForSequenceClassification(config)(pixels=torch.zeros(1, 1, 8, 8))


# Trainer and pipelines


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_transformers_learns(checkpointing: bool, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", "image")
    processor = AutoFeatureExtractor.from_pretrained(tmp_path / "encoder")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "encoder", num_labels=2)
    digits = load_digits(n_class=2)
    samples: Any = [
        {"image": image.astype(np.float32) / 16, "label": label}
        for image, label in zip(digits.images[:48], digits.target[:48], strict=True)
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            **processor(images=[row["image"] for row in rows]),
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        num_train_epochs=8,
        learning_rate=3e-3,
        remove_unused_columns=False,  # what the collate function reads
        gradient_checkpointing=checkpointing,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=collate)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.3 * before
    found: Any = trainer.predict(samples)
    assert (found.predictions.argmax(axis=1) == found.label_ids).mean() > 0.9


@pytest.mark.parametrize("modalities", [("image",), ("image", "speech")], ids=str)
def test_pipelines_of_images(modalities: tuple[str, ...], tmp_path: Path) -> None:
    """A real digit as a PNG file; of a checkpoint of two modalities the pipeline finds the one it is for."""
    save_encoder(tmp_path / "encoder", *modalities)
    names = {number: f"digit {number}" for number in range(10)}
    AutoModelForImageClassification.from_pretrained(
        tmp_path / "encoder", num_labels=10, id2label=names
    ).save_pretrained(tmp_path / "tuned")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "encoder")
    Image.fromarray((load_digits().images[7] * 15).astype(np.uint8)).save(tmp_path / "seven.png")

    classify = pipeline("image-classification", model=str(tmp_path / "tuned"), image_processor=extractor, device="cpu")
    found = {each["label"]: each["score"] for each in classify(str(tmp_path / "seven.png"), top_k=10)}
    assert set(found) == set(names.values())
    batch = extractor(str(tmp_path / "seven.png"), modality="image")
    with torch.no_grad():
        expected = torch.softmax(classify.model(**batch).logits[0], dim=0)
    assert [found[name] for name in names.values()] == pytest.approx(expected.tolist(), abs=1e-6)

    embed = pipeline(
        "image-feature-extraction", model=str(tmp_path / "encoder"), image_processor=extractor, device="cpu"
    )
    with torch.no_grad():
        expected = embed.model(**batch).pooler_output
    if len(modalities) == 1:
        vector: Any = embed(str(tmp_path / "seven.png"), pool=True, return_tensors=True)
        torch.testing.assert_close(vector, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("modalities", [("speech",), ("image", "speech")], ids=str)
def test_pipelines_of_sound(modalities: tuple[str, ...], tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", *modalities)
    AutoModelForAudioClassification.from_pretrained(tmp_path / "encoder", num_labels=3).save_pretrained(
        tmp_path / "tuned"
    )
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "encoder")
    file = io.BytesIO()
    soundfile.write(file, MODALITIES["speech"][1](1)[0], 8000, format="WAV")
    wave, rate = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")

    classify = pipeline(
        "audio-classification", model=str(tmp_path / "tuned"), feature_extractor=extractor, device="cpu"
    )
    found = {each["label"]: each["score"] for each in classify({"raw": wave, "sampling_rate": rate})}
    with torch.no_grad():
        logits = classify.model(**extractor(file.getvalue(), modality="speech")).logits[0]
    assert [found[f"LABEL_{number}"] for number in range(3)] == pytest.approx(
        torch.softmax(logits, dim=0).tolist(), abs=1e-5
    )


def test_the_pipeline_of_features_takes_any_modality(tmp_path: Path) -> None:
    save_encoder(tmp_path, "graph")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    graph = MODALITIES["graph"][1](1)[0]
    embed: Any = pipeline("feature-extraction", model=str(tmp_path), tokenizer=extractor, device="cpu")
    with torch.no_grad():
        expected = embed.model(**extractor(graph)).last_hidden_state
    assert torch.equal(embed(graph, return_tensors=True), expected)


def test_the_extractor_finds_the_modality_by_how_it_is_called() -> None:
    extractor = MMSSLFeatureExtractor({name: MODALITIES[name][0] for name in ("image", "speech", "graph")})
    image, wave = MODALITIES["image"][1](1)[0], MODALITIES["speech"][1](1)[0]
    assert set(extractor(images=image)) == {"pixel_values"}
    assert set(extractor(wave, sampling_rate=8000)) == {"input_values", "attention_mask"}
    assert extractor.sampling_rate == 8000
    assert "sampling_rate" not in extractor.to_dict()
    with pytest.raises(ValueError, match="pass modality="):
        extractor(image)
    with pytest.raises(ValueError, match="neither or both"):
        extractor(image, images=image)
    with pytest.raises(ValueError, match="neither or both"):
        extractor()
    assert not hasattr(MMSSLFeatureExtractor({"image": MODALITIES["image"][0]}), "sampling_rate")


def test_the_snippets_of_the_docs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_encoder(tmp_path / "encoder", "image")
    Image.fromarray((load_digits().images[7] * 15).astype(np.uint8)).save(tmp_path / "seven.png")
    config = MMSSLConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, modalities={"time_series": {"patch_length": 8}}
    )
    MMSSLModel(config).save_pretrained(tmp_path / "series")
    MMSSLProcessor(MMSSLFeatureExtractor(config.modalities)).save_pretrained(tmp_path / "series")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / "heads.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert names["vector"].shape == (1, 24)
    assert capsys.readouterr().out.splitlines()[-1] == "torch.Size([1, 12, 2])"
