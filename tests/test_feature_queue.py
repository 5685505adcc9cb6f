"""Tests of the feature queue against a list that is cut to its last entries."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl import feature_queue
from mmssl.feature_queue import FeatureQueue


def features(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


def oldest_first(queue: FeatureQueue) -> Tensor:
    return torch.roll(queue.features, -int(queue.pointer), dims=0)


def test_it_begins_with_the_same_unit_vectors_everywhere() -> None:
    """Whatever the global generator says: processes must not differ."""
    torch.manual_seed(1)
    first = FeatureQueue(50, 3)
    torch.manual_seed(2)
    assert torch.equal(first.features, FeatureQueue(50, 3).features)
    torch.testing.assert_close(first.features.norm(dim=1), torch.ones(50))


@pytest.mark.parametrize("sizes", [[4] * 5, [3, 5, 1, 7, 2], [10, 10], [7, 23, 4], [25, 1]], ids=str)
def test_it_keeps_the_last_ones_in_order(sizes: list[int]) -> None:
    """Also where a batch goes around the end, fills the queue, or is larger than it."""
    queue = FeatureQueue(10, 3)
    expected = list(queue.features)
    for seed, size in enumerate(sizes):
        queue.put(features(size, seed))
        expected = [*expected, *features(size, seed)][-10:]
        assert torch.equal(oldest_first(queue), torch.stack(expected))


def test_features_of_all_processes_enter_in_the_order_of_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_queue, "gather_batch", lambda values: torch.cat([values, 2 * values]))
    queue = FeatureQueue(10, 3)
    queue.put(features(4, 0))
    assert torch.equal(queue.features[:8], torch.cat([features(4, 0), 2 * features(4, 0)])) and queue.pointer == 8


def test_what_is_kept_has_no_gradient_and_stays_as_it_was() -> None:
    queue, given = FeatureQueue(6, 3), features(4, 0).requires_grad_()
    queue.put(given)
    assert not queue.features.requires_grad
    kept = queue.features.clone()
    with torch.no_grad():
        given.add_(1)
    assert torch.equal(queue.features, kept)


def test_a_loss_of_the_queue_can_be_differentiated_after_it_has_moved_on() -> None:
    queue, query = FeatureQueue(6, 3), features(2, 0).requires_grad_()
    before = queue.features.clone()
    loss = (query @ queue.features.T).square().sum()
    queue.put(features(4, 1))
    loss.backward()
    torch.testing.assert_close(query.grad, 2 * (query @ before.T @ before).detach())


def test_a_checkpoint_has_contents_and_place() -> None:
    queue = FeatureQueue(6, 3)
    queue.put(features(4, 0))
    again = FeatureQueue(6, 3)
    again.load_state_dict(queue.state_dict())
    for each in (queue, again):
        each.put(features(4, 1))
    assert torch.equal(again.features, queue.features) and torch.equal(again.pointer, queue.pointer)
    assert set(queue.state_dict()) == {"features", "pointer"}


def test_features_of_another_precision_are_converted() -> None:
    queue = FeatureQueue(6, 3)
    queue.put(features(4, 0).bfloat16())
    assert queue.features.dtype == torch.float32
    torch.testing.assert_close(queue.features[:4], features(4, 0).bfloat16().float())


def test_a_queue_of_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="queue: found a size of 0; expected at least 1"):
        FeatureQueue(0, 3)
