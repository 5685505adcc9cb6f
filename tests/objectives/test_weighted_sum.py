"""Tests of weighted sums of objectives: the loss is the sum, and each weight is there once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.latent_prediction import LatentPrediction
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.objectives.weighted_sum import Sum
from mmssl.training import TrainArguments, load_objective, pretrain

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}
PIXELS: dict[str, Any] = {"decoder_layers": 1, "decoder_hidden_size": 8, "decoder_attention_heads": 2}
LATENTS: dict[str, Any] = {"predictor_layers": 1, "predictor_hidden_size": 8, "predictor_attention_heads": 2}
TERMS: dict[str, dict[str, Any]] = {
    "pixels": {"class_path": "MaskedReconstruction", "init_args": PIXELS},
    "latents": {"class_path": "LatentPrediction", "init_args": LATENTS},
}


def make_model() -> MMSSLModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MMSSLModel(MMSSLConfig(modalities={"image": IMAGE}, **shape))


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


def test_loss_and_gradients_are_the_weighted_sum_of_those_of_the_terms() -> None:
    """Each term alone, on a model with the same weights, with the random numbers one after the other."""
    both = Sum(make_model(), TERMS, {"latents": 0.25})
    alone = [MaskedReconstruction(make_model(), **PIXELS), LatentPrediction(make_model(), **LATENTS)]
    for name, term in zip(TERMS, alone, strict=True):
        assert not term.load_state_dict(both.objectives[name].state_dict(), strict=False).unexpected_keys
    generator = torch.Generator().manual_seed(1)
    losses = [term(images(), generator).loss for term in alone]
    out = both(images(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(out.loss, losses[0] + 0.25 * losses[1])
    torch.testing.assert_close(out.metrics["latents/loss"], losses[1].detach())
    assert {"pixels/loss", "latents/target_std", "latents/target_rank"} <= set(out.metrics)
    out.loss.backward()
    (losses[0] + 0.25 * losses[1]).backward()
    for name, value in both.model.named_parameters():
        parts = [dict(term.model.named_parameters())[name].grad for term in alone]
        torch.testing.assert_close(value.grad, sum(part for part in parts if part is not None))


def test_terms_that_compare_views_share_them_and_their_forwards() -> None:
    """Each term alone, from the same random numbers: the same loss and gradients, for half of the work."""
    projector = {"projector_hidden_size": 8, "projector_size": 8}
    terms = {
        "vicreg": {"class_path": "VICReg", "init_args": projector},
        "distilled": {"class_path": "SelfDistillation", "init_args": projector | {"prototypes": 8, "local_views": 2}},
        "barlow": {"class_path": "BarlowTwins", "init_args": projector},
    }
    views = {"crop_scale": (0.3, 1.0)}
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MMSSLModel(MMSSLConfig(modalities={"image": IMAGE | views}, **shape))
    together = Sum(model, terms)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = together(images(), torch.Generator().manual_seed(3))
    assert len(calls) == 2 + 2  # two views for all three terms, and the local ones of one
    found.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for term in together.members():  # in an order in which each begins with the same two views
        out = term(images(), torch.Generator().manual_seed(3))
        out.loss.backward()
        losses.append(out.loss)
    torch.testing.assert_close(found.loss, sum(losses))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-2, atol=1e-4)


def test_each_weight_is_there_once() -> None:
    both = Sum(make_model(), TERMS)
    assert not [name for name in both.state_dict() if name.startswith("objectives") and ".model." in name]
    pointers = [value.data_ptr() for value in both.state_dict().values()]
    assert len(pointers) == len(set(pointers))
    assert both.objectives["pixels"].model is both.model is both.objectives["latents"].model


def test_teachers_move_once_a_step() -> None:
    both = Sum(
        make_model(), TERMS | {"latents": {**TERMS["latents"], "init_args": {**LATENTS, "momentum": [0.5, 0.5]}}}
    )
    before = {name: value.clone() for name, value in both.trained.named_parameters()}
    with torch.no_grad():
        for value in both.model.parameters():
            value.add_(1)
    both.after_step(0.1)
    assert both.trained is both.objectives["latents"].trained
    for name, value in both.trained.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.5)
    assert Sum(make_model(), {"pixels": TERMS["pixels"]}).trained is not None


def test_a_run_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    run = pretrain(
        Image(**IMAGE),
        lambda model: Sum(model, TERMS, {"latents": 0.5}),
        EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        DataArguments("digits", max_samples=32),
        TrainArguments(str(tmp_path / "run"), per_device_train_batch_size=16, max_train_steps=3),
    )
    found = load_objective(run)
    assert isinstance(found, Sum) and found.weights == {"pixels": 1.0, "latents": 0.5}
    # The teacher is what is saved; after three steps it is no copy of the model.
    (saved, student) = (dict(each.named_parameters()) for each in (MMSSLModel.from_pretrained(run), found.model))
    for name, value in found.trained.named_parameters():
        assert torch.equal(value, saved[name])
    assert any(not torch.equal(student[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("terms", "weights", "message"),
    [
        ({}, None, "terms: found none; expected"),
        (TERMS, {"pixel": 1.0}, "weights: found pixel; the terms are pixels, latents"),
        (
            {"a": {"class_path": "Sum"}},
            None,
            r"terms.a: found .*expected a class_path, one of .*LatentPrediction, Masked",
        ),
        ({"a": {"class_path": "MaskedReconstruction", "mask_ratio": 0.5}}, None, "terms.a: found .*and its init_args"),
        (
            {"a": {"class_path": "MaskedReconstruction", "init_args": {"masks": 2}}},
            None,
            "terms.a: MaskedReconstruction has no masks; it has corruption, mask_ratio",
        ),
    ],
)
def test_bad_terms(terms: dict, weights: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sum(make_model(), terms, weights)


def test_the_term_that_makes_something_of_samples_shows_it() -> None:
    """What masked reconstruction shows by itself; a sum without it shows the samples alone."""
    terms: dict[str, Any] = {
        "latent": {"class_path": "LatentPrediction", "init_args": {"views": False}},
        "masked": {"class_path": "MaskedReconstruction", "init_args": {"decoder_layers": 0, "corruption": "replace"}},
    }
    objective = Sum(make_model(), terms).eval()
    modality = objective.model.adapters["image"]
    tokens = modality.tokenize(images())
    found = objective.shown(modality, tokens, torch.Generator().manual_seed(1))
    (masked,) = (term for term in objective.members() if isinstance(term, MaskedReconstruction))
    expected = masked.shown(modality, tokens, torch.Generator().manual_seed(1))
    assert list(found) == list(expected) == ["original", "seen", "reconstructed"]
    for title, each in expected.items():
        torch.testing.assert_close(found[title].content, each.content, equal_nan=True)
    alone = Sum(make_model(), {"latent": terms["latent"]}).eval()
    assert list(alone.shown(modality, tokens, torch.Generator().manual_seed(1))) == ["original"]
