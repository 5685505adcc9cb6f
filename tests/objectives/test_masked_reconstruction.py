"""Tests of masked reconstruction: a slow MAE, transformers' ViTMAE, and the properties that leaks would break."""

import itertools
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmssl.discovery import options_of
from mmssl.encoder import EncoderOutput
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.tokens import Mask, Tokens

PATCHES, PATCH = 16, 4  # patches in an image, pixels in a patch
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "alteration": "zeros"}
CORRUPTIONS = ("drop", "replace", "alter")


class Padded(Image):
    """Images in which black patches are padding."""

    name: ClassVar = "image"

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        tokens.valid = (tokens.content != 0).any(dim=-1)
        return tokens


class WithoutViews(Image):
    name: ClassVar = "plain_image"
    view = Modality.view


class WithoutAlterations(Image):
    name: ClassVar = "plain_image"
    alter = Modality.alter


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model(image: dict[str, Any] | None = None, cls: type[Image] = Image, **config: Any) -> MMSSLModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **config}
    options = {**IMAGE, **(image or {})}
    model = MMSSLModel(MMSSLConfig(modalities={"image": options}, **shape))
    if cls is not Image:
        model.modalities["image"] = cls(**options).build(shape["hidden_size"])
    return model


def make(
    image: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    cls: type[Image] = Image,
    **options: Any,
) -> MaskedReconstruction:
    """An objective with a small model and decoder, all of whose parameters are away from their start values."""
    model = make_model(image, cls, **(encoder or {}))
    small: dict[str, Any] = {
        "decoder_layers": 1,
        "decoder_hidden_size": 8,
        "decoder_attention_heads": 2,
        "views": False,
    }
    objective = MaskedReconstruction(model, **{**small, **options})
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=key(1)), alpha=0.1)
    return objective


def make_for(corruption: str, **options: Any) -> MaskedReconstruction:
    """As above, as each corruption is usually used."""
    if corruption != "drop":
        options = {"decoder_layers": 0, **options}
    return make(corruption=corruption, **options)


def modality_of(objective: MaskedReconstruction) -> Image:
    modality = objective.model.modalities["image"]
    assert isinstance(modality, Image)
    return modality


def images(batch: int = 4, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(batch, 1, 8, 8, generator=key(seed))}


def clean_tokens(objective: MaskedReconstruction, batch: Batch) -> Tokens:
    return modality_of(objective).tokenize(batch)


def mask_of(objective: MaskedReconstruction, tokens: Tokens, seed: int = 0) -> Mask:
    """The mask that the objective draws with this seed."""
    ratio = 0.75 if objective.mask_ratio is None else objective.mask_ratio
    return modality_of(objective).mask(tokens, ratio, key(seed), objective.mask_style)


# Against slow and foreign implementations


