"""Tests of the parts of projectors: PyTorch's own batch normalisation, closed forms, and two processes against one."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmssl.heads import BatchNorm, mlp


def on_two_processes(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a function of the rank returns in each of two processes that can talk to each other."""

    def work(rank: int) -> None:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        torch.save(function(rank), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()

    context = multiprocessing.get_context("fork")  # which spares importing everything again
    processes = [context.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def values(rows: int, width: int = 5, seed: int = 0) -> Tensor:
    """Channels of different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 5, width)
    return torch.randn(rows, width, generator=generator) * scale + scale.flip(0)


def norm_with_weights(width: int = 5) -> BatchNorm:
    norm = BatchNorm(width)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(torch.randn(width, generator=torch.Generator().manual_seed(seed)))
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_and_its_gradients_are_those_of_pytorch(affine: bool) -> None:
    own = norm_with_weights() if affine else BatchNorm(5, affine=False)
    other = nn.BatchNorm1d(5, affine=affine).train()
    other.load_state_dict(own.state_dict(), strict=False)
    first, second = (values(7).requires_grad_() for _ in range(2))
    found, expected = own(first), other(second)
    torch.testing.assert_close(found, expected)
    for out in (found, expected):
        (out * torch.arange(5) + out**3).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-4)
    for one, two in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)


def test_variance_is_the_biased_one() -> None:
    """Of the numbers 1 and 5 it is 4, not 8: they become -1 and 1."""
    out = BatchNorm(1, affine=False, eps=0.0)(torch.tensor([[1.0], [5.0]]))
    torch.testing.assert_close(out, torch.tensor([[-1.0], [1.0]]))
    out = BatchNorm(3, affine=False)(values(9, 3))
    torch.testing.assert_close(out.square().sum(dim=0), torch.full((3,), 9.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(out.sum(dim=0), torch.zeros(3), rtol=0, atol=1e-4)


def test_statistics_are_those_of_the_batch_in_evaluation_too() -> None:
    norm = norm_with_weights()
    norm.train()(values(6, seed=1))
    assert torch.equal(norm.train()(values(6)), norm.eval()(values(6)))
    assert not list(norm.buffers())


def test_half_precision_is_computed_in_full() -> None:
    half = values(8).bfloat16()
    out = norm_with_weights()(half)
    assert out.dtype == torch.float32 and torch.equal(out, norm_with_weights()(half.float()))


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found a batch of 1 sample; expected at least 2: make it larger"):
        norm_with_weights()(values(1))


def test_two_processes_have_the_statistics_of_both(tmp_path: Path) -> None:
    """Output and gradients, with the mean over processes that DDP takes; one sample in each is enough."""
    weights = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))

    def run(rows: slice) -> tuple[Tensor, ...]:
        norm, inputs = norm_with_weights(), values(8)[rows].requires_grad_()
        out = norm(inputs)
        loss = (out.square() * weights[rows]).sum(dim=1).mean()
        loss.backward()
        assert norm.weight is not None and norm.bias is not None
        return out.detach(), inputs.grad, norm.weight.grad, norm.bias.grad  # type: ignore[return-value]

    def half(rank: int) -> Any:
        return run(slice(4 * rank, 4 * rank + 4)), norm_with_weights()(values(2)[rank : rank + 1]).detach()

    (first, one), (second, two) = on_two_processes(half, tmp_path)
    out, gradient, *of_parameters = run(slice(0, 8))
    torch.testing.assert_close(torch.cat([first[0], second[0]]), out)
    torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, gradient, rtol=1e-4, atol=1e-6)
    for mine, others, whole in zip(first[2:], second[2:], of_parameters, strict=True):
        torch.testing.assert_close((mine + others) / 2, whole)
    torch.testing.assert_close(torch.cat([one, two]), norm_with_weights()(values(2)).detach())


def test_projector_is_linear_norm_relu_and_linear_without_bias() -> None:
    torch.manual_seed(0)
    projector, features = mlp([4, 6, 5, 3]), values(7, 4)
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linears] == [(6, 4), (5, 6), (3, 5)]
    assert all(layer.bias is None for layer in linears)
    expected = features
    for layer in linears[:-1]:
        expected = expected @ layer.weight.T
        expected = (expected - expected.mean(dim=0)) / (expected.var(dim=0, unbiased=False) + 1e-5).sqrt()
        expected = expected.clamp(min=0)
    torch.testing.assert_close(projector(features), expected @ linears[-1].weight.T)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_without_batch_norm_layers_have_biases_and_samples_do_not_see_each_other(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    projector, features = mlp([4, 6, 3], batch_norm=False, activation=activation), values(7, 4)
    one, two = (layer for layer in projector if isinstance(layer, nn.Linear))
    expected = activation()(features @ one.weight.T + one.bias) @ two.weight.T + two.bias
    torch.testing.assert_close(projector(features), expected)
    torch.testing.assert_close(projector(features[2:3]), expected[2:3])
    assert len(projector) == 3


def test_one_layer_is_a_linear_map() -> None:
    projector = mlp([4, 3])
    assert len(projector) == 1
    torch.testing.assert_close(projector(2 * values(3, 4)), 2 * projector(values(3, 4)))
