"""Tests of self-distillation: slow loops over pairs, steps and tokens, and who reads what."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.discovery import options_of
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives import self_distillation
from mmssl.objectives.base import piece_of, represent, views_of
from mmssl.objectives.self_distillation import Centre, PrototypeHead, SelfDistillation
from mmssl.teacher import Teacher
from mmssl.training import TrainArguments
from mmssl.training.setup import make_optimizer
from tests.matrix.cases import MODALITIES, make_batch
from tests.test_heads import on_two_processes

WIDTH, PATCHES, K = 8, 16, 6
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "horizontal_flip": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "BYOL": {},
    "DINO": {"prototypes": K, "local_views": 2, "local_scale": (0.2, 0.6), "freeze_prototypes": 0.0},
    "iBOT": {"prototypes": K, "local_views": 1, "token_weight": 0.5, "mask_ratio": 0.4},
}
every_setting = pytest.mark.parametrize("name", SETTINGS)
with_prototypes = pytest.mark.parametrize("name", ["DINO", "iBOT"])


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    modality: str = "image", cls: type[Image] | None = None, encoder: dict[str, Any] | None = None, **options: Any
) -> SelfDistillation:
    """A small objective, all of whose parameters are away from their start values, the teacher's from the student's."""
    torch.manual_seed(0)
    own = IMAGE if modality == "image" else MODALITIES[modality][0]
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, **(encoder or {})}
    model = MMSSLModel(MMSSLConfig(modalities={modality: own}, **shape))
    if cls is not None:
        model.modalities["image"] = cls(**own).build(WIDTH)
    objective = SelfDistillation(model, **{"projector_hidden_size": 12, "projector_size": 5, **options})
    generator = key(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return objective.train()


def modality_of(objective: SelfDistillation) -> Modality:
    (modality,) = objective.model.adapters.values()
    return modality


def images(batch: int = 4, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


def cross_entropy(scores: Tensor, said: Tensor, centre: Tensor, teacher: float, student: float) -> float:
    """Of one vector of cosines of the teacher and one of the student, prototype by prototype."""
    sharp = [math.exp((scores[k] - centre[k]).item() / teacher) for k in range(len(scores))]
    soft = [math.exp(said[k].item() / student) for k in range(len(said))]
    return -sum(sharp[k] / sum(sharp) * math.log(soft[k] / sum(soft)) for k in range(len(scores)))


def scores_of(head: nn.Module, features: Tensor) -> Tensor:
    """What prototypes say of one vector, (K,): cosines with what the projector makes of it."""
    assert isinstance(head, PrototypeHead)
    projection = unit(head.projector(features))
    return torch.stack([unit(prototype) @ projection for prototype in head.prototypes.weight])


def inputs_of(module: nn.Module) -> list[Tensor]:
    """A list that grows by the first argument of each call."""
    calls: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    return calls


# The loss between views


def test_byol_is_that_of_a_loop_over_pairs_and_samples() -> None:
    objective, generator = make(local_views=1), key(3)
    out = objective(images(), key(3))
    modality, teacher = modality_of(objective), objective.teacher.module
    views = views_of(modality, images(), generator)
    (local,) = views_of(modality, images(), generator, 1)
    read = [*views, piece_of(modality, local, objective.local_scale, generator)]
    said = [objective.predictor(objective.head(represent(objective.model, modality, view))) for view in read]
    known = [objective.teacher_head.module(represent(teacher, modality, view)) for view in views]
    pairs = [(u, v) for u in range(2) for v in range(3) if u != v]
    distances = [(unit(known[u][row]) - unit(said[v][row])).square().sum() for u, v in pairs for row in range(4)]
    assert out.loss.item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-5)
    assert len(pairs) == 4
    assert out.embedding is not None and not out.embedding.requires_grad
    torch.testing.assert_close(out.embedding, represent(objective.model, modality, views[0]).detach())


def test_dino_is_that_of_a_loop_over_pairs_samples_and_prototypes() -> None:
    objective, generator = make(**SETTINGS["DINO"]), key(3)
    centre = torch.randn(K, generator=key(0)) / 10
    objective.centre.mean.copy_(centre)
    out = objective(images(), key(3))
    modality, teacher = modality_of(objective), objective.teacher.module
    views = views_of(modality, images(), generator)
    local = views_of(modality, images(), generator, 2)
    read = [*views, *(piece_of(modality, view, objective.local_scale, generator) for view in local)]
    said = [represent(objective.model, modality, view) for view in read]
    known = [represent(teacher, modality, view) for view in views]
    losses = [
        cross_entropy(
            scores_of(objective.teacher_head.module, known[u][row]),
            scores_of(objective.head, said[v][row]),
            centre,
            teacher=0.04,
            student=0.1,
        )
        for u in range(2)
        for v in range(4)
        if u != v
        for row in range(4)
    ]
    assert len(losses) == 6 * 4
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


class Negative(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return -features


def test_byol_lies_between_0_for_equal_and_4_for_opposite_vectors() -> None:
    """A view that is the sample itself, a teacher that is the student, and a predictor that does nothing."""
    objective = make()
    assert 0 < objective(images(), key(0)).loss < 4
    modality_of(objective).horizontal_flip = 0.0  # type: ignore[assignment]
    objective.teacher.module.load_state_dict(objective.model.state_dict())
    objective.teacher_head.module.load_state_dict(objective.head.state_dict())
    objective.predictor = nn.Sequential(nn.Identity())
    assert objective(images(), key(0)).loss.item() == pytest.approx(0, abs=1e-6)
    objective.predictor = nn.Sequential(Negative())
    assert objective(images(), key(0)).loss.item() == pytest.approx(4, rel=1e-6)


@every_setting
def test_order_of_the_two_views_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(**{**SETTINGS[name], "local_views": 0, "token_weight": 0.0})
    views = views_of(modality_of(objective), images(), key(0))
    losses = []
    for both in (views, views[::-1]):
        drawn = iter([both, []])
        monkeypatch.setattr(self_distillation, "views_of", lambda *args, drawn=drawn: next(drawn))
        losses.append(objective(images(), key(0)).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_length_of_projections_and_prototypes_does_not_matter() -> None:
    objective = make(**SETTINGS["DINO"])
    loss = objective(images(), key(0)).loss
    assert isinstance(objective.head, PrototypeHead)
    last = list(objective.head.projector.parameters())[-2:]  # weight and bias
    with torch.no_grad():
        objective.head.prototypes.weight.mul_(7)
        for parameter in last:
            parameter.mul_(3)
    torch.testing.assert_close(objective(images(), key(0)).loss, loss)
    scores = objective.head(torch.randn(50, WIDTH, generator=key(0)) * 100)
    assert scores.abs().max() <= 1 + 1e-6


# Who reads what


@every_setting
def test_local_views_never_reach_the_teacher(name: str) -> None:
    """Nor do mask tokens: it reads two whole views, and says something of these alone."""
    objective = make(encoder={"class_token": True}, **SETTINGS[name])
    by_teacher, by_student = (
        inputs_of(model.encoder.layers[0]) for model in (objective.teacher.module, objective.model)
    )
    asked = inputs_of(objective.teacher_head.module)
    objective(images(), key(3))
    generator, modality = key(3), modality_of(objective)
    teacher = objective.teacher.module
    views = views_of(modality, images(), generator)
    assert len(by_teacher) == 2 and len(by_student) == 2 + objective.local_views
    for found, view in zip(by_teacher, views, strict=True):
        own = teacher.adapters["image"]
        expected = own.embed(view) + own.position(view.coords)
        torch.testing.assert_close(found[:, 1:], expected)
    assert all(read.shape[1] == 1 + PATCHES for read in by_student[:2])
    assert all(1 < read.shape[1] < 1 + PATCHES for read in by_student[2:])
    assert len(asked) == (4 if objective.token_weight else 2)


def test_a_piece_is_connected_and_as_large_as_it_should_be() -> None:
    objective = make(local_views=1, local_scale=(0.25, 0.25))
    tokens = modality_of(objective).tokenize(images(16))
    piece = piece_of(modality_of(objective), tokens, objective.local_scale, key(0))
    assert piece.valid.sum(dim=1).eq(4).all()
    height, width = (piece.coords.amax(dim=1) - piece.coords.amin(dim=1) + 1).unbind(-1)
    assert (height * width == 4).all()  # a rectangle of patches
    assert len(piece.coords.amin(dim=1).unique(dim=0)) > 1
    for row in range(16):
        for place in range(piece.content.shape[1]):
            at = (tokens.coords[row] == piece.coords[row, place]).all(dim=1)
            assert torch.equal(tokens.content[row][at][0], piece.content[row, place])


def test_size_of_a_piece_is_drawn_from_its_range() -> None:
    objective = make("graph", local_views=1, local_scale=(0.3, 0.8))
    modality = modality_of(objective)
    tokens = modality.tokenize(make_batch(modality, 4))
    count = tokens.valid.sum(dim=1)
    shares = torch.stack(
        [piece_of(modality, tokens, objective.local_scale, key(seed)).valid.sum(dim=1) / count for seed in range(60)]
    )
    assert (shares * count >= (0.3 * count).floor()).all() and (shares * count <= (0.8 * count).ceil()).all()
    assert shares.mean(dim=1).min() < 0.4 and shares.mean(dim=1).max() > 0.7


@every_setting
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    objective = make(encoder={"drop_path_rate": 0.5, "hidden_dropout_prob": 0.3}, **SETTINGS[name])
    objective(images(), key(0)).loss.backward()
    of_teacher = [*objective.teacher.parameters(), *objective.teacher_head.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in of_teacher)
    assert not any(module.training for module in [*objective.teacher.modules(), *objective.teacher_head.modules()])
    others = [p for key, p in objective.named_parameters() if not key.startswith("teacher")]
    assert all(p.grad is not None for p in others)
    optimizer = make_optimizer(objective, TrainArguments())
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in others}


# Hidden tokens


def masks_of(objective: SelfDistillation, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    masks: list[Any] = []
    modality = modality_of(objective)
    inner = modality.mask
    monkeypatch.setattr(modality, "mask", lambda *args: masks.append(inner(*args)) or masks[-1])  # type: ignore
    return masks


@pytest.mark.parametrize("modality", ["image", "speech"])
def test_token_term_is_that_of_a_loop_over_hidden_tokens(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a centre of its own; of padded samples too."""
    objective = make(modality, **{**SETTINGS["iBOT"], "local_views": 0})
    adapter, model, teacher = modality_of(objective), objective.model, objective.teacher.module
    batch = images() if modality == "image" else make_batch(adapter, 4)
    centre = torch.randn(K, generator=key(0)) / 10
    objective.token_centre.mean.copy_(centre)
    masks = masks_of(objective, monkeypatch)
    out = objective(batch, key(3))
    monkeypatch.undo()
    assert len(masks) == 2 and not torch.equal(masks[0].hidden, masks[1].hidden)
    generator, means = key(3), []
    for view, mask in zip(views_of(adapter, batch, generator), masks, strict=True):
        content = adapter.embed(view)
        for row, place in mask.hidden.nonzero().tolist():
            content[row, place] = objective.mask_token
        read = model.encode(adapter, view, content).tokens
        known = teacher.encode(teacher.adapters[modality], view).tokens
        losses = [
            cross_entropy(
                scores_of(objective.teacher_head.module, known[row, place]),
                scores_of(objective.head, read[row, place]),
                centre,
                teacher=0.04,
                student=0.1,
            )
            for row, place in mask.hidden.nonzero().tolist()
        ]
        assert len(losses) == mask.hidden.sum() > 0 and view.valid[mask.hidden].all()
        means.append(sum(losses) / len(losses))
    assert out.metrics["tokens"].item() == pytest.approx(sum(means) / 2, rel=1e-4)
    assert out.loss.item() == pytest.approx(out.metrics["views"].item() + 0.5 * sum(means) / 2, rel=1e-4)


