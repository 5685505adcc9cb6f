"""Tests of Barlow Twins: slow loops, what is known of independent views, and the corners of mixed samples."""

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
from mmssl.objectives import barlow_twins
from mmssl.objectives.barlow_twins import BarlowTwins, cross_correlation
from mmssl.objectives.base import ObjectiveOutput, represent, views_of
from tests.matrix.cases import MODALITIES
from tests.test_heads import on_two_processes

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "horizontal_flip": 0.5}
SMALL: dict[str, Any] = {"projector_hidden_size": 12, "projector_size": 6}


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(modality: str = "image", cls: type[Image] | None = None, **options: Any) -> BarlowTwins:
    torch.manual_seed(0)
    own = IMAGE if modality == "image" else MODALITIES[modality][0]
    config = MMSSLConfig(modalities={modality: own}, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = MMSSLModel(config)
    if cls is not None:
        model.modalities["image"] = cls(**own).build(8)
    return BarlowTwins(model, **{**SMALL, **options})


def images(batch: int = 8, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def features(rows: int = 16, channels: int = 6, views: int = 2, seed: int = 0) -> list[Tensor]:
    """Of views that have something in common, and channels that have too."""
    both = torch.randn(rows, channels, generator=key(seed))
    found = [both + 0.7 * torch.randn(rows, channels, generator=key(seed + 1 + number)) for number in range(views)]
    return [(each @ torch.randn(channels, channels, generator=key(9)) + 1).requires_grad_() for each in found]


def loss_of(
    monkeypatch: pytest.MonkeyPatch,
    projections: list[Tensor],
    share: float = 0.3,
    partner: Tensor | None = None,
    **options: Any,
) -> ObjectiveOutput:
    """What the objective makes of these projections: of the first view, the second one and the mixture."""
    objective = make(**{"projector_size": projections[0].shape[1], **options})
    objective.projector = nn.Sequential()
    calls = iter(projections)
    monkeypatch.setattr(barlow_twins, "represent", lambda *args: next(calls))
    monkeypatch.setattr(barlow_twins, "mix", lambda *args: None)
    monkeypatch.setattr(barlow_twins, "from_first_process", lambda drawn: torch.full_like(drawn, share))
    if partner is not None:
        monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: partner)
    return objective(images(len(projections[0])), key(0))


def standardized(values: Tensor) -> np.ndarray:
    array = values.detach().double().numpy()
    return (array - array.mean(axis=0)) / np.sqrt(array.var(axis=0) + 1e-5)


def parts(first: Tensor, second: Tensor) -> tuple[float, float]:
    """On and off the diagonal, channel by channel and sample by sample."""
    one, two = standardized(first), standardized(second)
    rows, channels = one.shape
    on = off = 0.0
    for i in range(channels):
        for j in range(channels):
            c = sum(one[row, i] * two[row, j] for row in range(rows)) / rows
            if i == j:
                on += (1 - c) ** 2
            else:
                off += c**2
    return on, off


# The loss


@pytest.mark.parametrize("weight", [0.0, 0.0051, 0.5])
def test_loss_is_that_of_a_loop(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    views = features()
    out = loss_of(monkeypatch, views, redundancy_weight=weight)
    on, off = parts(*views)
    assert out.loss.item() == pytest.approx(on + weight * off, rel=1e-5)
    assert out.metrics["on_diagonal"].item() == pytest.approx(on / 6, rel=1e-5)
    assert out.metrics["off_diagonal"].item() == pytest.approx(off / 30, rel=1e-5)
    assert set(out.metrics) == {"on_diagonal", "off_diagonal", "projection_rank"}
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("rows", [4, 8])
def test_equal_views_of_independent_channels_have_no_loss(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a small batch too: with the unbiased variance the diagonal would be (B - 1) / B."""
    basis = torch.linalg.qr(torch.cat([torch.ones(rows, 1), torch.randn(rows, 3, generator=key(0))], dim=1))[0][:, 1:]
    channels = 10 * basis + torch.tensor([1.0, -5.0, 3.0])
    loss = loss_of(monkeypatch, [channels, channels], redundancy_weight=1.0).loss
    assert 0 <= loss < 1e-4


def test_independent_views_have_the_correlations_of_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """About d on the diagonal, and 1 / B in the mean of the squares off it."""
    rows, channels = 256, 96
    views = [torch.randn(rows, channels, generator=key(seed)) for seed in (0, 1)]
    out = loss_of(monkeypatch, views, redundancy_weight=0.0)
    assert out.loss.item() == pytest.approx(channels, rel=0.05)
    assert out.metrics["off_diagonal"].item() == pytest.approx(1 / rows, rel=0.05)


def test_scale_and_shift_of_a_channel_and_order_of_views_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = features()
    loss = loss_of(monkeypatch, [one, two]).loss
    scale, shift = torch.tensor([3.0, 0.5, -2.0, 7.0, 1.0, 40.0]), torch.arange(6.0)
    # A sign turns a correlation round, so it must be the same in both views.
    torch.testing.assert_close(loss_of(monkeypatch, [one * scale + shift, two * scale]).loss, loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss_of(monkeypatch, [one * scale.abs(), two]).loss, loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss_of(monkeypatch, [two, one]).loss, loss)
    lengths = torch.linspace(0.1, 5, 16)[:, None]  # but that of a sample does
    assert (loss_of(monkeypatch, [one * lengths, two]).loss - loss).abs() > 1e-3


def test_both_views_get_the_same_gradient_with_their_places_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is detached."""
    one, two = features()
    gradients = []
    for views in ([one, two], [two, one]):
        gradients.append(torch.autograd.grad(loss_of(monkeypatch, views).loss, [one, two]))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
        assert (first != 0).all()


def test_without_the_second_term_channels_may_all_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    same = torch.randn(16, 1, generator=key(0)).expand(-1, 6)
    assert loss_of(monkeypatch, [same, same], redundancy_weight=0.0).loss < 1e-6
    out = loss_of(monkeypatch, [same, same], redundancy_weight=0.1)
    assert out.loss.item() == pytest.approx(0.1 * 30, rel=1e-3)
    assert out.metrics["projection_rank"].item() == pytest.approx(1, abs=1e-3)


def test_evaluation_uses_the_batch_too() -> None:
    objective = make()
    assert torch.equal(objective.train()(images(), key(0)).loss, objective.eval()(images(), key(0)).loss)


def test_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="found a batch of 1 sample; expected at least 2"):
        make()(images(1), key(0))


def test_views_are_projected_one_after_the_other() -> None:
    """The objective as a whole: what the model returns of two random views, through the projector."""
    objective, generator = make(redundancy_weight=0.1), key(3)
    out = objective(images(), key(3))
    modality = objective.model.adapters["image"]
    read = [represent(objective.model, modality, tokens) for tokens in views_of(modality, images(), generator)]
    on, off = parts(*(objective.projector(each) for each in read))
    assert out.loss.item() == pytest.approx(on + 0.1 * off, rel=1e-4)
    assert out.embedding is not None and not out.embedding.requires_grad
    torch.testing.assert_close(out.embedding, read[0].detach())


# Mixed samples


def mixing(projections: list[Tensor], share: float, partner: Tensor, as_for_imagenet: bool = False) -> float:
    """The published formula, with the two matrices that the mixture's correlations should equal."""
    one, two, mixed = (standardized(each) for each in projections)
    rows, turned = len(one), two[partner.numpy()]
    first = (share * one.T @ one + (1 - share) * turned.T @ one) / rows
    other = two if as_for_imagenet else one
    second = (share * other.T @ two + (1 - share) * turned.T @ two) / rows
    return float(((mixed.T @ one / rows - first) ** 2).sum() + ((mixed.T @ two / rows - second) ** 2).sum())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_loss_of_mixed_samples_is_the_published_one(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the small-data code, times both weights."""
    views, partner = features(views=3), torch.randperm(16, generator=key(5))
    plain = loss_of(monkeypatch, views, redundancy_weight=0.01).loss
    out = loss_of(monkeypatch, views, share, partner, redundancy_weight=0.01, mix_weight=4.0)
    expected = mixing(views, share, partner)
    assert (out.loss - plain).item() == pytest.approx(4 * 0.01 * expected, rel=1e-3)
    assert out.metrics["mixed"].item() == pytest.approx(expected / 36, rel=1e-4)
    # The other released script has z2 in the place of z1, which this would find.
    assert abs(mixing(views, share, partner, as_for_imagenet=True) - expected) > 0.01 * expected or share == 0


def test_mixed_samples_have_the_gradients_of_the_published_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the mixture's correlations should equal is not detached."""
    views, partner, share = features(views=3), torch.randperm(16, generator=key(5)), 0.3
    plain = loss_of(monkeypatch, views, redundancy_weight=0.1).loss
    with_mixtures = loss_of(monkeypatch, views, share, partner, redundancy_weight=0.1, mix_weight=2.0).loss
    found = torch.autograd.grad(with_mixtures - plain, views)
    one, two, mixed = ((each - each.mean(dim=0)) / (each.var(dim=0, unbiased=False) + 1e-5).sqrt() for each in views)
    first = mixed.T @ one / 16 - (share * one.T @ one + (1 - share) * two[partner].T @ one) / 16
    second = mixed.T @ two / 16 - (share * one.T @ two + (1 - share) * two[partner].T @ two) / 16
    expected = torch.autograd.grad(2.0 * 0.1 * (first.square().sum() + second.square().sum()), views)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    one, two = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = cross_correlation(one, two)
    torch.testing.assert_close(half, one.T @ two / 16)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mixture_of_one_view_alone_has_no_loss(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole objective in training: with 1 the mixture is the first view, with 0 the other one of the partners.

    So mixture and target have the same partners and the same share.
    """
    objective = make(mix_weight=4.0).train()
    monkeypatch.setattr(barlow_twins, "from_first_process", lambda drawn: torch.full_like(drawn, share))
    assert objective(images(), key(0)).metrics["mixed"] < 1e-9
    monkeypatch.setattr(barlow_twins, "from_first_process", lambda drawn: torch.full_like(drawn, 0.5))
    assert objective(images(), key(0)).metrics["mixed"] > 1e-4
    views, partner = features(), torch.randperm(16, generator=key(5))
    views.append(views[0] if share == 1 else views[1][partner])
    assert mixing(views, share, partner) < 1e-20
    if share == 1:
        assert mixing(views, share, partner, as_for_imagenet=True) > 0.01


def test_half_of_each_has_a_loss_even_where_all_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of independent features has less spread, which standardising takes back: a factor of the root of 2."""
    rows, channels = 512, 4
    views = [torch.randn(rows, channels, generator=key(seed)) for seed in (0, 1)]
    partner = torch.arange(rows).roll(1)
    mixed = (views[0] + views[1][partner]) / 2
    out = loss_of(monkeypatch, [*views, mixed], 0.5, partner, mix_weight=1.0)
    # The difference is (sqrt(2) - 1) / 2 of z1 and of z2's partners; z1 correlates with itself alone.
    expected = channels * ((2**0.5 - 1) / 2) ** 2 / channels**2
    assert out.metrics["mixed"].item() == pytest.approx(expected, rel=0.4)


def test_every_sample_of_a_batch_has_the_same_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    inner = barlow_twins.mix
    monkeypatch.setattr(barlow_twins, "mix", lambda *args: shares.append(args[-1]) or inner(*args))  # type: ignore
    objective = make(mix_weight=1.0)
    for seed in range(120):
        objective(images(4), key(seed))
    found = torch.stack(shares)
    assert found.shape == (120,)
    # Beta(1, 1) is uniform: quartiles hold a quarter each.
    counts = torch.histc(found, 4, 0, 1) / 120
    assert (counts - 0.25).abs().max() < 0.12


def test_without_mixing_two_passes_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = barlow_twins.represent
    monkeypatch.setattr(barlow_twins, "represent", lambda *args: calls.append(1) or inner(*args))  # type: ignore
    make()(images(), key(0))
    assert len(calls) == 2
    make(mix_weight=1.0)(images(), key(0))
    assert len(calls) == 5


# Several processes


def test_two_processes_have_the_loss_and_gradients_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one share, though their generators differ. Partners lie in the same process."""
    whole, turned = features(rows=8, views=3), torch.tensor([1, 2, 3, 0])
    options: dict[str, Any] = {"redundancy_weight": 0.1, "mix_weight": 2.0}

    def half(rank: int) -> Any:
        rows = slice(4 * rank, 4 * rank + 4)
        mine = [each[rows].detach().requires_grad_() for each in whole]
        loss = loss_of(monkeypatch, mine, 0.3, turned, **options).loss
        gradients = torch.autograd.grad(loss, mine)
        monkeypatch.undo()
        shares: list[Tensor] = []
        inner = barlow_twins.mix
        barlow_twins.mix = lambda *args: shares.append(args[-1]) or inner(*args)  # type: ignore
        make(**options)(images(4), key(rank))
        return loss.detach(), gradients, shares

    (first, *ours, share), (second, *theirs, other) = on_two_processes(half, tmp_path)
    assert share == other and len(share) == 1
    loss = loss_of(monkeypatch, whole, 0.3, torch.cat([turned, turned + 4]), **options).loss
    torch.testing.assert_close(first, loss)
    torch.testing.assert_close(second, loss)
    for one, two, gradient in zip(*ours, *theirs, torch.autograd.grad(loss, whole), strict=True):
        torch.testing.assert_close(torch.cat([one, two]) / 2, gradient, rtol=1e-3, atol=1e-5)


# Options


def test_options_rebuild_the_objective_and_the_projector_is_that_of_the_paper() -> None:
    objective = make(mix_weight=2.0, redundancy_weight=0.1)
    assert options_of(BarlowTwins(objective.model, **options_of(objective))) == options_of(objective)
    assert list(options_of(objective)) == [
        "projector_layers",
        "projector_hidden_size",
        "projector_size",
        "redundancy_weight",
        "mix_weight",
    ]
    linears = [layer for layer in objective.projector if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(12, 8), (12, 12), (6, 12)]
    assert objective.trained is objective.model


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no projector": ({"projector_layers": 0}, r"projector_layers 0, .* at least 1"),
    "no channels": ({"projector_size": 0}, r"projector_size 0; expected at least 1"),
    "reward for redundancy": ({"redundancy_weight": -0.1}, r"redundancy_weight: found -0\.1; expected 0 or more"),
    "reward for mixtures": ({"mix_weight": -1.0}, r"mix_weight: found -1\.0; expected 0 or more"),
    "mixing times nothing": (
        {"mix_weight": 1.0, "redundancy_weight": 0.0},
        r"mix_weight: it is times redundancy_weight, which is 0",
    ),
    "no views": ({"cls": WithoutViews}, r"BarlowTwins with two views .*'view'.*plain_image"),
    "mixed graphs": ({"modality": "graph", "mix_weight": 1.0}, r"BarlowTwins with mix_weight .*graph.*mix_weight=0"),
    "mixed clouds": ({"modality": "point_cloud", "mix_weight": 1.0}, r"BarlowTwins .*point_cloud.*mix_weight=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**options)
