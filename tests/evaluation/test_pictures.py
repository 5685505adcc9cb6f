"""Tests of the pictures of masked reconstruction: the numbers that are drawn, not only the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image as PILImage
from torch import Tensor

from mmssl.evaluation import draw_reconstructions
from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modalities.speech import Speech
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.tokens import Mask, Tokens
from mmssl.training import load_objective

# Views and dropout are on, and must not show in a picture.
OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"image_size": 8, "patch_size": 2, "num_channels": 1, "crop_scale": (0.3, 0.6)},
    "speech": {"num_mels": 8, "n_fft": 128, "win_length": 128, "hop_length": 64, "time_ratio": 0.5, "gain": 6.0},
}
CASES = [
    ("image", "drop", {"normalize_target": True}),
    ("image", "drop", {"normalize_target": False}),
    ("image", "replace", {"normalize_target": True}),
    ("image", "alter", {"normalize_target": True, "alteration": "patches"}),
    ("image", "alter", {"normalize_target": False}),
    ("speech", "drop", {}),
    ("speech", "replace", {}),
    ("speech", "alter", {}),
]
TITLES = ["original", "seen", "reconstructed"]


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, corruption: Any, **options: Any) -> MaskedReconstruction:
    if name == "speech":
        pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    torch.manual_seed(0)
    config = MMSSLConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.5,
        modalities={name: OPTIONS[name] | options},
    )
    drop = corruption == "drop"
    return MaskedReconstruction(
        MMSSLModel(config),
        corruption=corruption,
        mask_ratio=None if corruption == "alter" else 0.5,
        decoder_layers=int(drop),
        decoder_hidden_size=16,
    )


def samples_of(name: str) -> tuple[Modality, Batch]:
    """Two samples; clips are of different lengths, so that the second ends with padding."""
    if name == "image":
        modality: Modality = Image(**OPTIONS["image"])
        return modality, modality.collate(
            [modality.prepare(torch.rand(8, 8, generator=keyed(seed)).numpy()) for seed in range(2)]
        )
    modality = Speech(**OPTIONS["speech"])
    waves = [torch.randn(64 * frames, generator=keyed(frames)) for frames in (29, 20)]
    return modality, modality.collate([modality.prepare(wave.numpy()) for wave in waves])


class Drawing:
    """Draws once; keeps what was drawn under each title, the contents behind it and what the model predicted."""

    def __init__(self, objective: MaskedReconstruction, batch: Batch, path: Path, seed: int = 0):
        self.images: dict[str, list[np.ndarray]] = {}
        self.contents: list[Tensor] = []
        self.prediction = torch.empty(0)
        ((name, modality),) = objective.model.adapters.items()
        cls, save = type(modality), Figure.savefig
        picture: Callable[[Any, Tokens], Tensor] = cls.picture

        def keep_contents(own: Modality, tokens: Tokens) -> Tensor:
            self.contents.append(tokens.content.clone())
            return picture(own, tokens)

        def keep_images(figure: Figure, *args: Any, **kwargs: Any) -> None:
            columns = len(figure.axes) // 3
            for row in range(3):
                axes = figure.axes[row * columns : (row + 1) * columns]
                self.images[axes[0].get_ylabel()] = [np.asarray(axis.get_images()[0].get_array()) for axis in axes]
            save(figure, *args, **kwargs)

        def keep_prediction(*hook: Any) -> None:
            self.prediction = hook[-1].clone()

        handle = objective.reconstruction_heads[name].register_forward_hook(keep_prediction)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, "picture", keep_contents)
            patch.setattr(Figure, "savefig", keep_images)
            assert draw_reconstructions(objective, batch, path, seed) == path
        handle.remove()
        assert list(self.images) == TITLES
        self.original, self.seen, self.reconstructed = self.contents


def predicted_content(prediction: Tensor, clean: Tensor, normalised: bool) -> Tensor:
    """One token's content from what was predicted; MAE predicts patches of mean 0 and unbiased variance 1."""
    if not normalised:
        return prediction
    return prediction * (clean.var(unbiased=True) + 1e-6).sqrt() + clean.mean()


