"""Tests of e-Mix: a slow loop, what shares are drawn from, and mixtures of one sample alone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from mmssl.discovery import options_of
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives import embedding_mixup
from mmssl.objectives.base import represent
from mmssl.objectives.embedding_mixup import EmbeddingMixup, shares, wanted
from tests.matrix.cases import MODALITIES, make_batch
from tests.test_heads import on_two_processes

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(modality: str = "image", **options: Any) -> EmbeddingMixup:
    torch.manual_seed(0)
    own = IMAGE if modality == "image" else MODALITIES[modality][0]
    config = MMSSLConfig(modalities={modality: own}, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    return EmbeddingMixup(MMSSLModel(config), **{"projector_size": 6, **options}).train()


def images(batch: int = 6, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def with_draws(monkeypatch: pytest.MonkeyPatch, share: Tensor, partner: Tensor) -> None:
    monkeypatch.setattr(embedding_mixup, "shares", lambda *args: share)
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: partner)


def loss_by_hand(objective: EmbeddingMixup, batch: Batch, share: Tensor, partner: Tensor) -> Tensor:
    """Mixed as inputs are, which is the same where embedding is affine; sample by sample."""
    modality = objective.model.adapters["image"]
    tokens = modality.tokenize(batch)
    total = []
    known = F.normalize(objective.projector(represent(objective.model, modality, tokens)))
    for i in range(len(share)):
        content = share[i] * tokens.content[i] + (1 - share[i]) * tokens.content[partner[i]]
        one = replace(tokens, content=content[None], coords=tokens.coords[:1], valid=tokens.valid[:1])
        mixed = F.normalize(objective.projector(represent(objective.model, modality, one)))[0]
        scores = torch.stack([(mixed * known[j]).sum() / objective.temperature for j in range(len(share))])
        log = scores - scores.exp().sum().log()
        total.append(-(share[i] * log[i] + (1 - share[i]) * log[partner[i]]))
    return torch.stack(total).mean()


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_and_gradients_are_those_of_a_loop(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample has a share of its own; one is its own partner; nothing is detached."""
    objective = make(temperature=temperature)
    share, partner = torch.linspace(0.5, 1, 6), torch.tensor([2, 1, 0, 4, 5, 3])
    with_draws(monkeypatch, share, partner)
    parameters = list(objective.parameters())
    found = objective(images(), key(0)).loss
    expected = loss_by_hand(objective, images(), share, partner)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, parameters) for loss in (found, expected)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_draws_are_those_of_the_generator() -> None:
    """The objective as it is: shares first, then partners."""
    objective, generator = make(), key(3)
    share = shares(1.0, 6, generator)
    partner = torch.randperm(6, generator=generator)
    torch.testing.assert_close(objective(images(), key(3)).loss, loss_by_hand(objective, images(), share, partner))


def test_all_of_one_sample_is_instance_discrimination(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make()
    with_draws(monkeypatch, torch.ones(6), torch.arange(6).roll(1))
    out = objective(images(), key(0))
    modality = objective.model.adapters["image"]
    read = F.normalize(objective.projector(represent(objective.model, modality, modality.tokenize(images()))))
    torch.testing.assert_close(out.loss, F.cross_entropy(read @ read.T / 0.2, torch.arange(6)))
    assert out.metrics["accuracy"] == 1 and out.metrics["least_loss"] == 0


def test_length_of_projections_does_not_matter() -> None:
    objective = make()
    loss = objective(images(), key(0)).loss
    with torch.no_grad():
        for parameter in objective.projector.parameters():
            parameter.mul_(7)
    torch.testing.assert_close(objective(images(), key(0)).loss, loss)


# Shares and what is wanted


def test_targets_sum_to_one_and_are_of_both_samples() -> None:
    share = torch.tensor([0.6, 0.9, 0.5])
    target = wanted(torch.tensor([3, 4, 5]), torch.tensor([4, 4, 3]), share, 6)
    expected = torch.tensor([[0, 0, 0, 0.6, 0.4, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0.5, 0, 0.5]])
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_are_of_a_folded_beta_distribution(alpha: float) -> None:
    found = shares(alpha, 2000, key(0))
    assert ((found >= 0.5) & (found <= 1)).all() and len(found.unique()) > 1500
    folded = stats.kstest(found.numpy(), lambda x: 2 * stats.beta(alpha, alpha).cdf(np.asarray(x)) - 1)
    assert folded.pvalue > 0.01


def test_shares_of_a_tiny_parameter_are_numbers() -> None:
    found = shares(1e-3, 2000, key(0))
    assert found.isfinite().all() and (found >= 0.5).all() and (found > 0.99).any()


def test_least_loss_is_the_entropy_of_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    share = torch.tensor([0.5, 0.75, 1.0, 0.9])
    with_draws(monkeypatch, share, torch.tensor([1, 0, 3, 3]))  # the last one is its own partner
    out = make()(images(4), key(0))
    expected = (math.log(2) - 0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 4
    assert out.metrics["least_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert out.loss > out.metrics["least_loss"]
    assert out.metrics["chance"] == 0.25
    assert set(out.metrics) == {"accuracy", "chance", "least_loss", "projection_rank"}
    assert not any(value.requires_grad for value in out.metrics.values())


def test_embedding_is_of_the_samples_as_they_are() -> None:
    objective = make("speech")
    modality = objective.model.adapters["speech"]
    batch = make_batch(modality, 4)
    out = objective(batch, key(0))
    assert out.embedding is not None and not out.embedding.requires_grad
    torch.testing.assert_close(out.embedding, represent(objective.model, modality, modality.tokenize(batch)).detach())
    assert objective.trained is objective.model


# Several processes


def test_candidates_are_the_samples_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, with partners in the same process."""
    share, turned, whole = torch.linspace(0.5, 1, 6), torch.tensor([1, 2, 0]), images()

    def run(rows: slice, partner: Tensor) -> Any:
        with_draws(monkeypatch, share[rows], partner)
        objective = make()
        out = objective({"pixel_values": whole["pixel_values"][rows]}, key(0))
        out.loss.backward()
        return out.loss.detach(), out.metrics["chance"], [parameter.grad for parameter in objective.parameters()]

    halves = on_two_processes(lambda rank: run(slice(3 * rank, 3 * rank + 3), turned), tmp_path)
    loss, chance, gradients = run(slice(0, 6), torch.cat([turned, turned + 3]))
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss)
    assert halves[0][1] == chance == pytest.approx(1 / 6)
    for one, two, gradient in zip(halves[0][2], halves[1][2], gradients, strict=True):
        torch.testing.assert_close((one + two) / 2, gradient, rtol=1e-3, atol=1e-5)


def test_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="EmbeddingMixup: found a batch of 1 sample; expected at least 2"):
        make()(images(1), key(0))


# Options


def test_options_rebuild_the_objective() -> None:
    objective = make(alpha=0.5)
    assert options_of(EmbeddingMixup(objective.model, **options_of(objective))) == options_of(objective)
    assert list(options_of(objective)) == ["alpha", "temperature", "projector_size"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no shares": ({"alpha": 0.0}, r"alpha: found 0\.0; expected a number above 0"),
    "no temperature": ({"temperature": -0.2}, r"temperature: found -0\.2; expected a number above 0"),
    "no channels": ({"projector_size": 0}, r"projector_size: found 0; expected at least 1"),
    "graphs": ({"modality": "graph"}, r"EmbeddingMixup with mixtures .*graph do not lie .*ShuffledEmbeddingDetection"),
    "clouds": ({"modality": "point_cloud"}, r"EmbeddingMixup with mixtures .*point_cloud do not lie"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**options)
