"""Tests of autoregressive prediction: a slow loop, and that no token sees what it is to predict."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mmssl.discovery import options_of
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.autoregressive import Autoregressive
from mmssl.tokens import Tokens
from tests.matrix.cases import MODALITIES, make_batch

WIDTH = 16
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "normalize_target": False}
PREFIX: dict[str, Any] = {"class_token": True, "num_register_tokens": 1}


class Holes(Image):
    """Images in which black patches are padding, wherever they lie."""

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
    cls: type[Image] | None = None,
    attention: str = "sdpa",
    own: dict[str, Any] | None = None,
    **options: Any,
) -> Autoregressive:
    """With no parameter at its start value."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"causal_attention": True, **(encoder or {})}
    own = (IMAGE if modality == "image" else MODALITIES[modality][0]) | (own or {})
    model = MMSSLModel(MMSSLConfig(modalities={modality: own}, **shape))
    model.set_attn_implementation(attention)
    if cls is not None:
        model.modalities["image"] = cls(**own).build(WIDTH)
    objective = Autoregressive(model, **{"views": False, **options})
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=key(1)), alpha=0.2)
    return objective.eval()


def batch_of(objective: Autoregressive) -> dict[str, Tensor]:
    modality = modality_of(objective)
    if modality.name != "image":
        return make_batch(modality, 4)
    pixels = torch.randn(4, 1, 8, 8, generator=key(2))
    if isinstance(modality, Holes):
        hole = torch.rand(4, 1, 4, 4, generator=key(4)) < torch.tensor([0.0, 0.4, 0.6, 0.3]).view(4, 1, 1, 1)
        pixels = pixels.masked_fill(hole.repeat_interleave(2, 2).repeat_interleave(2, 3), 0.0)
    return {"pixel_values": pixels}


def modality_of(objective: Autoregressive) -> Modality:
    return next(iter(objective.model.adapters.values()))


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize(
    ("modality", "cls"), [("image", None), ("image", Holes), ("speech", None), ("time_series", None), ("tabular", None)]
)
@torch.no_grad()
def test_equals_a_loop_over_prefixes_of_each_row(modality: str, cls: Any, shift: int) -> None:
    """Each token predicts from an encoder that is given nothing but itself and what comes before it.

    Such an encoder needs no causal mask for its last token. Padding, where it lies between tokens, is left out.
    """
    objective = make(modality, cls=cls, shift=shift)
    own, batch = modality_of(objective), batch_of(objective)
    tokens = own.tokenize(batch)
    total = count = 0.0
    whole = modality == "tabular" or (modality == "image" and cls is None)
    assert tokens.valid.all() == whole
    for row in range(len(tokens.valid)):
        places = tokens.valid[row].nonzero().flatten()
        for last in range(len(places) - shift):
            seen, wanted = places[: last + 1], places[last + shift]
            part = Tokens(
                tokens.content[row, seen][None], tokens.coords[row, seen][None], tokens.valid[row, seen][None]
            )
            encoded = objective.model.encode(own, part).tokens[:, -1:]
            target = own.target(tokens)[row, wanted][None, None]
            prediction = objective.reconstruction_heads[modality](encoded)
            loss, weight = own.reconstruction_loss(prediction, target, torch.ones(1, 1, dtype=torch.bool))
            total, count = total + float(loss * weight), count + float(weight)
    assert count > 0
    assert objective(batch, key(0)).loss.item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("encoder", [PREFIX, {"position_every_block": True}, {"norm_position": "post"}])
@torch.no_grad()
def test_a_token_changes_no_prediction_before_it(attention: str, shift: int, encoder: dict[str, Any]) -> None:
    objective = make(encoder=encoder, attention=attention, shift=shift)
    modality = modality_of(objective)
    tokens = modality.tokenize(batch_of(objective))
    before, target, _, _ = objective.predict(modality, tokens)
    assert before.shape[1] == target.shape[1] == 16 - shift
    assert torch.equal(target, modality.target(tokens)[:, shift:])
    for token in range(16):
        content = tokens.content.clone()
        content[:, token] += 3
        after, _, _, _ = objective.predict(modality, replace(tokens, content=content))
        change = (after - before).abs().amax(dim=(0, 2))
        assert (change[:token] <= 1e-6).all()
        assert (change[token:] > 1e-4).all()


