"""Tests of SupReMix: what is mixed and what label it has, a slow loop of the loss, and how labels reach a batch."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.data import DataArguments, PreparedSamples, Samples, load_samples
from mmssl.data.prepared import label_numbers
from mmssl.discovery import options_of
from mmssl.encoder import EncoderConfig
from mmssl.evaluation import evaluate
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modalities.tabular import Tabular
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import ObjectiveOutput, represent, split_labels
from mmssl.objectives.supremix import SupReMix, contrast, correlation
from mmssl.objectives.weighted_sum import Sum
from mmssl.samples import Rows
from mmssl.training import Source, TrainArguments, load_objective, pretrain

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}
SMALL: dict[str, Any] = {"projector_hidden_size": 16, "projector_size": 8}
LABELS = [3.0, -1.5, 0.25, 8.0, 3.0, 1.0]


def key(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model() -> MMSSLModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MMSSLModel(MMSSLConfig(modalities={"image": IMAGE}, **shape))


def make(**options: Any) -> SupReMix:
    return SupReMix(make_model(), **{**SMALL, **options})


def images(labels: Sequence[float] = LABELS) -> Batch:
    pixels = torch.randn(len(labels), 1, 8, 8, generator=key(0))
    return {"pixel_values": pixels, "labels": torch.tensor(labels, dtype=torch.float32)}


def projections(objective: SupReMix, batch: Batch) -> Tensor:
    (modality,) = objective.model.adapters.values()
    tokens = modality.tokenize({"pixel_values": batch["pixel_values"]})
    return F.normalize(objective.projector(represent(objective.model, modality, tokens)), dim=-1)


def draws(objective: SupReMix, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of a step, in the order they are drawn: for positives, for negatives, and from Beta."""
    generator, (a, b) = key(seed), objective.beta
    positive = torch.rand(count, 2 * objective.mixed_positives, generator=generator)
    negative = torch.rand(count, objective.mixed_negatives, generator=generator)
    parameters = torch.tensor([a, b]).expand(count, objective.mixed_negatives, 2)
    gammas = torch._standard_gamma(parameters, generator=generator)
    return positive, negative, gammas[..., 0] / gammas.sum(dim=-1)


# Hard positives


def random_labels(ties: bool, seed: int = 0) -> Tensor:
    """64-bit, so that what is equal on paper is nearly so."""
    labels = 10 * torch.randn(40, generator=key(seed), dtype=torch.float64)
    return labels.round() if ties else labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("window", [None, 4.0])
@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_mixtures_of_hard_positives_have_the_label_of_their_anchor(
    ties: bool, window: float | None, tolerance: float
) -> None:
    """From one that is lower and one that is higher, neither further away than the window."""
    own = random_labels(ties)
    ordered = own.sort().values
    objective = make(mixed_positives=20, window=window, tolerance=tolerance)
    low, high, share, enclosed = objective.enclosing(own, ordered, key())
    assert enclosed.sum() > 20
    below, above, label = ordered[low][enclosed], ordered[high][enclosed], own[enclosed][:, None]
    share = share[enclosed]
    torch.testing.assert_close(share * below + (1 - share) * above, label.expand_as(share), rtol=0, atol=1e-6)
    assert (below < label - tolerance).all() and (above > label + tolerance).all()
    assert (share > 0).all() and (share < 1).all()
    limit = math.inf if window is None else window
    assert (label - below <= limit).all() and (above - label <= limit).all()
    for i, label in enumerate(own.tolist()):  # and nobody is left out who could have some
        has_low = any(tolerance < label - other <= limit for other in own.tolist())
        has_high = any(tolerance < other - label <= limit for other in own.tolist())
        assert bool(enclosed[i]) == (has_low and has_high)


def test_all_that_may_be_mixed_is_mixed_equally_often() -> None:
    own = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0])
    low, high, _, _ = make(mixed_positives=6000, window=2.0).enclosing(own, own, key())
    for index, expected in ((low, {1: 1 / 2, 2: 1 / 2}), (high, {4: 1 / 3, 5: 1 / 3, 6: 1 / 3})):
        share = torch.bincount(index[3], minlength=7) / 6000
        for place in range(7):
            assert share[place].item() == pytest.approx(expected.get(place, 0), abs=0.03)


