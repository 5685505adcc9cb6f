"""Tests of VICReg: slow loops, NumPy's covariance, and each term's corner."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmssl.discovery import options_of
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives import vicreg
from mmssl.objectives.base import ObjectiveOutput, represent, views_of
from mmssl.objectives.vicreg import VICReg, deviation_and_covariance
from tests.test_heads import on_two_processes

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "horizontal_flip": 0.5}
ALONE: dict[str, dict[str, float]] = {
    "invariance": {"variance_weight": 0.0, "covariance_weight": 0.0},
    "variance": {"invariance_weight": 0.0, "covariance_weight": 0.0},
    "covariance": {"invariance_weight": 0.0, "variance_weight": 0.0},
}


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(cls: type[Image] | None = None, **options: Any) -> VICReg:
    torch.manual_seed(0)
    model = MMSSLModel(
        MMSSLConfig(modalities={"image": IMAGE}, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    if cls is not None:
        model.modalities["image"] = cls(**IMAGE).build(8)
    return VICReg(model, **{"projector_hidden_size": 12, "projector_size": 6, **options})


def images(batch: int = 8, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def features(rows: int = 16, channels: int = 6, scale: float = 0.4) -> list[Tensor]:
    """Of two views: some channels spread more than 1, some less, and they have something in common."""
    both = torch.randn(rows, channels, generator=key(0))
    turn = scale * torch.randn(channels, channels, generator=key(9))
    found = [both + 0.5 * torch.randn(rows, channels, generator=key(seed)) for seed in (1, 2)]
    return [(each @ turn + 1).requires_grad_() for each in found]


def loss_of(monkeypatch: pytest.MonkeyPatch, views: list[Tensor], **options: Any) -> ObjectiveOutput:
    """What the objective makes of these projections."""
    objective = make(**options)
    objective.projector = nn.Sequential()
    calls = iter(views)
    monkeypatch.setattr(vicreg, "represent", lambda *args: next(calls))
    return objective(images(len(views[0])), key(0))


def terms(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Invariance, variance and covariance, channel by channel."""
    views = [each.detach().double().numpy() for each in (first, second)]
    rows, channels = views[0].shape
    invariance = sum((views[0][n, i] - views[1][n, i]) ** 2 for n in range(rows) for i in range(channels))
    variance = covariance = 0.0
    for view in views:
        matrix = np.cov(view.T)  # divided by B - 1
        for i in range(channels):
            variance += max(0.0, 1 - np.sqrt(matrix[i, i] + 1e-4)) / channels / 2
            covariance += sum(matrix[i, j] ** 2 for j in range(channels) if j != i) / channels
    return invariance / rows / channels, variance, covariance


def test_terms_and_loss_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    views = features()
    invariance, variance, covariance = terms(*views)
    assert 0 < variance < 1
    out = loss_of(monkeypatch, views)
    assert out.loss.item() == pytest.approx(25 * invariance + 25 * variance + covariance, rel=1e-5)
    for name, value in zip(("invariance", "variance", "covariance"), (invariance, variance, covariance), strict=True):
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-5)
    weighted = loss_of(monkeypatch, views, invariance_weight=10.0, variance_weight=3.0, covariance_weight=7.0)
    assert weighted.loss.item() == pytest.approx(10 * invariance + 3 * variance + 7 * covariance, rel=1e-5)
    assert not any(value.requires_grad for value in out.metrics.values())


def test_equal_views_with_spread_and_without_covariance_have_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = torch.linalg.qr(torch.cat([torch.ones(8, 1), torch.randn(8, 3, generator=key(0))], dim=1))[0][:, 1:]
    channels = 7**0.5 * basis + 3  # an unbiased variance of 1, a biased one of 7 / 8
    out = loss_of(monkeypatch, [channels, channels])
    assert 0 <= out.loss < 1e-6
    assert out.metrics["projection_std"].item() == pytest.approx(1.0001**0.5, abs=1e-5)


