"""Every modality with every objective: what must hold whatever they are."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmssl.discovery import find_all, names, options_of
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective
from tests.matrix.cases import CELLS, IDS, MODALITIES, OBJECTIVES, REFUSED, build, make_batch

every_cell = pytest.mark.parametrize(("modality", "objective", "options"), CELLS, ids=IDS)


def generator(seed: int = 0) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def test_the_matrix_knows_every_modality_and_every_objective() -> None:
    assert set(MODALITIES) == set(names("modalities"))
    assert set(OBJECTIVES) == set(find_all("objectives", Objective))


@pytest.mark.parametrize(("modality", "objective", "options"), REFUSED)
def test_what_makes_no_sense_is_refused(modality: str, objective: str, options: dict[str, Any]) -> None:
    """When it is built, by an error that names both."""
    with pytest.raises(ValueError, match=rf"(?s)^(?=.*{modality})(?=.*{objective})"):
        build(modality, objective, options)


@every_cell
def test_loss_is_finite_and_every_parameter_gets_a_gradient(
    modality: str, objective: str, options: dict[str, Any]
) -> None:
    """A parameter without one would stop distributed training at its second step."""
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options)
    out = module(make_batch(adapter, 4), generator())
    out.loss.backward()
    assert out.loss.isfinite() and out.loss > 0
    without = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    assert not without
    assert all(value.grad.isfinite().all() for value in module.parameters() if value.grad is not None)
    assert out.embedding is not None and not out.embedding.requires_grad


@every_cell
def test_same_key_same_loss(modality: str, objective: str, options: dict[str, Any]) -> None:
    """Nothing is drawn from the global generator."""
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options)
    batch = make_batch(adapter, 4)
    first = module(batch, torch.Generator().manual_seed(3)).loss
    torch.manual_seed(99)
    assert torch.equal(first, module(batch, torch.Generator().manual_seed(3)).loss)
    others = (module(batch, torch.Generator().manual_seed(seed)).loss for seed in range(4, 9))
    assert any(not torch.equal(first, other) for other in others)  # of few mirrored samples two draws may agree


@every_cell
def test_inputs_are_left_as_they_are(modality: str, objective: str, options: dict[str, Any]) -> None:
    module, adapter = build(modality, objective, options)
    batch = make_batch(adapter, 4)
    before = {name: value.clone() for name, value in batch.items()}
    module(batch, generator())
    for name in batch:
        torch.testing.assert_close(batch[name], before[name], rtol=0, atol=0, equal_nan=True)


@every_cell
def test_padding_does_not_matter(modality: str, objective: str, options: dict[str, Any]) -> None:
    """What lies behind the end of a sample changes neither the loss nor the embedding."""
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options)
    batch = make_batch(adapter, 4)
    if "attention_mask" not in batch:
        pytest.skip("samples of this modality are all of one length")
    value = batch[adapter.inputs[0]]
    real = batch["attention_mask"].bool()
    real = real.reshape(real.shape + (1,) * (value.dim() - real.dim()))
    spoilt = batch | {adapter.inputs[0]: torch.where(real, value, 1e4)}
    first, second = (module.eval()(each, generator()) for each in (batch, spoilt))
    torch.testing.assert_close(first.loss, second.loss)
    torch.testing.assert_close(first.embedding, second.embedding)


@every_cell
def test_options_rebuild_the_objective(modality: str, objective: str, options: dict[str, Any]) -> None:
    """The record of a run holds all that is needed to make its objective again."""
    module, _ = build(modality, objective, options)
    again = type(module)(module.model, **options_of(module))
    assert options_of(again) == options_of(module)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}


@every_cell
def test_saved_and_loaded_weights_give_the_same_loss(
    tmp_path, modality: str, objective: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options)
    batch = make_batch(adapter, 4)
    module.model.save_pretrained(tmp_path)
    again = type(module)(MMSSLModel.from_pretrained(tmp_path), **options_of(module))
    again.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("model.")}, strict=False)
    assert torch.equal(module.eval()(batch, generator()).loss, again.eval()(batch, generator()).loss)


@every_cell
def test_a_resumed_run_goes_on_to_the_bit(modality: str, objective: str, options: dict[str, Any]) -> None:
    """All that an objective remembers from step to step, teachers and queues too, is in its state."""
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options)
    batch = make_batch(adapter, 4)

    def train(module: Objective, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            loss = module(batch, generator(step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.after_step((step + 1) / 4)
            losses.append(loss.item())
        return losses

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    train(module, optimizer, range(2))
    state, moments = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    went_on = train(module, optimizer, range(2, 4))
    torch.manual_seed(1)
    again, _ = build(modality, objective, options)
    again.load_state_dict(state)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments)
    assert train(again, optimizer, range(2, 4)) == went_on


@every_cell
def test_bf16_autocast_is_close(modality: str, objective: str, options: dict[str, Any]) -> None:
    """On the average of a few masks and views: of one, how values are rounded may be more than 2 % of a loss.

    Some losses are a small difference of cosines from 1, each of them rounded to 2**-8; their average is nearer.
    """
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options)
    batch = make_batch(adapter, 4)
    module.eval()
    full = torch.stack([module(batch, generator(seed)).loss for seed in range(4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.stack([module(batch, generator(seed)).loss for seed in range(4)])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.mean(), full.mean(), rtol=0.02, atol=2**-10)


@every_cell
def test_eight_samples_are_over_fitted(modality: str, objective: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, adapter = build(modality, objective, options, hidden_size=32)
    batch = make_batch(adapter, 8)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(100):  # one mask for all steps: what is hidden can be learned by heart
        loss = module(batch, generator()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if all(each < 0.5 * losses[0] for each in losses[-5:]):
            return
    pytest.fail(f"the loss did not stay below half of {losses[0]:.3f}: it ended at {losses[-5:]}")


@pytest.mark.parametrize("modality", names("modalities"))
def test_an_affine_modality_embeds_by_one_affine_map(modality: str) -> None:
    """The embedding of a mixture is the mixture of embeddings, wherever tokens lie; others say that they are not."""
    module, plain = build(modality, "MaskedReconstruction", {"views": False})
    adapter = module.model.adapters[modality]
    tokens = adapter.tokenize(make_batch(plain, 4))
    mixed = 0.3 * tokens.content.float() + 0.7 * tokens.content.float().flip(0)
    moved = replace(tokens, content=mixed, coords=tokens.coords.flip(1))
    embedded = adapter.eval().embed(tokens)
    expected = 0.3 * embedded + 0.7 * embedded.flip(0)
    both = tokens.valid & tokens.valid.flip(0)
    same = torch.allclose(adapter.embed(moved)[both], expected[both], atol=1e-4)
    assert same == adapter.affine