def test_the_greater_part_is_of_the_nearer_end() -> None:
    """Label 1 between 0 and 4: three quarters of the sample with label 0."""
    own = torch.tensor([0.0, 1.0, 4.0])
    low, high, share, enclosed = make().enclosing(own, own, key())
    assert enclosed.tolist() == [False, True, False]
    assert (low[1] == 0).all() and (high[1] == 2).all() and (share[1] == 0.75).all()


def test_extremes_have_no_hard_positive_and_no_loss_of_their_own() -> None:
    labels = [3.0, -1.5, 0.25, 8.0]
    own = torch.tensor(labels)
    _, _, _, enclosed = make().enclosing(own, own.sort().values, key())
    assert enclosed.tolist() == [True, False, True, False]
    out = make()(images(labels), key())
    assert out.metrics["anchors"] == 0.5 and out.loss.isfinite()


@pytest.mark.parametrize("ties", [False, True])
def test_another_unit_of_the_labels_leaves_hard_positives_as_they_are(ties: bool) -> None:
    own = random_labels(ties)
    first = make(window=5.0, tolerance=0.25).enclosing(own, own.sort().values, key())
    other = 4 * own - 7
    second = make(window=20.0, tolerance=1.0).enclosing(other, other.sort().values, key())
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_another_unit_of_the_labels_leaves_the_loss_as_it_is() -> None:
    first = make(window=4.0, tolerance=0.25)(images(), key()).loss
    second = make(window=8.0, tolerance=0.5)(images([2 * label + 32 for label in LABELS]), key()).loss
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


# Hard negatives


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_hard_negatives_are_mixed_of_all_others_and_of_no_sample_of_the_label(ties: bool, tolerance: float) -> None:
    own = random_labels(ties)[:12]
    ordered = own.sort().values
    other, apart = make(mixed_negatives=2000, tolerance=tolerance).others(own, ordered, key())
    torch.testing.assert_close(apart, (ordered[other] - own[:, None]).abs())
    for i in range(12):
        expected = (ordered - own[i]).abs() > tolerance
        found = torch.bincount(other[i], minlength=12) / 2000
        assert torch.equal(found > 0, expected)
        equally = torch.full_like(found[expected], 1 / int(expected.sum()))
        torch.testing.assert_close(found[expected], equally, rtol=0.35, atol=0)


