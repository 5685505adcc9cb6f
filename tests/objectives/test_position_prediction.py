"""Tests of MP3: a slow loop, and what would tell places or let tokens read what they should not."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.discovery import options_of
from mmssl.modalities.base import Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.position_prediction import PositionPrediction
from mmssl.positions import MLPPositions
from mmssl.tokens import Tokens
from tests.matrix.cases import MODALITIES, make_batch

WIDTH, PLACES = 16, 16
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}
PREFIX: dict[str, Any] = {"class_token": True, "num_register_tokens": 1}


class Learned(Image):
    """With learned places."""

    name: ClassVar = "image"

    def positions(self, width: int) -> nn.Module:
        return MLPPositions(width, axes=2)


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    modality: str = "image",
    encoder: dict[str, Any] | None = None,
    cls: type[Image] | None = None,
    start: bool = False,
    **options: Any,
) -> PositionPrediction:
    """With no parameter at its start value, unless asked for."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, **(encoder or {})}
    own = IMAGE if modality == "image" else MODALITIES[modality][0]
    model = MMSSLModel(MMSSLConfig(modalities={modality: own}, **shape))
    if cls is not None:
        model.modalities["image"] = cls(**own).build(WIDTH)
    objective = PositionPrediction(model, **{"views": False, **options})
    if not start:
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=key(1)), alpha=0.2)
    return objective.eval()


def batch_of(objective: PositionPrediction, count: int = 4) -> dict[str, Tensor]:
    modality = next(iter(objective.model.adapters.values()))
    if modality.name != "image":
        return make_batch(modality, count)
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=key(2))}


def tokens_of(objective: PositionPrediction) -> tuple[Modality, Tokens, Tensor]:
    modality = next(iter(objective.model.adapters.values()))
    tokens = modality.tokenize(batch_of(objective))
    return modality, tokens, objective.context(tokens, key(3))


