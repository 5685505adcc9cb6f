"""Encoders of transformers that mmssl has not pretrained (ViT, DINOv2, wav2vec 2.0, VideoMAE, ...), measured too.

A model is read as its own processor and configuration say: images, clips and sound are told apart by the name and the
shape of what the processor makes, not by a list of models. Its hidden states are those that transformers returns.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.image import Image
from mmssl.modalities.speech import Speech
from mmssl.modalities.video import Video
from mmssl.modeling import MMSSLModelOutput
from mmssl.pixels import Size, channels_first, pair, read_image, size_of
from mmssl.samples import Samples, file_of, number_array
from mmssl.tokens import Tokens
from mmssl.video_files import frame_files, opened, read_collection

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
PREFIX_TOKENS = (*CLASS_TOKENS, "distillation_token", "register_tokens")  # parameters, first in a sequence
UNREAD = ("pooler", "mask_token", "masked_spec_embed")  # weights that no hidden state of a frozen encoder depends on
PIXELS, SOUND = ("pixel_values", "pixel_values_videos"), ("input_values", "input_features")
MOST_RAW_FEATURES = 32_768


class Prepared(Modality):
    """What a processor of transformers makes of samples.

    Args:
        processor: the checkpoint's own.
        main_input: name of the model's main input.
    """

    def __init__(self, processor: Any, main_input: str):
        super().__init__()
        self.processor, self.main_input = processor, main_input

    def options(self) -> dict[str, Any]:
        return {"processor": json.loads(self.processor.to_json_string())}

    def example(self) -> Any:
        """A sample that tells whether the model can read what the processor makes."""
        raise NotImplementedError


class Pictures(Prepared):
    """Images.

    Args:
        processor: the checkpoint's own.
        main_input: name of the model's main input.
        config: of the model.
    """

    extensions: ClassVar = Image.extensions
    columns: ClassVar = Image.columns

    @property
    def name(self) -> str:
        return "image"

    def __init__(self, processor: Any, main_input: str, config: PreTrainedConfig):
        super().__init__(processor, main_input)
        self.channels = getattr(config, "num_channels", 3)
        patch: Any = getattr(config, "patch_size", None) or 16
        self.patch_size: Size = pair(patch if isinstance(patch, int) else tuple(patch)[-2:])

    def example(self) -> Any:
        return np.zeros((self.channels, 64, 64), dtype=np.uint8)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """What ``Image.prepare`` takes, at its own size; the processor resizes."""
        pixels = read_image(sample, size_of(sample, self.channels), self.channels, (1, 1))
        return {self.main_input: self.processed(in_8_bits(pixels))}

    def processed(self, pictures: Any) -> Tensor:
        made = self.processor(pictures, input_data_format="channels_first", return_tensors="pt")
        return made[self.main_input][0]

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        return {self.main_input: torch.stack([sample[self.main_input] for sample in samples])}

    def clips(self, batch: Batch) -> Tensor:
        """(B, C, T, H, W); an image is a clip of one frame."""
        return batch[self.main_input][:, :, None]

    def tokenize(self, batch: Batch) -> Tokens:
        """Patches, for what is measured without the model; where those of the model do not fit, pixels."""
        pixels = self.clips(batch)
        size, (rows, columns) = (pixels.shape[3], pixels.shape[4]), self.patch_size
        patch = (rows if size[0] % rows == 0 else 1, columns if size[1] % columns == 0 else 1)
        own = Video(
            num_frames=1, image_size=size, patch_size=patch, tubelet_size=1, num_channels=pixels.shape[1],
            normalize_target=False,
        )  # fmt: skip
        return own.tokenize({"pixel_values_videos": pixels})

    def raw_features(self, batch: Batch) -> Tensor:
        """The pixels where there are at most 32,768; else those of each frame averaged to at most 64 x 64, or of
        several frames to 16 x 16."""
        pixels = self.clips(batch)
        if pixels[0].numel() > MOST_RAW_FEATURES:
            most = 64 if pixels.shape[2] == 1 else 16
            frames = pixels.transpose(1, 2).flatten(0, 1)
            height, width = (min(side, most) for side in frames.shape[2:])
            frames = nn.functional.adaptive_avg_pool2d(frames, (height, width))
            pixels = frames.unflatten(0, (len(pixels), -1))
        return pixels.flatten(1)


class Clips(Pictures):
    """Videos, of which as many frames are prepared as the model reads."""

    extensions: ClassVar = Video.extensions
    columns: ClassVar = Video.columns

    @property
    def name(self) -> str:
        return "video"

    def __init__(self, processor: Any, main_input: str, config: PreTrainedConfig):
        super().__init__(processor, main_input, config)
        frames: Any = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        if frames is None:
            raise ValueError("its config does not say how many frames it reads (num_frames or frames_per_clip)")
        self.num_frames: int = frames

    def example(self) -> Any:
        return np.zeros((self.num_frames, self.channels, 64, 64), dtype=np.uint8)

    def collection(self, source: str) -> Samples | None:
        return read_collection(source)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """What ``Video.prepare`` takes, as frames spread evenly over all of it, at their own size."""
        reader = EvenFrames(
            num_frames=self.num_frames, frame_stride=1, image_size=frame_size(sample, self.channels), patch_size=1,
            tubelet_size=1, num_channels=self.channels, image_mean=0.0, image_std=1.0, normalize_target=False,
        )  # fmt: skip
        pixels = reader.excerpt(reader.prepare(sample), None)["pixel_values_videos"]
        return {self.main_input: self.processed(list(in_8_bits(pixels.transpose(0, 1))))}

    def clips(self, batch: Batch) -> Tensor:
        return batch[self.main_input].transpose(1, 2)  # frames come before channels there


class EvenFrames(Video):
    """A clip whose frames lie evenly over the whole video, the first one first."""

    def frame_numbers(self, count: int, seconds: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return torch.arange(self.num_frames) * count // self.num_frames


class Sounds(Prepared):
    """Sound, as waves or as frames of a spectrogram."""

    extensions: ClassVar = Speech.extensions
    columns: ClassVar = Speech.columns

    @property
    def name(self) -> str:
        return "sound"

    def __init__(self, processor: Any, main_input: str):
        super().__init__(processor, main_input)
        self.reader = Speech(sampling_rate=processor.sampling_rate, rms_level=None).eval()

    def example(self) -> Any:
        return np.linspace(-1, 1, self.processor.sampling_rate, dtype=np.float32)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """What ``Speech.prepare`` takes; the feature extractor normalises."""
        return self.reader.excerpt(self.reader.prepare(sample), None)

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        waves = [sample["input_values"].numpy() for sample in samples]
        rate = self.processor.sampling_rate
        made = self.processor(waves, sampling_rate=rate, padding=True, return_attention_mask=True, return_tensors="pt")
        return {name: made[name] for name in (self.main_input, "attention_mask") if name in made}

    def tokenize(self, batch: Batch) -> Tokens:
        """Frames of the spectrogram; of waves those that ``Speech`` makes."""
        values = batch[self.main_input]
        if values.dim() == 2:
            mask = batch.get("attention_mask", torch.ones_like(values, dtype=torch.long))
            return self.reader.tokenize({"input_values": values, "attention_mask": mask})
        valid = batch.get("attention_mask", values.new_ones(values.shape[:2])).bool()
        time = torch.arange(values.shape[1], device=values.device, dtype=torch.float32)[None, :, None]
        return Tokens(content=values, coords=time.expand(len(values), -1, -1), valid=valid)

    def raw_features(self, batch: Batch) -> Tensor:
        """Mean and standard deviation over time of each channel of the spectrogram; of waves, of the one that
        ``Speech`` makes."""
        values = batch[self.main_input]
        if values.dim() == 2:
            mask = batch.get("attention_mask", torch.ones_like(values, dtype=torch.long))
            return self.reader.raw_features({"input_values": values, "attention_mask": mask})
        tokens = self.tokenize(batch)
        mean = tokens.pool(values)
        return torch.cat([mean, tokens.pool((values - mean[:, None]).square()).sqrt()], dim=1)


def in_8_bits(pixels: Tensor) -> np.ndarray:
    """Pixels from 0 to 1 as processors take them best: whatever they do with floats differs."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def frame_size(sample: Any, channels: int) -> Size:
    """Height and width of the frames of a video that ``Video.prepare`` takes."""
    if isinstance(sample, dict):
        sample = file_of(sample)
    if not isinstance(sample, str | Path | bytes):
        height, width = channels_first(torch.from_numpy(number_array(sample)), channels, before="T, ").shape[2:]
        return height, width
    if not isinstance(sample, bytes) and Path(sample).is_dir():
        return size_of(frame_files(Path(sample))[0], channels)
    with opened(sample if isinstance(sample, bytes) else str(sample)) as (container, stream):
        for frame in container.decode(stream):
            turned = round(frame.rotation / 90) % 2
            return (frame.width, frame.height) if turned else (frame.height, frame.width)
    raise ValueError("found no frame that can be decoded; expected an intact video file")