def slow_places(coords: Tensor, width: int) -> Tensor:
    """Sine and cosine of x, then of y, with wavelengths from 2 pi to 10,000 times that: (N, width)."""
    bands = width // 4
    rows = [
        [wave(value / 10_000 ** (k / bands)) for value in (x, y) for wave in (math.sin, math.cos) for k in range(bands)]
        for y, x in coords.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def slow_transformer(x: Tensor, weights: dict[str, Tensor], layers: int, heads: int) -> Tensor:
    """Pre-norm transformer for one sequence (N, D), head by head."""

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    size = x.shape[1] // heads
    for i in range(layers):
        q, k, v = linear(norm(x, f"layers.{i}.norm1"), f"layers.{i}.attention.qkv").chunk(3, dim=1)
        parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
        out = [torch.softmax(q[:, p] @ k[:, p].T / size**0.5, dim=-1) @ v[:, p] for p in parts]
        x = x + linear(torch.cat(out, dim=1), f"layers.{i}.attention.proj")
        inner = linear(norm(x, f"layers.{i}.norm2"), f"layers.{i}.mlp.fc1")
        x = x + linear(inner * (1 + torch.erf(inner / 2**0.5)) / 2, f"layers.{i}.mlp.fc2")
    return norm(x, "norm")


def slow_mae(objective: MaskedReconstruction, pixels: Tensor, valid: Tensor, hidden: Tensor) -> float:
    """He et al. (2022), sample by sample, with the mean over all hidden patches of the batch."""
    weights = {name: value.detach() for name, value in objective.state_dict().items()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    coords = torch.tensor([[y, x] for y in range(4) for x in range(4)])
    errors = []
    for image, keep, hide in zip(pixels, valid.tolist(), hidden.tolist(), strict=True):
        patches = torch.stack([image[0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten() for y, x in coords.tolist()])
        seen = [n for n in range(PATCHES) if keep[n] and not hide[n]]
        embedding = part("model.modalities.image.projection.")
        x = patches[seen] @ embedding["weight"].T + embedding["bias"] + slow_places(coords[seen], 16)
        prefix = weights.get("model.encoder.prefix_tokens", torch.zeros(1, 0, 16))[0]
        x = slow_transformer(torch.cat([prefix, x]), part("model.encoder."), 2, 2)
        x = x @ weights["decoder_input.weight"].T + weights["decoder_input.bias"]
        x, class_token = x[len(prefix) :], x[: min(len(prefix), 1)]  # registers end here
        places = [n for n in range(PATCHES) if keep[n]]
        rows = [x[seen.index(n)] if n in seen else weights["decoder_mask_token"] for n in places]
        x = torch.cat([class_token, torch.stack(rows) + slow_places(coords[places], 8)])
        x = slow_transformer(x, part("decoder."), 1, 2)[len(class_token) :]
        x = x @ weights["reconstruction_heads.image.weight"].T + weights["reconstruction_heads.image.bias"]
        for n in range(PATCHES):
            if hide[n]:
                target = (patches[n] - patches[n].mean()) / (patches[n].var() + 1e-6).sqrt()
                errors.append((x[places.index(n)] - target).square().mean().item())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "prefix", [{}, {"class_token": True}, {"class_token": True, "num_register_tokens": 2}], ids=str
)
def test_loss_equals_a_slow_mae(prefix: dict[str, Any], padded: bool) -> None:
    objective = make(encoder=prefix, cls=Padded if padded else Image).double()
    pixels = images(5)["pixel_values"].double()
    if padded:  # rows of different lengths, padding in front, between and behind
        for row, black in enumerate([[], [15], [0, 1, 2, 3], [5, 6, 9, 10, 15], list(range(1, 15))]):
            for n in black:
                pixels[row, 0, 2 * (n // 4) : 2 * (n // 4) + 2, 2 * (n % 4) : 2 * (n % 4) + 2] = 0
    tokens = clean_tokens(objective, {"pixel_values": pixels})
    hidden = mask_of(objective, tokens, seed=3).hidden
    assert tokens.valid.sum(dim=1).tolist() == ([16, 15, 12, 11, 2] if padded else [16] * 5)
    assert hidden.sum(dim=1).tolist() == ([12, 12, 9, 9, 1] if padded else [12] * 5)
    loss = objective({"pixel_values": pixels}, key(3)).loss
    assert loss.item() == pytest.approx(slow_mae(objective, pixels, tokens.valid, hidden), rel=1e-6)


class Fixed(nn.Module):
    """Answers the same, whatever it is asked."""

    def __init__(self, answer: Any):
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_equals_that_of_transformers_for_the_same_predictions_and_mask(
    normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, batch = make(image={"normalize_target": normalize}), images(6)
    prediction = torch.randn(6, PATCHES, PATCH, generator=key(5))
    mask = mask_of(objective, clean_tokens(objective, batch), seed=3)
    of_hidden = torch.stack([p[h] for p, h in zip(prediction, mask.hidden, strict=True)])
    objective.reconstruction_heads["image"] = Fixed(of_hidden)
    config = ViTMAEConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config.update({"mask_ratio": 0.75, "norm_pix_loss": normalize})
    theirs = ViTMAEForPreTraining(config)
    monkeypatch.setattr(theirs, "decoder", Fixed(SimpleNamespace(logits=prediction)))
    # They keep the patches of least noise.
    expected = theirs(batch["pixel_values"], noise=mask.hidden.float() + torch.arange(PATCHES) / 100)
    assert torch.equal(expected.mask.bool(), mask.hidden)
    assert objective(batch, key(3)).loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize("corruption", ["drop", "replace"])
def test_predicting_the_mean_costs_the_variance(corruption: str) -> None:
    """With predictions of 0 each normalised patch costs (P - 1) / P, as the variance it is divided by is unbiased."""
    objective = make_for(corruption)
    for parameter in objective.reconstruction_heads.parameters():
        nn.init.zeros_(parameter)
    assert objective(images(), key(0)).loss.item() == pytest.approx((PATCH - 1) / PATCH, rel=1e-4)


# Nothing hidden reaches the encoder; each prediction belongs to its place


def reconstruct(objective: MaskedReconstruction, tokens: Tokens, seed: int = 0) -> Any:
    return objective.reconstruct(modality_of(objective), tokens, key(seed))


@pytest.mark.parametrize("mask_style", ["random", "block"])
@pytest.mark.parametrize("corruption", ["drop", "replace"])
def test_hidden_content_has_no_influence_on_what_is_encoded_and_predicted(corruption: str, mask_style: str) -> None:
    objective = make_for(corruption, mask_style=mask_style, encoder={"class_token": True})
    tokens = clean_tokens(objective, images())
    mask = mask_of(objective, tokens)
    before = reconstruct(objective, tokens)
    assert torch.equal(before.index, mask.hidden_index) and before.where.all()
    assert before.prediction.shape[1] == mask.hidden[0].sum() == 12  # visible tokens are not even predicted
    other = torch.randn(tokens.content.shape, generator=key(9))
    tokens.content = torch.where(mask.hidden[..., None], other, tokens.content)
    after = reconstruct(objective, tokens)
    assert torch.equal(after.encoded, before.encoded)
    assert torch.equal(after.prediction, before.prediction)
    tokens.content = torch.where(mask.hidden[..., None], tokens.content, other)
    changed = reconstruct(objective, tokens)
    assert (changed.prediction != before.prediction).any(dim=(1, 2)).all(), "visible content has no influence"


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_no_gradient_reaches_what_is_hidden(corruption: str) -> None:
    """Hidden pixels enter the loss through the target alone, which carries no gradient; nothing else is cut off."""
    objective, batch = make_for(corruption), images()
    pixels = batch["pixel_values"].requires_grad_()
    tokens = clean_tokens(objective, batch)
    hidden = (
        modality_of(objective).alter(tokens, key(3))[1]
        if corruption == "alter"
        else mask_of(objective, tokens, seed=3).hidden
    )
    objective(batch, key(3)).loss.backward()
    assert pixels.grad is not None
    gradient = clean_tokens(objective, {"pixel_values": pixels.grad}).content
    assert (gradient[hidden] == 0).all()
    assert (gradient[~hidden] != 0).any(dim=1).all()


def place_code(coords: Tensor, width: int) -> Tensor:
    """The number of each place on the grid, repeated."""
    return (coords[..., 0] * 4 + coords[..., 1])[..., None].expand(-1, -1, width)


def test_decoder_gets_each_token_and_each_mask_token_at_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(decoder_hidden_size=16)
    tokens = clean_tokens(objective, images())
    mask = mask_of(objective, tokens)
    inputs: list[tuple[Tensor, ...]] = []

    def decoder(*args: Tensor, prefix: Tensor) -> EncoderOutput:
        assert prefix.shape[1] == 0
        inputs.append(args)
        return EncoderOutput(args[0], args[0][:, :0])

    monkeypatch.setattr(
        objective, "encode", lambda modality, seen: (place_code(seen.coords, 16), seen.coords.new_zeros(4, 0, 16))
    )
    monkeypatch.setattr(objective.decoder, "forward", decoder)
    monkeypatch.setattr(objective, "decoder_input", nn.Identity())
    reconstruct(objective, tokens)
    ((content, position, *_),) = inputs
    place = torch.arange(PATCHES).float()[:, None].expand(PATCHES, 16)
    for row in range(4):
        assert torch.equal(content[row], torch.where(mask.hidden[row, :, None], objective.decoder_mask_token, place))
        torch.testing.assert_close(position[row].double(), slow_places(tokens.coords[row], 16))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_each_prediction_is_compared_with_the_target_of_its_own_place(
    corruption: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch n of each image is filled with n and the decoder answers with the number of the place: no error is left."""
    objective = make_for(corruption, image={"normalize_target": False})
    pixels = torch.arange(16.0).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(4, 1, 8, 8)
    objective.reconstruction_heads["image"] = nn.Identity()
    for error in (0, 2):
        monkeypatch.setattr(objective, "decode", lambda _, clean, *__, e=error: place_code(clean.coords, PATCH) + e)
        assert objective({"pixel_values": pixels}, key(0)).loss == error**2


def test_replace_puts_the_mask_token_where_hidden_and_keeps_the_place() -> None:
    objective = make_for("replace")
    modality, tokens = modality_of(objective), clean_tokens(objective, images())
    mask = mask_of(objective, tokens)
    inputs: list[tuple[Tensor, ...]] = []
    objective.model.encoder.register_forward_pre_hook(lambda module, args: inputs.append(args))
    reconstruct(objective, tokens)
    ((content, position, valid, *_),) = inputs
    expected = torch.where(mask.hidden[..., None], objective.mask_token, modality.embed(tokens))
    assert torch.equal(content, expected) and valid.all()
    torch.testing.assert_close(position[0].double(), slow_places(tokens.coords[0], 16))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_class_and_register_tokens_are_never_hidden(corruption: str) -> None:
    objective = make_for(corruption, encoder={"class_token": True, "num_register_tokens": 1})
    encoder, inputs = objective.model.encoder, []
    encoder.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    reconstruct(objective, clean_tokens(objective, images()))
    (hidden_states,) = inputs
    assert torch.equal(hidden_states[:, :2], encoder.prefix_tokens.expand(4, -1, -1))
    assert hidden_states.shape[1] == 2 + (4 if corruption == "drop" else PATCHES)


@pytest.mark.parametrize("decoder_layers", [0, 1])
def test_alter_counts_altered_tokens_alone(decoder_layers: int) -> None:
    """GMML: the loss does not look at predictions of what was left alone, and is the mean over what was altered."""
    objective, batch = make_for("alter", decoder_layers=decoder_layers), images()
    predictions: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        out.retain_grad()
        predictions.append(out)

    objective.reconstruction_heads["image"].register_forward_hook(keep)
    modality, tokens = modality_of(objective), clean_tokens(objective, batch)
    altered, where = modality.alter(tokens, key(3))
    loss = objective(batch, key(3)).loss
    loss.backward()
    (prediction,) = predictions
    assert prediction.grad is not None
    assert (prediction.grad[~where] == 0).all() and (prediction.grad[where] != 0).any(dim=1).all()
    target = tokens.content
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert loss.item() == pytest.approx(F.mse_loss(prediction[where], target[where]).item(), rel=1e-5)
    # What the encoder sees is what the modality made of it.
    out = reconstruct(objective, tokens, seed=3)
    assert torch.equal(out.seen.content, altered.content) and torch.equal(out.clean.content, tokens.content)


# Options


@pytest.mark.parametrize("corruption", ["drop", "replace"])
def test_several_masks_per_sample_are_the_mean_of_single_ones(corruption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times, batch = 3, images()
    objective = make_for(corruption, masks_per_sample=times)
    tokens = clean_tokens(objective, batch)
    hidden = mask_of(objective, tokens.repeat(times), seed=3).hidden.view(4, times, PATCHES)
    assert all(len({tuple(mask) for mask in sample}) == times for sample in hidden.tolist()), "masks are repeated"
    together = objective(batch, key(3)).loss
    objective.masks_per_sample, losses = 1, []
    for number in range(times):
        mask = Mask.from_hidden(hidden[:, number], tokens.valid)
        monkeypatch.setattr(modality_of(objective), "mask", lambda *_, mask=mask: mask)
        losses.append(objective(batch, key(3)).loss)
    torch.testing.assert_close(together, torch.stack(losses).mean(), rtol=1e-6, atol=0)


def test_several_alterations_per_sample_never_take_patches_of_the_same_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image has one value of its own, so each altered one must show exactly two."""
    objective = make_for("alter", image={"alteration": "patches"}, masks_per_sample=2)
    embed, seen = modality_of(objective).embed, []

    def look(tokens: Tokens) -> Tensor:
        seen.append(tokens.content)
        return embed(tokens)

    monkeypatch.setattr(modality_of(objective), "embed", look)
    objective({"pixel_values": torch.arange(3.0)[:, None, None, None].expand(3, 1, 8, 8)}, key(0))
    rows = torch.cat(seen)
    assert len(rows) == 6
    assert [len(row.unique()) for row in rows] == [2] * 6


@pytest.mark.parametrize("prefix", [{}, {"class_token": True, "num_register_tokens": 1}], ids=str)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_average_of_layers_is_normalised_by_the_final_norm(corruption: str, prefix: dict[str, Any]) -> None:
    objective = make_for(corruption, average_layers=(1, 3), encoder={"num_hidden_layers": 3, **prefix})
    encoder, outputs = objective.model.encoder, []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    encoded = reconstruct(objective, clean_tokens(objective, images())).encoded
    mean = (outputs[0] + outputs[2]) / 2
    norm = encoder.norm
    assert isinstance(norm, torch.nn.LayerNorm)
    expected = F.layer_norm(mean, (16,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(encoded, expected[:, encoder.num_prefix_tokens :])


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_embedding_is_the_mean_output_of_what_was_seen(corruption: str) -> None:
    objective, batch = make_for(corruption, encoder={"class_token": True}), images()
    embedding = objective(batch, key(3)).embedding
    assert embedding is not None and not embedding.requires_grad
    encoded = reconstruct(objective, clean_tokens(objective, batch), seed=3).encoded
    assert encoded.shape[1] == (4 if corruption == "drop" else PATCHES)
    torch.testing.assert_close(embedding, encoded.mean(dim=1))


def test_views_are_drawn_before_the_mask_and_are_what_is_reconstructed() -> None:
    image = {"horizontal_flip": 0.5, "crop_scale": (0.3, 1.0)}
    objective, batch, generator = make(image=image, views=True), images(), key(3)
    viewed = modality_of(objective).view(batch, generator).batch
    assert not torch.equal(viewed["pixel_values"], batch["pixel_values"])
    loss = objective(batch, key(3)).loss
    objective.views = False
    assert torch.equal(loss, objective(viewed, generator).loss)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_loss_follows_from_the_seed_alone(corruption: str) -> None:
    image = {"horizontal_flip": 0.5, "alteration": "noise", "swap_probability": 0.5}
    objective, losses = make_for(corruption, image=image, views=True, masks_per_sample=2), []
    for position, seed in enumerate((1, 1, 2)):
        torch.manual_seed(position)
        losses.append(objective(images(), key(seed)).loss.item())
    assert losses[0] == losses[1] != losses[2]


PREFIX: dict[str, Any] = {"class_token": True, "num_register_tokens": 1}
POST_NORM: dict[str, Any] = {"norm_position": "post", "layer_scale_init": 0.1}
CORNERS: list[dict[str, Any]] = [
    {"corruption": corruption, "decoder_layers": decoder, **head, **average, "encoder": encoder}
    for corruption, decoder, head, average, encoder in itertools.product(
        CORRUPTIONS,
        (0, 1),
        ({}, {"head_layers": 2, "head_norm": True}),
        ({}, {"average_layers": (1, 2)}),
        ({}, PREFIX, POST_NORM),
    )
    if (corruption != "drop" or decoder) and not (average and encoder is POST_NORM)
]


@pytest.mark.parametrize("options", CORNERS, ids=str)
def test_every_parameter_has_a_gradient(options: dict[str, Any]) -> None:
    """DDP fails at the second step on a parameter that the loss does not depend on."""
    objective = make(**options)
    objective(images(), key(0)).loss.backward()
    unused = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


def test_average_of_layers_must_reach_the_last_block() -> None:
    """Else the blocks behind the last one that is read would never be trained, and DDP would fail on them."""
    with pytest.raises(ValueError, match=r"average_layers.*\[1\].*2"):
        make_for("alter", average_layers=(1,))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_options_rebuild_an_equal_objective(corruption: str) -> None:
    options = {"masks_per_sample": 2, "head_layers": 1, "head_norm": True, "average_layers": [1, 2]}
    objective = make_for(corruption, **options)
    found = options_of(objective)
    again = MaskedReconstruction(make_model(), **found)
    assert options_of(again) == found
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(images(), key(0)).loss, objective(images(), key(0)).loss)


@pytest.mark.parametrize(
    "corruption, mask_ratio", [("drop", 0.75), ("replace", 0.6), ("alter", None)], ids=["MAE", "SimMIM", "GMML"]
)
def test_overfits_a_batch(corruption: str, mask_ratio: float | None) -> None:
    """Eight digits under one mask are learned by heart: a tenth of the error of the mean picture is left, or less."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images[:8]).float()[:, None] / 16
    objective = MaskedReconstruction(
        make_model({"normalize_target": False}, hidden_size=32),
        corruption=corruption,  # type: ignore[arg-type]
        mask_ratio=mask_ratio,
        decoder_layers=int(corruption == "drop"),
        decoder_hidden_size=32,
        views=False,
    )
    optimizer = torch.optim.Adam(objective.parameters(), betas=(0.9, 0.95))
    losses = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        loss = objective({"pixel_values": (pixels - 0.5) / 0.5}, key(0)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * (pixels / 0.5).var(dim=0, unbiased=False).mean().item() < 0.1 * losses[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing hidden": ({"mask_ratio": 0.0}, r"mask_ratio: found 0\.0; expected .* between 0 and 1"),
    "all hidden": ({"mask_ratio": 1.0}, r"mask_ratio: found 1\.0; expected .* between 0 and 1"),
    "more than all hidden": ({"mask_ratio": 1.5}, r"mask_ratio: found 1\.5; expected .* between 0 and 1"),
    "ratio of alterations": ({"corruption": "alter", "mask_ratio": 0.5}, r"mask_ratio .*'alter'.*modality's options"),
    "drop without decoder": ({"decoder_layers": 0}, r"'drop' needs a decoder.*decoder_layers to 1"),
    "block 0": ({"average_layers": (0, 2)}, r"average_layers: found \[0, 2\]; .* 1 to 2"),
    "block 3 of 2": ({"average_layers": [2, 3]}, r"average_layers: found \[2, 3\]; .* 1 to 2"),
    "average of post-norm": (
        {"average_layers": (1, 2), "encoder": {"norm_position": "post"}},
        r"average_layers.*post-norm.*norm_position='pre'",
    ),
    "views without views": (
        {"views": True, "cls": WithoutViews},
        r"MaskedReconstruction with views=True .*'view'.*plain_image.*views=False",
    ),
    "alter without alterations": (
        {"corruption": "alter", "cls": WithoutAlterations},
        r"MaskedReconstruction with corruption='alter' .*'alter'.*plain_image.*'drop' or 'replace'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_unknown_mask_style_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tube'.*random, block"):
        make(mask_style="tube")(images(), key(0))


# A share of the hidden tokens is predicted


def padded_batch() -> Batch:
    """Rows with 16, 16, 9 and 5 patches that are not padding."""
    batch = images()
    batch["pixel_values"][2, :, 6:] = batch["pixel_values"][3, :, 2:] = 0
    batch["pixel_values"][2, :, 4:6, 2:] = 0
    batch["pixel_values"][3, :, 2:4, :2] = 1
    return batch


def test_all_of_them_are_what_it_is_without_the_option() -> None:
    """Predictions, targets, and the loss of padded rows."""
    batch = padded_batch()
    whole, shared = (make(cls=Padded, predict_ratio=ratio) for ratio in (None, 1.0))
    torch.testing.assert_close(shared(batch, key(0)).loss, whole(batch, key(0)).loss)
    tokens = clean_tokens(whole, batch)
    one, other = (each.reconstruct(modality_of(each), tokens, key(0)) for each in (whole, shared))
    assert one.index is not None and other.index is not None
    assert torch.equal(one.where, other.where) and torch.equal(one.index[one.where], other.index[other.where])
    torch.testing.assert_close(one.prediction[one.where], other.prediction[other.where])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_others_are_neither_decoded_nor_counted(ratio: float) -> None:
    """The decoder reads the visible tokens and the share, rounded up, at their places; in time each token is in it."""
    objective = make(cls=Padded, predict_ratio=ratio)
    modality, tokens = modality_of(objective), clean_tokens(objective, padded_batch())
    mask, read = mask_of(objective, tokens), list[Any]()
    objective.decoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs))
    all_places, ever = objective.decoder_positions["image"](tokens.coords), torch.zeros_like(mask.hidden)
    for seed in range(40):
        again = key(0)
        modality.mask(tokens, 0.75, again, "random")  # the same mask each time, then another share
        torch.rand(seed, generator=again)
        _, small, kept = objective.filled(tokens, mask, again)
        out = objective.reconstruct(modality, tokens, key(seed))
        assert kept is not None and out.index is not None
        chosen = torch.zeros_like(mask.hidden).scatter(1, kept, small.hidden)
        assert (chosen <= mask.hidden).all()
        counts = (mask.hidden.sum(dim=1) * ratio).ceil().long()
        assert chosen.sum(dim=1).tolist() == counts.tolist() == out.where.sum(dim=1).tolist()
        ever |= chosen
    assert out.index is not None
    content, place, valid, *_ = read[-1]
    counts = out.where.sum(dim=1) + out.seen.valid.sum(dim=1)
    assert valid.sum(dim=1).tolist() == counts.tolist() and content.shape[1] == counts.max()
    hidden = mask_of(objective, tokens, 39).hidden
    for row in range(4):
        visible = (tokens.valid & ~hidden)[row].nonzero().flatten().tolist()
        these = sorted(visible + out.index[row, out.where[row]].tolist())
        assert torch.equal(place[row, valid[row]], all_places[row, these])
    assert torch.equal(ever, mask.hidden)


def test_the_loss_is_the_mean_over_the_share() -> None:
    """Of the predictions of another objective with the same weights and the same draws, at these tokens."""
    objective, batch = make(predict_ratio=0.5), images()
    modality, tokens = modality_of(objective), clean_tokens(objective, batch)
    out = objective.reconstruct(modality, tokens, key(7))
    assert out.index is not None
    target = torch.stack([content[places] for content, places in zip(tokens.content, out.index, strict=True)])
    mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    errors = ((target - mean) / (variance + 1e-6).sqrt() - out.prediction).square().mean()
    torch.testing.assert_close(objective(batch, key(7)).loss, errors)


def test_in_evaluation_all_are_predicted() -> None:
    objective, batch = make(predict_ratio=0.3).eval(), images()
    torch.testing.assert_close(objective(batch, key(0)).loss, make().eval()(batch, key(0)).loss)


@pytest.mark.parametrize("options", [{"predict_ratio": 0.0}, {"predict_ratio": 1.1}, {"corruption": "replace"}])
def test_a_share_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="predict_ratio: found"):
        make(**{"predict_ratio": 0.5, "decoder_layers": 1, **options})