@pytest.mark.parametrize("modality", ["image", "speech", "time_series"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
@torch.no_grad()
def test_equals_a_loop_over_rows_and_tokens(modality: str, mask_ratio: float) -> None:
    """Each row alone, without padding, read by an encoder that is given no places."""
    objective = make(modality, encoder=PREFIX, mask_ratio=mask_ratio)
    own, tokens, context = tokens_of(objective)
    out = objective(batch_of(objective), key(3))
    head: Any = objective.place_heads[modality]
    losses, right = [], []
    for row, valid in enumerate(tokens.valid):
        content = own.embed(tokens)[row : row + 1, valid]
        everything = torch.ones(1, int(valid.sum()), dtype=torch.bool)
        encoder = objective.model.encoder
        encoded = encoder(content, torch.zeros_like(content), everything, context=context[row : row + 1, valid]).tokens
        for token, place in zip(encoded[0], own.places(tokens)[row, valid].tolist(), strict=True):
            normalised = F.layer_norm(token, (WIDTH,), head[0].weight, head[0].bias, eps=1e-6)
            scores = (head[1].weight @ normalised + head[1].bias).tolist()
            losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[place])
            right.append(scores[place] == max(scores))
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert out.metrics["accuracy"].item() == pytest.approx(sum(right) / len(right))
    assert out.metrics["chance"].item() == pytest.approx(1 / own.num_places)
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("modality", ["image", "speech"])
@pytest.mark.parametrize(("mask_ratio", "share"), [(0.0, 1.0), (0.5, 0.5), (0.75, 0.25), (0.99, 0.01)])
def test_context_is_a_share_of_the_valid_tokens_of_each_row(modality: str, mask_ratio: float, share: float) -> None:
    objective = make(modality, mask_ratio=mask_ratio)
    _, tokens, context = tokens_of(objective)
    assert not (context & ~tokens.valid).any()
    counts = tokens.valid.sum(dim=1).tolist()
    assert context.sum(dim=1).tolist() == [max(1, round(count * share)) for count in counts]
    assert mask_ratio == 0 or not torch.equal(context, objective.context(tokens, key(4)))


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
@torch.no_grad()
def test_permuted_tokens_have_permuted_logits(mask_ratio: float) -> None:
    """No place is left in: neither added to the contents nor between the blocks."""
    for encoder in (PREFIX, {"position_every_block": True}):
        objective = make(encoder=encoder, mask_ratio=mask_ratio)
        modality, tokens, context = tokens_of(objective)
        order = torch.randperm(PLACES, generator=key(5))
        logits, _ = objective.predict(modality, tokens, context)
        moved = replace(tokens, content=tokens.content[:, order])  # coords stay where they were
        permuted, _ = objective.predict(modality, moved, context[:, order])
        torch.testing.assert_close(permuted, logits[:, order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_lies_outside_the_context_is_read_by_no_other_token() -> None:
    """In no layer, as all layers share one context; but it asks for its own place."""
    objective = make(encoder=PREFIX | {"num_hidden_layers": 4}, mask_ratio=0.5)
    modality, tokens, context = tokens_of(objective)
    before, _ = objective.predict(modality, tokens, context)
    outside = int((~context[0]).nonzero()[0])
    content = tokens.content.clone()
    content[0, outside] += 1
    after, _ = objective.predict(modality, replace(tokens, content=content), context)
    others = torch.arange(PLACES) != outside
    assert torch.equal(after[0, others], before[0, others]) and torch.equal(after[1:], before[1:])
    assert not torch.allclose(after[0, outside], before[0, outside])
    inside = int(context[0].nonzero()[0])
    content[0, inside] += 1
    read, _ = objective.predict(modality, replace(tokens, content=content), context)
    assert (read[0] - after[0]).abs().amax(dim=-1).min() > 1e-4


@torch.no_grad()
def test_tokens_that_are_all_the_same_cannot_be_told_apart() -> None:
    objective = make(encoder=PREFIX, mask_ratio=0.5)
    modality, tokens, context = tokens_of(objective)
    same = replace(tokens, content=tokens.content[:, :1].expand_as(tokens.content))
    logits, _ = objective.predict(modality, same, context)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), atol=1e-5, rtol=1e-5)
    loss = objective({"pixel_values": torch.ones(4, 1, 8, 8)}, key(0)).loss
    assert loss >= math.log(PLACES) - 1e-5


@pytest.mark.parametrize("modality", ["image", "speech", "time_series", "video"])
@pytest.mark.parametrize("width", [16, 128])
def test_loss_begins_at_that_of_an_even_guess(modality: str, width: int) -> None:
    objective = make(modality, start=True, encoder={"hidden_size": width})
    places = next(iter(objective.model.adapters.values())).num_places
    assert objective(batch_of(objective), key(0)).loss.item() == pytest.approx(math.log(places), rel=0.05)


def test_places_are_learned_from_contents_alone() -> None:
    """A brighter patch in each place: nearly all are found. With contents that say nothing none is, as in the paper's
    test that no place has leaked in."""
    accuracy = {}
    for told in (True, False):
        objective = make(start=True, mask_ratio=0.5).train()
        optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
        bright = torch.linspace(-2, 2, PLACES).view(1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        for step in range(120):
            pixels = 0.05 * torch.randn(32, 1, 8, 8, generator=key(step)) + (bright if told else 0)
            out = objective({"pixel_values": pixels}, key(1000 + step))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        accuracy[told] = out.metrics["accuracy"].item()
    assert accuracy[True] > 0.9
    assert accuracy[False] < 0.15


def test_learned_places_get_no_gradient_and_ask_for_none() -> None:
    objective = make(cls=Learned).train()
    objective(batch_of(objective), key(0)).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.requires_grad == (".position." not in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_embedding_is_the_mean_of_the_valid_tokens() -> None:
    objective = make("speech", mask_ratio=0.5)
    modality, tokens, context = tokens_of(objective)
    embedding = objective(batch_of(objective), key(3)).embedding
    _, encoded = objective.predict(modality, tokens, context)
    assert embedding is not None and not embedding.requires_grad
    for row, valid in enumerate(tokens.valid):
        torch.testing.assert_close(embedding[row], encoded[row, valid].mean(dim=0))


def test_views_are_drawn_first() -> None:
    objective = make("speech", views=True)
    batch, generator = batch_of(objective), key(3)
    viewed = objective.model.adapters["speech"].view(batch, generator).batch
    loss = objective(batch, key(3)).loss
    objective.views = False
    assert torch.equal(loss, objective(viewed, generator).loss)


def test_options_rebuild_an_equal_objective() -> None:
    objective = make(mask_ratio=0.3)
    again = PositionPrediction(MMSSLModel(objective.model.config), **options_of(objective)).eval()
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(batch_of(objective), key(0)).loss, objective(batch_of(objective), key(0)).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio: found 1.0; expected a share from 0 to below 1"),
        ({"mask_ratio": -0.1}, r"mask_ratio: found -0.1"),
        ({"modality": "graph"}, r"PositionPrediction .*'places', which graph does not offer.*an order in common"),
        ({"modality": "point_cloud"}, r"PositionPrediction .*'places', which point_cloud does not offer"),
        ({"modality": "tabular"}, r"PositionPrediction .*'places', which tabular does not offer"),
        (
            {"cls": WithoutViews, "views": True},
            r"PositionPrediction with views=True .*'view'.*plain_image.*views=False",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
