"""Tests of transform prediction: a slow loop, what chance looks like, and that the answer is in the content."""

import math
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mmssl.discovery import options_of
from mmssl.modalities.base import Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.transform_prediction import TransformPrediction
from tests.matrix.cases import MODALITIES, make_batch

WIDTH = 16
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}
COUNTS = {
    ("image", "rotation"): 4,
    ("image", "jigsaw"): 24,
    ("video", "rotation"): 4,
    ("speech", "order"): 6,
    ("speech", "reverse"): 2,
    ("time_series", "order"): 6,
    ("time_series", "flip"): 2,
    ("point_cloud", "up"): 6,
}


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    modality: str = "image",
    pretext: str = "rotation",
    encoder: dict[str, Any] | None = None,
    cls: type[Image] | None = None,
    start: bool = False,
    **options: Any,
) -> TransformPrediction:
    """With no parameter at its start value, unless asked for."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, **(encoder or {})}
    own = IMAGE if modality == "image" else MODALITIES[modality][0]
    model = MMSSLModel(MMSSLConfig(modalities={modality: own}, **shape))
    if cls is not None:
        model.modalities["image"] = cls(**own).build(WIDTH)
    objective = TransformPrediction(model, pretext, **{"views": False, "head_widths": (12, 10), **options})
    if not start:
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=key(1)), alpha=0.2)
    return objective.eval()


def batch_of(objective: TransformPrediction, count: int = 6) -> dict[str, Tensor]:
    modality = next(iter(objective.model.adapters.values()))
    if modality.name != "image":
        return make_batch(modality, count)
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=key(2))}


def drawn(objective: TransformPrediction, batch: dict[str, Tensor], seed: int) -> list[int]:
    """Which transform each sample gets: the objective asks the modality for it."""
    modality = next(iter(objective.model.adapters.values()))
    with mock.patch.object(modality, "transform", wraps=modality.transform) as transform:
        objective(batch, key(seed))
    return transform.call_args.args[2].tolist()


@pytest.mark.parametrize(("modality", "pretext"), COUNTS)
@pytest.mark.parametrize("head_widths", [(), (12, 10)])
@torch.no_grad()
def test_equals_a_loop_over_samples(modality: str, pretext: str, head_widths: tuple[int, ...]) -> None:
    """Each sample transformed alone, read by the model as a user reads it, and by a head written out."""
    objective = make(modality, pretext, encoder={"class_token": True}, head_widths=head_widths)
    batch = batch_of(objective)
    out = objective(batch, key(3))
    own = objective.model.adapters[modality]
    layers: Any = [layer for layer in objective.heads[modality].modules() if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [*head_widths, COUNTS[modality, pretext]]
    losses, right = [], []
    for row, number in enumerate(drawn(objective, batch, 3)):
        alone = own.transform(
            {name: value[row : row + 1] for name, value in batch.items()}, pretext, torch.tensor([number])
        )
        hidden = objective.model(**alone).pooler_output[0]
        torch.testing.assert_close(out.embedding[row], hidden, atol=1e-5, rtol=1e-4)
        for layer in layers[:-1]:
            hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
        scores = (layers[-1].weight @ hidden + layers[-1].bias).tolist()
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[number])
        right.append(scores[number] == max(scores))
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert out.metrics["accuracy"].item() == pytest.approx(sum(right) / len(right))
    assert out.metrics["chance"].item() == pytest.approx(1 / COUNTS[modality, pretext])
    assert out.embedding is not None and not out.embedding.requires_grad


def test_each_transform_is_drawn_equally_often() -> None:
    """In 2,400 draws of 24: 100 of each, with a standard deviation of 9.8."""
    objective = make(pretext="jigsaw")
    numbers = torch.tensor(drawn(objective, batch_of(objective, 2400), 0))
    count = torch.bincount(numbers, minlength=24)
    assert len(count) == 24 and count.min() > 60 and count.max() < 140


@pytest.mark.parametrize(("modality", "pretext"), COUNTS)
@pytest.mark.parametrize(("width", "head_widths"), [(16, ()), (128, ()), (128, (512, 128))])
def test_loss_begins_at_that_of_an_even_guess(
    modality: str, pretext: str, width: int, head_widths: tuple[int, ...]
) -> None:
    objective = make(modality, pretext, {"hidden_size": width}, start=True, head_widths=head_widths)
    batch = batch_of(objective)
    with torch.no_grad():  # of few samples, some draws are far from even
        losses = [objective(batch, key(seed)).loss.item() for seed in range(10)]
    assert sum(losses) / 10 == pytest.approx(math.log(COUNTS[modality, pretext]), rel=0.05)


@torch.no_grad()
def test_a_constant_gives_no_hint() -> None:
    """All transforms of it look the same, so whatever the weights are the best that can be had is chance."""
    objective = make()
    losses, hits = [], []
    for seed in range(5):
        out = objective({"pixel_values": torch.ones(400, 1, 8, 8)}, key(seed))
        losses.append(out.loss.item())
        hits.append(out.metrics["accuracy"].item())
    assert sum(losses) / 5 > math.log(4) - 0.01
    assert sum(hits) / 5 == pytest.approx(0.25, abs=0.04)  # 2,000 draws: a standard deviation of 0.01


def test_rotations_are_learned_where_images_have_an_upside() -> None:
    """Light from above: learned on some, found on others."""
    objective = make(start=True).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    light = torch.linspace(1, -1, 8).view(1, 1, 8, 1)
    for step in range(80):
        pixels = light + 0.5 * torch.randn(32, 1, 8, 8, generator=key(step))
        out = objective({"pixel_values": pixels}, key(1000 + step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.metrics["accuracy"] > 0.95


def test_views_are_drawn_first() -> None:
    objective = make("speech", "order", views=True)
    batch, generator = batch_of(objective), key(3)
    viewed = objective.model.adapters["speech"].view(batch, generator).batch
    loss = objective(batch, key(3)).loss
    objective.views = False
    assert torch.equal(loss, objective(viewed, generator).loss)


def test_several_modalities_have_heads_of_their_own() -> None:
    modalities = {"speech": MODALITIES["speech"][0], "time_series": MODALITIES["time_series"][0]}
    model = MMSSLModel(
        MMSSLConfig(modalities=modalities, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2)
    )
    objective = TransformPrediction(model, "order", head_widths=())
    for name in modalities:
        assert objective(make_batch(model.adapters[name], 4), key(0)).loss.item() == pytest.approx(
            math.log(6), rel=0.05
        )
    with pytest.raises(ValueError, match=r"'flip': speech does not offer it"):
        TransformPrediction(model, "flip")


def test_options_rebuild_an_equal_objective() -> None:
    objective = make(pretext="jigsaw")
    again = TransformPrediction(MMSSLModel(objective.model.config), **options_of(objective)).eval()
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(batch_of(objective), key(0)).loss, objective(batch_of(objective), key(0)).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretext": "order"}, r"TransformPrediction with pretext='order': image does not.*offers: rotation, jigsaw"),
        ({"modality": "graph"}, r"TransformPrediction with pretext='rotation': graph does not.*it offers: none"),
        ({"modality": "tabular"}, r"tabular does not offer it.*it offers: none"),
        (
            {"modality": "video", "pretext": "speed"},
            r"video does not offer it, with these options; it offers: rotation",
        ),
        ({"head_widths": (512, 0)}, r"head_widths: found \[512, 0\]; expected numbers of at least 1"),
        ({"cls": WithoutViews, "views": True}, r"TransformPrediction with views=True .*'view'.*plain_image"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