class ForeignModel(nn.Module):
    """A model of transformers with what the protocols ask of an ``MMSSLModel``.

    Args:
        model: the encoder.
        adapter: what prepares samples for it.
    """

    def __init__(self, model: PreTrainedModel, adapter: Prepared):
        super().__init__()
        self.model: Any = model
        self.adapter = adapter
        names = {name.rpartition(".")[2]: value for name, value in model.named_parameters()}
        self.num_prefix_tokens = sum(
            value.numel() // value.shape[-1] for name, value in names.items() if name in PREFIX_TOKENS
        )
        self.config: Any = copy.deepcopy(model.config)
        self.config.modalities = {adapter.name: adapter.options()}
        self.config.class_token = any(name in CLASS_TOKENS for name in names)

    @property
    def adapters(self) -> dict[str, Modality]:
        """What it reads, by name."""
        return {self.adapter.name: self.adapter}

    @property
    def encoder(self) -> "ForeignModel":
        """Itself: where the number of prefix tokens stands."""
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    def untrained(self) -> "ForeignModel":
        """The same architecture with start values drawn from the global generator."""
        return ForeignModel(AutoModel.from_config(copy.deepcopy(self.model.config)), self.adapter)

    def forward(self, output_hidden_states: bool = False, **batch: Tensor) -> MMSSLModelOutput:
        """Encode a batch as the adapter collates it.

        Clips of different lengths go through one length at a time if the processor says that the model was trained
        without an attention mask: so padding never tells on a clip.
        """
        mask = batch.get("attention_mask")
        if mask is not None and not self.adapter.processor.return_attention_mask:
            states, valid = self.by_length(batch[self.adapter.main_input], mask.sum(dim=1), output_hidden_states)
        else:
            states, valid = self.encode(batch, output_hidden_states)
        last, prefix = states[-1], self.num_prefix_tokens
        tokens = Tokens(last[:, prefix:], last[:, prefix:, :0], valid[:, prefix:])
        return MMSSLModelOutput(
            last_hidden_state=last,
            pooler_output=tokens.pool(tokens.content),
            token_mask=valid,
            hidden_states=tuple(states[:-1]) if output_hidden_states else None,
        )

    def encode(self, batch: Batch, every_layer: bool) -> tuple[list[Tensor], Tensor]:
        """Hidden states of the layers, if wanted, and the last one, (B, N, D) each; and which tokens are valid."""
        values, mask = batch[self.adapter.main_input], batch.get("attention_mask")
        options: dict[str, Any] = {}
        if getattr(self.model.config, "mask_ratio", None) is not None:  # an MAE, which shuffles patches by this noise
            patches = values.shape[-2] * values.shape[-1] // int(np.prod(pair(self.model.config.patch_size)))
            options["noise"] = torch.arange(patches, device=values.device).expand(len(values), -1).float()
        out = self.model(**batch, **options, output_hidden_states=every_layer)
        hidden = [*(out.hidden_states if every_layer else ()), out.last_hidden_state]
        # Maps of features (B, C, H, W), of convolutions, are tokens too.
        states = [each.flatten(2).transpose(1, 2) if each.dim() == 4 else each for each in hidden]
        length = states[-1].shape[1]
        if mask is None:
            return states, states[-1].new_ones(len(values), length, dtype=torch.bool)
        if hasattr(self.model, "_get_feature_vector_attention_mask"):
            return states, self.model._get_feature_vector_attention_mask(length, mask).bool()
        if mask.shape[1] != length:
            raise ValueError(
                f"found {length} tokens for {mask.shape[1]} steps, and a {type(self.model).__name__} that does not say "
                "which tokens are of padding"
            )
        return states, mask.bool()

    def by_length(self, values: Tensor, lengths: Tensor, every_layer: bool) -> tuple[list[Tensor], Tensor]:
        """As ``encode``, of rows without their padding; what is returned is padded."""
        found: list[list[Tensor]] = [[] for _ in values]
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            states, _ = self.encode({self.adapter.main_input: values[rows, :length]}, every_layer)
            for number, row in enumerate(rows.tolist()):
                found[row] = [state[number] for state in states]
        padded = [nn.utils.rnn.pad_sequence(list(states), batch_first=True) for states in zip(*found, strict=True)]
        counts = torch.tensor([len(states[-1]) for states in found], device=values.device)
        return padded, torch.arange(padded[-1].shape[1], device=values.device) < counts[:, None]