def test_student_sees_nothing_of_hidden_tokens_and_the_teacher_all(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = make(**{**SETTINGS["iBOT"], "local_views": 0}), images()
    masks, modality = masks_of(objective, monkeypatch), modality_of(objective)
    modality.horizontal_flip = 0.0  # type: ignore[assignment]
    read, known = inputs_of(objective.head), inputs_of(objective.teacher_head.module)
    objective(batch, key(3))
    first = masks[0].hidden

    def spoilt(batch: Batch, generator: torch.Generator, count: int = 2) -> list[Any]:
        tokens = modality.tokenize(batch)
        other = torch.randn(tokens.content.shape, generator=key(7))
        return [replace(tokens, content=torch.where(first[..., None], other, tokens.content)), tokens][:count]

    monkeypatch.setattr(self_distillation, "views_of", lambda modality, *args: spoilt(*args))
    objective(batch, key(3))
    assert torch.equal(masks[2].hidden, first)
    pooled, at_hidden = range(0, 4, 2), range(1, 4, 2)  # of each view
    for of in (pooled, at_hidden):
        assert torch.equal(read[of[0]], read[4 + of[0]])
        assert not torch.allclose(known[of[0]], known[4 + of[0]])


def test_without_token_term_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(**SETTINGS["DINO"])
    masks = masks_of(objective, monkeypatch)
    objective(images(), key(0))
    assert not masks and not any("token" in name for name, _ in objective.named_parameters() if "model" not in name)


def test_views_and_tokens_share_the_head() -> None:
    objective = make(**SETTINGS["iBOT"])
    assert [name for name, module in objective.named_modules() if isinstance(module, PrototypeHead)] == [
        "head",
        "teacher_head.module",
    ]


# Sharpening and centring


def test_teacher_temperature_grows_during_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(prototypes=K, teacher_temperature=(0.02, 0.1), teacher_temperature_warmup=0.5)
    features = torch.randn(3, WIDTH, generator=key(0))
    scores = objective.teacher_head.module(features)
    entropies = []
    for progress, temperature in ((0.0, 0.02), (0.25, 0.06), (0.5, 0.1), (0.9, 0.1)):
        objective.progress.fill_(progress)
        said = objective.teacher_says(features)
        torch.testing.assert_close(said, (scores / temperature).softmax(dim=1))
        entropies.append(torch.special.entr(said).sum().item())
    assert entropies[0] < entropies[1] < entropies[2] == entropies[3]
    student = objective.student_says(features).exp()
    torch.testing.assert_close(student, (objective.head(features) / 0.1).softmax(dim=1))


@with_prototypes
def test_centre_is_that_of_a_loop_over_steps(name: str) -> None:
    """Of all scores since the last step, of both views and of two batches; forward alone does not move it."""
    objective = make(**{**SETTINGS[name], "momentum": (1.0, 1.0)})
    asked = inputs_of(objective.teacher_head.module)
    centres = {2: objective.centre}
    if objective.token_weight:
        centres[3] = objective.token_centre
    expected = {axes: torch.zeros(K) for axes in centres}
    for step in range(3):
        asked.clear()
        for part in range(2):
            objective(images(seed=2 * step + part), key(2 * step + part))
            for axes, centre in centres.items():
                torch.testing.assert_close(centre.mean, expected[axes])
        calls = list(asked)  # what follows asks too
        for axes in centres:
            rows = torch.cat([call.flatten(0, -2) for call in calls if call.dim() == axes])
            scores = [scores_of(objective.teacher_head.module, row) for row in rows]
            expected[axes] = 0.9 * expected[axes] + 0.1 * torch.stack(scores).mean(dim=0).detach()
        objective.eval()(images(), key(0))
        objective.train().after_step(step / 3)
        for axes, centre in centres.items():
            torch.testing.assert_close(centre.mean, expected[axes])
    assert all(value.abs().max() > 1e-3 for value in expected.values())


def test_only_scores_that_count_enter_the_centre() -> None:
    centre, scores = Centre(3, momentum=0.5), torch.randn(2, 4, 3, generator=key(0))
    counts = torch.tensor([[True, True, False, True], [False, False, True, False]])
    centre.see(scores, counts)
    centre.move()
    torch.testing.assert_close(centre.mean, 0.5 * scores[counts].mean(dim=0))
    before = centre.mean.clone()
    centre.move()
    assert torch.equal(centre.mean, before)


def test_centre_is_of_the_global_batch(tmp_path: Path) -> None:
    """Though the processes have different numbers of scores."""
    scores = torch.randn(7, 3, generator=key(0))

    def part(rank: int) -> Tensor:
        centre = Centre(3, momentum=0.9)
        mine = scores[:2] if rank == 0 else scores[2:]
        centre.see(mine, torch.ones(len(mine), dtype=torch.bool))
        centre.move()
        return centre.mean

    for mean in on_two_processes(part, tmp_path):
        torch.testing.assert_close(mean, 0.1 * scores.mean(dim=0))


def test_centring_takes_off_what_the_teacher_says_of_all_samples() -> None:
    """Scores that favour one prototype are level again once the centre knows of it."""
    objective = make(prototypes=K, centre_momentum=0.0)
    features = 0.1 * torch.randn(64, WIDTH, generator=key(0)) + torch.randn(WIDTH, generator=key(1))
    before = objective.metrics(objective.teacher_says(features))
    objective.after_step(0.0)
    after = objective.metrics(objective.teacher_says(features))
    assert before["entropy_of_mean"] < 0.5 < 0.8 < after["entropy_of_mean"]


# Steps


@every_setting
def test_momentum_goes_along_a_cosine_from_start_to_end(name: str) -> None:
    objective = make(**SETTINGS[name], momentum=(0.6, 1.0))
    for progress, kept in ((0.0, 0.6), (0.5, 0.8), (0.25, 0.6 + 0.4 * (1 - math.sqrt(0.5)) / 2), (1.0, 1.0)):
        pairs: list[tuple[Teacher[Any], nn.Module]] = [
            (objective.teacher, objective.model),
            (objective.teacher_head, objective.head),
        ]
        before = [copy.deepcopy(teacher.module.state_dict()) for teacher, _ in pairs]
        objective.after_step(progress)
        for (teacher, student), own in zip(pairs, before, strict=True):
            other = dict(student.named_parameters())
            for parameter, value in teacher.module.named_parameters():
                torch.testing.assert_close(value, kept * own[parameter] + (1 - kept) * other[parameter])


@every_setting
def test_what_is_saved_is_the_teacher_with_prototypes_and_the_student_without(name: str) -> None:
    objective = make(**SETTINGS[name])
    assert objective.trained is (objective.model if name == "BYOL" else objective.teacher.module)


def test_prototypes_stay_as_they_are_at_the_beginning() -> None:
    objective = make(prototypes=K, freeze_prototypes=0.2)
    assert isinstance(objective.head, PrototypeHead)
    for progress, moves in ((None, False), (0.1, False), (0.2, True), (0.9, True)):
        if progress is not None:
            objective.after_step(progress)
        objective.zero_grad()
        objective(images(), key(0)).loss.backward()
        gradient = objective.head.prototypes.weight.grad
        assert gradient is not None and (gradient != 0).any() == moves
        *_, weight, _ = objective.head.projector.parameters()
        assert weight.grad is not None and (weight.grad != 0).any()


# Collapse


def test_entropies_tell_a_collapse_onto_one_prototype_or_onto_all() -> None:
    objective = make(prototypes=K)

    def metrics(target: Tensor) -> tuple[float, float]:
        found = objective.metrics(target)
        return found["entropy_of_mean"].item(), found["entropy"].item()

    one = torch.eye(K)[[2] * 12]
    assert metrics(one) == pytest.approx((0, 0), abs=1e-6)
    assert metrics(torch.full((12, K), 1 / K)) == pytest.approx((1, 1), abs=1e-6)
    assert metrics(torch.eye(K).repeat(2, 1)) == pytest.approx((1, 0), abs=1e-6)
    assert metrics(torch.eye(K)[[0, 1, 2] * 4]) == pytest.approx((math.log(3) / math.log(K), 0), abs=1e-6)


def test_spread_of_projections_is_one_for_evenly_spread_directions() -> None:
    objective = make()
    vectors = F.normalize(torch.randn(2000, 5, generator=key(0)), dim=1)
    assert objective.metrics(vectors)["projection_spread"].item() == pytest.approx(1, rel=0.02)
    assert objective.metrics(vectors[:1].expand(20, -1))["projection_spread"].item() == pytest.approx(0, abs=1e-6)
    out = objective(images(), key(0))
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.fixture(scope="module")
def digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images[:512], dtype=torch.float32)[:, None] / 8 - 1


