"""Speech and other sound: waveforms of any rate and length as log-mel frames (Liu et al., TERA, 2021)."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.drawings import Drawing, Spectrogram
from mmssl.modalities.base import ORDERS, Batch, Modality, View, bin_of, block_order, reversed_rows, segment_orders
from mmssl.positions import SinCosPositions
from mmssl.samples import file_of, number_array
from mmssl.tokens import Tokens, gather

PLACES = 32  # bins of the place of a frame in its clip


class Speech(Modality):
    """Waveforms as log-mel frames, one token each, normalised per utterance and mel channel over its own frames.

    Args:
        sampling_rate: samples per second that clips are resampled to.
        num_mels: mel channels F (HTK scale, triangles of equal height).
        n_fft: length of the Fourier transform, in samples.
        win_length: length of the Hann window, in samples.
        hop_length: samples from one frame to the next.
        rms_level: loudness that waveforms are scaled to, in dB of the root mean square. None: as they are.
        max_seconds: in training, longer clips are cut: files and views at random, arrays after this time.
        distance: "l1" (TERA) or "l2" error of an element of a frame.
        time_ratio: share of frames altered in time, as in ``round(frames * time_ratio / time_width)`` blocks.
        time_width: frames of a block altered in time, and longest hidden block of the mask style "block".
        frequency_ratio: greatest share of the mel channels that one block of channels, set to zero, takes.
        noise_probability: probability that a batch gets noise added to its frames.
        noise_std: standard deviation of that noise.
        crop_scale: least and greatest share of a clip that a view keeps.
        gain: a view's loudness changes by at most this, in dB. Without effect on the frames where ``rms_level`` or
            normalisation undo it; noise and clipping apart.
        view_noise: least and greatest signal-to-noise ratio of a view's white noise, in dB. None: no noise.
        speed: a view's speed (and pitch) changes by at most this share.
    """

    inputs: ClassVar = ("input_values", "attention_mask")
    extensions: ClassVar = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
    columns: ClassVar = ("audio", "speech", "input_values")
    mask_styles: ClassVar = ("random", "block")
    affine: ClassVar = True

    def __init__(
        self,
        sampling_rate: int = 16_000,
        num_mels: int = 80,
        n_fft: int = 400,
        win_length: int = 400,
        hop_length: int = 160,
        rms_level: float | None = -25.0,
        max_seconds: float = 15.0,
        distance: Literal["l1", "l2"] = "l1",
        time_ratio: float = 0.15,
        time_width: int = 7,
        frequency_ratio: float = 0.2,
        noise_probability: float = 0.15,
        noise_std: float = 0.2,
        crop_scale: tuple[float, float] = (1.0, 1.0),
        gain: float = 0.0,
        view_noise: tuple[float, float] | None = None,
        speed: float = 0.0,
    ):
        super().__init__()
        self.sampling_rate, self.num_mels, self.n_fft = sampling_rate, num_mels, n_fft
        self.win_length, self.hop_length = win_length, hop_length
        self.rms_level, self.max_seconds, self.distance = rms_level, max_seconds, distance
        self.time_ratio, self.time_width, self.frequency_ratio = time_ratio, time_width, frequency_ratio
        self.noise_probability, self.noise_std = noise_probability, noise_std
        self.crop_scale, self.gain, self.speed = tuple(crop_scale), gain, speed
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: found {crop_scale}; expected least and greatest share, above 0, at most 1")
        if not 0 <= speed < 1:
            raise ValueError(f"speed: found {speed}; expected a share from 0 to below 1")
        self.view_noise = None if view_noise is None else tuple(view_noise)

    @property
    def content_shape(self) -> tuple[int, ...]:
        return (self.num_mels,)

    def build(self, width: int) -> Self:
        self.projection = nn.Linear(self.num_mels, width)
        return super().build(width)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """Decode, mix down, resample and scale a path, bytes, a ``{"bytes", "path"}`` record, a
        ``{"array", "sampling_rate"}`` record, or an array (samples,) or (channels, samples) at ``sampling_rate``.

        Of a file longer than ``max_seconds`` only the header is read: ``excerpt`` decodes what is asked for.
        """
        if isinstance(sample, dict) and sample.get("array") is None:
            sample = file_of(sample)
        if not isinstance(sample, str | Path | bytes):
            return {"input_values": self.wave(*self.from_array(sample))}
        with open_sound(sample) as file:
            if file.frames <= self.max_seconds * file.samplerate:
                return {"input_values": self.wave(*decode_audio(file))}
            kind, data = ("file", sample) if isinstance(sample, bytes) else ("path", os.fsencode(sample))
            return {
                kind: torch.frombuffer(bytearray(data), dtype=torch.uint8),
                "length": torch.tensor(file.frames),
                "rate": torch.tensor(file.samplerate),
            }

    def excerpt(self, sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """Of a file longer than ``max_seconds``, so much at a random place in training, which is not silent; else all.

        Raises:
            ValueError: nothing but silence at ten places, or what ``prepare`` refuses.
        """
        if "input_values" in sample:
            return sample
        data = sample["file" if "file" in sample else "path"].numpy().tobytes()
        kept = int(self.max_seconds * int(sample["rate"]))
        with open_sound(data if "file" in sample else os.fsdecode(data)) as file:
            if generator is None:
                return {"input_values": self.wave(*decode_audio(file))}
            for _ in range(10):
                start = int(torch.randint(int(sample["length"]) - kept + 1, (), generator=generator))
                wave, rate = decode_audio(file, start, kept)
                if wave.any():
                    break
        return {"input_values": self.wave(wave, rate)}

    def wave(self, wave: Tensor, rate: int) -> Tensor:
        """Mix down, resample and scale."""
        try:
            from torchaudio.functional import resample
        except ImportError as error:
            raise ImportError('speech needs torchaudio and soundfile: pip install "mmssl[speech]"') from error
        if not wave.isfinite().all():
            raise ValueError("found NaN or infinite samples; expected finite values")
        if wave.dim() == 2:
            wave = wave.mean(dim=0)
        if rate != self.sampling_rate:
            wave = resample(wave, rate, self.sampling_rate)
        if len(wave) < self.win_length:
            raise ValueError(
                f"found a clip of {len(wave)} samples at {self.sampling_rate} Hz; expected at least one window, "
                f"{self.win_length} samples"
            )
        rms = wave.square().mean().sqrt()
        if rms == 0:
            raise ValueError("found silence (every sample is zero); expected sound")
        if self.rms_level is not None:
            wave = wave * (10 ** (self.rms_level / 20) / (rms + 1e-10))
        return wave

    def from_array(self, sample: Any) -> tuple[Tensor, int]:
        rate = self.sampling_rate
        if isinstance(sample, dict):
            sample, rate = sample["array"], int(sample["sampling_rate"])
        wave = torch.from_numpy(number_array(sample))
        if not wave.is_floating_point():
            if wave.dtype not in (torch.int16, torch.int32):
                raise ValueError(f"found an array of {wave.dtype}; expected int16, int32 or floats from -1 to 1")
            wave = wave.float() / (torch.iinfo(wave.dtype).max + 1)
        if wave.dim() not in (1, 2):
            raise ValueError(f"found an array of shape {tuple(wave.shape)}; expected (samples,) or (channels, samples)")
        return wave.float(), rate

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        waves = [sample["input_values"] for sample in samples]
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = nn.utils.rnn.pad_sequence(waves, batch_first=True)
        return {"input_values": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}

    def limited(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Waves and their attention mask (B, samples), in training cut after ``max_seconds``."""
        limit = int(self.max_seconds * self.sampling_rate) if self.training else None
        return batch["input_values"][..., :limit], batch["attention_mask"][..., :limit]

    def log_mel(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-mel frames (B, N, F) and their validity (B, N): ``1 + length // hop_length`` frames a clip.

        Each clip is reflected at its own two ends, so its frames do not depend on the rest of the batch.
        """
        from torchaudio.functional import spectrogram

        waves, attention = self.limited(batch)
        if waves.dim() != 2 or waves.shape != attention.shape:
            raise ValueError(
                f"input_values: found shape {tuple(waves.shape)} and an attention_mask of {tuple(attention.shape)}; "
                "expected (batch, samples) for both"
            )
        waves = waves.float()
        length = attention.sum(dim=1)
        half = self.n_fft // 2
        index = torch.arange(-half, waves.shape[1] + half, device=waves.device).abs()
        last = length[:, None] - 1
        index = torch.where(index > last, 2 * last - index, index).clamp(min=0)
        window, filters = filterbank(self.sampling_rate, self.num_mels, self.n_fft, self.win_length, waves.device)
        with torch.autocast(waves.device.type, enabled=False):
            power = spectrogram(
                waves.gather(1, index),
                0,
                window,
                self.n_fft,
                self.hop_length,
                self.win_length,
                2.0,
                False,
                center=False,
            )
            mel = ((power.transpose(1, 2) @ filters) + 1e-10).log()
        valid = torch.arange(mel.shape[1], device=mel.device) < (1 + length // self.hop_length)[:, None]
        return mel, valid

    def tokenize(self, batch: Batch) -> Tokens:
        """(B, samples) to contents (B, N, F): log-mel frames, normalised by mean and unbiased standard deviation."""
        mel, valid = self.log_mel(batch)
        keep, count = valid[..., None].float(), valid.sum(dim=1)[:, None, None]
        centred = (mel - (mel * keep).sum(dim=1, keepdim=True) / count) * keep
        std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        # A channel that never changes is zero; dividing by 1e-10 would blow its rounding errors up.
        content = torch.where(std > 1e-4, centred / (std + 1e-10), 0.0)
        time = torch.arange(mel.shape[1], device=mel.device, dtype=torch.float32)[None, :, None]
        return Tokens(content=content, coords=time.expand(len(mel), -1, -1), valid=valid)

    def embed(self, tokens: Tokens) -> Tensor:
        return self.projection(tokens.content.to(self.projection.weight.dtype))

    def positions(self, width: int) -> nn.Module:
        return SinCosPositions(width, axes=1)

    def raw_features(self, batch: Batch) -> Tensor:
        """Mean and standard deviation over time of each log-mel channel, (B, 2 F)."""
        mel, valid = self.log_mel(batch)
        keep, count = valid[..., None].float(), valid.sum(dim=1, keepdim=True)
        mean = (mel * keep).sum(dim=1) / count
        std = (((mel - mean[:, None]) * keep).square().sum(dim=1) / count).sqrt()
        return torch.cat([mean, std], dim=1)

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        if style == "random":
            return super().hiding_order(tokens, generator, style)
        return block_order(tokens, [self.time_width], generator)

    @property
    def num_places(self) -> int:
        return PLACES

    def places(self, tokens: Tokens) -> Tensor:
        return bin_of(tokens.coords[..., 0], tokens.valid.sum(dim=1, keepdim=True), PLACES)

    @property
    def pretexts(self) -> dict[str, int]:
        return {"order": len(ORDERS), "reverse": 2}

    def transform(self, batch: Batch, pretext: str, number: Tensor) -> Batch:
        """Of what training reads of each clip, put three segments in one of six orders, or play it backwards.

        Segments fade in and out, in any order: clicks where they are joined would tell that they are not in the first.
        """
        waves, attention = self.limited(batch)
        length, steps = attention.sum(dim=1), waves.shape[1]
        if pretext == "reverse":
            waves = waves.gather(1, reversed_rows(length, steps, number == 1))
        elif pretext == "order":
            index, to_end = segment_orders(length, steps, number)
            waves = waves.gather(1, index) * ((to_end + 0.5) * 2 / self.win_length).clamp(max=1)
        else:
            return super().transform(batch, pretext, number)
        return {**batch, "input_values": waves, "attention_mask": attention}

    def alter(self, tokens: Tokens, generator: torch.Generator) -> tuple[Tokens, Tensor]:
        """TERA's alterations of time, frequency and magnitude; returns the altered elements (B, N, F).

        Time: ``round(frames * time_ratio / time_width)`` blocks of ``time_width`` frames, begun at different frames but
        free to overlap. One die for each utterance: all its blocks are set to zero (80%), replaced by as many other
        segments of the same utterance (10%), or left as they are (10%); they count as altered in all three cases.
        Frequency: one block of 0 to ``frequency_ratio * num_mels`` channels set to zero in all frames.
        Magnitude: noise on the whole batch, with ``noise_probability``; alone, all elements count as altered.
        """
        content, valid = tokens.content, tokens.valid
        (batch, _, channels), device = content.shape, content.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        altered = torch.zeros_like(content, dtype=torch.bool)
        result = content
        if self.time_ratio:
            where, source = self.time_blocks(valid, uniform)
            die = uniform(batch, 1, 1)
            filling = torch.where(die < 0.8, 0.0, torch.where(die < 0.9, gather(content, source), content))
            result = torch.where(where[..., None], filling, result)
            altered = altered | where[..., None]
        if self.frequency_ratio:
            width = (uniform(batch) * (int(self.frequency_ratio * channels) + 1)).floor()
            start = (uniform(batch) * (channels - width + 1)).floor()
            channel = torch.arange(channels, device=device)
            band = ((channel >= start[:, None]) & (channel < (start + width)[:, None]))[:, None] & valid[..., None]
            result = result.masked_fill(band, 0.0)
            altered = altered | band
        noise = torch.randn(content.shape, generator=generator, device=device) * self.noise_std
        noisy = (uniform() < self.noise_probability) & valid[..., None]
        result = result + noise * noisy
        if not self.time_ratio and not self.frequency_ratio:
            altered = valid[..., None].expand_as(content)
        return replace(tokens, content=result), altered

    def time_blocks(self, valid: Tensor, uniform) -> tuple[Tensor, Tensor]:
        """Frames inside blocks (B, N), and for each frame the one that would replace it (B, N)."""
        (batch, frames), width, device = valid.shape, self.time_width, valid.device
        length = valid.sum(dim=1, keepdim=True)
        count = (length.double() * self.time_ratio / width).round().long()
        first_of = torch.arange(frames, device=device)
        allowed = first_of <= (length - width).clamp(min=0)
        most = max(1, round(frames * self.time_ratio / width))

        def starts() -> Tensor:  # (B, most), different from each other inside a row
            return uniform(batch, frames).masked_fill(~allowed, -1.0).topk(min(most, frames), dim=1).indices

        start, other = starts(), starts()
        number = torch.arange(start.shape[1], device=device)
        used = (number < count) & allowed.gather(1, start)
        step = torch.arange(width, device=device)
        place = (start[..., None] + step).clamp(max=frames - 1)
        inside = used[..., None] & (start[..., None] + step < length[..., None])
        # Which block a frame belongs to: the last one, where blocks overlap. amax makes it the same at every run.
        owner = torch.full((batch, frames), -1, device=device).scatter_reduce(
            1, place.flatten(1), torch.where(inside, number[:, None], -1).flatten(1), reduce="amax"
        )
        where, owner = owner >= 0, owner.clamp(min=0)
        source = other.gather(1, owner) + first_of - start.gather(1, owner)
        return where, source.minimum(length - 1).clamp(min=0)

    def picture(self, tokens: Tokens) -> Tensor:
        """Spectrograms in grey, time to the right, low frequencies below; black and white are 3 deviations away."""
        shades = (tokens.content.float() / 6 + 0.5).clamp(0, 1).masked_fill(~tokens.valid[..., None], torch.nan)
        return shades.transpose(1, 2).flip(1)[..., None].expand(-1, -1, -1, 3)

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """Spectrograms in deviations from the mean of each mel channel of the clip; its loudness is not in tokens."""
        from transformers.audio_utils import hertz_to_mel, mel_to_hertz

        # A filter is a triangle from the middle of the one below to the middle of the one above.
        corners = np.linspace(0.0, hertz_to_mel(self.sampling_rate / 2, "htk"), self.num_mels + 2)
        frequencies = np.asarray(mel_to_hertz(corners[1:-1], "htk"))
        hop = self.hop_length / self.sampling_rate
        return [
            Spectrogram(content[valid].T.float().numpy(force=True), hop, frequencies)
            for content, valid in zip(tokens.content, tokens.valid, strict=True)
        ]

    def sounds(self, batch: Batch) -> list[tuple[np.ndarray, int]]:
        """Waveforms as they are read; one that goes beyond -1 or 1, as ``rms_level`` may make it, is made quieter."""
        waves = [
            wave[attention.bool()].float().numpy(force=True)
            for wave, attention in zip(batch["input_values"], batch["attention_mask"], strict=True)
        ]
        return [(wave / max(1.0, np.abs(wave).max()), self.sampling_rate) for wave in waves]

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """Crop, change the speed and the loudness, and add noise, on the whole batch at once."""
        waves, attention = batch["input_values"], batch["attention_mask"]
        count, device = len(waves), waves.device

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator, device=device)

        length = attention.sum(dim=1)
        limit = int(self.max_seconds * self.sampling_rate)
        kept = (length * uniform(*self.crop_scale)).long().clamp(max=limit).maximum(length.clamp(max=self.win_length))
        start = (uniform(0, 1) * (length - kept + 1)).long()
        speed, gain = uniform(1 - self.speed, 1 + self.speed), uniform(-self.gain, self.gain)
        parameters = {"start": start, "kept": kept, "speed": speed, "gain": gain}
        new_length = (kept / speed).long().clamp(min=self.win_length)
        time = torch.arange(int(new_length.max()), device=device)
        inside = time < new_length[:, None]
        place = (time * speed[:, None]).minimum((kept - 1)[:, None])  # within the crop: float32 is exact enough there
        below = place.long()
        above = (below + 1).minimum((kept - 1)[:, None])
        low, high = waves.gather(1, start[:, None] + below), waves.gather(1, start[:, None] + above)
        waves = torch.lerp(low, high, place - below)
        waves = waves * 10 ** (gain[:, None] / 20) * inside
        if self.view_noise is not None:
            ratio = uniform(*self.view_noise)
            rms = (waves.square().sum(dim=1) / new_length).sqrt()
            noise = torch.randn(waves.shape, generator=generator, device=device)
            waves = waves + noise * (rms * 10 ** (-ratio / 20))[:, None] * inside
            parameters["signal_to_noise"] = ratio
        return View({**batch, "input_values": waves, "attention_mask": inside.long()}, parameters)


@contextmanager
def open_sound(data: bytes | str | Path) -> Iterator[Any]:
    """A wav, flac, ogg, mp3 or other file, open, through libsndfile.

    Raises:
        ValueError: not a sound file, or one that ends before its header says.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError('speech needs torchaudio and soundfile: pip install "mmssl[speech]"') from error

    # libsndfile reads what is left of a cut wav without a word. 0xFFFFFFFF: written by a stream, length unknown.
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as stream:
        head, size = stream.read(8), stream.seek(0, io.SEEK_END)
        stream.seek(0)
        announced = int.from_bytes(head[4:], "little") if head[:4] == b"RIFF" else 0
        if announced != 0xFFFFFFFF and announced + 8 > max(size, 8):
            raise ValueError(f"truncated: the header announces {announced + 8} bytes, found {size}")
        try:
            with soundfile.SoundFile(stream) as file:
                yield file
        except soundfile.LibsndfileError as error:
            raise ValueError(f"not a readable sound file ({error}); expected wav, flac, ogg or mp3") from error


def decode_audio(file: Any, start: int = 0, count: int | None = None) -> tuple[Tensor, int]:
    """(channels, samples) of an open sound file from a sample on, and their rate.

    Raises:
        ValueError: no samples, or fewer than the header says.
    """
    expected = file.frames if count is None else count
    file.seek(start)
    wave = file.read(expected, dtype="float32", always_2d=True)
    if len(wave) < expected:
        raise ValueError(f"truncated: the header announces {expected} samples, found {len(wave)}")
    if len(wave) == 0:
        raise ValueError("found no samples; expected sound")
    return torch.from_numpy(wave.T), file.samplerate


@lru_cache(maxsize=8)
def filterbank(
    sampling_rate: int, num_mels: int, n_fft: int, win_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Hann window (win_length,) and mel filters (n_fft // 2 + 1, num_mels); not part of any checkpoint."""
    from torchaudio.functional import melscale_fbanks

    window = torch.hann_window(win_length)
    filters = melscale_fbanks(n_fft // 2 + 1, 0.0, sampling_rate / 2, num_mels, sampling_rate, mel_scale="htk")
    return window.to(device), filters.to(device)
