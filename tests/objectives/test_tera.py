"""TERA and masked reconstruction of speech: what the loss counts, and what it must not see."""

from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchaudio", reason="torchaudio is not installed")

from mmssl.modalities.base import Batch
from mmssl.modalities.speech import Speech
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.tokens import Tokens

HOP = 64
SMALL = {"num_mels": 8, "n_fft": 128, "win_length": 128, "hop_length": HOP}
# 63, 30 and 11 frames: with blocks of time alone the last one, below 24 frames, has no label.
LENGTHS = [62 * HOP, 29 * HOP, 10 * HOP]


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tera(corruption: Any = "alter", options: dict[str, Any] | None = None, **arguments: Any) -> MaskedReconstruction:
    """A small model with the objective; the start values are the same at each call."""
    torch.manual_seed(0)
    config = MMSSLConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        norm_position="post",
        modalities={"speech": SMALL | (options or {})},
    )
    arguments = {"decoder_layers": 0, "head_layers": 1, "head_norm": True, "views": False} | arguments
    return MaskedReconstruction(MMSSLModel(config), corruption=corruption, **arguments)


def speech_of(objective: MaskedReconstruction) -> Speech:
    modality = objective.model.modalities["speech"]
    assert isinstance(modality, Speech)
    return modality


def batch_of(lengths: list[int], padding: float = 0.0) -> Batch:
    """Clips of noise whose loudness changes; what lies behind their ends is ``padding``."""
    waves = [torch.randn(n, generator=keyed(seed)) * (torch.arange(n) * 0.01).cos() for seed, n in enumerate(lengths)]
    batch = Speech(**SMALL).collate([{"input_values": wave} for wave in waves])  # type: ignore[arg-type]
    batch["input_values"] = batch["input_values"].masked_fill(batch["attention_mask"] == 0, padding)
    return batch


