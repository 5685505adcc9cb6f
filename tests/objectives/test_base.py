"""Tests of what all objectives share: the global mean, refusals, and start values of heads."""

import warnings
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmssl.modalities.base import Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.objectives.base import Objective, global_mean, views_of

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1}


class Still(Image):
    """Images without views."""

    name: ClassVar = "still"
    view = Modality.view


def make_model(**config: Any) -> MMSSLModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **config}
    return MMSSLModel(MMSSLConfig(modalities={"image": IMAGE}, **shape))


def losses(seed: int) -> tuple[Tensor, Tensor]:
    """Losses and weights of two ranks that have different numbers of tokens: (2, 3, 4)."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(2, 3, 4, generator=generator).requires_grad_()
    return loss, torch.randint(0, 4, (2, 3, 4), generator=generator).float() * torch.tensor([1.0, 5.0])[:, None, None]


def test_global_mean_of_one_process_is_the_weighted_mean() -> None:
    loss, weight = losses(0)
    value = global_mean(loss, weight)
    pairs = list(zip(loss.flatten().tolist(), weight.flatten().tolist(), strict=True))
    assert value.item() == pytest.approx(sum(x * w for x, w in pairs) / sum(w for _, w in pairs))
    value.backward()
    torch.testing.assert_close(loss.grad, weight / weight.sum())


def test_global_mean_of_nothing_is_zero() -> None:
    loss = torch.rand(3, requires_grad=True)
    value = global_mean(loss, torch.zeros(3))
    value.backward()
    assert value == 0
    assert loss.grad is not None and (loss.grad == 0).all()


def test_mean_over_ranks_is_the_mean_over_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP takes the mean of the ranks' gradients; here the collective is simulated, rank after rank."""
    loss, weight = losses(1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.copy_(weight.sum()))
    mean = (global_mean(loss[0], weight[0]) + global_mean(loss[1], weight[1])) / 2
    torch.testing.assert_close(mean, (loss * weight).sum() / weight.sum())
    (gradient,) = torch.autograd.grad(mean, loss)
    torch.testing.assert_close(gradient, weight / weight.sum())


def test_refusal_names_objective_modality_method_and_what_works() -> None:
    model = make_model()
    objective = Objective(model)
    objective.require("view", "views=True", "views=False")  # images offer views
    model.modalities["still"] = Still(**IMAGE)
    with pytest.raises(ValueError, match=r"Objective with views=True .*'view', which still does not.*views=False"):
        objective.require("view", "views=True", "views=False")
    objective.require("alter", "alteration", "nothing else")


class WithHeads(Objective):
    """An objective whose heads start with nonsense."""

    def __init__(self, model: MMSSLModel):
        super().__init__(model)
        self.linear, self.norm = nn.Linear(300, 200), nn.LayerNorm(200)
        self.nested = nn.Sequential(nn.Linear(200, 7), nn.GELU())
        for parameter in self.parameters():
            nn.init.constant_(parameter, 7.0)


@pytest.mark.parametrize("initializer", ["xavier_uniform", "normal"])
def test_heads_start_like_the_encoder_and_the_model_stays_as_it_is(initializer: str) -> None:
    model = make_model(initializer=initializer, initializer_range=0.05)
    objective = WithHeads(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    objective.init_heads(model.config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    linear, norm, (nested, _) = objective.linear, objective.norm, objective.nested
    assert isinstance(nested, nn.Linear)
    # Glorot and Bengio (2010): U(-a, a) with a = sqrt(6 / (in + out)), so a standard deviation of a / sqrt(3).
    bound = (6 / 500) ** 0.5
    deviation = bound / 3**0.5 if initializer == "xavier_uniform" else 0.05
    assert linear.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert linear.weight.mean().abs() < 5 * deviation / 60_000**0.5
    if initializer == "xavier_uniform":
        assert bound * 0.99 < linear.weight.abs().max() <= bound
    for value, start in [(linear.bias, 0), (nested.bias, 0), (norm.weight, 1), (norm.bias, 0)]:
        assert torch.equal(value, torch.full_like(value, start))
    assert 0 < nested.weight.abs().max() < 1


@pytest.mark.parametrize(("options", "equal"), [({}, True), ({"horizontal_flip": 0.5}, False)])
def test_views_that_change_nothing_are_warned_of_once(options: dict[str, Any], equal: bool) -> None:
    modality = make_modality("image", {**IMAGE, **options})
    batch = {"pixel_values": torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    for number in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            views_of(modality, batch, torch.Generator().manual_seed(number))
        found = [str(each.message) for each in caught if "views" in str(each.message)]
        assert len(found) == int(equal and number == 0)
        assert not found or ("image: found two views" in found[0] and "--modality.help Image" in found[0])
