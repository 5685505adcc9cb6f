"""Tests of the moving-average teacher: the closed form, and that it is left out of everything else."""

from math import cos, pi, prod

import pytest
import torch
from torch import nn

from mmssl.teacher import Teacher


def student() -> nn.Sequential:
    """Parameters of two shapes, buffers of two types, and layers that differ between training and evaluation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def change(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_teacher_begins_as_a_copy_of_its_own() -> None:
    module = student()
    teacher = Teacher(module, (0.9, 1.0))
    own, other = teacher.module.state_dict(), module.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert not {id(parameter) for parameter in teacher.parameters()} & {id(p) for p in module.parameters()}
    change(module, 1)
    assert not torch.equal(next(teacher.parameters()), next(module.parameters()))
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("momentum", [(0.5, 0.9), (0.996, 1.0), (0.9, 0.2), (0.7, 0.7)], ids=str)
def test_several_steps_equal_the_closed_form_with_linear_momentum(momentum: tuple[float, float]) -> None:
    """``t_n = t_0 * m_1 ... m_n + sum of s_k * (1 - m_k) * m_(k+1) ... m_n``, with m_k on a line, not on a cosine."""
    steps, (start, end) = 8, momentum
    module = student().double()
    teacher, first = Teacher(module, momentum), [parameter.clone() for parameter in module.parameters()]
    kept = [start + (end - start) * k / steps for k in range(1, steps + 1)]
    expected = [value * prod(kept) for value in first]
    for k in range(1, steps + 1):
        change(module, k)
        share = (1 - kept[k - 1]) * prod(kept[k:])
        expected = [total + share * value for total, value in zip(expected, module.parameters(), strict=True)]
        teacher.follow(module, k / steps)
    for own, closed in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(own, closed, rtol=1e-6, atol=1e-9)


def test_momentum_of_one_keeps_and_of_zero_copies_to_the_bit() -> None:
    module = student()
    teacher = Teacher(module, (0.0, 1.0))
    before = [parameter.clone() for parameter in teacher.parameters()]
    change(module, 1)
    teacher.follow(module, 1.0)
    assert all(torch.equal(own, old) for own, old in zip(teacher.parameters(), before, strict=True))
    teacher.follow(module, 0.0)
    assert all(torch.equal(own, new) for own, new in zip(teacher.parameters(), module.parameters(), strict=True))


def test_buffers_are_copied_not_averaged() -> None:
    module = student()
    teacher = Teacher(module, (0.5, 0.5))
    module(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) + 7)
    teacher.follow(module, 0.5)
    assert module[1].num_batches_tracked == 1
    own, other = dict(teacher.module.named_buffers()), dict(module.named_buffers())
    assert len(own) == 3 and all(torch.equal(own[name], other[name]) for name in own)


def test_student_is_left_as_it_is() -> None:
    module = student()
    teacher = Teacher(module, (0.5, 0.5))
    change(module, 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    teacher.follow(module, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_teacher_has_no_gradient_and_stays_in_evaluation_mode() -> None:
    module = student()
    teacher = Teacher(module, (0.5, 0.5))
    parent = nn.ModuleList([module, teacher])
    for mode in (True, False, True):
        parent.train(mode)
        assert not any(part.training for part in teacher.modules())
        assert module.training == mode
    x = torch.ones(5, 3)
    assert torch.equal(teacher.module(x), teacher.module(x)) and not torch.equal(module(x), module(x))  # no dropout
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.module(x).requires_grad


@pytest.mark.parametrize("momentum", [(-0.1, 1.0), (0.9, 1.1)], ids=str)
def test_momentum_beyond_its_range_is_refused(momentum: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"momentum: found \[.*\]; expected two numbers from 0 to 1, at start and end"):
        Teacher(student(), momentum)


def test_momentum_on_a_cosine_is_that_of_byol() -> None:
    """``1 - (1 - m) (1 + cos(pi t / T)) / 2``: at the first steps it hardly grows, half-way it is the mean."""
    teacher = Teacher(nn.Linear(1, 1, bias=False), (0.9, 1.0), schedule="cosine")
    other = nn.Linear(1, 1, bias=False)
    for progress in (0.0, 0.1, 0.5, 0.8, 1.0):
        with torch.no_grad():
            teacher.module.weight.fill_(1.0)
            other.weight.fill_(0.0)
        teacher.follow(other, progress)
        kept = 1 - (1 - 0.9) * (1 + cos(pi * progress)) / 2
        assert teacher.module.weight.item() == pytest.approx(kept, abs=1e-6)
