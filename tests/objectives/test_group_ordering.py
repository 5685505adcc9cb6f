"""Tests of group ordering: the values of closed examples, a slow sorting network, and who is an anchor of whom."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives import group_ordering
from mmssl.objectives.base import represent, views_of
from mmssl.objectives.group_ordering import GroupOrdering, ordering_loss, soft_permutation

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "crop_scale": (0.5, 1.0)}
SMALL: dict[str, Any] = {"projector_hidden_size": 16, "projector_size": 8, "num_negatives": 3}


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model() -> MMSSLModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MMSSLModel(MMSSLConfig(modalities={"image": IMAGE}, **shape))


def make(**options: Any) -> GroupOrdering:
    return GroupOrdering(make_model(), **{**SMALL, **options})


def images(count: int = 6) -> Batch:
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=key(0))}


def loss(positive: Any, negative: Any, steepness: float = 1.0) -> float:
    rows = torch.tensor([positive], dtype=torch.float64), torch.tensor([negative], dtype=torch.float64)
    return ordering_loss(*rows, steepness).item()


def slow_network(values: list[float], steepness: float) -> list[list[float]]:
    """How far each element lies at each rank, pair by pair and element by element."""
    n, values = len(values), list(values)
    share = [[float(element == rank) for rank in range(n)] for element in range(n)]
    for layer in range(n):
        for at in range(layer % 2, n - 1, 2):
            stay = 0.5 + math.atan(steepness * (values[at + 1] - values[at])) / math.pi
            for row in (values, *share):
                low, high = row[at], row[at + 1]
                row[at], row[at + 1] = stay * low + (1 - stay) * high, (1 - stay) * low + stay * high
    return share


# The loss of given similarities


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        (1.0, [-1.0] * 10, 0.14697),
        (0.8, [0.1 + 0.4 * n / 9 for n in range(10)], 0.19281),
        (0.3, [0.3] * 10, 0.20198),
        (-1.0, [1.0] * 10, 0.26433),
    ],
    ids=["apart", "ordered", "equal", "reversed"],
)
def test_loss_of_known_similarities(positive: float, negative: list[float], expected: float) -> None:
    """One positive, ten negatives, steepness 1; in whatever order the negatives come."""
    assert loss([positive], negative) == pytest.approx(expected, abs=6e-6)
    assert loss([positive], negative[::-1]) == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize("steepness", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("length", [2, 5, 8])
def test_soft_permutation_equals_a_slow_network(length: int, steepness: float) -> None:
    values = torch.randn(4, length, generator=key(length), dtype=torch.float64)
    found = soft_permutation(values, steepness)
    for row in range(4):
        expected = torch.tensor(slow_network(values[row].tolist(), steepness), dtype=torch.float64)
        torch.testing.assert_close(found[row], expected)


def test_rows_and_columns_of_the_permutation_sum_to_one() -> None:
    values = torch.randn(20, 11, generator=key())
    found = soft_permutation(values, 2.0)
    for axis in (1, 2):
        torch.testing.assert_close(found.sum(dim=axis), torch.ones(20, 11), rtol=0, atol=1e-6)
    assert (found >= 0).all()


def test_a_steep_network_sorts() -> None:
    """Rows are elements and columns ranks: values times the permutation are in ascending order."""
    values = torch.stack([torch.randperm(9, generator=key(seed)).double() for seed in range(10)])
    found = soft_permutation(values, 1e4)
    assert ((found - found.round()).abs() < 1e-3).all()
    torch.testing.assert_close(torch.einsum("bi,bir->br", values, found), values.sort().values, rtol=0, atol=1e-2)
    ranks = values.argsort(dim=1).argsort(dim=1)
    assert torch.equal(found.argmax(dim=2), ranks)


def test_a_steep_loss_is_zero_in_order_and_large_where_reversed() -> None:
    assert loss([0.9, 0.8], [0.1, 0.2, -0.3], 1e4) < 1e-3
    assert loss([-0.9, -0.8], [0.1, 0.2, 0.3], 1e4) > 1
    assert loss([0.8, 0.9], [0.1, 0.2, -0.3], 1e4) < 1e-3  # how positives are ordered does not count


def test_loss_is_the_cross_entropy_of_the_groups_mass() -> None:
    """A slow loop over presorted elements; positives and negatives carry the same mass in the wrong ranks."""
    positive, negative = torch.rand(5, 2, generator=key()), torch.rand(5, 4, generator=key(1))
    total = wrong_up = wrong_down = 0.0
    for row in range(5):
        values = sorted(negative[row].tolist()) + sorted(positive[row].tolist())
        share = slow_network(values, 3.0)
        for element in range(6):
            up = sum(share[element][4:])
            total -= math.log(up) if element >= 4 else math.log(1 - up)
            wrong_up, wrong_down = wrong_up + (element < 4) * up, wrong_down + (element >= 4) * (1 - up)
    assert ordering_loss(positive, negative, 3.0).item() == pytest.approx(total / 30, rel=1e-5)
    assert wrong_up == pytest.approx(wrong_down)


def test_gradient_raises_positives_and_lowers_negatives() -> None:
    positive, negative = torch.full((1, 1), 0.2, requires_grad=True), torch.full((1, 10), 0.3, requires_grad=True)
    ordering_loss(positive, negative, 1.0).backward()
    assert positive.grad is not None and negative.grad is not None
    assert positive.grad.item() < 0 and negative.grad.sum().item() > 0


def test_loss_is_in_full_precision_under_autocast() -> None:
    positive, negative = torch.rand(4, 1, generator=key()), torch.rand(4, 5, generator=key(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ordering_loss(positive, negative, 1.0), ordering_loss(positive, negative, 1.0).float())
        half = ordering_loss(positive, negative, 1.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ordering_loss(positive, negative, 1.0), rtol=0, atol=0)


# Anchors, positives and negatives


def projections(objective: GroupOrdering, batch: Batch, seed: int) -> list[Tensor]:
    (modality,) = objective.model.adapters.values()
    views = views_of(modality, batch, key(seed), objective.num_views)
    return [F.normalize(objective.projector(represent(objective.model, modality, view)), dim=-1) for view in views]


@pytest.mark.parametrize("num_views", [2, 4])
def test_objective_equals_a_slow_loop(num_views: int) -> None:
    """Loss and gradients, with positives and negatives held: other views of the sample, the same view of others."""
    objective = make(num_views=num_views)
    objective(images(), key(3)).loss.backward()
    found = objective(images(), key(3)).loss
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    views = projections(objective, images(), 3)
    losses = []
    for v in range(num_views):
        for row in range(6):
            anchor = views[v][row]
            positive = [anchor @ views[w][row].detach() for w in range(num_views) if w != v]
            others = sorted([anchor @ views[v][n].detach() for n in range(6) if n != row])
            losses.append(ordering_loss(torch.stack(positive)[None], torch.stack(others[-3:])[None], 1.0))
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(found, expected)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_other_views_of_a_sample_are_no_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that are the same for each sample, and all samples at right angles: every negative scores 0."""
    objective = make(num_views=3)
    monkeypatch.setattr(objective.projector, "forward", lambda values: torch.eye(8)[: len(values)])
    out = objective(images(), key())
    assert out.metrics["hard_negative_similarity"] == 0 and out.metrics["positive_similarity"] == 1
    assert out.metrics["accuracy"] == 1
    assert out.loss.item() == pytest.approx(loss([1.0, 1.0], [0.0] * 3), rel=1e-6)


