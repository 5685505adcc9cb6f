"""Tests of OBoW: slow loops, and what its vocabulary must do from step to step."""

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.discovery import options_of
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.bag_of_words import BagOfWords, Vocabulary, divergence, perplexity, squared_distance
from mmssl.objectives.base import piece_of, represent, views_of
from mmssl.objectives.contrastive import similarity
from tests.matrix.cases import MODALITIES, make_batch
from tests.test_heads import on_two_processes

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "horizontal_flip": 0.5}
SMALL: dict[str, Any] = {"words": 12, "crop_scale": (0.3, 0.6)}
WIDTH = 8


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(modality: str = "image", cls: type[Image] | None = None, **options: Any) -> BagOfWords:
    """With no parameter at its start value, and a teacher that is not the student."""
    torch.manual_seed(0)
    own = IMAGE if modality == "image" else MODALITIES[modality][0]
    config = MMSSLConfig(modalities={modality: own}, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2)
    model = MMSSLModel(config)
    if cls is not None:
        model.modalities["image"] = cls(**own).build(WIDTH)
    objective = BagOfWords(model, **{**SMALL, **options}).train()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return objective


def images(batch: int = 5, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def vocabulary(size: int = 7, width: int = 4, inv_delta: float = 10.0, seed: int = 0) -> Vocabulary:
    torch.manual_seed(0)
    made = Vocabulary(size, width, inv_delta)
    made.queue.features = torch.randn(size, width, generator=key(seed))
    return made


def features(batch: int = 3, length: int = 6, width: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens, of which the last ones of some rows are padding."""
    valid = torch.arange(length) < torch.tensor([length, 2, length - 1, 1])[:batch, None]
    return torch.randn(batch, length, width, generator=key(seed)), valid


def bags_by_hand(tokens: Tensor, valid: Tensor, words: Tensor, inv_delta: float, mu: float | None = None):
    """Token by token and word by word; mu of this batch alone, unless it is given."""
    least = []
    for row, real in zip(tokens.double(), valid, strict=True):
        for token in row[real]:
            least.append(min(float(((token - word) ** 2).sum()) for word in words.double()))
    mu = sum(least) / len(least) if mu is None else mu
    bags = []
    for row, real in zip(tokens.double(), valid, strict=True):
        most = [0.0] * len(words)
        for token in row[real]:
            scores = [math.exp(-inv_delta / mu * float(((token - word) ** 2).sum())) for word in words.double()]
            most = [max(old, score / sum(scores)) for old, score in zip(most, scores, strict=True)]
        bags.append([value / sum(most) for value in most])
    return torch.tensor(bags), mu


# Bags of words


@pytest.mark.parametrize("inv_delta", [1.0, 10.0])
def test_bags_are_those_of_a_loop(inv_delta: float) -> None:
    own = vocabulary(inv_delta=inv_delta)
    tokens, valid = features()
    bag, mu = own(tokens, valid)
    expected, expected_mu = bags_by_hand(tokens, valid, own.queue.features, inv_delta)
    torch.testing.assert_close(bag, expected.float(), rtol=1e-4, atol=1e-6)
    assert mu.item() == pytest.approx(expected_mu, rel=1e-5)
    torch.testing.assert_close(bag.sum(dim=1), torch.ones(3))


def test_order_of_tokens_and_padding_do_not_matter() -> None:
    own, (tokens, valid) = vocabulary(), features()
    bag, mu = own(tokens, valid)
    order = torch.randperm(6, generator=key(2))
    again, other = own(tokens[:, order].masked_fill(~valid[:, order, None], 1e4), valid[:, order])
    torch.testing.assert_close(again, bag)
    torch.testing.assert_close(other, mu)


def test_order_of_words_is_that_of_bags_weights_and_scores() -> None:
    own, (tokens, valid) = vocabulary(), features()
    represented = torch.randn(3, 4, generator=key(3))
    bag, weights = own(tokens, valid)[0], own.weights()
    loss = divergence(bag, similarity(represented, weights))
    order = torch.randperm(7, generator=key(2))
    own.queue.features = own.queue.features[order]
    turned = own.weights()
    torch.testing.assert_close(own(tokens, valid)[0], bag[:, order])
    torch.testing.assert_close(turned, weights[order])
    torch.testing.assert_close(divergence(bag[:, order], similarity(represented, turned)), loss)


def test_sharp_codes_are_the_nearest_words() -> None:
    """Each word that is the nearest of some token counts the same."""
    own, (tokens, valid) = vocabulary(inv_delta=1e6), features()
    bag, _ = own(tokens, valid)
    for row, real, found in zip(tokens, valid, bag, strict=True):
        used = {int((own.queue.features - token).square().sum(dim=1).argmin()) for token in row[real]}
        expected = torch.tensor([1 / len(used) if word in used else 0.0 for word in range(7)])
        torch.testing.assert_close(found, expected)


def test_size_of_features_does_not_matter() -> None:
    """As mu follows them."""
    own, (tokens, valid) = vocabulary(), features()
    bag, mu = own(tokens, valid)
    own.queue.features = own.queue.features * 30
    again, other = own(tokens * 30, valid)
    torch.testing.assert_close(again, bag, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other, mu * 900)


def test_distances_are_exact_far_from_the_origin() -> None:
    tokens, words = (torch.randn(50, 16, generator=key(seed)) + 300 for seed in (0, 1))
    expected = (tokens.double()[:, None] - words.double()).square().sum(dim=-1)
    torch.testing.assert_close(squared_distance(tokens, words), expected.float(), rtol=1e-4, atol=0)
    assert (squared_distance(words, words) >= 0).all()


def test_tokens_that_are_words_have_finite_codes() -> None:
    own = vocabulary()
    bag, _ = own(own.queue.features[None, :3], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(bag, torch.tensor([[1 / 3] * 3 + [0.0] * 4]), rtol=1e-4, atol=1e-4)


# mu


def test_mu_is_a_running_mean_that_soon_forgets_its_start() -> None:
    own, (tokens, valid) = vocabulary(), features()
    expected = 0.0
    for step in range(1200):
        size = 100.0 if step == 0 else 1.0 + step % 7
        spread_out = tokens * size
        least = squared_distance(spread_out, own.queue.features).amin(dim=-1)[valid].mean().item()
        momentum = min(0.99, step / (step + 10))
        expected = momentum * expected + (1 - momentum) * least
        _, mu = own(spread_out, valid)
        assert mu.item() == pytest.approx(expected, rel=1e-4)
        own.seen.append((tokens[:0, 0], mu))  # no new words
        own.move()
        if step == 30:
            assert expected < 1e-2 * squared_distance(tokens * 100, own.queue.features).amin(dim=-1)[valid].mean()
    assert momentum == 0.99


def test_evaluation_moves_nothing() -> None:
    objective = make().eval()
    before = copy.deepcopy(objective.vocabularies.state_dict())
    objective(images(), key(0))
    objective.after_step(0.5)
    for name, value in objective.vocabularies.state_dict().items():
        assert torch.equal(value, before[name])


# The vocabulary


@pytest.mark.parametrize("modality", ["image", "speech", "time_series"])
def test_one_token_of_each_sample_replaces_the_oldest_words(modality: str) -> None:
    """Of the view that the teacher read, no padding, and of all rows of a sample."""
    objective = make(modality, layers=[1, 2])
    batch = images() if modality == "image" else make_batch(objective.model.adapters[modality], 5)
    own = objective.model.modality_of(batch)
    found: dict[int, set[int]] = {sample: set() for sample in range(5)}
    for step in range(6):
        whole = views_of(own, batch, key(step), 1)[0]
        read = objective.teacher_reads(own, whole)
        before = [each.queue.features.clone() for each in objective.levels]
        objective(batch, key(step))
        for old, each in zip(before, objective.levels, strict=True):
            assert torch.equal(old, each.queue.features)  # until the step is done
        objective.after_step(0.0)
        places = []
        for level, (old, each) in enumerate(zip(before, objective.levels, strict=True)):
            first = 5 * step % 12
            rows = [(first + number) % 12 for number in range(5)]
            changed = (each.queue.features != old).any(dim=1).nonzero().flatten().tolist()
            assert changed == sorted(rows)
            assert each.queue.pointer == 5 * (step + 1) % 12
            tokens = read[level].reshape(5, -1, WIDTH)
            valid = whole.valid.reshape(5, -1)
            for sample, row in enumerate(rows):
                same = torch.isclose(tokens[sample], each.queue.features[row], atol=1e-6).all(dim=-1) & valid[sample]
                assert same.any()
                places.append(int(same.nonzero()[0]))
                found[sample].add(places[-1])
        assert places[:5] == places[5:]
    assert all(len(choices) > 2 for choices in found.values())


def test_a_step_of_several_batches_enters_all_of_them() -> None:
    objective = make()
    for seed in (0, 1):
        first = objective(images(3), key(seed)).loss
        assert torch.equal(first, objective(images(3), key(seed)).loss)  # by the same words
    objective.after_step(0.0)
    (own,) = objective.levels
    assert own.queue.pointer == 0 and own.steps == 1  # 12 words
    assert not torch.equal(first, objective(images(3), key(1)).loss)


def test_words_start_at_random_with_the_length_of_normalised_tokens() -> None:
    words = Vocabulary(50, 16, 1.0).queue.features
    torch.testing.assert_close(words.norm(dim=1), torch.full((50,), 4.0))
    assert torch.linalg.matrix_rank(words) == 16


def test_words_of_two_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """mu, words and weights; and the gradient that G gets."""
    tokens, valid = features(4)
    represented = torch.randn(4, 4, generator=key(4))

    def run(rows: slice) -> Any:
        own = vocabulary()
        bag, mu = own(tokens[rows], valid[rows])
        own.see(tokens[rows, 0], mu)
        divergence(bag, similarity(represented[rows], own.weights())).mean().backward()
        own.move()
        return bag, own.state_dict(), [parameter.grad for parameter in own.parameters()]

    halves = on_two_processes(lambda rank: run(slice(2 * rank, 2 * rank + 2)), tmp_path)
    bag, state, gradients = run(slice(0, 4))
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), bag)
    for _, own, _ in halves:
        torch.testing.assert_close(own, state)
    for one, two, gradient in zip(halves[0][2], halves[1][2], gradients, strict=True):
        torch.testing.assert_close((one + two) / 2, gradient, rtol=1e-4, atol=1e-6)


# The loss


def test_weights_are_those_of_pytorch_layers() -> None:
    own = vocabulary()
    one, _, _, two = own.weight_maker
    assert isinstance(one, nn.Linear) and isinstance(two, nn.Linear)
    assert one.bias is None and two.bias is not None and one.weight.shape == (8, 4)
    norm = nn.BatchNorm1d(8).train()
    expected = F.normalize(two(norm(one(F.normalize(own.queue.features))).relu()))
    torch.testing.assert_close(own.weights(), expected)
    assert torch.equal(own.eval().weights(), own.train().weights())
    own.queue.features = own.queue.features * torch.linspace(0.1, 9, 7)[:, None]  # lengths do not matter
    torch.testing.assert_close(own.weights(), expected)


def test_divergence_is_that_of_pytorch_and_0_at_best() -> None:
    bag = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    scores = torch.randn(2, 3, generator=key(0))
    expected = F.kl_div(scores.log_softmax(dim=1), bag, reduction="none").sum(dim=1)
    torch.testing.assert_close(divergence(bag, scores), expected)
    torch.testing.assert_close(divergence(bag, bag.log().clamp(min=-1e4) + 3), torch.zeros(2))


@pytest.mark.parametrize("layers", [(), (1, 2)])
def test_objective_is_that_of_a_loop(layers: tuple[int, ...]) -> None:
    """f keeps its length; levels and pieces are averaged; a piece is of a view of its own."""
    objective = make(layers=layers, crops=3, kappa=2.0, inv_delta=5.0)
    modality, generator = objective.model.adapters["image"], key(3)
    whole, *others = views_of(modality, images(), generator, 4)
    teacher = objective.teacher.module
    out = teacher.encode(teacher.adapters["image"], whole, keep_layers=layers)
    levels = out.layers if layers else [out.tokens]
    pieces = [piece_of(modality, other, objective.crop_scale, generator) for other in others]
    read = [represent(objective.model, modality, piece).detach() for piece in pieces]
    losses, perplexities, of_means = [], [], []
    for tokens, own in zip(levels, objective.levels, strict=True):
        bags, _ = bags_by_hand(tokens.detach(), whole.valid, own.queue.features, 5.0)
        weights = own.weights().detach().double()
        for each in read:
            for bag, vector in zip(bags, each.double(), strict=True):
                scores = [2.0 * float(vector @ weight) for weight in weights]
                total = math.log(sum(math.exp(score) for score in scores))
                losses.append(
                    sum(float(y) * (math.log(y) - s + total) for y, s in zip(bag, scores, strict=True) if y > 0)
                )
        perplexities += [math.exp(-sum(float(y) * math.log(y) for y in bag if y > 0)) for bag in bags]
        of_means.append(math.exp(-sum(float(y) * math.log(y) for y in bags.mean(dim=0) if y > 0)))
    found = objective(images(), key(3))
    assert found.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.metrics["perplexity"].item() == pytest.approx(sum(perplexities) / len(perplexities), rel=1e-4)
    assert found.metrics["perplexity_of_mean"].item() == pytest.approx(sum(of_means) / len(of_means), rel=1e-4)
    assert set(found.metrics) == {"perplexity_of_mean", "perplexity", "mu"}
    assert not any(value.requires_grad for value in found.metrics.values())
    assert found.embedding is not None and not found.embedding.requires_grad
    torch.testing.assert_close(found.embedding, read[0])


def test_rows_of_a_sample_are_one_bag(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make("time_series")
    batch = make_batch(objective.model.adapters["time_series"], 4)
    seen: list[tuple[Tensor, Tensor]] = []
    inner = Vocabulary.forward
    monkeypatch.setattr(Vocabulary, "forward", lambda self, *args: seen.append(args) or inner(self, *args))  # type: ignore
    objective(batch, key(0))
    whole = views_of(objective.model.adapters["time_series"], batch, key(0), 1)[0]
    read = objective.teacher_reads(objective.model.adapters["time_series"], whole)[0]
    assert whole.sample is not None and len(whole.valid) == 8
    ((tokens, valid),) = seen
    for sample in range(4):
        rows = whole.sample == sample
        torch.testing.assert_close(tokens[sample][valid[sample]], read[rows][whole.valid[rows]])


def test_pieces_are_connected_parts_of_the_given_size() -> None:
    objective = make(crop_scale=(0.25, 0.25))
    modality = objective.model.adapters["image"]
    piece = piece_of(modality, modality.tokenize(images()), objective.crop_scale, key(0))
    assert piece.valid.shape == (5, 4) and piece.valid.all()
    extent = piece.coords.amax(dim=1) - piece.coords.amin(dim=1)
    assert (extent <= 3).all()
    objective = make(crop_scale=(0.1, 1.0))
    tokens = modality.tokenize(images())
    sizes = {piece_of(modality, tokens, objective.crop_scale, key(seed)).valid.shape[1] for seed in range(20)}
    assert len(sizes) > 5


def test_student_and_heads_learn_and_nothing_else_does() -> None:
    objective = make(layers=[1, 2])
    objective(images(), key(0)).loss.backward()
    for name, parameter in objective.named_parameters():
        teachers = name.startswith("teacher.")
        assert parameter.requires_grad != teachers
        assert (parameter.grad is None) == teachers, name
    assert not any(buffer.requires_grad for buffer in objective.buffers())
    assert objective.trained is objective.model


def test_teacher_follows_along_a_cosine_and_gives_the_targets() -> None:
    objective = make(momentum=(0.5, 1.0))
    one, other = (next(each.model.parameters()) for each in (objective, make()))
    old = next(objective.teacher.parameters()).clone()
    for progress in (0.0, 0.25):
        momentum = 1 - 0.5 * (1 + math.cos(math.pi * progress)) / 2
        objective.after_step(progress)
        old = momentum * old + (1 - momentum) * one
        torch.testing.assert_close(next(objective.teacher.parameters()), old.detach())
    assert torch.equal(one, other)
    first = objective(images(), key(0)).metrics
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.add_(torch.randn(parameter.shape))
    again = objective(images(), key(0)).metrics  # bags do not depend on the student
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_perplexity_is_the_number_of_words_in_use() -> None:
    even = torch.tensor([[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(perplexity(even), torch.tensor([4.0, 2.0, 1.0]))


def test_one_sample_is_enough() -> None:
    out = make()(images(1), key(0))
    assert out.loss.isfinite() and out.loss > 0


# Options


def test_options_rebuild_the_objective() -> None:
    objective = make(layers=[2], crops=1)
    assert options_of(BagOfWords(objective.model, **options_of(objective))) == options_of(objective)
    assert list(options_of(objective)) == [
        "words",
        "layers",
        "crops",
        "crop_scale",
        "inv_delta",
        "kappa",
        "momentum",
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one word": ({"words": 1}, r"words: found 1; expected at least 2"),
    "no pieces": ({"crops": 0}, r"crops: found 0; expected at least 1"),
    "no such block": ({"layers": [3]}, r"layers: found \[3\]; expected different ones of blocks 1 to 2"),
    "blocks count from 1": ({"layers": [0, 1]}, r"layers: found \[0, 1\]"),
    "a block twice": ({"layers": [1, 1]}, r"layers: found \[1, 1\]"),
    "empty pieces": ({"crop_scale": (0.0, 0.5)}, r"crop_scale: found \[0\.0, 0\.5\]; expected least and greatest"),
    "pieces the wrong way round": ({"crop_scale": (0.6, 0.5)}, r"crop_scale: found \[0\.6, 0\.5\]"),
    "no sharpness": ({"inv_delta": 0.0}, r"inv_delta: found 0\.0; expected a number above 0"),
    "no scale": ({"kappa": -1.0}, r"kappa: found -1\.0; expected a number above 0"),
    "momentum above 1": ({"momentum": (0.9, 1.1)}, r"momentum: found \[0\.9, 1\.1\]"),
    "no views": ({"cls": WithoutViews}, r"BagOfWords with views of each sample .*'view'.*plain_image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**options)
