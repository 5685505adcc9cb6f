"""Tests of ShED: a slow loop, and what shuffling must leave alone."""

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mmssl.discovery import options_of
from mmssl.modalities.base import Batch
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.shuffled_embedding_detection import ShuffledEmbeddingDetection, detection_metrics
from mmssl.tokens import Tokens
from tests.matrix.cases import MODALITIES, make_batch

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(modality: str = "image", **options: Any) -> ShuffledEmbeddingDetection:
    torch.manual_seed(0)
    own = IMAGE if modality == "image" else MODALITIES[modality][0]
    config = MMSSLConfig(modalities={modality: own}, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    objective = ShuffledEmbeddingDetection(MMSSLModel(config), **options).train()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return objective


def images(batch: int = 5, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def of_lengths(*lengths: int) -> Tokens:
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Tokens(torch.zeros(len(lengths), longest, 1), torch.zeros(len(lengths), longest, 1), valid)


def shuffles(
    monkeypatch: pytest.MonkeyPatch, objective: ShuffledEmbeddingDetection
) -> list[tuple[Tokens, Tensor, Tensor]]:
    """What the encoder is given: tokens, their embedded contents and those in their place."""
    seen: list[tuple[Tokens, Tensor, Tensor]] = []
    inner = objective.model.encode

    def encode(modality, tokens, content, **options):
        assert not options  # places are told, everything may be read
        seen.append((tokens, modality.embed(tokens), content))
        return inner(modality, tokens, content)

    monkeypatch.setattr(objective.model, "encode", encode)
    return seen


# The loss


@pytest.mark.parametrize("modality", ["image", "speech", "graph"])
def test_loss_is_that_of_a_loop(modality: str) -> None:
    """The mean over the valid tokens of the batch, each with the label of whether its content is another's."""
    objective = make(modality, shuffle_ratio=0.3)
    own = objective.model.adapters[modality]
    batch = make_batch(own, 5)
    tokens = own.tokenize(batch)
    content = own.embed(tokens)
    source = objective.sources(tokens, key(3))
    shuffled = torch.stack([row[index] for row, index in zip(content, source, strict=True)])
    encoded = objective.model.encode(own, tokens, shuffled).tokens.detach()
    losses, right, moved = [], 0, 0
    for row in range(5):
        for place in range(tokens.valid.shape[1]):
            if tokens.valid[row, place]:
                score = float(objective.head(encoded[row, place]).detach())
                theirs = tokens.content[row, source[row, place]]
                label = not torch.equal(theirs, tokens.content[row, place])  # some patches are blank
                losses.append(math.log1p(math.exp(-score if label else score)))
                right += (score > 0) == label
                moved += label
    out = objective(batch, key(3))
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert out.metrics["accuracy"].item() == pytest.approx(right / len(losses))
    assert out.metrics["share_moved"].item() == pytest.approx(moved / len(losses))
    assert out.embedding is not None and not out.embedding.requires_grad
    torch.testing.assert_close(out.embedding, tokens.pool(encoded))
    assert tokens.valid.all() == (modality == "image")
    assert objective.trained is objective.model


# Shuffling


@pytest.mark.parametrize("modality", MODALITIES)
def test_contents_of_a_row_stay_the_same_ones(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change places among valid tokens; where tokens lie, their edges and their samples do not change."""
    objective = make(modality, shuffle_ratio=0.4)
    own = objective.model.adapters[modality]
    batch = make_batch(own, 4)
    seen = shuffles(monkeypatch, objective)
    out = objective(batch, key(0))
    ((tokens, before, after),) = seen
    clean = own.tokenize(batch)
    for name in ("content", "coords", "valid", "edges", "sample"):
        one, two = getattr(tokens, name), getattr(clean, name)
        assert (one is None and two is None) or torch.equal(one, two)
    assert torch.equal(before[~tokens.valid], after[~tokens.valid])
    moved = 0
    for row, real in enumerate(tokens.valid):
        one, two = (sorted(map(tuple, each[row][real].tolist())) for each in (before, after))
        assert one == two
        moved += int((before[row] != after[row]).any(dim=-1).sum())
    assert moved > 0
    assert out.metrics["share_moved"].item() == pytest.approx(moved / int(tokens.valid.sum()))


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.99])
def test_a_share_of_each_row_moves_in_one_cycle(ratio: float) -> None:
    """round(n * ratio) tokens, at least two; a single one has nowhere to go."""
    lengths = (20, 13, 7, 3, 2, 1)
    tokens = of_lengths(*lengths)
    for seed in range(10):
        source = make(shuffle_ratio=ratio).sources(tokens, key(seed))
        for row, length in enumerate(lengths):
            assert sorted(source[row].tolist()) == list(range(20))
            assert source[row, length:].tolist() == list(range(length, 20))  # padding
            moved = [place for place in range(length) if source[row, place] != place]
            expected = min(length, max(2, round(length * ratio))) if length > 1 else 0
            assert len(moved) == expected
            if moved:
                walk = [moved[0]]
                while int(source[row, walk[-1]]) != moved[0]:
                    walk.append(int(source[row, walk[-1]]))
                assert sorted(walk) == moved


def test_rows_of_one_and_no_token_are_left_alone() -> None:
    objective = make()
    tokens = of_lengths(1, 0, 1)
    assert torch.equal(objective.sources(tokens, key(0)), torch.zeros(3, 1, dtype=torch.long))
    metrics = detection_metrics(torch.tensor([0.3, -0.2]), torch.tensor([False, False]))
    assert metrics["share_moved"] == 0 and metrics["auc"] == 0 and metrics["accuracy"] == 0.5


def test_every_token_moves_as_often_and_goes_everywhere() -> None:
    tokens = of_lengths(*[6] * 4000, *[8] * 10)
    source = make(shuffle_ratio=0.5).sources(tokens, key(0))[:4000, :6]
    counts = torch.stack([(source == place).float().mean(dim=0) for place in range(6)])
    torch.testing.assert_close(counts.diagonal(), torch.full((6,), 0.5), rtol=0, atol=0.04)
    elsewhere = counts[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(elsewhere, torch.full((30,), 0.1), rtol=0, atol=0.025)


def test_a_token_that_gets_what_it_had_has_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """All patches but one are blank: if it moves, two contents have changed, and else none has."""
    objective = make(shuffle_ratio=0.5)
    batch = {"pixel_values": torch.zeros(8, 1, 8, 8)}
    batch["pixel_values"][:, :, :2, :2] = 1.0
    source = objective.sources(objective.model.adapters["image"].tokenize(batch), key(0))
    moved = (source[:, 0] != 0).sum() * 2
    assert 0 < moved < 16
    assert objective(batch, key(0)).metrics["share_moved"].item() == pytest.approx(moved.item() / 128)


# Metrics


def test_auc_is_that_of_scikit_learn() -> None:
    logits, moved = torch.randn(60, generator=key(0)), torch.rand(60, generator=key(1)) < 0.2
    metrics = detection_metrics(logits, moved)
    assert metrics["auc"].item() == pytest.approx(roc_auc_score(moved.numpy(), logits.numpy()), rel=1e-5)
    assert detection_metrics(moved.float(), moved)["auc"] == 1
    never = detection_metrics(-torch.rand(60, generator=key(2)), moved)
    assert never["accuracy"].item() == pytest.approx(1 - never["share_moved"].item())
    assert set(metrics) == {"accuracy", "share_moved", "auc"}


# Options


def test_options_rebuild_the_objective() -> None:
    objective = make(shuffle_ratio=0.3)
    again = ShuffledEmbeddingDetection(objective.model, **options_of(objective))
    assert options_of(again) == options_of(objective) == {"shuffle_ratio": 0.3}


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 15.0])
def test_options_that_cannot_work_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"shuffle_ratio: found .*; expected a share between 0 and 1"):
        make(shuffle_ratio=ratio)
