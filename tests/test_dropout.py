"""Dropout by 16 random bits of each value."""

import pytest
import torch
from torch import nn

from mmssl.dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_share_and_scale_are_those_of_torch(p: float) -> None:
    """Of a million ones the share that is 0 is p within five standard errors; the others are 1 / (1 - p)."""
    torch.manual_seed(0)
    out = dropout(torch.ones(1000, 1000), p)
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p)) ** 0.5 / 1000)
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))


def test_values_are_dropped_independently() -> None:
    """No row, no column and no distance of up to 8, which one draw of 64 bits spans, drops together."""
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(400_000), 0.3) == 0).double() - 0.3
    for distance in (1, 2, 3, 4, 8, 1024):
        assert (dropped[distance:] * dropped[:-distance]).mean().abs() < 5 * 0.21 / 400_000**0.5


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 3, 2)])
def test_gradient_is_the_mask_times_the_scale(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape).requires_grad_()
    out = dropout(values, 0.5)
    weight = torch.randn(shape)
    (out * weight).sum().backward()
    torch.testing.assert_close(values.grad, weight * (out / values).detach().round())  # 0 or 2


def test_without_a_share_without_training_and_with_all_of_it() -> None:
    values = torch.randn(7)
    assert dropout(values, 0.0) is values and dropout(values, 0.4, training=False) is values
    assert Dropout(0.4).eval()(values) is values
    assert dropout(values, 1.0).eq(0).all()


def test_seed_decides_and_half_precision_stays() -> None:
    values = torch.ones(1000, dtype=torch.bfloat16)
    torch.manual_seed(3)
    one, other = dropout(values, 0.5), dropout(values, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(values, 0.5), one) and not torch.equal(one, other) and one.dtype == torch.bfloat16


def test_layers_of_the_encoder_use_it() -> None:
    """Every dropout layer that a model has is this one."""
    from mmssl.encoder import Encoder, EncoderConfig

    encoder = Encoder(EncoderConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, hidden_dropout_prob=0.1))
    layers = [each for each in encoder.modules() if isinstance(each, nn.Dropout)]
    assert len(layers) == 3 and all(isinstance(each, Dropout) for each in layers)