def test_the_anchors_share_of_a_hard_negative_is_from_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a fifth on the average: Beta(2, 8)."""
    seen: list[Tensor] = []
    objective = make(mixed_positives=0, mixed_negatives=500)

    def mixed(anchor: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        assert torch.equal(first, anchor[:, None])
        seen.append(share)
        return SupReMix.mixed(objective, anchor, first, second, share)

    monkeypatch.setattr(objective, "mixed", mixed)
    objective(images(), key())
    (share,) = seen
    assert stats.kstest(share.flatten().numpy(), stats.beta(2, 8).cdf).pvalue > 0.01


def test_mixtures_are_of_length_one_and_the_share_is_of_the_first() -> None:
    anchor, first, second = (F.normalize(torch.randn(3, 8, generator=key(seed)), dim=-1) for seed in range(3))
    found = make().mixed(anchor, first[:, None], second[:, None], torch.full((3, 1), 0.7))
    expected = F.cosine_similarity(anchor, 0.7 * first + 0.3 * second)
    torch.testing.assert_close(found[:, 0], expected)


# The loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 4.0, "tolerance": 0.8, "magnify": 0.0, "temperature": 0.5},
        {"mixed_positives": 0, "magnify": 3.0},
        {"mixed_negatives": 0},
    ],
    ids=str,
)
def test_objective_equals_a_slow_loop(options: dict[str, Any]) -> None:
    """Loss and gradients; one anchor, positive and negative at a time, each positive alone with all negatives."""
    objective = make(**options)
    batch = images()
    out = objective(batch, key(3))
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()

    z, y = projections(objective, batch), LABELS
    uniform, other, beta = draws(objective, len(y), 3)
    by_label = sorted(range(len(y)), key=lambda i: (y[i], i))
    tolerance, window = objective.tolerance, objective.window or math.inf
    span = max(y) - min(y)
    losses = []
    for i in range(len(y)):
        positives = [z[p] for p in range(len(y)) if p != i and abs(y[p] - y[i]) <= tolerance]
        lower = [p for p in by_label if tolerance < y[i] - y[p] <= window]
        upper = [p for p in by_label if tolerance < y[p] - y[i] <= window]
        count = objective.mixed_positives if lower and upper else 0
        for m in range(count):
            low = lower[int(uniform[i, m] * len(lower))]
            high = upper[int(uniform[i, objective.mixed_positives + m] * len(upper))]
            share = (y[high] - y[i]) / (y[high] - y[low])
            positives.append(F.normalize(share * z[low] + (1 - share) * z[high], dim=0))
        apart = [n for n in by_label if abs(y[n] - y[i]) > tolerance]
        negatives = [(z[n], y[n]) for n in apart]
        for m in range(objective.mixed_negatives):
            n = apart[int(other[i, m] * len(apart))]
            share = beta[i, m].item()
            mixture = F.normalize(share * z[i] + (1 - share) * z[n], dim=0)
            negatives.append((mixture, share * y[i] + (1 - share) * y[n]))
        if not positives:
            continue
        total = torch.zeros(())
        for candidate, label in negatives:
            if abs(label - y[i]) > tolerance:  # a mixture may come to lie that near
                weight = 1 + objective.magnify * abs(label - y[i]) / span
                total = total + weight * torch.exp(z[i] @ candidate / objective.temperature)
        scores = [torch.exp(z[i] @ p / objective.temperature) for p in positives]
        losses.append(torch.stack([-torch.log(score / (score + total)) for score in scores]).mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert out.metrics["anchors"].item() == pytest.approx(len(losses) / len(y))
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_positive_is_not_pushed_away_by_the_others() -> None:
    """Two positives of score 0 and one negative of score 0: log 2, not log 3."""
    positive, negative = torch.zeros(1, 2), torch.zeros(1, 3)
    found = contrast(positive, torch.tensor([[True, True]]), negative, torch.tensor([[True, False, False]]))
    assert found.item() == pytest.approx(math.log(2))


def test_a_sample_is_not_its_own_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a label at a right angle: were a sample its own positive, the similarity were one half."""
    objective = make(mixed_positives=0, mixed_negatives=0)
    monkeypatch.setattr(objective.projector, "forward", lambda values: torch.eye(8)[[0, 1, 2]])
    out = objective(images([1.0, 1.0, 2.0]), key())
    assert out.metrics["positive_similarity"] == 0
    weight = 2  # of the one negative, whose label is as far as any
    assert out.loss.item() == pytest.approx(math.log(1 + weight))


@pytest.mark.parametrize("options", [{}, {"mixed_positives": 0}, {"tolerance": 1.0}], ids=str)
def test_equal_labels_have_no_negatives_no_loss_and_no_gradient(options: dict[str, Any]) -> None:
    objective = make(**options)
    with torch.autograd.set_detect_anomaly(True):  # nor NaN on the way
        out = objective(images([5.0, 5.0, 5.0, 5.5 if "tolerance" in options else 5.0]), key())
        out.loss.backward()
    assert out.loss == 0 and out.metrics["anchors"] == 1 and out.metrics["negative_similarity"] == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in objective.parameters())
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("options", [{"mixed_positives": 0}, {"window": 0.1}], ids=str)
def test_a_batch_without_positives_has_no_loss_and_no_gradient(options: dict[str, Any]) -> None:
    objective = make(**options)
    out = objective(images([1.0, 2.0, 3.0, 4.0]), key())
    out.loss.backward()
    assert out.loss == 0 and out.metrics["anchors"] == 0 and out.metrics["positive_similarity"] == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in objective.parameters())


def test_far_negatives_weigh_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """All similarities are equal, so that only weights count: 1 + m |dy| / range of the label furthest away."""
    labels = [0.0, 0.0, 1.0, 4.0]
    objective = make(mixed_positives=0, mixed_negatives=0, magnify=2.0)
    monkeypatch.setattr(objective.projector, "forward", lambda values: torch.ones(4, 8))
    weights = (1 + 2 * 1 / 4) + (1 + 2 * 4 / 4)
    assert objective(images(labels), key()).loss.item() == pytest.approx(math.log(1 + weights))
    objective.magnify = 0.0
    assert objective(images(labels), key()).loss.item() == pytest.approx(math.log(1 + 2))


