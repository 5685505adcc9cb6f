"""Tests of contrastive learning: slow loops, closed forms, and what a leak or a wrong index would break."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives import contrastive
from mmssl.objectives.base import represent, views_of
from mmssl.objectives.contrastive import (
    Contrastive,
    beta,
    extrapolate,
    info_nce,
    interpolate,
    mixtures,
    score_metrics,
    uniformity,
)
from mmssl.tokens import Tokens
from mmssl.training import TrainArguments, pretrain

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "crop_scale": (0.5, 1.0)}
SMALL: dict[str, Any] = {"projector_hidden_size": 16, "projector_size": 8, "temperature": 0.2}
MOCO: dict[str, Any] = {"momentum": (0.9, 1.0)}
QUEUE: dict[str, Any] = {**MOCO, "queue_size": 24}
MOCHI: dict[str, Any] = {"hard_negatives": 6, "mixed_negatives": 5, "query_mixed_negatives": 3}
TRANSFORMED: dict[str, Any] = {"extrapolation": 2.0, "interpolation": 1.6}
EVERYTHING: dict[str, Any] = {**QUEUE, **MOCHI, **TRANSFORMED}


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


class WithoutAlterations(Image):
    name: ClassVar = "plain_image"
    alter = Modality.alter


def key(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model() -> MMSSLModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MMSSLModel(MMSSLConfig(modalities={"image": IMAGE}, **shape))


def make(**options: Any) -> Contrastive:
    """A small objective, all of whose parameters are away from their start values, the teacher's from the student's."""
    objective = Contrastive(make_model(), **{**SMALL, **options})
    generator = key(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return objective.train()


def images(count: int = 5) -> Batch:
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=key(0))}


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=key(seed), dtype=torch.float64), dim=-1)


def seen(objective: Contrastive, batch: Batch, seed: int) -> tuple[Modality, list[Tokens]]:
    """The views that a forward pass with this key begins with."""
    (modality,) = objective.model.adapters.values()
    return modality, views_of(modality, batch, key(seed))


def of_student(objective: Contrastive, batch: Batch, seed: int) -> list[Tensor]:
    modality, views = seen(objective, batch, seed)
    return [objective.query(represent(objective.model, modality, view)) for view in views]


# InfoNCE


def test_info_nce_equals_a_slow_loop() -> None:
    query, positive, shared, own = units(4, 6), units(4, 6, seed=1), units(5, 6, seed=2), units(4, 3, 6, seed=3)
    excluded = torch.rand(4, 5, generator=key(4)) < 0.4
    found = info_nce(query, positive, shared, 0.3, excluded, own)
    for row in range(4):
        score = math.exp(float(query[row] @ positive[row]) / 0.3)
        total = score
        for column in range(5):
            if not excluded[row, column]:
                total += math.exp(float(query[row] @ shared[column]) / 0.3)
        for number in range(3):
            total += math.exp(float(query[row] @ own[row, number]) / 0.3)
        assert found[row].item() == pytest.approx(-math.log(score / total), rel=1e-5)


@pytest.mark.parametrize("count", [2, 5])
def test_simclr_is_the_cross_entropy_of_the_whole_matrix_of_similarities(count: int) -> None:
    """NT-Xent another way: all 2B views against all of them, the diagonal blotted out; loss and gradients."""
    objective = make()
    found = objective(images(count), key(3))
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()

    both = torch.cat(of_student(objective, images(count), 3))
    matrix = (both @ both.T / 0.2).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(matrix, (torch.arange(2 * count) + count) % (2 * count))
    expected.backward()
    torch.testing.assert_close(found.loss, expected)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("count", [2, 5])
def test_simclr_with_all_views_equal_is_the_log_of_the_number_of_candidates(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make()
    monkeypatch.setattr(objective, "query", lambda values: torch.ones(len(values), 4) / 2)
    assert objective(images(count), key()).loss.item() == pytest.approx(math.log(2 * count - 1))


@pytest.mark.parametrize(
    ("options", "candidates"), [(MOCO, 5), ({**MOCO, "predictor_layers": 2}, 5), (QUEUE, 25)], ids=["v3", "v3p", "v2"]
)
def test_with_unrelated_keys_the_loss_is_the_log_of_the_number_of_candidates(
    options: dict[str, Any], candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of SiT, sum of both directions times 2 * 0.2, it is 0.8 log B."""
    for scaled, factor in ((False, 1.0), (True, 0.8)):
        objective = make(**options, scale_by_temperature=scaled)
        monkeypatch.setattr(objective, "query", lambda values: F.one_hot(torch.zeros(5).long(), 8).float())
        monkeypatch.setattr(objective, "keys", lambda *_: [torch.eye(8)[1:6], torch.eye(8)[1:6]])
        if "queue_size" in options:
            objective.queue.features = objective.queue.features.index_fill(1, torch.tensor(0), 0.0)
        assert objective(images(5), key()).loss.item() == pytest.approx(factor * math.log(candidates), rel=1e-6)


