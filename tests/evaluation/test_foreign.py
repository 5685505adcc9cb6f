"""Tests of encoders of transformers that mmssl has not pretrained: features are those of transformers' own forward."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    VideoMAEConfig,
    VideoMAEImageProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
)
from transformers.models.audio_spectrogram_transformer import ASTConfig, ASTFeatureExtractor

from mmssl.data import DataArguments
from mmssl.evaluation import embed, evaluate
from mmssl.evaluation.features import pooled
from mmssl.evaluation.foreign import ForeignModel
from mmssl.evaluation.models import fresh, load_model
from mmssl.modeling import MMSSLConfig, MMSSLModel

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,  # so that inputs matter to what comes out
}
SQUARE = {"height": 32, "width": 32}
WAVES: dict[str, Any] = SHAPE | {
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = WhisperConfig(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    vocab_size=60,
    num_mel_bins=8,
    pad_token_id=1,
)
CHECKPOINTS: dict[str, tuple[PreTrainedConfig, Any]] = {
    "vit": (ViTConfig(image_size=32, patch_size=16, **SHAPE), ViTImageProcessor(size=SQUARE)),
    "dino": (
        Dinov2WithRegistersConfig(image_size=28, patch_size=14, num_register_tokens=3, **SHAPE),
        BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
    ),
    "videomae": (
        VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, **SHAPE),
        VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    ),
    "wav2vec2": (Wav2Vec2Config(feat_extract_norm="group", **WAVES), Wav2Vec2FeatureExtractor()),
    "wav2vec2_masked": (
        Wav2Vec2Config(feat_extract_norm="layer", do_stable_layer_norm=True, **WAVES),
        Wav2Vec2FeatureExtractor(return_attention_mask=True),
    ),
    "ast": (
        ASTConfig(patch_size=16, num_mel_bins=32, max_length=64, **SHAPE),
        ASTFeatureExtractor(num_mel_bins=32, max_length=64),
    ),
}


def save(path: Path, config: PreTrainedConfig, processor: Any) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return save(tmp_path / "checkpoint", *CHECKPOINTS[request.param])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Grey, wide and turned ones: what processors get is RGB, as people see it."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number, shape in enumerate(((40, 50, 3), (48, 40), (64, 33, 3))):
        picture = PILImage.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        exif = PILImage.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        picture.save(tmp_path / "images" / f"{number}.png", exif=exif)
    return tmp_path / "images"


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "sounds").mkdir()
    for number, length in enumerate((3000, 8000, 3000, 5000)):
        soundfile.write(tmp_path / "sounds" / f"{number}.wav", rng.normal(0, 0.1, length), 16_000, subtype="FLOAT")
    return tmp_path / "sounds"


def embedded(checkpoint: Path, data: Path, **options: Any) -> dict[str, list]:
    path = embed(checkpoint, DataArguments(str(data)), checkpoint.parent / "embedded.parquet", **options)
    return pq.read_table(path).to_pydict()


@pytest.mark.parametrize(("checkpoint", "prefix"), [("vit", 1), ("dino", 4)], indirect=["checkpoint"])
def test_images(checkpoint: Path, images: Path, prefix: int) -> None:
    """Beside transformers on one image at a time, as its documentation reads files."""
    model, processor = AutoModel.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    expected = []
    for path in sorted(images.iterdir()):
        picture = PILImage.open(path).convert("RGB")
        picture = picture.rotate(-90, expand=True) if path.name == "2.png" else picture
        with torch.no_grad():
            expected.append(model(**processor(picture, return_tensors="pt"), output_hidden_states=True))
    found = {pooling: embedded(checkpoint, images, pooling=pooling) for pooling in ("mean", "cls", "tokens")}
    layers = embedded(checkpoint, images, layers=[1])["layer_1"]
    assert len(layers) == 3
    for number, out in enumerate(expected):
        tokens = out.last_hidden_state[0].numpy()
        same = {"cls": tokens[0], "mean": tokens[prefix:].mean(axis=0), "tokens": tokens[prefix:]}
        for pooling, wanted in same.items():
            np.testing.assert_allclose(np.array(found[pooling]["embedding"][number]), wanted, atol=1e-4)
        np.testing.assert_allclose(layers[number], out.hidden_states[1][0, prefix:].mean(dim=0).numpy(), atol=1e-4)


@pytest.mark.parametrize("checkpoint", ["videomae"], indirect=True)
def test_videos(checkpoint: Path, tmp_path: Path) -> None:
    """Frames that lie evenly over the clip; arrays and folders of frames."""
    clip = np.random.default_rng(0).integers(0, 256, (10, 40, 32, 3), dtype=np.uint8)
    (tmp_path / "clips" / "one").mkdir(parents=True)
    for number, frame in enumerate(clip):
        PILImage.fromarray(frame).save(tmp_path / "clips" / "one" / f"{number}.png")
    np.savez(tmp_path / "clips.npz", video=clip[None])
    model, processor = AutoModel.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    frames = [PILImage.fromarray(clip[number]) for number in (0, 2, 5, 7)]  # 0, 2.5, 5 and 7.5
    with torch.no_grad():
        expected = model(**processor(frames, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
    for source in ("clips", "clips.npz"):
        found = embedded(checkpoint, tmp_path / source)["embedding"]
        assert len(found) == 1
        np.testing.assert_allclose(found[0], expected, atol=1e-4)


@pytest.mark.parametrize("checkpoint", ["videomae"], indirect=True)
def test_video_files_are_read_at_their_own_size(checkpoint: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    from mmssl.evaluation.foreign import frame_size

    frames = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "one.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path = str(tmp_path / "videos" / "one.mp4")
    assert frame_size(path, 3) == frame_size(Path(path).read_bytes(), 3) == (48, 64)
    with av.open(path) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    model, processor = AutoModel.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    chosen = [PILImage.fromarray(decoded[number]) for number in (0, 1, 3, 4)]
    with torch.no_grad():
        expected = model(**processor(chosen, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
    found = embedded(checkpoint, tmp_path / "videos")["embedding"]
    np.testing.assert_allclose(found[0], expected, atol=0.02)  # colours are converted a little differently


@pytest.mark.parametrize("checkpoint", ["wav2vec2", "wav2vec2_masked", "ast"], indirect=True)
@pytest.mark.parametrize("pooling", ["mean", "max", "tokens"])
def test_sound(checkpoint: Path, sounds: Path, pooling: str) -> None:
    """Beside transformers on one clip at a time, so without any padding."""
    model, processor = AutoModel.from_pretrained(checkpoint), AutoFeatureExtractor.from_pretrained(checkpoint)
    found = embedded(checkpoint, sounds, pooling=pooling)["embedding"]
    assert len(found) == 4
    for path, embedding in zip(sorted(sounds.iterdir()), found, strict=True):
        wave, rate = soundfile.read(path, dtype="float32")
        with torch.no_grad():
            hidden = model(**processor(wave, sampling_rate=rate, return_tensors="pt")).last_hidden_state[0]
        hidden = hidden[2:] if "ASTModel" in type(model).__name__ else hidden  # class and distillation token
        expected = {"mean": hidden.mean(dim=0), "max": hidden.amax(dim=0), "tokens": hidden}[pooling].numpy()
        np.testing.assert_allclose(np.array(embedding), expected, atol=2e-4)


def test_an_mae_hides_nothing_and_keeps_the_order(tmp_path: Path, images: Path) -> None:
    """By a ViT with the same weights, which has no mask; and twice the same."""
    torch.manual_seed(0)
    mae = ViTMAEModel(ViTMAEConfig(image_size=32, patch_size=16, mask_ratio=0.75, **SHAPE))
    torch.nn.init.normal_(mae.embeddings.position_embeddings)
    mae.save_pretrained(tmp_path / "mae")
    ViTImageProcessor(size=SQUARE).save_pretrained(tmp_path / "mae")
    vit = ViTModel(ViTConfig(image_size=32, patch_size=16, **SHAPE), add_pooling_layer=False).eval()
    vit.load_state_dict(mae.state_dict())
    pixels = [
        load_model(tmp_path / "mae").adapters["image"].prepare(str(path))["pixel_values"]
        for path in sorted(images.iterdir())
    ]
    with torch.no_grad():
        expected = vit(torch.stack(pixels)).last_hidden_state[:, 1:].numpy()
    first, second = (embedded(tmp_path / "mae", images, pooling="tokens")["embedding"] for _ in range(2))
    assert first == second
    np.testing.assert_allclose(np.array(first), expected, atol=1e-4)


def test_the_vision_tower_of_a_model_of_images_and_text(tmp_path: Path, images: Path) -> None:
    torch.manual_seed(0)
    whole = CLIPModel(
        CLIPConfig(vision_config=dict(image_size=32, patch_size=16, **SHAPE), text_config=dict(vocab_size=50, **SHAPE))
    ).eval()
    whole.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(tmp_path / "clip")
    model = load_model(tmp_path / "clip")
    assert isinstance(model, ForeignModel) and isinstance(model.model, CLIPVisionModel)
    pixels = torch.stack([model.adapter.prepare(str(path))["pixel_values"] for path in sorted(images.iterdir())])
    with torch.no_grad():
        expected = whole.vision_model(pixels).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(embedded(tmp_path / "clip", images, pooling="cls")["embedding"], expected, atol=1e-4)


@pytest.mark.parametrize("checkpoint", ["wav2vec2"], indirect=True)
def test_padding_does_not_tell_on_a_clip(checkpoint: Path) -> None:
    """A group norm would: over time, it reads padding too."""
    model = load_model(checkpoint).eval()
    adapter = model.adapters["sound"]
    short, long = (
        adapter.prepare(np.random.default_rng(length).normal(size=length).astype(np.float32)) for length in (2000, 9000)
    )
    with torch.no_grad():
        together = model(**adapter.collate([short, long]), output_hidden_states=True)
        alone = model(**adapter.collate([short]), output_hidden_states=True)
    length = alone.last_hidden_state.shape[1]
    assert together.token_mask[0].sum() == length < together.token_mask[1].sum()
    for one, other in ((together, alone),):
        torch.testing.assert_close(one.last_hidden_state[0, :length], other.last_hidden_state[0])
        torch.testing.assert_close(one.hidden_states[1][0, :length], other.hidden_states[1][0])
        torch.testing.assert_close(one.pooler_output[0], other.pooler_output[0])


@pytest.mark.parametrize("checkpoint", ["vit"], indirect=True)
def test_untrained_is_the_same_architecture_with_weights_of_the_seed(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    before = torch.random.get_rng_state()
    one, again, other = (fresh(model, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())

    def weights(model: Any) -> Tensor:
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    assert torch.equal(weights(one), weights(again)) and not torch.equal(weights(one), weights(other))
    assert not torch.equal(weights(one), weights(model)) and str(one.model) == str(model.model)
    batch = {"pixel_values": torch.rand(2, 3, 32, 32)}
    assert torch.equal(pooled(one)(batch), pooled(again)(batch))


@pytest.mark.parametrize("checkpoint", ["vit"], indirect=True)
def test_raw_features_are_what_the_processor_gives(checkpoint: Path, images: Path) -> None:
    adapter = load_model(checkpoint).adapters["image"]
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    picture = PILImage.open(images / "0.png")
    expected = processor(picture, return_tensors="pt")["pixel_values"].flatten(1)
    torch.testing.assert_close(adapter.raw_features(adapter.collate([adapter.prepare(picture)])), expected)
    # Larger ones are averaged over blocks, here of 4 x 4 pixels.
    large = torch.rand(1, 3, 256, 256)
    blocks = large.reshape(1, 3, 64, 4, 64, 4).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(adapter.raw_features({"pixel_values": large}), blocks)


@pytest.mark.parametrize("checkpoint", ["ast"], indirect=True)
def test_raw_features_of_a_spectrogram(checkpoint: Path) -> None:
    adapter = load_model(checkpoint).adapters["sound"]
    frames = torch.rand(2, 64, 32)
    found = adapter.raw_features({"input_values": frames})
    expected = torch.cat([frames.mean(dim=1), frames.std(dim=1, unbiased=False)], dim=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("checkpoint", ["vit"], indirect=True)
def test_a_table_with_a_foreign_and_an_own_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Foreign encoders of one shape are two rows beside one of pixels and one of untrained; ours a table of its own."""
    torch.manual_seed(1)
    AutoModel.from_config(CHECKPOINTS["vit"][0]).save_pretrained(tmp_path / "other")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "other")
    modalities: dict[str, dict[str, Any]] = {"image": {"image_size": 8, "patch_size": 4, "num_channels": 1}}
    shape = {key: value for key, value in SHAPE.items() if key != "initializer_range"}
    MMSSLModel(MMSSLConfig(modalities=modalities, **shape)).save_pretrained(tmp_path / "own")
    data, test = (DataArguments("digits", split=split, max_samples=120) for split in ("train", "test"))
    scores = evaluate([checkpoint, tmp_path / "other"], data, test, ["knn"])
    rows = ["raw", "untrained", f"pretrained {checkpoint}", f"pretrained {tmp_path / 'other'}"]
    assert {score.row: len(score.values) for score in scores} == dict.fromkeys(rows, 1)
    (own,) = evaluate([tmp_path / "own"], data, test, ["knn"], baselines=False)
    assert all(0.2 < value <= 1 for score in (*scores, own) for value in score.values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(vocab_size=30, **SHAPE), "is a Bert and reads input_ids; expected a model that mmssl has"),
        (
            WHISPER,
            "is a Whisper and reads input_features to decode it; expected",
        ),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path: Path, config: PreTrainedConfig, message: str) -> None:
    save(tmp_path / "checkpoint", config, None)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*ViT, DINOv2[^\n]*$"):
        load_model(tmp_path / "checkpoint")


