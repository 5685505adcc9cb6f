"""Tests of mixed samples: a slow loop, and mixtures of the inputs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective, mix, represent
from mmssl.tokens import Tokens
from tests.matrix.cases import MODALITIES, make_batch

ALIGNED = ("image", "speech", "tabular", "time_series", "video")


def make(modality: str) -> tuple[MMSSLModel, Modality, Tokens]:
    torch.manual_seed(0)
    options: dict[str, Any] = MODALITIES[modality][0]
    model = MMSSLModel(
        MMSSLConfig(modalities={modality: options}, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    adapter = model.adapters[modality]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model, adapter, adapter.tokenize(make_batch(adapter, 4))


def cut(tokens: Tokens, length: int) -> Tokens:
    index = torch.arange(length).expand(len(tokens.valid), -1)
    return tokens.select(index, torch.ones_like(index, dtype=torch.bool))


def by_hand(model: MMSSLModel, modality: Modality, tokens: Tokens, other: Tokens, partner: list[int], share: Tensor):
    own, others = modality.embed(tokens), modality.embed(other)
    copies = len(own) // len(partner)
    expected = own.clone()
    for row in range(len(own)):
        sample, number = divmod(row, copies)
        theirs = partner[sample] * copies + number
        part = share if share.dim() == 0 else share[sample]
        for place in range(own.shape[1]):
            if place < others.shape[1] and other.valid[theirs, place]:
                expected[row, place] = part * own[row, place] + (1 - part) * others[theirs, place]
    return expected


@pytest.mark.parametrize("modality", ALIGNED)
@pytest.mark.parametrize("each", [False, True], ids=["one share", "a share of each"])
def test_mixture_is_that_of_a_loop(modality: str, each: bool) -> None:
    """Lengths differ within the batch of speech, channels of a series are rows of their own."""
    model, adapter, tokens = make(modality)
    partner, share = [2, 0, 3, 1], torch.tensor([0.1, 0.3, 0.6, 0.9]) if each else torch.tensor(0.3)
    other = replace(tokens, content=tokens.content.roll(1, dims=1))
    length = tokens.valid.shape[1]
    for one, two in ((tokens, other), (cut(tokens, length - 2), other), (tokens, cut(other, length - 2))):
        found = mix(model, adapter, one, two, torch.tensor(partner), share)
        torch.testing.assert_close(found, by_hand(model, adapter, one, two, partner, share))
    if modality == "speech":
        assert not tokens.valid.all()
    if modality == "time_series":
        assert len(tokens.valid) == 8


def test_an_affine_embedding_of_mixed_inputs_is_the_same() -> None:
    model, adapter, tokens = make("image")
    share, partner = torch.tensor(0.3), torch.tensor([1, 2, 3, 0])
    mixed = replace(tokens, content=share * tokens.content + (1 - share) * tokens.content[partner])
    content = mix(model, adapter, tokens, tokens, partner, share)
    torch.testing.assert_close(content, adapter.embed(mixed))
    torch.testing.assert_close(represent(model, adapter, tokens, content), represent(model, adapter, mixed))


@pytest.mark.parametrize("modality", ALIGNED)
def test_all_of_one_is_this_one_to_the_bit(modality: str) -> None:
    model, adapter, tokens = make(modality)
    partner = torch.tensor([1, 2, 3, 0])
    assert torch.equal(mix(model, adapter, tokens, tokens, partner, torch.tensor(1.0)), adapter.embed(tokens))
    none = mix(model, adapter, tokens, tokens, torch.arange(4), torch.tensor(0.0))
    assert torch.equal(none[tokens.valid], adapter.embed(tokens)[tokens.valid])


def test_contents_are_embedded_by_the_model_that_is_named() -> None:
    model, adapter, tokens = make("image")
    torch.manual_seed(1)
    other = MMSSLModel(model.config)
    found = mix(other, adapter, tokens, tokens, torch.arange(4), torch.tensor(0.5))
    torch.testing.assert_close(found, other.adapters["image"].embed(tokens))


def test_both_parts_get_gradients_and_padding_does_not() -> None:
    model, adapter, tokens = make("speech")
    one, two = (replace(tokens, content=tokens.content.clone().requires_grad_()) for _ in range(2))
    partner, share = torch.tensor([3, 0, 1, 2]), torch.tensor(0.3)
    mix(model, adapter, one, two, partner, share).sum().backward()
    assert one.content.grad is not None and two.content.grad is not None
    torch.testing.assert_close(two.content.grad[~tokens.valid], torch.zeros_like(tokens.content[~tokens.valid]))
    alone = tokens.valid & ~tokens.valid[partner]
    whole = one.content.grad[alone]
    assert alone.any() and (whole != 0).any()
    torch.testing.assert_close(one.content.grad[0, 0] / 0.3, whole[0])


@pytest.mark.parametrize("modality", MODALITIES)
def test_samples_without_common_places_are_refused(modality: str) -> None:
    model, *_ = make(modality)
    objective = Objective(model)
    if modality in ALIGNED:
        objective.require_aligned("mixing", "mixing=False")
    else:
        with pytest.raises(ValueError, match=rf"Objective with mixing .*{modality} do not lie at .*: mixing=False"):
            objective.require_aligned("mixing", "mixing=False")