def test_at_the_start_the_loss_is_near_that_of_unrelated_keys() -> None:
    """Views and projections of an untrained model that are normalised over the batch say little about each other."""
    torch.manual_seed(0)
    objective = Contrastive(make_model(), **{**SMALL, **MOCO, "projector_size": 64, "predictor_layers": 2})
    loss = objective({"pixel_values": torch.randn(64, 1, 8, 8, generator=key(5))}, key()).loss
    assert loss.item() == pytest.approx(math.log(64), rel=0.1)


# Keys of a moving average


def slow(query: Tensor, positive: Tensor, negatives: list[Tensor]) -> Tensor:
    scores = torch.stack([query @ positive, *(query @ each for each in negatives)]) / 0.2
    return scores.logsumexp(dim=0) - scores[0]


@pytest.mark.parametrize("predictor_layers", [0, 2])
def test_moco_v3_equals_a_slow_loop(predictor_layers: int) -> None:
    """Queries of the student's view 1, keys of the teacher's view 2, negatives are the keys of the other samples."""
    objective = make(**MOCO, predictor_layers=predictor_layers)
    modality, views = seen(objective, images(), 3)
    queries = of_student(objective, images(), 3)
    model, projector = objective.teacher.module, objective.teacher_projector.module
    keys = [F.normalize(projector(represent(model, modality, view)), dim=-1) for view in views]
    losses = []
    for query, other in ((queries[0], keys[1]), (queries[1], keys[0])):
        for row in range(5):
            losses.append(slow(query[row], other[row], [other[n] for n in range(5) if n != row]))
    torch.testing.assert_close(objective(images(), key(3)).loss, torch.stack(losses).mean())
    scaled = make(**MOCO, predictor_layers=predictor_layers, scale_by_temperature=True)
    both = torch.stack(losses).unflatten(0, (2, 5)).mean(dim=1).sum()
    torch.testing.assert_close(scaled(images(), key(3)).loss, 2 * 0.2 * both)


def test_moco_with_a_queue_equals_a_slow_loop() -> None:
    """Negatives are the queue alone, in both directions."""
    objective = make(**QUEUE)
    modality, views = seen(objective, images(), 3)
    keys, queries = objective.keys(modality, views), of_student(objective, images(), 3)
    queue = list(objective.queue.features)
    losses = [slow(queries[0][row], keys[1][row], queue) for row in range(5)]
    losses += [slow(queries[1][row], keys[0][row], queue) for row in range(5)]
    torch.testing.assert_close(objective(images(), key(3)).loss, torch.stack(losses).mean())


@pytest.mark.parametrize(
    "options", [{}, MOCO, {**MOCO, "predictor_layers": 2}, QUEUE], ids=["SimCLR", "v3", "v3p", "v2"]
)
def test_swapping_the_views_changes_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(**options)
    first = objective(images(), key()).loss
    monkeypatch.setattr(contrastive, "views_of", lambda *args: views_of(*args)[::-1])
    torch.testing.assert_close(objective(images(), key()).loss, first)