def load_foreign(checkpoint: str | Path, config: PreTrainedConfig) -> ForeignModel:
    """An encoder of images, videos or sound from a folder or the Hub.

    Of a model of images and text, its vision tower, where transformers has that as a model of its own.

    Raises:
        ValueError: another kind of model; no processor; or weights that are missing, or no safetensors.
    """
    what = f"{checkpoint} is a {type(config).__name__.removesuffix('Config')}"
    tower: Any = getattr(config, "vision_config", None)
    if main_input(config) not in PIXELS + SOUND and tower is not None and main_input(tower) in PIXELS:
        config = tower
    name = main_input(config)
    if name not in PIXELS + SOUND or config.is_encoder_decoder:
        reads = f"reads {name or 'no samples'}{' to decode it' if config.is_encoder_decoder else ''}"
        raise ValueError(
            f"{what} and {reads}; expected a model that mmssl has pretrained, or an encoder of images, videos or sound "
            "that AutoModel loads, such as ViT, DINOv2, wav2vec 2.0, AST, VideoMAE or the vision tower of CLIP"
        )
    if getattr(config, "mask_ratio", None) is not None:
        config.mask_ratio = 0.0  # nothing is hidden from a frozen encoder
    processor = load_processor(checkpoint, name)
    model, info = AutoModel.from_pretrained(
        checkpoint,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    lacking = [key for key in sorted(info["missing_keys"]) if not any(part in key for part in UNREAD)]
    if lacking:
        raise ValueError(f"{what}, but lacks weights of a {type(model).__name__}, such as {lacking[0]}")
    try:
        foreign = ForeignModel(model, adapter_of(processor, config, name))
        example = foreign.adapter.collate([foreign.adapter.prepare(foreign.adapter.example())])
        with torch.inference_mode():
            foreign.eval()(**example)
    except Exception as error:  # any of the many models of transformers, so anything may be raised
        raise ValueError(
            f"{what} that cannot read what its processor, a {type(processor).__name__}, makes of a sample "
            f"({type(error).__name__}: {error})"
        ) from error
    return foreign


def main_input(config: PreTrainedConfig) -> str | None:
    """Name of the main input of the model that ``AutoModel`` makes of a configuration, if there is one."""
    model: Any = MODEL_MAPPING.get(type(config), None)
    return getattr(model, "main_input_name", None)


def load_processor(checkpoint: str | Path, name: str) -> Any:
    """What prepares the main input of this name."""
    file = "preprocessor_config.json"
    kind: Any = AutoFeatureExtractor if name in SOUND else AutoImageProcessor
    video = cached_file(checkpoint, "video_preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if name in PIXELS and video is not None:
        file, kind = "video_preprocessor_config.json", AutoVideoProcessor
    try:
        return kind.from_pretrained(checkpoint, trust_remote_code=False)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: its {file} needs a package that is missing here ({reason})") from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint} has no {file} that tells how samples are prepared for the model; save its own processor "
            f"there: processor.save_pretrained(...) ({reason})"
        ) from error


def adapter_of(processor: Any, config: PreTrainedConfig, name: str) -> Prepared:
    """The adapter for what the processor makes: frames have an axis more than an image."""
    if name in SOUND:
        return Sounds(processor, name)
    pictures = Pictures(processor, name, config)
    return Clips(processor, name, config) if pictures.processed([pictures.example()]).dim() == 4 else pictures