@pytest.mark.parametrize("checkpoint", ["vit", "wav2vec2"], indirect=True)
def test_a_missing_processor_is_said(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*checkpoint has no preprocessor_config\.json that tells[^\n]*$"):
        load_model(checkpoint)


@pytest.mark.parametrize("checkpoint", ["vit"], indirect=True)
def test_weights_as_pickle_are_refused(checkpoint: Path) -> None:
    torch.save(AutoModel.from_pretrained(checkpoint).state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors; expected weights as safetensors: those of pickle"):
        load_model(checkpoint)


@pytest.mark.parametrize("checkpoint", ["vit"], indirect=True)
def test_weights_that_are_missing_are_said(checkpoint: Path) -> None:
    """The pooler's are not: it is not read."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"is a ViT, but lacks weights of a ViTModel, such as .*2\."):
        load_model(checkpoint)
    ViTModel(ViTConfig(**config), add_pooling_layer=False).save_pretrained(checkpoint)
    assert isinstance(load_model(checkpoint), ForeignModel)


@pytest.mark.parametrize("checkpoint", ["vit"], indirect=True)
def test_a_processor_of_another_model_is_said(checkpoint: Path) -> None:
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(checkpoint)
    with pytest.raises(
        ValueError, match=r"is a ViT that cannot read what its processor, a ViTImageProcessor\w*, makes"
    ):
        load_model(checkpoint)


def test_unknown_models_and_code_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ValueError, match=r"^[^\n]*transformers cannot read its config[^\n]*$"):
        load_model(tmp_path)
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model", "auto_map": auto}))
    with pytest.raises(ValueError, match=r"^[^\n]*transformers cannot read its config[^\n]*$"):
        load_model(tmp_path)


@pytest.mark.parametrize("checkpoint", ["videomae", "wav2vec2"], indirect=True)
def test_no_class_token(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pooling: found cls, but the encoder has no class token"):
        embed(checkpoint, DataArguments("moving_digits"), tmp_path / "e.npz", pooling="cls")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("checkpoint", ["videomae"], indirect=True)
def test_what_a_processor_of_videos_needs_is_said(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").rename(checkpoint / "video_preprocessor_config.json")
    with pytest.raises(ValueError, match=r"^[^\n]*its video_preprocessor_config\.json needs a package .*orchvision"):
        load_model(checkpoint)


@pytest.mark.parametrize("checkpoint", ["videomae"], indirect=True)
def test_processors_of_videos(checkpoint: Path) -> None:
    """Where torchvision is there, which they need."""
    pytest.importorskip("torchvision")
    from transformers import VideoMAEVideoProcessor

    (checkpoint / "preprocessor_config.json").unlink()
    processor = VideoMAEVideoProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    processor.save_pretrained(checkpoint)
    clip = torch.randint(0, 256, (10, 3, 40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = load_model(checkpoint).adapters["video"].prepare(clip.numpy())["pixel_values"]
    assert torch.equal(found, processor(clip[[0, 2, 5, 7]], return_tensors="pt")["pixel_values"][0])