def test_collapsed_views_have_a_variance_term_of_nearly_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - sqrt(0.0001), and its gradient is finite."""
    same = torch.ones(8, 6, requires_grad=True)
    out = loss_of(monkeypatch, [same, same])
    assert out.loss.item() == pytest.approx(25 * 0.99, rel=1e-5)
    out.loss.backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_spread_beyond_one_is_neither_rewarded_nor_punished(monkeypatch: pytest.MonkeyPatch) -> None:
    views = features(scale=20.0)
    out = loss_of(monkeypatch, views, **ALONE["variance"])
    assert out.loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.loss, views))


def test_a_shift_of_one_view_is_seen_by_the_invariance_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = features()
    for name, options in ALONE.items():
        before = loss_of(monkeypatch, [one, two], **options).loss
        after = loss_of(monkeypatch, [one + 5, two], **options).loss
        assert torch.allclose(before, after, rtol=1e-4) == (name != "invariance")


def test_order_of_views_and_of_samples_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = features()
    loss, order = loss_of(monkeypatch, [one, two]).loss, torch.randperm(16, generator=key(0))
    torch.testing.assert_close(loss_of(monkeypatch, [two, one]).loss, loss)
    torch.testing.assert_close(loss_of(monkeypatch, [one[order], two[order]]).loss, loss)


def test_variance_and_covariance_are_of_all_channels_together() -> None:
    """Of two halves apart, what one half has in common with the other would be missed."""
    whole = features()[0].detach()
    both = torch.cat([whole, whole], dim=1)
    _, covariance = deviation_and_covariance(both)
    _, half = deviation_and_covariance(whole)
    matrix = np.cov(whole.numpy().T)
    expected = (4 * (matrix**2).sum() - 2 * (np.diag(matrix) ** 2).sum()) / 12
    assert covariance.item() == pytest.approx(expected, rel=1e-5) and covariance > half


def test_autocast_does_not_lower_the_precision() -> None:
    values = features()[0].detach()
    full = deviation_and_covariance(values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = deviation_and_covariance(values)
    assert all(torch.equal(one, two) for one, two in zip(full, half, strict=True))


@pytest.mark.parametrize("layers", [1, 3])
def test_batch_of_one_is_refused(layers: int) -> None:
    """Without a batch norm too."""
    with pytest.raises(ValueError, match="found a batch of 1 sample; expected at least 2"):
        make(projector_layers=layers)(images(1), key(0))


def test_views_are_projected_one_after_the_other() -> None:
    objective, generator = make(), key(3)
    out = objective(images(), key(3))
    modality = objective.model.adapters["image"]
    read = [represent(objective.model, modality, tokens) for tokens in views_of(modality, images(), generator)]
    invariance, variance, covariance = terms(*(objective.projector(each) for each in read))
    assert out.loss.item() == pytest.approx(25 * invariance + 25 * variance + covariance, rel=1e-4)
    assert out.embedding is not None and not out.embedding.requires_grad
    torch.testing.assert_close(out.embedding, read[0].detach())
    assert objective.trained is objective.model


def test_two_processes_have_the_terms_and_gradients_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = features(rows=8)

    def half(rank: int) -> Any:
        mine = [each[4 * rank : 4 * rank + 4].detach().requires_grad_() for each in whole]
        out = loss_of(monkeypatch, mine)
        return out.loss.detach(), torch.autograd.grad(out.loss, mine), out.metrics

    (first, ours, metrics), (second, theirs, _) = on_two_processes(half, tmp_path)
    out = loss_of(monkeypatch, whole)
    torch.testing.assert_close((first + second) / 2, out.loss)
    for name in ("variance", "covariance", "projection_std"):
        torch.testing.assert_close(metrics[name], out.metrics[name])
    for one, two, gradient in zip(ours, theirs, torch.autograd.grad(out.loss, whole), strict=True):
        torch.testing.assert_close(torch.cat([one, two]) / 2, gradient, rtol=1e-3, atol=1e-5)


def test_options_rebuild_the_objective() -> None:
    objective = make(covariance_weight=2.0)
    assert options_of(VICReg(objective.model, **options_of(objective))) == options_of(objective)
    linears = [layer for layer in objective.projector if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(12, 8), (12, 12), (6, 12)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no projector": ({"projector_layers": 0}, r"projector_layers 0, .* at least 1"),
    "no width": ({"projector_hidden_size": 0}, r"projector_hidden_size 0 .* at least 1"),
    "reward for distance": ({"invariance_weight": -1.0}, r"invariance_weight: found -1\.0; expected 0 or more"),
    "reward for covariance": ({"covariance_weight": -1.0}, r"covariance_weight: found -1\.0; expected 0 or more"),
    "no terms": (ALONE["invariance"] | {"invariance_weight": 0.0}, r"variance_weight .*: found 0; expected one"),
    "no views": ({"cls": WithoutViews}, r"VICReg with two views .*'view'.*plain_image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**options)