def test_hard_negatives_weigh_by_the_label_of_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [0.0, 0.0, 4.0]
    objective = make(mixed_positives=0, mixed_negatives=2)
    monkeypatch.setattr(objective.projector, "forward", lambda values: torch.ones(3, 8))
    _, _, share = draws(objective, 3, 0)
    weights = 2 + (1 + 1 - share[:2]).sum(dim=1)  # the two that have a positive, apart from the third by all there is
    assert objective(images(labels), key()).loss.item() == pytest.approx((1 + weights).log().mean().item())


@pytest.mark.parametrize("detach_mix", [False, True])
def test_mixtures_get_a_gradient_unless_detached(detach_mix: bool) -> None:
    anchor, first, second = (torch.randn(3, 8, generator=key(seed), requires_grad=True) for seed in range(3))
    objective = make(detach_mix=detach_mix)
    objective.mixed(anchor, first[:, None], second[:, None], torch.full((3, 1), 0.3)).sum().backward()
    assert anchor.grad is not None
    for value in (first, second):
        assert (value.grad is None) == detach_mix
        assert detach_mix or value.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_detached_hard_negatives_leave_the_gradient_of_the_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample's own share of its hard negatives gets no gradient either, the sample as an anchor does."""
    z = F.normalize(torch.randn(3, 8, generator=key()), dim=1).requires_grad_()
    objective = make(mixed_positives=0, mixed_negatives=1, detach_mix=True, magnify=0.0, temperature=1.0)
    monkeypatch.setattr(objective.projector, "forward", lambda values: z)
    objective(images([0.0, 0.0, 1.0]), key()).loss.backward()
    _, _, share = draws(objective, 3, 0)
    expected = torch.zeros(())
    unit = F.normalize(z, dim=1)
    for i, other in ((0, 1), (1, 0)):
        mixture = F.normalize(share[i, 0] * unit[i] + (1 - share[i, 0]) * unit[2], dim=0).detach()
        total = torch.exp(unit[i] @ unit[2]) + torch.exp(unit[i] @ mixture)
        expected = expected + torch.log(1 + total / torch.exp(unit[i] @ unit[other])) / 2
    (gradient,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(z.grad, gradient)


def test_order_of_the_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample with the random numbers it had."""
    objective, batch = make(), images([3.0, -1.5, 0.25, 8.0, 2.0, 1.0])
    order = torch.randperm(6, generator=key(1))
    rand, gamma = torch.rand, torch._standard_gamma
    first = objective(batch, key()).loss
    monkeypatch.setattr(torch, "rand", lambda *size, **options: rand(*size, **options)[order])
    monkeypatch.setattr(torch, "_standard_gamma", lambda *args, **options: gamma(*args, **options)[order])
    second = objective({name: value[order] for name, value in batch.items()}, key()).loss
    torch.testing.assert_close(first, second)


def test_loss_is_in_full_precision_under_autocast() -> None:
    z = F.normalize(torch.randn(6, 8, generator=key()), dim=1)
    objective = make()
    objective.projector.forward = lambda values: z  # type: ignore[method-assign]
    full = objective(images(), key()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective(images(), key()).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=1e-6, atol=0)


def test_correlation_is_pearsons() -> None:
    first, second = torch.randn(2, 5, 5, generator=key())
    where = ~torch.eye(5, dtype=torch.bool)
    expected = stats.pearsonr(first[where].numpy(), second[where].numpy()).statistic
    assert correlation(first, second, where).item() == pytest.approx(expected, rel=1e-4)
    assert correlation(first, torch.zeros(5, 5), where) == 0


def test_samples_that_lie_on_an_arc_by_label_correlate(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make()
    labels = torch.linspace(0, 1, 6)
    arc = torch.stack([labels.cos(), labels.sin()], dim=1)
    monkeypatch.setattr(objective.projector, "forward", lambda values: arc)
    assert objective(images(labels.tolist()), key()).metrics["label_correlation"] > 0.9
    assert objective(images(labels.flip(0).roll(3).tolist()), key()).metrics["label_correlation"] < 0.2


@pytest.mark.slow
def test_training_orders_embeddings_by_label() -> None:
    """Spearman's correlation of how far labels and representations lie apart rises, on samples not trained on."""
    torch.manual_seed(0)
    objective = make(temperature=0.2)
    y = 10 * torch.rand(160, generator=key(1))
    pattern, noise = torch.randn(2, 64, generator=key(2)), torch.randn(160, 64, generator=key(3))
    pixels = ((y / 3).sin()[:, None] * pattern[0] + (y / 3).cos()[:, None] * pattern[1] + noise).view(160, 1, 8, 8)
    (modality,) = objective.model.adapters.values()

    def agreement() -> float:
        with torch.no_grad():
            found = represent(objective.model, modality, modality.tokenize({"pixel_values": pixels[96:]}))
        pairs = torch.triu_indices(64, 64, 1)
        distance, gap = torch.cdist(found, found)[pairs[0], pairs[1]], (y[96:, None] - y[96:])[pairs[0], pairs[1]].abs()
        return stats.spearmanr(distance.numpy(), gap.numpy()).statistic

    before = agreement()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(60):
        loss = objective({"pixel_values": pixels[:96], "labels": y[:96]}, key(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agreement() > before + 0.1


# Labels in a batch


def prepared(count: int = 8, **options: Any) -> PreparedSamples:
    """Images whose grey is their label."""
    grey = [np.full((8, 8), i / 10, dtype=np.float32) for i in range(count)]
    samples = Samples(grey, "image {}".format, np.arange(count) / 10)
    return PreparedSamples(samples, Image(**IMAGE, image_mean=0.0, image_std=1.0), **options)


class Blind(Image):
    """Cannot read some of the samples."""

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        if round(float(sample[0, 0]) * 10) in (2, 3, 7):
            raise ValueError("unreadable")
        return super().prepare(sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_stay_with_their_samples(workers: int) -> None:
    """Also where an unreadable sample gives way to the next one, where samples are repeated, and in any order."""
    data = prepared(on_error="skip", repeat=2)
    data.modality = Blind(**IMAGE, image_mean=0.0, image_std=1.0)
    data.add_labels()
    found = []
    for batch in DataLoader(data, 4, shuffle=True, num_workers=workers, collate_fn=data.collate, generator=key()):
        labels = batch["inputs"]["labels"]
        assert labels.shape == (4,) and labels.dtype == torch.float32
        torch.testing.assert_close(labels, batch["inputs"]["pixel_values"][:, 0, 0, 0])
        found += [round(10 * label) for label in labels.tolist()]
    assert sorted(found) == sorted(2 * [0, 1, 4, 4, 4, 5, 6, 0])


def test_without_the_need_there_are_no_labels() -> None:
    data = prepared()
    assert set(data.collate([data[0], data[1]])["inputs"]) == {"pixel_values"}
    data.add_labels()
    assert set(data[0][0]) == {"pixel_values", "labels"}
    assert "labels" not in data.modality.prepare(data.samples.values[0])


def table_of(folder: Path, column: Sequence[Any], name: str = "target") -> Samples:
    frame = pandas.DataFrame({"a": np.arange(len(column)), name: pandas.Series(column)})
    frame.to_parquet(folder / "table.parquet")
    return load_samples(DataArguments(str(folder / "table.parquet"), label_column=name), Tabular())


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([30.5, -2.0, 1e6], [30.5, -2.0, 1e6]),
        ([47, 3, 18], [47.0, 3.0, 18.0]),
        ([-5, 10, 2], [-5.0, 10.0, 2.0]),
        (["20", "3", "-1.5"], [20.0, 3.0, -1.5]),
    ],
    ids=["floats", "integers", "negative integers", "numbers as text"],
)
def test_numbers_of_a_column_are_the_labels(tmp_path: Path, column: list, expected: list[float]) -> None:
    """Integers are not numbered as classes, in the order of which they would be 2, 0, 1."""
    assert label_numbers(table_of(tmp_path, column)).tolist() == expected


def test_digits_and_folders_named_by_numbers_count(tmp_path: Path) -> None:
    from PIL import Image as PILImage

    digits = load_samples(DataArguments("digits"), Image(**IMAGE))
    assert label_numbers(digits).tolist() == list(digits.labels)  # type: ignore[arg-type]
    for age in ("9", "20", "100"):
        (tmp_path / age).mkdir()
        PILImage.new("L", (8, 8)).save(tmp_path / age / "face.png")
    faces = load_samples(DataArguments(str(tmp_path)), Image(**IMAGE))
    ages = {Path(faces.name(i)).parent.name: label for i, label in enumerate(label_numbers(faces).tolist())}
    assert ages == {"9": 9.0, "20": 20.0, "100": 100.0}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["low", "high", "low"], r"data.label_column: the label of .*row 0 is low; expected a number"),
        ([1, None, 3], r"data.label_column: row 1 of target is (nan|None); expected a number"),
        ([1.0, float("nan"), 3.0], r"data.label_column: row 1 of target is (nan|None); expected a number"),
        (["1", "2", None], r"data.label_column: the label of .*row 2 is None; expected a number"),
        (["1", "inf", "2"], r"data.label_column: the label of .*row 1 is inf; expected a number"),
        ([True, False, True], r"data.label_column: the label of .*row 0 is True; expected a number"),
    ],
    ids=str,
)
def test_labels_that_are_no_numbers_are_refused_by_name(tmp_path: Path, column: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_numbers(table_of(tmp_path, column))


def test_missing_labels_are_refused_by_name() -> None:
    values = list(np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match=r"data\.label_column: the label of image 1 is nan; expected a number"):
        label_numbers(Samples(values, "image {}".format, np.array([0.0, np.nan, 1.0])))
    with pytest.raises(ValueError, match=r"data\.label_column: the label of image 2 is -1; expected a number"):
        label_numbers(Samples(values, "image {}".format, np.array([0, 1, -1]), ["5", "6"]))
    with pytest.raises(ValueError, match=r"data\.label_column: found no label for each sample"):
        label_numbers(Samples(values, "image {}".format))
    assert label_numbers(Samples(values, str, np.array([4, 0, 2]))).tolist() == [4, 0, 2]  # numbers without names


# Runs


class Watched(SupReMix):
    """Notes what it is given; a sample's first cell is its label in another unit."""

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        inputs, labels = split_labels(batch)
        assert set(inputs) == {"cells"} and labels is not None
        assert stats.pearsonr(inputs["cells"][:, 0].numpy(), labels.numpy()).statistic == pytest.approx(1, abs=1e-5)
        return super().forward(batch, generator)


def run(folder: Path, objective: Any = SupReMix, data: DataArguments | None = None, **train: Any) -> Path:
    """Pretrain on a table of 40 rows in which the first column is half of the target."""
    if data is None:
        target = np.random.default_rng(0).normal(size=40) * 100
        frame = pandas.DataFrame({"half": target / 2, "noise": np.random.default_rng(1).normal(size=40), "y": target})
        frame.to_csv(folder / "table.csv", index=False)
        data = DataArguments(str(folder / "table.csv"), label_column="y")
    flags = {"max_train_steps": 6, "per_device_train_batch_size": 16, "logging_steps": 1, **train}
    return pretrain(
        Tabular(),
        partial(objective, **SMALL) if isinstance(objective, type) else objective,
        EncoderConfig(16, 1, 2),
        data,
        TrainArguments(str(folder / "run"), **flags),
    )


@pytest.mark.filterwarnings("ignore:the column half")
def test_a_run_reads_the_labels_of_its_samples_and_never_as_inputs(tmp_path: Path) -> None:
    folder = run(tmp_path, Watched, dataloader_num_workers=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert {"anchors", "positive_similarity", "negative_similarity", "label_correlation"} <= set(lines[0])
    record = json.loads((folder / "run.json").read_text())
    assert [column["name"] for column in record["modality"]["tabular"]["schema"]] == ["half", "noise"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the column half")
def test_a_finished_run_loads(tmp_path: Path) -> None:
    found = load_objective(run(tmp_path, max_train_steps=1))
    assert isinstance(found, SupReMix) and found.beta == (2.0, 8.0) and found.projector_size == 8


@pytest.mark.filterwarnings("ignore:the column half")
def test_probes_of_it_need_test_data_of_their_own(tmp_path: Path) -> None:
    """A part that is held out of what it has read would flatter it."""
    folder = run(tmp_path, max_train_steps=1)
    data = DataArguments(str(tmp_path / "table.csv"), label_column="y")
    with pytest.raises(ValueError, match="a model that learned from labels, perhaps from those that would be held out"):
        evaluate([folder], data, protocols=["knn"])
    assert evaluate([folder], data, replace(data, max_samples=20), protocols=["knn"])


def test_a_run_without_numbers_for_labels_is_refused_before_it_begins(tmp_path: Path) -> None:
    for source in ("arrow_head_of_words", "unlabelled"):
        frame = pandas.DataFrame({"a": range(40), "b": np.random.default_rng(0).normal(size=40)})
        label_column = None
        if source != "unlabelled":
            frame["y"], label_column = ["low", "high"] * 20, "y"
        frame.to_csv(tmp_path / "words.csv", index=False)
        data = DataArguments(str(tmp_path / "words.csv"), label_column=label_column)
        with pytest.raises(ValueError, match=r"data\.label_column: .* expected (a number|one)"):
            run(tmp_path, data=data)
        assert not (tmp_path / "run").exists()


TERMS: dict[str, dict[str, Any]] = {
    "pixels": {"class_path": "MaskedReconstruction", "init_args": {"decoder_layers": 1, "decoder_hidden_size": 8}},
    "labels": {"class_path": "SupReMix", "init_args": SMALL},
}


def test_a_sum_needs_labels_if_a_term_does_and_gives_them_to_that_one_alone() -> None:
    assert not Sum(make_model(), {"pixels": TERMS["pixels"]}).needs_labels and not Sum.needs_labels
    both = Sum(make_model(), TERMS)
    assert both.needs_labels
    batch = images()
    out = both(batch, key())  # reconstruction would not know a batch with labels
    out.loss.backward()
    assert out.metrics["labels/loss"] > 0 and "labels" in batch
    assert all(p.grad is not None for p in both.parameters() if p.requires_grad)
    only = Sum(make_model(), {"labels": TERMS["labels"]})
    alone = SupReMix(make_model(), **SMALL)
    alone.load_state_dict(only.objectives["labels"].state_dict(), strict=False)
    assert torch.equal(only(batch, key()).loss, alone(batch, key()).loss)


@pytest.mark.filterwarnings("ignore:the column half")
def test_a_run_of_a_sum_reads_labels(tmp_path: Path) -> None:
    folder = run(tmp_path, lambda model: Sum(model, TERMS), max_train_steps=2)
    assert '"labels/label_correlation"' in (folder / "metrics.jsonl").read_text()


def test_a_joint_run_reads_the_labels_of_each_modality(tmp_path: Path) -> None:
    also = Source(Image(**IMAGE), DataArguments("digits", max_samples=40))
    folder = pretrain(
        Tabular(),
        partial(SupReMix, **SMALL),
        EncoderConfig(16, 1, 2),
        DataArguments("diabetes", max_samples=40),
        TrainArguments(str(tmp_path), max_train_steps=6, per_device_train_batch_size=16, logging_steps=6),
        also=[also],
    )
    line = json.loads((folder / "metrics.jsonl").read_text())
    assert line["loss/tabular"] > 0 and line["loss/image"] > 0


# What is refused


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="SupReMix: found a batch without labels"):
        make()(split_labels(images())[0], key())


def test_a_batch_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="SupReMix: found a batch of 2 samples; expected at least 3"):
        make()(images([1.0, 2.0]), key())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: found 0.0; expected a number above 0"),
        ({"mixed_positives": -1}, "mixed_positives: found -1"),
        ({"mixed_negatives": -1}, "mixed_negatives: found -1"),
        ({"tolerance": -0.5}, "tolerance: found -0.5"),
        ({"magnify": -1.0}, "magnify: found -1.0"),
        ({"window": 0.0}, "window: found 0.0 with tolerance 0.0"),
        ({"window": 1.0, "tolerance": 1.0}, "window: found 1.0 with tolerance 1.0"),
        ({"beta": (0.0, 8.0)}, "beta: found (0.0, 8.0)"),
        ({"beta": (2.0,)}, "beta: found (2.0,)"),
        ({"projector_size": 0}, "projector_size 0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


def test_options_go_through_json() -> None:
    objective = make(beta=(1.0, 3.0), window=2.0)
    again = SupReMix(make_model(), **json.loads(json.dumps(options_of(objective))))
    assert options_of(again) == options_of(objective)


def test_no_views_are_needed() -> None:
    class WithoutViews(Image):
        name: ClassVar = "image"
        view = Modality.view

    model = make_model()
    model.modalities["image"] = WithoutViews(**IMAGE).build(16)
    assert SupReMix(model, **SMALL)(images(), key()).loss.isfinite()


def test_rows_of_a_table_keep_the_label_column_apart() -> None:
    """The label is in no column that the encoder reads."""
    samples = load_samples(DataArguments("diabetes"), Tabular())
    assert isinstance(samples.values, Rows) and len(samples.values.columns) == 10
    assert label_numbers(samples).tolist() == pytest.approx(list(samples.labels))  # type: ignore[arg-type]