@pytest.mark.parametrize("options", [MOCO, EVERYTHING], ids=["v3", "everything"])
def test_teacher_and_queue_get_no_gradient(options: dict[str, Any]) -> None:
    objective = make(**options)
    modality, views = seen(objective, images(), 0)
    assert not any(each.requires_grad for each in objective.keys(modality, views))
    if "queue_size" in options:
        objective.queue.features.requires_grad_(False)
    objective(images(), key()).loss.backward()
    for teacher in (objective.teacher, objective.teacher_projector):
        assert not teacher.training
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    if "queue_size" in options:
        assert objective.queue.features.grad is None and not objective.queue.features.requires_grad
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_without_momentum_keys_have_a_gradient() -> None:
    """The gradient of SimCLR is not that of the same loss with its keys held."""
    objective = make()
    first, second = of_student(objective, images(), 0)
    (both,) = torch.autograd.grad(objective(images(), key()).loss, [next(objective.projector.parameters())])
    held = torch.cat([first.detach(), second.detach()])
    excluded = torch.eye(5, dtype=torch.bool).repeat(1, 2)
    losses = [
        info_nce(query, positive.detach(), held, 0.2, excluded).mean()
        for query, positive in ((first, second), (second, first))
    ]
    (one,) = torch.autograd.grad(torch.stack(losses).mean(), [next(objective.projector.parameters())])
    assert not torch.allclose(both, one, rtol=0.1)


def test_model_and_projector_are_followed_and_the_student_is_what_is_saved() -> None:
    """Along a cosine from the first momentum to the last, half-way at the middle."""
    objective = make(momentum=(0.5, 0.9))
    before = {name: value.clone() for name, value in objective.named_parameters()}
    objective.after_step(0.25)
    momentum = 0.9 - 0.4 * (1 + math.cos(math.pi / 4)) / 2
    moved = 0
    for name, value in objective.named_parameters():
        if name.startswith("teacher"):
            student = name.replace("teacher_projector.module", "projector").replace("teacher.module", "model")
            expected = momentum * before[name] + (1 - momentum) * before[student]
            torch.testing.assert_close(value, expected)
            moved += 1
    assert moved == len([name for name in before if name.startswith(("model", "projector"))])
    assert objective.trained is objective.model


def test_queries_alone_are_read_from_altered_tokens() -> None:
    """As by hand: views, then alterations of both; keys are those of the clean views."""
    objective = make(**MOCO, alter_queries=True)
    (modality,) = objective.model.adapters.values()
    generator = key(3)
    views = views_of(modality, images(), generator)
    altered = [modality.alter(view, generator)[0] for view in views]
    assert all(not torch.equal(one.content, other.content) for one, other in zip(views, altered, strict=True))
    queries = [objective.query(represent(objective.model, modality, each)) for each in altered]
    keys = objective.keys(modality, views)
    losses = []
    for query, other in ((queries[0], keys[1]), (queries[1], keys[0])):
        for row in range(5):
            losses.append(slow(query[row], other[row], [other[n] for n in range(5) if n != row]))
    torch.testing.assert_close(objective(images(), key(3)).loss, torch.stack(losses).mean())


# The queue


@pytest.mark.parametrize("options", [QUEUE, EVERYTHING], ids=["plain", "everything"])
def test_unmixed_keys_of_unit_length_enter_the_queue_after_the_step(options: dict[str, Any]) -> None:
    objective = make(**options)
    modality, views = seen(objective, images(), 3)
    keys, start = torch.cat(objective.keys(modality, views)), objective.queue.features.clone()
    objective(images(), key(3))
    assert torch.equal(objective.queue.features, start)
    objective.after_step(0.5)
    torch.testing.assert_close(objective.queue.features[:10], keys)
    assert torch.equal(objective.queue.features[10:], start[10:]) and objective.queue.pointer == 10
    for step in range(4):
        objective(images(), key(step))
        objective.after_step(0.5)
        torch.testing.assert_close(objective.queue.features.norm(dim=1), torch.ones(24))