@pytest.mark.parametrize("name, corruption, options", CASES)
def test_contents_of_the_three_rows(name: str, corruption: str, options: dict[str, Any], tmp_path: Path) -> None:
    objective = make(name, corruption, **options)
    objective.train()
    modality, batch = samples_of(name)
    drawing = Drawing(objective, batch, tmp_path / "drawn.png", seed=3)
    clean = modality.tokenize(batch)
    torch.testing.assert_close(drawing.original, clean.content, rtol=0, atol=0)

    own = objective.model.adapters[name]
    if corruption == "alter":
        altered, where = own.alter(clean, keyed(3))
        torch.testing.assert_close(drawing.seen, altered.content, rtol=0, atol=0)
        assert (altered.content != clean.content).any()
        where = where.reshape(where.shape + (1,) * (clean.content.dim() - where.dim())).expand_as(clean.content)
        counted = torch.ones_like(clean.valid)
    else:
        mask: Mask = own.mask(clean, 0.5, keyed(3))
        where = mask.hidden[..., None].expand_as(clean.content)
        torch.testing.assert_close(drawing.seen.isnan(), where, rtol=0, atol=0)
        torch.testing.assert_close(drawing.seen[~where], clean.content[~where], rtol=0, atol=0)
        counted = mask.hidden
    assert where.any() and not where.all() and not where[~clean.valid].any()

    expected = clean.content.clone()
    for row in range(len(expected)):
        for number, place in enumerate(counted[row].nonzero().flatten().tolist()):
            token = clean.content[row, place]
            content = predicted_content(drawing.prediction[row, number], token, options.get("normalize_target", False))
            expected[row, place] = torch.where(where[row, place], content, token)
    torch.testing.assert_close(drawing.reconstructed, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawing.reconstructed[~where], clean.content[~where], rtol=0, atol=0)
    assert (drawing.reconstructed - clean.content)[where].abs().mean() > 1e-2


@pytest.mark.parametrize("name, corruption, options", CASES)
def test_contents_are_drawn_under_their_titles(
    name: str, corruption: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Each as the modality's own picture of it, without NaN; what is hidden or padding is one light grey."""
    objective = make(name, corruption, **options)
    modality, batch = samples_of(name)
    drawing = Drawing(objective, batch, tmp_path / "drawn.png")
    clean = modality.tokenize(batch)
    for title, content in zip(TITLES, drawing.contents, strict=True):
        tokens = Tokens(content, clean.coords, clean.valid)
        pictures = modality.picture(tokens).numpy()
        for image, picture in zip(drawing.images[title], pictures, strict=True):
            np.testing.assert_allclose(image, np.where(np.isnan(picture), 0.75, picture), atol=1e-6)
    with PILImage.open(tmp_path / "drawn.png") as file:
        assert file.format == "PNG" and len(np.unique(np.asarray(file))) > 10


def test_the_original_is_drawn_as_it_came(tmp_path: Path) -> None:
    """Pixels between 0 and 1, in their places, as they were before they were normalised."""
    _, batch = samples_of("image")
    drawing = Drawing(make("image", "drop"), batch, tmp_path / "drawn.png")
    for seed, image in enumerate(drawing.images["original"]):
        pixels = torch.rand(8, 8, generator=keyed(seed)).numpy()
        np.testing.assert_allclose(image, np.repeat(pixels[..., None], 3, axis=-1), atol=1e-6)
        grey = (drawing.images["seen"][seed] == 0.75).all(axis=-1)
        assert grey.reshape(4, 2, 4, 2).all(axis=(1, 3)).sum() == 8 == grey.sum() / 4


@pytest.mark.parametrize("name, corruption", [("image", "drop"), ("image", "alter"), ("speech", "alter")])
def test_the_seed_alone_chooses_what_is_hidden(name: str, corruption: str, tmp_path: Path) -> None:
    """Dropout is off, the global random state is neither read nor moved."""
    objective = make(name, corruption)
    _, batch = samples_of(name)
    drawings: list[Drawing] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawings))
        before = torch.get_rng_state()
        objective.train()
        drawings.append(Drawing(objective, batch, tmp_path / "drawn.png", seed))
        assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(drawings[0].contents, drawings[1].contents, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(drawings[0].seen.nan_to_num(9.0), drawings[2].seen.nan_to_num(9.0))


def test_one_sample_is_drawn(tmp_path: Path) -> None:
    _, batch = samples_of("image")
    one = {name: value[:1] for name, value in batch.items()}
    drawing = Drawing(make("image", "drop"), one, tmp_path / "drawn.png")
    assert [len(images) for images in drawing.images.values()] == [1, 1, 1]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="no finished run"):
            load_objective(folder)
    MMSSLModel(MMSSLConfig(num_hidden_layers=1, modalities={"image": OPTIONS["image"]})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no finished run"):  # a model, but no heads to draw with
        load_objective(tmp_path)