def predictions(objective: MaskedReconstruction) -> list[Tensor]:
    """Collects what the head predicts from now on, and its gradients."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    objective.reconstruction_heads["speech"].register_forward_hook(keep)
    return seen


TIME_ONLY = {"frequency_ratio": 0.0, "noise_probability": 0.0}
MAGNITUDE_ONLY = {"time_ratio": 0.0, "frequency_ratio": 0.0, "noise_probability": 1.0}


@pytest.mark.parametrize("options", [{}, TIME_ONLY, MAGNITUDE_ONLY], ids=["all", "time", "magnitude"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_loss_is_the_mean_over_labelled_elements(options: dict[str, Any], distance: str) -> None:
    """Element by element; its gradient is zero at all others, and at padding."""
    objective = tera(options=options | {"distance": distance})
    modality, batch, seen = speech_of(objective), batch_of(LENGTHS), predictions(objective)
    clean = modality.tokenize(batch)
    altered = modality.alter(clean, keyed(1))[1]
    loss = objective(batch, keyed(1)).loss
    loss.backward()
    assert len(seen) == 1 and seen[0].grad is not None
    prediction, gradient = seen[0].detach(), seen[0].grad
    errors = []
    for row, frame, channel in torch.cartesian_prod(*map(torch.arange, prediction.shape)).tolist():
        difference = float(prediction[row, frame, channel]) - float(clean.content[row, frame, channel])
        slope = float(gradient[row, frame, channel])
        if altered[row, frame, channel]:
            assert frame < 1 + LENGTHS[row] // HOP
            errors.append(abs(difference) if distance == "l1" else difference**2)
            expected = (1.0 if difference > 0 else -1.0) if distance == "l1" else 2 * difference
            assert slope * int(altered.sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        else:
            assert slope == 0.0
    assert 0 < len(errors) < clean.valid.numel() * 8
    assert options != TIME_ONLY or not altered[2].any()
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_the_encoder_reads_the_altered_frames_and_the_target_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = tera(options={"noise_probability": 1.0})
    modality, batch = speech_of(objective), batch_of(LENGTHS)
    clean = modality.tokenize(batch)
    altered = modality.alter(clean, keyed(1))[0]
    read: list[Tensor] = []
    original = modality.embed

    def embed(tokens: Tokens) -> Tensor:
        read.append(tokens.content)
        return original(tokens)

    monkeypatch.setattr(modality, "embed", embed)
    out = objective.reconstruct(modality, clean, keyed(1))
    assert len(read) == 1 and torch.equal(read[0], altered.content) and not torch.equal(read[0], clean.content)
    assert torch.equal(modality.target(out.clean), modality.tokenize(batch).content)


def test_a_batch_without_labels_has_loss_zero() -> None:
    objective = tera(options=TIME_ONLY)
    loss = objective(batch_of([10 * HOP, 5 * HOP]), keyed(0)).loss
    loss.backward()
    assert loss.item() == 0.0
    gradients = [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


def test_a_padded_batch_equals_its_samples_weighted_by_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same alterations; whatever the padding holds."""
    objective = tera(options={"noise_probability": 1.0})
    modality = speech_of(objective)
    altered, where = modality.alter(modality.tokenize(batch_of(LENGTHS)), keyed(3))
    total, count, pooled = 0.0, 0, []
    for row, length in enumerate(LENGTHS):
        frames = 1 + length // HOP
        alone = {name: value[row : row + 1, :length] for name, value in batch_of(LENGTHS).items()}
        content, labels = altered.content[row : row + 1, :frames], where[row : row + 1, :frames]

        def same(tokens: Tokens, generator: torch.Generator, content: Tensor = content, labels: Tensor = labels) -> Any:
            return Tokens(content, tokens.coords, tokens.valid), labels

        monkeypatch.setattr(modality, "alter", same)
        out = objective(alone, keyed(0))
        total += out.loss.item() * int(labels.sum())
        count += int(labels.sum())
        pooled.append(out.embedding)
    monkeypatch.setattr(modality, "alter", lambda tokens, generator: (altered, where))
    for padding in (0.0, 1e4, torch.nan):
        out = objective(batch_of(LENGTHS, padding), keyed(0))
        assert out.loss.item() == pytest.approx(total / count, rel=1e-5)
        torch.testing.assert_close(out.embedding, torch.cat(pooled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_model_itself_alters_nothing(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tera(options={"noise_probability": 1.0, "speed": 0.2}).model.train(training)
    modality, batch = model.modalities["speech"], batch_of(LENGTHS)
    state = torch.get_rng_state()
    for name in ("alter", "view", "mask"):
        monkeypatch.setattr(Speech, name, lambda *_, name=name: pytest.fail(f"{name} outside of an objective"))
    out = model(**batch)
    tokens = modality.tokenize(batch)
    expected = model.encoder(modality.projection(tokens.content), modality.position(tokens.coords), tokens.valid)
    assert torch.equal(out.last_hidden_state, expected.tokens)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("style", ["random", "block"])
@pytest.mark.parametrize(("corruption", "decoder"), [("drop", 1), ("replace", 0), ("replace", 1)])
def test_masked_frames(style: str, corruption: str, decoder: int) -> None:
    """Of n frames n - int(n * (1 - ratio)) are hidden, padding never; the loss is the mean over their elements."""
    arguments: dict[str, Any] = {"decoder_layers": decoder, "decoder_hidden_size": 16, "head_layers": 0}
    objective = tera(corruption, mask_ratio=0.6, mask_style=style, **arguments)
    modality, batch = speech_of(objective), batch_of(LENGTHS)
    clean = modality.tokenize(batch)
    out = objective.reconstruct(modality, clean, keyed(2))
    assert out.index is not None
    errors = []
    for row, length in enumerate(LENGTHS):
        frames = 1 + length // HOP
        hidden = out.index[row][out.where[row]].tolist()
        assert len(set(hidden)) == len(hidden) == frames - int(frames * (1 - 0.6)) and max(hidden) < frames
        # In blocks hidden frames have more hidden neighbours than the six tenths of chance.
        neighbours = sum(frame + 1 in hidden for frame in hidden) / len(hidden)
        assert style == "random" or frames < 60 or neighbours > 0.75
        for place, frame in enumerate(out.index[row].tolist()):
            if out.where[row, place]:
                errors.append((out.prediction[row, place] - clean.content[row, frame]).abs().mean().item())
    loss = objective(batch, keyed(2)).loss
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert torch.equal(objective(batch_of(LENGTHS, torch.nan), keyed(2)).loss, loss)


@pytest.mark.parametrize("corruption", ["drop", "replace"])
def test_hidden_frames_do_not_reach_the_prediction(corruption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they contain may change at will: predictions are bit by bit the same."""
    objective = tera(corruption, mask_ratio=0.5, decoder_layers=1, decoder_hidden_size=16)
    modality = speech_of(objective)
    clean = modality.tokenize(batch_of(LENGTHS))
    first = objective.reconstruct(modality, clean, keyed(0))
    assert first.index is not None
    other = clean.content.clone()
    for row in range(len(LENGTHS)):
        other[row, first.index[row][first.where[row]]] = 1e3
    second = objective.reconstruct(modality, Tokens(other, clean.coords, clean.valid), keyed(0))
    assert torch.equal(first.prediction, second.prediction) and not torch.equal(other, clean.content)


def test_views_are_drawn_before_the_alterations() -> None:
    """With views the clean content is the view's, so targets belong to what the encoder reads."""
    objective = tera(options={"speed": 0.2, "crop_scale": [0.5, 0.9]}, views=True)
    modality, batch = speech_of(objective), batch_of(LENGTHS)
    generator = keyed(4)
    view = modality.view(batch, generator).batch
    expected = tera(options={"speed": 0.2, "crop_scale": [0.5, 0.9]}, views=False)(view, generator).loss
    loss = objective(batch, keyed(4)).loss
    assert torch.equal(loss, expected) and isfinite(loss.item())
    assert not torch.equal(loss, objective(batch, keyed(5)).loss)


def test_overfits_four_clips() -> None:
    """With the same alterations at each step, the labelled elements of four clips are learned by heart."""
    objective = tera(views=False)
    batch = batch_of([30 * HOP, 40 * HOP, 24 * HOP, 35 * HOP])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = objective(batch, keyed(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < 0.25 * losses[0]