def short_run(digits: Tensor, **options: Any) -> dict[str, float]:
    """Metrics of the last of 45 steps."""
    torch.manual_seed(0)
    own = {**IMAGE, "horizontal_flip": 0.0, "crop_scale": (0.5, 1.0)}
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MMSSLModel(MMSSLConfig(modalities={"image": own}, **shape))
    small: dict[str, Any] = {"projector_hidden_size": 64, "projector_size": 32, "momentum": (0.99, 1.0)}
    objective = SelfDistillation(model, teacher_temperature=(0.02, 0.02), **small, **options).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    for step in range(45):
        batch = {"pixel_values": digits[torch.randint(512, (48,), generator=key(step))]}
        out = objective(batch, key(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.after_step(step / 600)
    return {name: value.item() for name, value in out.metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("token_weight", [0.0, 0.5])
def test_centring_keeps_the_teacher_from_saying_the_same_of_all(token_weight: float, digits: Tensor) -> None:
    """Without it the teacher says one prototype of nearly all samples, and the loss is nearly 0."""
    options: dict[str, Any] = {"prototypes": 32, "freeze_prototypes": 0.0, "token_weight": token_weight}
    assert short_run(digits, **options)["entropy_of_mean"] > 0.6
    assert short_run(digits, **options, centre_momentum=1.0)["entropy_of_mean"] < 0.3


@pytest.mark.slow
def test_byol_keeps_its_spread(digits: Tensor) -> None:
    assert short_run(digits)["projection_spread"] > 0.5


# Options


@every_setting
def test_options_rebuild_an_equal_objective(name: str) -> None:
    objective = make(**SETTINGS[name])
    found = options_of(objective)
    again = SelfDistillation(MMSSLModel(objective.model.config), **found).train()
    assert options_of(again) == found
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(images(), key(0)).loss, objective(images(), key(0)).loss)


def test_heads_are_those_of_the_papers() -> None:
    byol, dino = make(), make(prototypes=K, projector_layers=3)
    names = {"Linear", "BatchNorm", "ReLU", "GELU"}

    def layers(module: nn.Module) -> list[str]:
        return [type(layer).__name__ for layer in module.modules() if type(layer).__name__ in names]

    assert layers(byol.head) == layers(byol.predictor) == ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert layers(dino.head) == ["Linear", "GELU", "Linear", "GELU", "Linear", "Linear"]
    assert not hasattr(dino, "predictor") and not hasattr(byol, "centre")
    assert isinstance(dino.head, PrototypeHead) and dino.head.prototypes.weight.shape == (K, 5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one prototype": ({"prototypes": 1}, r"prototypes: found 1; expected 0, or 2 and more"),
    "no projector": ({"projector_layers": 0}, r"projector_layers 0, .* at least 1"),
    "fewer than no views": ({"local_views": -1}, r"local_views: found -1; expected 0 or more"),
    "pieces of nothing": ({"local_scale": (0.0, 0.4)}, r"local_scale: found \[0\.0, 0\.4\]; expected .*above 0"),
    "pieces of more": ({"local_scale": (0.5, 1.4)}, r"local_scale: found \[0\.5, 1\.4\]; expected .*at most 1"),
    "scale upside down": ({"local_scale": (0.5, 0.4)}, r"local_scale: found \[0\.5, 0\.4\]"),
    "cold student": ({"student_temperature": 0.0}, r"student_temperature .*: found 0\.0 .*above 0"),
    "one temperature": ({"teacher_temperature": (0.04,)}, r"teacher_temperature: found 0\.1 and \[0\.04\]; .* two"),
    "no warm-up": ({"teacher_temperature_warmup": 0.0}, r"teacher_temperature_warmup: found 0\.0; .* above 0 to 1"),
    "centre": ({"centre_momentum": 1.5}, r"centre_momentum: found 1\.5; expected a number from 0 to 1"),
    "frozen for longer": ({"freeze_prototypes": 1.5}, r"freeze_prototypes: found 1\.5; expected a number from 0 to 1"),
    "tokens without prototypes": ({"token_weight": 1.0}, r"token_weight: found 1\.0 with prototypes=0; expected 0"),
    "reward for tokens": ({"token_weight": -1.0, "prototypes": K}, r"token_weight: found -1\.0"),
    "all hidden": ({"token_weight": 1.0, "prototypes": K, "mask_ratio": 1.0}, r"mask_ratio: found 1\.0; expected"),
    "no such mask": (
        {"token_weight": 1.0, "prototypes": K, "mask_style": "tube"},
        r"image has no mask style 'tube'; it offers: random, block",
    ),
    "momentum": ({"momentum": (0.9, 1.1)}, r"momentum: found \[0\.9, 1\.1\]; expected two numbers from 0 to 1"),
    "no views": ({"cls": WithoutViews}, r"SelfDistillation with two views .*'view'.*plain_image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**options)