def test_every_batch_of_a_step_enters_the_queue_and_none_of_an_evaluation() -> None:
    objective = make(**QUEUE)
    keys = []
    for seed in (3, 4):
        modality, views = seen(objective, images(), seed)
        keys += objective.keys(modality, views)
        objective(images(), key(seed))
    objective.eval()(images(), key(5))
    objective.after_step(0.5)
    torch.testing.assert_close(objective.queue.features[:20], torch.cat(keys))
    assert objective.queue.pointer == 20
    objective.after_step(0.5)
    assert objective.queue.pointer == 20


def test_what_waits_for_the_queue_is_never_more_than_it_holds() -> None:
    objective = make(**{**QUEUE, "queue_size": 7})
    for seed in range(3):
        objective(images(), key(seed))
    modality, views = seen(objective, images(), 2)
    (waiting,) = objective.waiting
    torch.testing.assert_close(waiting, torch.cat(objective.keys(modality, views))[-7:])


def test_a_resumed_run_has_the_queue_of_the_whole_one(tmp_path: Path) -> None:
    def run(folder: str, **more: Any) -> list[float]:
        pretrain(
            Image(**IMAGE),
            partial(Contrastive, **SMALL, **EVERYTHING),
            EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            DataArguments("digits", max_samples=32),
            TrainArguments(
                str(tmp_path / folder),
                per_device_train_batch_size=4,
                max_train_steps=6,
                logging_steps=1,
                gradient_accumulation_steps=2,
                checkpointing_steps=3,
                **more,
            ),
        )
        return [json.loads(line)["loss"] for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    whole = run("whole", checkpoints_total_limit=None)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step_6", ignore_errors=True)
    (tmp_path / "cut" / "objective.safetensors").unlink()
    assert run("cut", resume_from_checkpoint="latest") == whole
    one, two = (load_file(tmp_path / folder / "objective.safetensors") for folder in ("whole", "cut"))
    assert one["queue.pointer"] == 6 * 16 % 24
    assert all(torch.equal(one[name], two[name]) for name in one)


# MoCHi


def fit(columns: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """The weights that make the wanted vectors from columns, and the length of what is left over."""
    columns, wanted = columns.double(), wanted.double()
    weights = torch.linalg.pinv(columns) @ wanted
    return weights, float((columns @ weights - wanted).norm(dim=0).max())


def test_mixtures_have_unit_length_and_no_gradient() -> None:
    query = units(3, 8).requires_grad_()
    made = mixtures(query, units(20, 8, seed=1).requires_grad_(), 5, 4, 3, key())
    assert made.shape == (3, 7, 8) and not made.requires_grad
    torch.testing.assert_close(made.norm(dim=-1), torch.ones(3, 7))


def test_mixtures_lie_in_the_span_of_the_query_s_own_hard_negatives() -> None:
    """Two queries whose hard negatives have nothing in common: what is gathered for one must not go to the other."""
    basis = torch.eye(12)
    query = F.normalize(basis[:3].sum(dim=0) + 0.1 * basis[9], dim=0), F.normalize(basis[3:6].sum(dim=0), dim=0)
    negatives = F.normalize(
        torch.cat([basis[:6], -basis[:6], basis[6:9]]) + 0.01 * torch.randn(15, 12, generator=key())
    )
    made = mixtures(torch.stack(query), negatives, 3, 40, 0, key(1))
    for row, own in enumerate((negatives[:3], negatives[3:6])):
        share, residual = fit(own.T, made[row].T)  # (3, 40)
        assert residual < 1e-6
        assert ((share.abs() > 1e-6).sum(dim=0) == 2).all() and (share > -1e-6).all()  # of two different ones
        pairs = {tuple(column.nonzero().flatten().tolist()) for column in (share > 1e-6).T}
        assert pairs == {(0, 1), (0, 2), (1, 2)}


def test_mixtures_with_the_query_are_nearer_to_it_and_never_the_query_itself() -> None:
    query, negatives = units(50, 6), units(40, 6, seed=1)
    made = mixtures(query, negatives, 4, 0, 30, key()).double()
    hardest = (query @ negatives.T).topk(4, dim=1).indices
    for row in range(50):
        share = []
        for one in made[row]:
            # b q + (1 - b) n_j, times a length, for one of the four hard negatives
            fits = [(fit(torch.stack([query[row], negatives[j]], dim=1), one), j) for j in hardest[row]]
            (weights, residual), j = min(fits, key=lambda each: each[0][1])
            assert residual < 1e-6
            assert query[row] @ negatives[j] - 1e-6 <= one @ query[row] < 1
            share.append(float(weights[0] / weights.sum()))
        assert min(share) > -1e-6 and max(share) < 0.5 + 1e-6
        assert max(share) - min(share) > 0.1


def test_hard_negatives_are_the_nearest_to_the_query() -> None:
    """With one hard negative and no weight on the query nothing but the nearest is left."""
    query, negatives = units(20, 6), units(40, 6, seed=1)
    made = mixtures(query, negatives, 1, 0, 8, key()).double()
    for row in range(20):
        nearest = negatives[max(range(40), key=lambda n: float(query[row] @ negatives[n]))]
        plane = torch.linalg.qr(torch.stack([query[row], nearest], dim=1)).Q
        torch.testing.assert_close(made[row] @ plane @ plane.T, made[row], rtol=0, atol=1e-6)


def test_without_mixed_negatives_it_is_moco() -> None:
    plain, none, some = (
        make(**QUEUE, **options)(images(), key(3)).loss for options in ({}, {"hard_negatives": 6}, MOCHI)
    )
    assert torch.equal(plain, none)
    assert some > plain  # more candidates


def test_mixed_negatives_are_candidates_of_their_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a slow loop over queue and mixtures, mixed from the queue as it is."""
    objective = make(**QUEUE, **MOCHI)
    made: list[tuple[tuple[Any, ...], Tensor]] = []

    def spy(*args: Any) -> Tensor:
        made.append((args, mixtures(*args)))
        return made[-1][1]

    monkeypatch.setattr(contrastive, "mixtures", spy)
    found = objective(images(), key(3)).loss
    modality, views = seen(objective, images(), 3)
    keys, queries = objective.keys(modality, views), of_student(objective, images(), 3)
    losses = []
    for (args, extra), query, other in zip(made, queries, keys[::-1], strict=True):
        assert torch.equal(args[0], query) and torch.equal(args[1], objective.queue.features) and args[2:5] == (6, 5, 3)
        losses += [slow(query[row], other[row], [*args[1], *extra[row]]) for row in range(5)]
    torch.testing.assert_close(found, torch.stack(losses).mean())


# Transformed features


@pytest.mark.parametrize("weight", [1.0, 1.3, 2.0])
def test_identity_of_extrapolated_positives(weight: float) -> None:
    """Their score is s + 2 l (1 - l) (1 - s), at most s; their length is at least 1: nothing is normalised again."""
    query, other = units(30, 5), units(30, 5, seed=1)
    score = (query * other).sum(dim=1)
    new_query, new_key = extrapolate(query, other, torch.tensor(weight, dtype=torch.float64))
    new, gap = (new_query * new_key).sum(dim=1), 2 * weight * (1 - weight) * (1 - score)
    torch.testing.assert_close(new, score + gap, rtol=0, atol=1e-6)
    torch.testing.assert_close(new_query.norm(dim=1).square(), 1 - gap, rtol=0, atol=1e-6)
    assert (new <= score + 1e-12).all() and (new_query.norm(dim=1) >= 1 - 1e-12).all()
    if weight > 1:
        assert (new < score).all()


def test_gradient_reaches_the_query_inside_the_extrapolated_key() -> None:
    query, other, weight = units(1, 5)[0].requires_grad_(), units(1, 5, seed=1)[0], 1.7
    new_query, new_key = extrapolate(query, other, torch.tensor(weight, dtype=torch.float64))
    (found,) = torch.autograd.grad(new_query @ new_key, query)
    with torch.no_grad():
        expected = weight * new_key + (1 - weight) * new_query
    torch.testing.assert_close(found, expected)


def test_interpolated_negatives_vary_less() -> None:
    """Of independent rows the variance falls by m^2 + (1 - m)^2, over Beta(1.6, 1.6) by 0.619."""
    negatives, order = torch.randn(20000, 4, generator=key()), torch.randperm(20000, generator=key(1))
    for weight in (0.2, 0.5, 1.0):
        found = interpolate(negatives, torch.tensor(weight), order).var(dim=0).mean() / negatives.var(dim=0).mean()
        assert found.item() == pytest.approx(weight**2 + (1 - weight) ** 2, rel=0.02)
    generator = key(2)
    drawn = torch.stack([beta(1.6, generator) for _ in range(4000)])
    assert (drawn**2 + (1 - drawn) ** 2).mean().item() == pytest.approx(0.619, abs=0.005)


@pytest.mark.parametrize("parameter", [0.5, 1.6, 2.0])
def test_beta_has_the_moments_of_its_distribution(parameter: float) -> None:
    generator = key()
    drawn = torch.stack([beta(parameter, generator) for _ in range(4000)])
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * parameter + 1)), rel=0.06)


def test_with_weights_of_one_it_is_moco(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "beta", lambda parameter, _: torch.tensor(0.0 if parameter == 2.0 else 1.0))
    assert torch.equal(make(**QUEUE, **TRANSFORMED)(images(), key(3)).loss, make(**QUEUE)(images(), key(3)).loss)


def test_transformed_features_equal_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """l = 1 + 0.4 pushes apart; the extrapolated query meets the negatives too, which are mixed 0.3 to 0.7."""
    monkeypatch.setattr(contrastive, "beta", lambda parameter, _: torch.tensor(0.4 if parameter == 2.0 else 0.3))
    order = torch.randperm(24, generator=key(9))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    objective = make(**QUEUE, **TRANSFORMED)
    modality, views = seen(objective, images(), 3)
    keys, queries = objective.keys(modality, views), of_student(objective, images(), 3)
    queue = objective.queue.features
    negatives = [0.3 * queue[n] + 0.7 * queue[order[n]] for n in range(24)]
    losses = []
    for query, other in zip(queries, keys[::-1], strict=True):
        for row in range(5):
            new_query = 1.4 * query[row] - 0.4 * other[row]
            losses.append(slow(new_query, 1.4 * other[row] - 0.4 * query[row], negatives))
    torch.testing.assert_close(objective(images(), key(3)).loss, torch.stack(losses).mean())


# Metrics


def test_metrics_are_of_raw_scores() -> None:
    """Slow loops; neither mixtures nor transforms change what is reported, as they differ from run to run."""
    plain, everything = make(**QUEUE), make(**EVERYTHING)
    metrics, other = (objective(images(), key(3)).metrics for objective in (plain, everything))
    assert metrics == other
    modality, views = seen(plain, images(), 3)
    query, positive = of_student(plain, images(), 3)[0].detach(), plain.keys(modality, views)[1]
    own = torch.stack([query[row] @ positive[row] for row in range(5)])
    scores = torch.stack([query[row] @ plain.queue.features[n] for row in range(5) for n in range(24)])
    nearest = sum(bool(own[row] > scores.view(5, 24)[row].max()) for row in range(5)) / 5
    pairs = torch.stack([(query[i] - query[j]).norm() for i in range(5) for j in range(i)])
    expected = {
        "positive_similarity": own.mean(),
        "positive_similarity_std": own.std(correction=0),
        "negative_similarity": scores.mean(),
        "negative_similarity_std": scores.std(correction=0),
        "accuracy": torch.tensor(nearest),
        "uniformity": (-2 * pairs.square()).exp().mean().log(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-6)
        assert not metrics[name].requires_grad


def test_metrics_leave_out_what_is_no_negative() -> None:
    query, negatives = units(3, 6).float(), units(4, 6, seed=1).float()
    excluded = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    kept = (query @ negatives.T)[~excluded]
    found = score_metrics(query, negatives[[0, 1, 2]], negatives, excluded)
    torch.testing.assert_close(found["negative_similarity"], kept.mean())
    torch.testing.assert_close(found["negative_similarity_std"], kept.std(correction=0))


def test_accuracy_counts_positives_that_are_nearest() -> None:
    query = torch.eye(4)
    negatives = F.normalize(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1.0, 3]]), dim=1)  # near to queries 0, 1 and 3
    positive = F.normalize(torch.tensor([[1.0, 0, 0, 0], [1, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 1, 2]]), dim=1)
    assert score_metrics(query, positive, negatives, None)["accuracy"] == 0.5


def test_uniformity_of_known_sets() -> None:
    assert uniformity(units(1, 6).expand(7, 6)).item() == pytest.approx(0.0, abs=1e-5)
    assert uniformity(torch.eye(5)).item() == pytest.approx(-4.0)  # squared distance 2 everywhere
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite).item() == pytest.approx(-8.0)
    assert uniformity(torch.ones(1, 3)) == 0


# What is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"projector_layers": 0}, "projector_layers"),
        ({"projector_hidden_size": 0}, "projector_hidden_size"),
        ({"projector_size": 0}, "projector_size"),
        ({"predictor_layers": -1}, "predictor_layers"),
        ({"predictor_layers": 2}, "momentum=None"),
        ({"queue_size": 16}, "momentum=None"),
        ({"alter_queries": True}, "momentum=None"),
        ({**MOCO, "queue_size": -1}, "queue_size"),
        ({"momentum": (0.9, 1.1)}, "momentum"),
        ({**MOCO, "hard_negatives": 4, "mixed_negatives": 2}, "queue"),
        ({**MOCO, "extrapolation": 2.0}, "queue"),
        ({**MOCO, "interpolation": 1.6}, "queue"),
        ({**QUEUE, "extrapolation": 0.0}, "extrapolation"),
        ({**QUEUE, "interpolation": -1.0}, "interpolation"),
        ({**QUEUE, "mixed_negatives": 2}, "hard_negatives"),
        ({**QUEUE, "query_mixed_negatives": 2}, "hard_negatives"),
        ({**QUEUE, "hard_negatives": 1, "mixed_negatives": 2}, "hard_negatives"),
        ({**QUEUE, "hard_negatives": 25, "mixed_negatives": 2}, "hard_negatives"),
        ({**QUEUE, "hard_negatives": 4, "mixed_negatives": -2}, "mixed_negatives"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}.*found|found.*{named}"):
        Contrastive(make_model(), **options)


def test_a_batch_without_negatives_is_refused() -> None:
    for options in ({}, MOCO):
        with pytest.raises(ValueError, match="Contrastive: found a batch of 1 sample; expected at least 2"):
            make(**options, batch_norm=False)(images(1), key())
    assert make(**QUEUE, batch_norm=False)(images(1), key()).loss.isfinite()


def test_a_modality_without_views_or_alterations_is_refused() -> None:
    model = make_model()
    model.modalities["image"] = WithoutViews(**IMAGE).build(16)
    with pytest.raises(ValueError, match=r"Contrastive.*plain_image"):
        Contrastive(model)
    model.modalities["image"] = WithoutAlterations(**IMAGE).build(16)
    with pytest.raises(ValueError, match=r"Contrastive with alter_queries=True.*plain_image"):
        Contrastive(model, **MOCO, alter_queries=True)


def test_without_batch_norm_there_is_none() -> None:
    for batch_norm in (True, False):
        objective = make(**MOCO, predictor_layers=2, batch_norm=batch_norm)
        assert any("BatchNorm" in type(module).__name__ for module in objective.modules()) is batch_norm
    one = make(projector_layers=1, batch_norm=False)
    assert [tuple(p.shape) for p in one.projector.parameters()] == [(8, 16), (8,)]
