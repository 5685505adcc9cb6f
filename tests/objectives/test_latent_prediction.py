"""Tests of latent prediction: slow loops, the papers' published sizes, and the properties that leaks would break."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.discovery import options_of
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.latent_prediction import LatentPrediction, standardized
from mmssl.tokens import Tokens
from mmssl.training import TrainArguments
from mmssl.training.setup import make_optimizer
from tests.matrix.cases import MODALITIES, make_batch

PATCHES, WIDTH = 16, 16
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}
PREFIX: dict[str, Any] = {"class_token": True, "num_register_tokens": 1}
DROPOUT: dict[str, Any] = {
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.3,
    "drop_path_rate": 0.5,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "I-JEPA": {},
    "T-JEPA": {
        "num_targets": (3,),
        "target_scale": ((0.2, 0.6),),
        "target_style": "random",
        "context": "first",
        "context_scale": (0.2, 0.4),
        "distance": "l2",
        "normalize_target": False,
    },
    "V-JEPA": {
        "num_targets": (1, 1),
        "target_blocks": (3, 1),
        "target_scale": ((0.15, 0.15), (0.5, 0.5)),
        "context": "complement",
        "distance": "l1",
    },
    "data2vec": {
        "num_targets": (3,),
        "target_scale": ((0.6, 0.6),),
        "target_style": "random",
        "context": "complement",
        "average_layers": (1, 2),
        "distance": "l2",
    },
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


class Padded(Image):
    """Images in which black patches are padding."""

    name: ClassVar = "image"

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        tokens.valid = (tokens.content != 0).any(dim=-1)
        return tokens


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    modality: str = "image",
    encoder: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
    cls: type[Image] | None = None,
    **options: Any,
) -> LatentPrediction:
    """A small objective, all of whose parameters are away from their start values, the teacher's from the student's."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, **(encoder or {})}
    own = {**IMAGE, **(image or {})} if modality == "image" else MODALITIES[modality][0]
    model = MMSSLModel(MMSSLConfig(modalities={modality: own}, **shape))
    if cls is not None:
        model.modalities["image"] = cls(**own).build(WIDTH)
    small: dict[str, Any] = {"predictor_layers": 1, "predictor_hidden_size": 8, "predictor_attention_heads": 2}
    objective = LatentPrediction(model, **{"views": False, **small, **options})
    generator = key(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return objective


def modality_of(objective: LatentPrediction) -> Modality:
    (modality,) = objective.model.adapters.values()
    return modality


def images(batch: int = 4, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def padded_images() -> Batch:
    """Rows of 16, 15, 12, 11, 2 and 1 patches; padding in front, between and behind."""
    pixels = images(6)["pixel_values"]
    for row, black in enumerate([[], [15], range(4), [5, 6, 9, 10, 15], range(1, 15), range(15)]):
        for n in black:
            pixels[row, 0, 2 * (n // 4) : 2 * (n // 4) + 2, 2 * (n % 4) : 2 * (n % 4) + 2] = 0
    return {"pixel_values": pixels}


def tokens_of(objective: LatentPrediction, batch: Batch) -> Tokens:
    return modality_of(objective).tokenize(batch)


def choose(objective: LatentPrediction, tokens: Tokens, seed: int) -> tuple[Tensor, Tensor]:
    return objective.choose(modality_of(objective), tokens, key(seed))


def predict(objective: LatentPrediction, tokens: Tokens, contexts: Tensor, targets: Tensor) -> Any:
    return objective.predict(modality_of(objective), tokens, contexts, targets)


def ragged(rows: int, length: int, seed: int = 0) -> Tokens:
    """Places on a 4-wide grid; rows with 1 to all valid tokens, anywhere."""
    count = torch.randint(1, length + 1, (rows, 1), generator=key(seed))
    count[0], count[1] = 1, length
    order = torch.rand(rows, length, generator=key(seed + 1)).argsort(dim=1)
    coords = torch.stack([torch.arange(length) // 4, torch.arange(length) % 4], dim=-1).float()
    return Tokens(torch.zeros(rows, length, 4), coords.expand(rows, -1, -1), order < count)


# The teacher


@every_setting
def test_teacher_reads_every_token_whatever_is_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is predicted is, to the bit, what the encoder in evaluation mode gives for the whole sample: no dropout."""
    objective = make(encoder={**PREFIX, **DROPOUT}, **SETTINGS[name]).train()
    calls: list[Tensor] = []
    target = objective.target
    monkeypatch.setattr(objective, "target", lambda *args: calls.append(target(*args)) or calls[-1])  # type: ignore
    for seed in (1, 2):
        objective(images(), key(seed))
    assert torch.equal(calls[0], calls[1]) and not calls[0].requires_grad

    model = MMSSLModel(objective.model.config).eval()
    model.load_state_dict(objective.teacher.module.state_dict())
    out = model(**images(), output_hidden_states=True)
    assert out.last_hidden_state is not None and out.hidden_states is not None
    expected = out.last_hidden_state[:, 2:].detach()
    if objective.average_layers:
        blocks = [F.instance_norm(block[:, 2:].mT).mT for block in out.hidden_states[-2:]]
        torch.testing.assert_close(calls[0], F.layer_norm((blocks[0] + blocks[1]) / 2, (WIDTH,)).detach())
    elif objective.normalize_target:
        assert torch.equal(calls[0], F.layer_norm(expected, (WIDTH,)))
    else:
        assert torch.equal(calls[0], expected)


@every_setting
def test_teacher_is_asked_once_and_the_student_for_contexts_alone(name: str) -> None:
    """However many masks there are (data2vec 2.0)."""
    objective = make(encoder=PREFIX, **SETTINGS[name])
    by_teacher: list[Tensor] = []
    by_student: list[Tensor] = []
    for model, calls in ((objective.teacher.module, by_teacher), (objective.model, by_student)):
        model.encoder.layers[0].register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0]))
    objective(images(), key(0))
    contexts, targets = choose(objective, tokens_of(objective, images()), 0)
    (of_teacher,), (of_student,) = by_teacher, by_student
    assert of_teacher.shape == (4, 2 + PATCHES, WIDTH)
    # Class and register tokens always come first, and the patches that were chosen after them.
    assert of_student.shape == (4 * contexts.shape[1], 2 + int(contexts.sum(dim=2).max()), WIDTH)
    assert torch.equal(of_student[:, :2], objective.model.encoder.prefix_tokens.expand(len(of_student), -1, -1))
    assert contexts.shape[1] == (targets.shape[1] if objective.context == "complement" else 1)


def test_after_step_moves_the_teacher_in_a_straight_line_of_momentum() -> None:
    objective = make(momentum=(0.6, 1.0), encoder=PREFIX)
    own, other = objective.teacher.module.state_dict(), objective.model.state_dict()
    expected = {name: 0.7 * own[name] + 0.3 * other[name] for name in own}
    objective.after_step(0.25)
    for name, value in objective.teacher.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    objective.after_step(1.0)
    for name, value in objective.teacher.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert objective.trained is objective.teacher.module


def test_teacher_gets_no_gradient_and_no_optimiser() -> None:
    objective = make(**SETTINGS["V-JEPA"]).train()
    objective(images(), key(0)).loss.backward()
    teacher = dict(objective.teacher.named_parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.values())
    assert not any(module.training for module in objective.teacher.modules())
    optimizer = make_optimizer(objective, TrainArguments())
    optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not optimised & {id(parameter) for parameter in teacher.values()}
    rest = {id(p) for name, p in objective.named_parameters() if not name.startswith("teacher.")}
    assert optimised == rest
    decayed = {
        id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]
    }
    assert id(objective.mask_tokens) not in decayed


# Nothing but the context reaches a prediction; each prediction belongs to its place


@pytest.mark.parametrize("padded", [False, True])
@every_setting
def test_contents_outside_the_context_have_no_influence(name: str, padded: bool) -> None:
    """Each pair of a context and its targets on its own, as contexts of one sample may differ."""
    objective = make(encoder=PREFIX, cls=Padded if padded else None, **SETTINGS[name])
    tokens = tokens_of(objective, padded_images() if padded else images())
    contexts, targets = choose(objective, tokens, 3)
    before, _, counts, encoded, seen = predict(objective, tokens, contexts, targets)
    other = 1e3 * torch.randn(tokens.content.shape, generator=key(9))
    for number in range(targets.shape[1]):
        context = contexts[:, min(number, contexts.shape[1] - 1)]
        hidden = replace(tokens, content=torch.where(context[..., None], tokens.content, other))
        after, _, _, encoded_after, seen_after = predict(objective, hidden, contexts, targets)
        of_pair = slice(number, None, targets.shape[1])
        assert torch.equal(after[of_pair][counts[of_pair]], before[of_pair][counts[of_pair]])
        of_context = slice(number if contexts.shape[1] > 1 else 0, None, contexts.shape[1])
        assert torch.equal(seen_after.valid, seen.valid)
        valid = seen.valid[of_context]
        assert torch.equal(encoded_after[of_context][valid], encoded[of_context][valid])
        changed = replace(tokens, content=torch.where(context[..., None], other, tokens.content))
        moved = (predict(objective, changed, contexts, targets)[0] != before).any(dim=2)[of_pair]
        assert moved[counts[of_pair]].all(), "the context has no influence"


@every_setting
def test_no_gradient_reaches_what_is_in_no_context(name: str) -> None:
    """Targets enter the loss through the teacher alone, and carry no gradient."""
    objective, batch = make(**SETTINGS[name]), images()
    pixels = batch["pixel_values"].requires_grad_()
    tokens = tokens_of(objective, batch)
    contexts, targets = choose(objective, tokens, 3)
    objective(batch, key(3)).loss.backward()
    assert pixels.grad is not None
    gradient = tokens_of(objective, {"pixel_values": pixels.grad}).content
    read = contexts.any(dim=1)
    assert (gradient[~read] == 0).all() and (gradient[read] != 0).any(dim=1).all()
    assert (targets.any(dim=1) & ~read).any()


@every_setting
def test_prediction_depends_on_its_own_place_and_is_equal_for_equal_places(name: str) -> None:
    objective = make(**SETTINGS[name])
    tokens = tokens_of(objective, images())
    contexts, targets = choose(objective, tokens, 3)
    before, index, counts, *_ = predict(objective, tokens, contexts, targets)
    assert counts[0, :2].all()
    first, second = index[0, :2].tolist()
    assert (before[0, 0] - before[0, 1]).abs().max() > 1e-3
    coords = tokens.coords.clone()
    coords[0, first] = coords[0, second]  # both now lie where the second one lay
    after = predict(objective, replace(tokens, coords=coords), contexts, targets)[0]
    torch.testing.assert_close(after[0, 0], after[0, 1], rtol=1e-6, atol=1e-6)
    assert (after[0, 0] - before[0, 0]).abs().max() > 1e-3
    assert torch.equal(after[targets.shape[1] :], before[targets.shape[1] :])  # other samples


@every_setting
def test_order_of_the_tokens_does_not_matter(name: str) -> None:
    """Contents, places and masks are permuted together: predictions are those of the same tokens."""
    objective = make(encoder=PREFIX, **SETTINGS[name])
    tokens = tokens_of(objective, images())
    contexts, targets = choose(objective, tokens, 3)
    order = torch.randperm(PATCHES, generator=key(0))
    moved = Tokens(tokens.content[:, order], tokens.coords[:, order], tokens.valid[:, order])

    def by_token(tokens: Tokens, contexts: Tensor, targets: Tensor, names: Tensor) -> Tensor:
        prediction, index, counts, *_ = predict(objective, tokens, contexts, targets)
        found = torch.zeros(len(index), PATCHES, WIDTH)
        for row in range(len(index)):
            found[row, names[index[row][counts[row]]]] = prediction[row][counts[row]]
        return found

    torch.testing.assert_close(
        by_token(moved, contexts[..., order], targets[..., order], order),
        by_token(tokens, contexts, targets, torch.arange(PATCHES)),
    )


@every_setting
def test_targets_of_one_sample_know_nothing_of_each_other(name: str) -> None:
    """They are predicted in sequences of their own: another second target leaves the other predictions as they are."""
    objective = make(**SETTINGS[name])
    tokens = tokens_of(objective, images())
    contexts, targets = choose(objective, tokens, 3)
    before, *_ = predict(objective, tokens, contexts, targets)
    other = targets.clone()
    other[:, 1] = targets[:, 1].roll(5, dims=1)  # as many tokens
    assert not torch.equal(other, targets)
    after, *_ = predict(objective, tokens, contexts, other)
    rest = torch.arange(len(before)) % targets.shape[1] != 1
    assert torch.equal(after[rest], before[rest]) and not torch.equal(after[~rest], before[~rest])


def test_each_kind_of_target_has_a_mask_token_of_its_own() -> None:
    objective = make(num_targets=(2, 1), target_blocks=(1, 2), target_scale=((0.2, 0.2), (0.4, 0.4)))
    tokens = tokens_of(objective, images())
    masks = choose(objective, tokens, 3)
    before = predict(objective, tokens, *masks)[0].unflatten(0, (4, 3))
    with torch.no_grad():
        objective.mask_tokens[1] += 1
    after = predict(objective, tokens, *masks)[0].unflatten(0, (4, 3))
    assert torch.equal(after[:, :2], before[:, :2])
    assert (after[:, 2] != before[:, 2]).any(dim=2).all()


# Contexts and targets


@pytest.mark.parametrize("style", ["region", "random"])
@pytest.mark.parametrize("context", ["shared", "first", "complement"])
def test_contexts_and_targets_are_valid_and_disjoint(context: str, style: str) -> None:
    """Over many draws of many rows, from one token on; large targets, so that little is left."""
    objective = make(
        num_targets=(2, 1),
        target_blocks=(1, 3),
        target_scale=((0.1, 0.6), (0.3, 0.9)),
        target_style=style,
        context=context,
        context_scale=(0.1, 0.9),
    )
    tokens = ragged(100, PATCHES)
    for seed in range(20):
        contexts, targets = choose(objective, tokens, seed)
        assert contexts.shape == (100, 3 if context == "complement" else 1, PATCHES) and targets.shape == (100, 3, 16)
        assert not (contexts & targets).any()
        assert not ((contexts | targets) & ~tokens.valid[:, None]).any()
        assert contexts.any(dim=2).all()
        if context == "complement":
            assert torch.equal(contexts | targets, tokens.valid[:, None].expand(-1, 3, -1))
        if style == "random" and context != "first":  # where there is a second token, there is a target
            assert targets[tokens.valid.sum(dim=1) > 1].any(dim=2).any(dim=1).all()
        _, index, counts, *_ = predict(objective, tokens, contexts, targets)
        for mask, places, count in zip(targets.flatten(0, 1)[::17], index[::17], counts[::17], strict=True):
            assert places[count].tolist() == mask.nonzero().flatten().tolist()


@every_setting
def test_each_token_is_in_a_context_and_in_a_target_at_times_and_no_prefix_token_ever(name: str) -> None:
    """T-JEPA's code never uses the last column, as it counts the class token."""
    objective = make(encoder=PREFIX, **SETTINGS[name])
    tokens = tokens_of(objective, images(100))
    in_context, in_target = torch.zeros(PATCHES), torch.zeros(PATCHES)
    for seed in range(20):
        contexts, targets = choose(objective, tokens, seed)
        assert contexts.shape[2] == targets.shape[2] == PATCHES
        in_context += contexts.any(dim=1).sum(dim=0)
        in_target += targets.any(dim=1).sum(dim=0)
    assert (in_context > 20).all() and (in_target > 20).all()  # of 2,000
    if objective.target_style == "random":
        for share in (in_context / 2000, in_target / 2000):
            assert share.max() - share.min() < 10 * 0.5 / 2000**0.5


@every_setting
def test_sizes_are_the_same_in_a_batch_and_places_are_not(name: str) -> None:
    """But for unions of blocks, which overlap, and for what they leave of a context."""
    objective = make(**SETTINGS[name])
    tokens, sizes = tokens_of(objective, images(30)), set()
    for seed in range(20):
        contexts, targets = choose(objective, tokens, seed)
        for number, blocks in zip(range(targets.shape[1]), (3, 1) if name == "V-JEPA" else (1, 1, 1, 1), strict=False):
            size = targets[:, number].sum(dim=1)
            assert blocks > 1 or len(size.unique()) == 1
            sizes.add(int(size[0]))
            assert len(targets[:, number].unique(dim=0)) > 2
        if name in ("T-JEPA", "data2vec"):
            assert len(contexts.sum(dim=2).unique()) == 1
    assert len(sizes) > 1 or name == "data2vec"  # drawn anew for each batch


@pytest.mark.parametrize("shares", [(0.136, 0.156), (0.368, 0.622), (0.5, 0.5), (0.3, 1.0), (0.95, 0.2)], ids=str)
def test_sizes_of_random_parts_equal_a_slow_count(shares: tuple[float, float]) -> None:
    """T-JEPA: Python's ``round(columns * share)``, at least one, and targets of what the context has left."""
    objective = make(
        target_style="random", context="first", context_scale=(shares[0],) * 2, target_scale=((shares[1],) * 2,)
    )
    tokens = Tokens(
        torch.zeros(54, 54, 1), torch.arange(54.0).expand(54, -1)[..., None], torch.ones(54, 54).tril().bool()
    )
    contexts, targets = choose(objective, tokens, 0)
    for columns in range(1, 55):
        read = max(1, round(columns * shares[0]))
        predicted = min(max(1, round(columns * shares[1])), columns - read)
        assert contexts[columns - 1].sum() == read
        assert targets[columns - 1].sum(dim=1).tolist() == [predicted] * 4


def test_sizes_of_t_jepa_on_jannis_are_the_published_ones() -> None:
    """54 columns: 7 to 20 in the context, 13.5 on the average, and 8 to 34 in a target, 20.9 on the average."""
    objective = make(
        target_style="random", context="first", context_scale=(0.136, 0.368), target_scale=((0.156, 0.622),)
    )
    tokens = Tokens(torch.zeros(1, 54, 1), torch.arange(54.0)[None, :, None], torch.ones(1, 54, dtype=torch.bool))
    drawn = [choose(objective, tokens, seed) for seed in range(1000)]
    contexts = torch.tensor([int(contexts.sum()) for contexts, _ in drawn]).float()
    targets = torch.stack([targets[0].sum(dim=1) for _, targets in drawn]).float()
    assert (targets == targets[:, :1]).all()
    assert {7, 20} <= set(contexts.tolist()) <= set(range(7, 21))
    assert {8, 34} <= set(targets.flatten().tolist()) <= set(range(8, 35))
    assert contexts.mean().item() == pytest.approx(13.5, abs=0.4)
    assert targets.mean().item() == pytest.approx(20.9, abs=0.8)


def grid_of(side: int, **options: Any) -> tuple[LatentPrediction, Tokens]:
    objective = make(image={"image_size": side, "patch_size": 1}, **options)
    return objective, tokens_of(objective, {"pixel_values": torch.zeros(16, 1, side, side)})


def test_sizes_of_i_jepa_are_those_of_its_defaults() -> None:
    """On 14 x 14 patches: targets of 15 to 20 %, the context of 85 to 100 % less them; each within half a row."""
    objective, tokens = grid_of(14)
    for seed in range(100):
        contexts, targets = choose(objective, tokens, seed)
        sizes = targets.sum(dim=2)
        assert (sizes >= 0.15 * 196 - 2.5).all() and (sizes <= 0.2 * 196 + 3).all()
        assert len(sizes.unique()) == 1
        # What was in the context before the targets were cut out of it is a rectangle of the context's share.
        least = 0.85 * 196 - 7 - targets.any(dim=1).sum(dim=1)
        assert (contexts.sum(dim=2)[:, 0] >= least).all()


def test_contexts_of_i_jepa_are_as_large_as_measured_on_its_code() -> None:
    """59.9 tokens, as the least of 16 rows, which its batches are cut to.

    Its code never uses the last row and column of 14 x 14 patches, and its context always is the rest, 13 x 13.
    """
    share = 196 / 169
    objective, tokens = grid_of(13, target_scale=((0.15 * share, 0.2 * share),), context_scale=(1.0, 1.0))
    least = [float(choose(objective, tokens, seed)[0].sum(dim=2).min()) for seed in range(200)]
    assert torch.tensor(least).mean().item() == pytest.approx(59.9, abs=3)


@pytest.mark.parametrize("blocks, scale, context", [(8, 0.15, 0.369), (2, 0.7, 0.183)], ids=["short", "long"])
def test_unions_of_v_jepa_leave_as_much_as_measured_on_its_code(blocks: int, scale: float, context: float) -> None:
    objective, tokens = grid_of(
        14, num_targets=(1,), target_blocks=(blocks,), target_scale=((scale, scale),), context="complement"
    )
    shares = [float(choose(objective, tokens, seed)[0].float().mean()) for seed in range(100)]
    assert torch.tensor(shares).mean().item() == pytest.approx(context, abs=0.02)


# The loss


def distance(name: str, prediction: Tensor, target: Tensor) -> float:
    terms = []
    for difference in (prediction - target).tolist():
        size = abs(difference)
        smooth = size**2 / 2 if size < 1 else size - 0.5
        terms.append({"l1": size, "l2": size**2, "smooth_l1": smooth}[name])
    return sum(terms) / len(terms)


def normal(values: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 of a vector."""
    return (values - values.mean()) / (values.var(unbiased=False) + eps).sqrt()


def edges_among(tokens: Tokens, row: int, index: Tensor) -> Tensor | None:
    """The edges of one row between these tokens, renumbered."""
    if tokens.edges is None:
        return None
    length, place = tokens.valid.shape[1], {token: number for number, token in enumerate(index.tolist())}
    own = [(s % length, t % length) for s, t in tokens.edges.T.tolist() if s // length == row]
    kept = [(place[s], place[t]) for s, t in own if s in place and t in place]
    return torch.tensor(kept, dtype=torch.long).reshape(-1, 2).T


def slow_loss(objective: LatentPrediction, tokens: Tokens, contexts: Tensor, targets: Tensor) -> float:
    """The paper's equation sample by sample and target by target, without padding, from the module's own parts."""
    modality, teacher = modality_of(objective), objective.teacher.module
    (name,) = teacher.adapters

    def part(row: int, index: Tensor) -> Tokens:
        content, coords = tokens.content[row, index][None], tokens.coords[row, index][None]
        return Tokens(content, coords, torch.ones(1, len(index), dtype=torch.bool), edges_among(tokens, row, index))

    kinds = [kind for kind, count in enumerate(objective.num_targets) for _ in range(count)]
    losses = []
    for number, kind in enumerate(kinds):
        errors = []
        for row in range(len(tokens.valid)):
            every = tokens.valid[row].nonzero().flatten()
            context = contexts[row, min(number, contexts.shape[1] - 1)].nonzero().flatten()
            target = targets[row, number].nonzero().flatten()
            if not len(target):
                continue
            out = teacher.encode(teacher.adapters[name], part(row, every), keep_layers=objective.average_layers)
            wanted = out.tokens[0]
            if objective.average_layers:
                blocks = [torch.stack([normal(channel) for channel in layer[0].T]).T for layer in out.layers]
                wanted = sum(blocks, torch.zeros(())) / len(blocks)
            if objective.normalize_target:
                wanted = torch.stack([normal(token) for token in wanted])
            out = objective.model.encode(modality, part(row, context))
            read = objective.predictor_input(out.tokens)
            masks = objective.mask_tokens[kind].expand(1, len(target), -1)
            places = torch.cat([context, target])
            prediction = objective.predictor(
                torch.cat([read, masks], dim=1),
                objective.predictor_positions[name](tokens.coords[row, places][None]),
                torch.ones(1, len(places), dtype=torch.bool),
                edges_among(tokens, row, places),
                prefix=objective.predictor_input(out.prefix[:, :1]),  # the class token; registers end here
            ).tokens[0, len(context) :]
            prediction = objective.predictor_output(prediction)
            position = {token: place for place, token in enumerate(every.tolist())}
            errors += [
                distance(objective.distance, guess, wanted[position[token]])
                for guess, token in zip(prediction, target.tolist(), strict=True)
            ]
        losses.append(sum(errors) / max(len(errors), 1))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "name, options",
    [
        ("I-JEPA", {}),
        (
            "I-JEPA",
            {"distance": "l2", "num_targets": (1, 2), "target_blocks": (2, 1), "target_scale": ((0.2, 0.3),) * 2},
        ),
        ("T-JEPA", {}),
        ("T-JEPA", {"distance": "l1", "normalize_target": True, "target_style": "region"}),
        ("V-JEPA", {}),
        ("V-JEPA", {"distance": "smooth_l1", "normalize_target": False}),
        ("data2vec", {}),
        ("data2vec", {"normalize_target": False, "average_layers": (2,)}),
    ],
    ids=str,
)
def test_loss_equals_a_slow_loop(name: str, options: dict[str, Any], padded: bool) -> None:
    objective = make(encoder=PREFIX, cls=Padded if padded else None, **{**SETTINGS[name], **options}).double().eval()
    pixels = (padded_images() if padded else images())["pixel_values"].double()
    tokens = tokens_of(objective, {"pixel_values": pixels})
    assert tokens.valid.sum(dim=1).tolist() == ([16, 15, 12, 11, 2, 1] if padded else [16] * 4)
    expected = slow_loss(objective, tokens, *choose(objective, tokens, 3))
    assert objective({"pixel_values": pixels}, key(3)).loss.item() == pytest.approx(expected, rel=1e-5)


@every_setting
def test_loss_of_graphs_equals_a_slow_loop(name: str) -> None:
    """Context and targets read each other along the edges between them, and along no other."""
    objective = make("graph", encoder=PREFIX, **SETTINGS[name]).eval()
    batch = make_batch(modality_of(objective), 4)
    tokens = tokens_of(objective, batch)
    expected = slow_loss(objective, tokens, *choose(objective, tokens, 3))
    assert objective(batch, key(3)).loss.item() == pytest.approx(expected, rel=1e-4)


def test_targets_of_two_kinds_weigh_equally_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 1 for all of the small kind and of 3 for all of the large one is 2 on the average."""
    objective = make(**SETTINGS["V-JEPA"])
    predict = objective.predict

    def wrong(*args: Any) -> Any:
        prediction, *rest = predict(*args)
        error = torch.tensor([1.0, 3.0]).repeat(len(prediction) // 2)[:, None, None]
        return error.expand_as(prediction), *rest

    monkeypatch.setattr(objective, "predict", wrong)
    monkeypatch.setattr(objective, "target", lambda modality, tokens: torch.zeros(*tokens.valid.shape, WIDTH))
    assert objective(images(), key(0)).loss.item() == pytest.approx(2)


def test_average_of_layers_is_standardised_over_the_valid_tokens() -> None:
    values = 3 * torch.randn(4, 9, 5, generator=key(0)) + 7
    whole = torch.ones(4, 9, dtype=torch.bool)
    torch.testing.assert_close(standardized(values, whole), F.instance_norm(values.mT).mT)
    valid = whole.clone()
    valid[1, 6:] = valid[2, ::2] = valid[3] = False
    valid[3, 4] = True  # one token: nothing to compare it with
    spoilt = torch.where(valid[..., None], values, 1e6)
    found = standardized(spoilt, valid)
    for row in range(3):
        torch.testing.assert_close(found[row, valid[row]], F.instance_norm(values[row, valid[row]].T[None])[0].T)
    assert (found[3, 4] == 0).all() and (found[~valid] == 0).all()


@every_setting
def test_targets_are_normalised_in_full_precision_under_autocast(name: str) -> None:
    """To mean 0 and variance 1 up to a millionth, which bf16 cannot hold."""
    objective = make(**{**SETTINGS[name], "normalize_target": True})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = objective.target(modality_of(objective), tokens_of(objective, images()))
        out = objective(images(), key(0))
    assert target.dtype == out.loss.dtype == torch.float32
    assert target.mean(dim=-1).abs().max() < 1e-5
    assert (target.var(dim=-1, unbiased=False) - 1).abs().max() < 1e-3
    assert not torch.equal(target, target.bfloat16().float())
    assert out.loss.item() == pytest.approx(objective(images(), key(0)).loss.item(), rel=0.02)


@every_setting
def test_row_of_one_token_counts_nothing(name: str) -> None:
    """It is the context, and no target is left: it leaves the loss as it is, and alone it is a loss of 0."""
    objective = make(cls=Padded, **SETTINGS[name])
    batch = {"pixel_values": images(3)["pixel_values"]}
    one = images(1, seed=5)["pixel_values"]
    one[..., 2:, :] = 0
    one[..., 2:] = 0
    tokens = tokens_of(objective, {"pixel_values": torch.cat([batch["pixel_values"], one])})
    contexts, targets = choose(objective, tokens, 3)
    assert not targets[3].any() and (contexts[3].sum(dim=1) == 1).all()
    out = objective({"pixel_values": torch.cat([batch["pixel_values"], one])}, key(3))
    few = Tokens(tokens.content[:3], tokens.coords[:3], tokens.valid[:3])
    assert out.loss.item() == pytest.approx(slow_loss(objective.eval(), few, contexts[:3], targets[:3]), rel=1e-5)
    alone = objective({"pixel_values": one}, key(3))
    alone.loss.backward()
    assert alone.loss == 0 and all(value.isfinite() for value in alone.metrics.values())
    assert all(value.grad is None or not value.grad.any() for value in objective.parameters())


# Collapse


def test_collapsed_encoder_raises_the_alarm_while_the_loss_goes_to_zero() -> None:
    """A constant target is learned at once: the loss says nothing, spread and rank do."""
    objective = make(predictor_hidden_size=16)
    healthy = objective(images(), key(0)).metrics
    assert healthy["target_std"] > 0.3 and healthy["target_rank"] > 5 and healthy["prediction_std"] > 0.01
    for model in (objective.model, objective.teacher.module):
        assert isinstance(model.encoder.norm, nn.LayerNorm)
        nn.init.zeros_(model.encoder.norm.weight.requires_grad_(False))
    optimizer = torch.optim.Adam(objective.predictor_output.parameters(), lr=0.05)
    losses = []
    for step in range(100):
        out = objective(images(seed=step % 3), key(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 1e-3 < 0.1 < losses[0]
    assert out.metrics["target_std"] < 1e-6 and out.metrics["prediction_std"] < 0.05
    assert out.metrics["target_rank"].item() == pytest.approx(1, abs=1e-3)


def test_monitors_read_valid_targets_alone() -> None:
    objective = make(cls=Padded)
    tokens = tokens_of(objective, padded_images())
    metrics = objective(padded_images(), key(3)).metrics
    target = objective.target(modality_of(objective), tokens)[tokens.valid]
    assert metrics["target_std"].item() == pytest.approx(target.numpy().std(axis=0, ddof=1).mean(), rel=1e-5)
    prediction, _, counts, *_ = predict(objective, tokens, *choose(objective, tokens, 3))
    spread = prediction[counts].detach().numpy().std(axis=0, ddof=1).mean()
    assert metrics["prediction_std"].item() == pytest.approx(spread, rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


@every_setting
def test_embedding_is_the_mean_output_for_the_contexts(name: str) -> None:
    """Of all contexts of a sample together."""
    objective = make(encoder=PREFIX, cls=Padded, **SETTINGS[name])
    embedding = objective(padded_images(), key(3)).embedding
    assert embedding is not None and embedding.shape == (6, WIDTH) and not embedding.requires_grad
    tokens = tokens_of(objective, padded_images())
    contexts, targets = choose(objective, tokens, 3)
    *_, encoded, seen = predict(objective, tokens, contexts, targets)
    for row, sample in enumerate(encoded.unflatten(0, (6, -1))):
        own = sample[seen.valid.unflatten(0, (6, -1))[row]]
        torch.testing.assert_close(embedding[row], own.mean(dim=0))


# Graphs


@every_setting
def test_messages_carry_nothing_from_targets_to_the_context(name: str) -> None:
    """Nodes outside the context are neighbours of nodes in it, and must not be read through the edges."""
    part = {"context_scale": (0.6, 0.6)} if name == "T-JEPA" else {}  # so that there are edges in the context too
    objective = make("graph", encoder=PREFIX, **{**SETTINGS[name], **part})
    modality = modality_of(objective)
    tokens = modality.tokenize(make_batch(modality, 4))
    contexts, targets = choose(objective, tokens, 3)
    before, _, counts, encoded, seen = predict(objective, tokens, contexts, targets)
    assert tokens.edges is not None
    for number in range(targets.shape[1]):
        of_pair, of_context = (slice(number % count, None, count) for count in (targets.shape[1], contexts.shape[1]))
        context = contexts[:, min(number, contexts.shape[1] - 1)]
        source, target = (context.flatten()[ends] for ends in tokens.edges)
        assert (~source & target).any() and (source & target).any()
        other = torch.where(context[..., None], tokens.content, 100.0)
        after, _, _, encoded_after, _ = predict(objective, replace(tokens, content=other), contexts, targets)
        valid = seen.valid[of_context]
        assert torch.equal(encoded_after[of_context][valid], encoded[of_context][valid])
        assert torch.equal(after[of_pair][counts[of_pair]], before[of_pair][counts[of_pair]])
    # The teacher does read through them.
    neighbour = int(tokens.edges[0, 0])
    content = tokens.content.clone().flatten(0, 1)
    content[neighbour] += 1
    changed = replace(tokens, content=content.view_as(tokens.content))
    reader = int(tokens.edges[1, 0])
    first, second = (objective.target(modality, each).flatten(0, 1)[reader] for each in (tokens, changed))
    assert not torch.equal(first, second)


# Options


def test_views_are_drawn_first_and_are_what_student_and_teacher_read() -> None:
    image = {"horizontal_flip": 0.5, "crop_scale": (0.3, 1.0)}
    objective, batch, generator = make(image=image, views=True), images(), key(3)
    viewed = modality_of(objective).view(batch, generator).batch
    assert not torch.equal(viewed["pixel_values"], batch["pixel_values"])
    loss = objective(batch, key(3)).loss
    objective.views = False
    assert torch.equal(loss, objective(viewed, generator).loss)


@every_setting
def test_options_rebuild_an_equal_objective(name: str) -> None:
    objective = make(**SETTINGS[name])
    found = options_of(objective)
    again = LatentPrediction(MMSSLModel(objective.model.config), **found)
    assert options_of(again) == found
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(images(), key(0)).loss, objective(images(), key(0)).loss)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kinds that do not match": (
        {"num_targets": (1, 1)},
        r"num_targets, target_blocks and target_scale: found 2, 1 and 1 kinds.*the same number",
    ),
    "no kinds": ({"num_targets": (), "target_blocks": (), "target_scale": ()}, r"found 0, 0 and 0 kinds.*at least one"),
    "no targets": ({"num_targets": (0,)}, r"found num_targets \[0\].*expected at least 1 of each"),
    "no blocks": ({"target_blocks": (0,)}, r"target_blocks \[0\].*expected at least 1 of each"),
    "no predictor": ({"predictor_layers": 0}, r"predictor_layers 0; expected at least 1 of each"),
    "target of nothing": ({"target_scale": ((0.0, 0.2),)}, r"target_scale: found \[0\.0, 0\.2\]; expected .*above 0"),
    "scale upside down": ({"target_scale": ((0.3, 0.2),)}, r"target_scale: found \[0\.3, 0\.2\]; expected least and"),
    "scale of three": ({"target_scale": ((0.1, 0.2, 0.3),)}, r"target_scale: found \[0\.1, 0\.2, 0\.3\]; expected"),
    "more than all": ({"context_scale": (0.5, 1.5)}, r"context_scale: found \[0\.5, 1\.5\]; expected .*at most 1"),
    "unknown style": ({"target_style": "block"}, r"target_style: found 'block'; expected one of region, random"),
    "unknown context": ({"context": "all"}, r"context: found 'all'; expected one of shared, first, complement"),
    "unknown distance": ({"distance": "cosine"}, r"distance: found 'cosine'; expected one of l1, l2, smooth_l1"),
    "block 0": ({"average_layers": (0, 1)}, r"average_layers: found \[0, 1\]; the encoder has blocks 1 to 2"),
    "block 3 of 2": ({"average_layers": (3,)}, r"average_layers: found \[3\]; the encoder has blocks 1 to 2"),
    "momentum": ({"momentum": (0.9, 1.1)}, r"momentum: found \[0\.9, 1\.1\]; expected two numbers from 0 to 1"),
    "heads": ({"predictor_attention_heads": 3}, r"num_attention_heads must divide hidden_size; found 3 heads .* 8"),
    "views without views": (
        {"views": True, "cls": WithoutViews},
        r"LatentPrediction with views=True .*'view'.*plain_image.*views=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**options)