def test_positives_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the loss of one view's anchors is of that view alone."""
    given = [F.normalize(torch.randn(6, 8, generator=key(seed)), dim=1).requires_grad_() for seed in range(2)]
    calls = iter(given)
    objective = make()
    monkeypatch.setattr(objective.projector, "forward", lambda values: next(calls))
    kept: list[Tensor] = []
    monkeypatch.setattr(
        group_ordering,
        "ordering_loss",
        lambda *args: kept.append(ordering_loss(*args)) or kept[-1],  # type: ignore
    )
    objective(images(), key())
    for number, each in enumerate(kept):
        gradients = torch.autograd.grad(each, given, allow_unused=True, retain_graph=True)
        assert gradients[number] is not None and gradients[number].abs().sum() > 0
        assert gradients[1 - number] is None or gradients[1 - number].abs().sum() == 0


def test_order_of_the_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.randn(2, 6, 8, generator=key())
    found = []
    for order in (torch.arange(6), torch.randperm(6, generator=key(1))):
        calls = iter([first[order], second[order]])
        objective = make()
        monkeypatch.setattr(objective.projector, "forward", lambda values, calls=calls: next(calls))
        found.append(objective(images(), key()).loss)
    torch.testing.assert_close(found[0], found[1])


def test_accuracy_counts_anchors_whose_positives_are_all_above_their_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(num_negatives=2, num_views=3)
    first = torch.eye(8)[:4] + 0.5 * torch.eye(8)[4]
    second, third = first.clone(), first.clone()
    third[0] = torch.eye(8)[7]  # one of two positives of sample 0 is at a right angle, negatives are not
    calls = iter([first, second, third])
    monkeypatch.setattr(objective.projector, "forward", lambda values: next(calls))
    assert objective(images(4), key()).metrics["accuracy"] == 0.75


# What is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_views": 1}, "num_views"),
        ({"num_negatives": 0}, "num_negatives"),
        ({"steepness": 0.0}, "steepness"),
        ({"projector_layers": 0}, "projector_layers"),
        ({"projector_hidden_size": 0}, "projector_hidden_size"),
        ({"projector_size": 0}, "projector_size"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}: found"):
        make(**options)


def test_a_batch_with_too_few_negatives_is_refused() -> None:
    assert make(num_negatives=3)(images(4), key()).loss.isfinite()
    with pytest.raises(
        ValueError, match=r"GroupOrdering: found a batch of 4 samples.*num_negatives=4 needs at least 5"
    ):
        make(num_negatives=4)(images(4), key())


def test_a_modality_without_views_is_refused() -> None:
    model = make_model()
    model.modalities["image"] = WithoutViews(**IMAGE).build(16)
    with pytest.raises(ValueError, match=r"GroupOrdering.*plain_image"):
        GroupOrdering(model)