@torch.no_grad()
def test_prefix_tokens_read_no_token() -> None:
    objective = make(encoder=PREFIX)
    modality = modality_of(objective)
    tokens = modality.tokenize(batch_of(objective))
    first = objective.model.encode(modality, tokens).prefix
    other = objective.model.encode(modality, replace(tokens, content=tokens.content + 3)).prefix
    assert torch.equal(first, other)


@torch.no_grad()
def test_a_saved_model_reads_in_the_same_direction(tmp_path) -> None:
    objective = make(encoder=PREFIX)
    objective.trained.save_pretrained(tmp_path)
    loaded = MMSSLModel.from_pretrained(tmp_path)
    assert loaded.config.causal_attention
    batch = batch_of(objective)
    spoilt = {"pixel_values": batch["pixel_values"].clone()}
    spoilt["pixel_values"][..., 4:, :] = 7.0
    first, second = (loaded(**each).last_hidden_state[:, : 2 + 8] for each in (batch, spoilt))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded(**batch).pooler_output, objective(batch, key(0)).embedding, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rows_of_different_length_are_as_they_are_alone() -> None:
    """The last tokens of a short row have no target, whatever stands behind them."""
    objective = make("speech", shift=2)
    modality = modality_of(objective)
    samples = [modality.prepare(sample) for sample in MODALITIES["speech"][1](3)]
    together = objective(modality.collate(samples), key(0)).loss
    total = count = 0.0
    for sample in samples:
        batch = modality.collate([sample])
        frames = int(modality.tokenize(batch).valid.sum()) - 2
        total, count = total + frames * objective(batch, key(0)).loss.item(), count + frames
    assert together.item() == pytest.approx(total / count, rel=1e-4)


@torch.no_grad()
def test_rows_without_a_target_count_nothing() -> None:
    objective = make(cls=Holes, shift=3)
    batch = batch_of(objective)
    single = torch.zeros(1, 1, 8, 8)
    single[..., :2, :6] = 1.0  # three tokens
    more = {"pixel_values": torch.cat([batch["pixel_values"], single])}
    torch.testing.assert_close(objective(more, key(0)).loss, objective(batch, key(0)).loss)
    with pytest.raises(ValueError, match=r"rows of at most 3 tokens, and shift=3.*smaller shift"):
        objective({"pixel_values": single}, key(0))


def test_what_comes_next_is_learned() -> None:
    """Each patch is the last one with the other sign: of variance 1, and all that is not known of it has been seen."""
    objective = make(encoder=PREFIX).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    sign = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    for step in range(150):
        values = torch.randn(32, 1, 1, 1, generator=key(step)) * sign
        loss = objective({"pixel_values": values}, key(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_views_are_drawn_first() -> None:
    objective = make("speech", views=True)
    batch, generator = batch_of(objective), key(3)
    viewed = modality_of(objective).view(batch, generator).batch
    loss = objective(batch, key(3)).loss
    objective.views = False
    assert torch.equal(loss, objective(viewed, generator).loss)


def test_options_rebuild_an_equal_objective() -> None:
    objective = make(shift=2)
    again = Autoregressive(MMSSLModel(objective.model.config), **options_of(objective)).eval()
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(batch_of(objective), key(0)).loss, objective(batch_of(objective), key(0)).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": {"causal_attention": False}}, r"Autoregressive: found .*causal_attention=False.*under `encoder`"),
        ({"shift": 0}, r"shift: found 0; expected at least 1"),
        ({"modality": "graph"}, r"Autoregressive needs tokens in an order .* graph have not"),
        ({"modality": "point_cloud"}, r"Autoregressive needs tokens in an order .* point_cloud have not"),
        ({"cls": WithoutViews, "views": True}, r"Autoregressive with views=True .*'view'.*plain_image.*views=False"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
