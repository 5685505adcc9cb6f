"""The learning rate against its formula and against transformers' schedulers; keyed seeds."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mmssl.randomness import keyed_generator, seed_of
from mmssl.training.schedule import learning_rate, weight_decay


@pytest.mark.parametrize(
    ("shape", "theirs"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_decay_equals_that_of_transformers(shape: str, theirs) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = theirs(optimizer, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        if step >= 10:  # theirs starts its warm-up at 0, ours one step further
            assert learning_rate(step, 50, 10, 0.3, shape=shape) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert [learning_rate(step, 100, 4, 1.0) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_least_rate_is_reached_and_kept() -> None:
    assert learning_rate(100, 100, 10, 1.0, least=0.1) == pytest.approx(0.1)
    assert learning_rate(120, 100, 10, 1.0, least=0.1) == pytest.approx(0.1)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, 10, 0, 0.7) == pytest.approx(0.7)


def test_seed_depends_on_every_part_of_the_key() -> None:
    keys = [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 12), ("0", 1, 2)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2)


def test_keyed_generator_seeds_the_global_one_too() -> None:
    keyed_generator(torch.device("cpu"), 5)
    first = torch.rand(3)
    torch.rand(7)
    own = keyed_generator(torch.device("cpu"), 5)
    assert torch.equal(first, torch.rand(3))
    drawn = torch.rand(3, generator=own)
    assert torch.equal(drawn, torch.rand(3, generator=keyed_generator(torch.device("cpu"), 5)))
    assert not torch.equal(drawn, first)  # dropout must not reuse the numbers that chose the mask


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.04), (25, 0.04 + 0.36 * (1 - 0.5**0.5) / 2), (50, 0.22), (100, 0.4)]
)
def test_weight_decay_rises_as_a_half_cosine(step: int, expected: float) -> None:
    """I-JEPA's .04 to .4, by hand at a quarter, at half and at the end of the way."""
    assert weight_decay(step, 100, 0.04, 0.4) == pytest.approx(expected)
    assert weight_decay(step, 100, 0.04, None) == 0.04
