"""Speech: sound files to log-mel frames, TERA's alterations of them, and views of waveforms."""

import io
from collections.abc import Callable
from math import comb, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchaudio", reason="torchaudio is not installed")
pytest.importorskip("soundfile", reason="soundfile is not installed")

import soundfile
from torchaudio.functional import resample
from torchaudio.transforms import MelSpectrogram

from mmssl.modalities.base import Batch
from mmssl.modalities.speech import Speech
from mmssl.tokens import Tokens

RATE = 16_000
LEVEL = 10 ** (-25 / 20)
# Lengths around one window and around whole hops, where an off-by-one in reflection or frame count shows.
LENGTHS = [400, 401, 479, 480, 481, 7999, 16_000]


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(samples, generator=keyed(seed))


def chord(samples: int = 8000, rate: int = RATE) -> np.ndarray:
    """A sound that lossy codecs keep."""
    time = np.arange(samples) / rate
    return (0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)


def encoded(wave: np.ndarray, container: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=container, subtype=subtype)
    return file.getvalue()


def batch_of(lengths: list[int], padding: float = 0.0, speech: Speech | None = None) -> Batch:
    """Clips of noise; what lies behind their ends is ``padding``."""
    batch = (speech or Speech()).collate([{"input_values": noise(n, seed)} for seed, n in enumerate(lengths)])
    batch["input_values"] = batch["input_values"].masked_fill(batch["attention_mask"] == 0, padding)
    return batch


# ---- Features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_rate": RATE, "n_fft": 400, "win_length": 400, "hop_length": 160, "num_mels": 80},
        {"sampling_rate": 8000, "n_fft": 512, "win_length": 200, "hop_length": 100, "num_mels": 40},
    ],
    ids=["tera", "other"],
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "padded"])
def test_log_mel_equals_torchaudio(options: dict[str, Any], together: bool) -> None:
    """Each clip is reflected at its own end, so in a padded batch too it has the frames it has alone."""
    speech = Speech(**options)
    names = {"num_mels": "n_mels", "sampling_rate": "sample_rate"}
    reference = MelSpectrogram(
        **{names.get(name, name): value for name, value in options.items()},
        power=2.0,
        center=True,
        pad_mode="reflect",
        mel_scale="htk",
        norm=None,
    )
    whole = speech.log_mel(batch_of(LENGTHS, padding=1e3))
    for seed, length in enumerate(LENGTHS):
        mel, valid = (part[seed] for part in whole) if together else (p[0] for p in speech.log_mel(waves(length, seed)))
        expected = (reference(noise(length, seed)) + 1e-10).log().T
        assert valid.tolist() == [frame < 1 + length // options["hop_length"] for frame in range(len(valid))]
        torch.testing.assert_close(mel[valid], expected, rtol=1e-5, atol=1e-5)


def waves(length: int, seed: int) -> Batch:
    return {"input_values": noise(length, seed)[None], "attention_mask": torch.ones(1, length, dtype=torch.long)}


def test_frames_are_normalised_over_valid_frames_alone() -> None:
    """Every channel has mean 0 and unbiased standard deviation 1 over the frames of its own clip; padding is zero."""
    speech, batch = Speech(), batch_of(LENGTHS)
    tokens = speech.tokenize(batch)
    mel = speech.log_mel(batch)[0].double().numpy()
    assert tokens.coords[..., 0].tolist() == [list(range(101))] * len(LENGTHS)
    for row, length in enumerate(LENGTHS):
        frames = 1 + length // 160
        expected = (mel[row, :frames] - mel[row, :frames].mean(0)) / (mel[row, :frames].std(0, ddof=1) + 1e-10)
        np.testing.assert_allclose(tokens.content[row, :frames], expected, atol=1e-4)
        assert tokens.valid[row].sum() == frames
        assert not tokens.content[row, frames:].any()


def test_padding_never_matters() -> None:
    """Not even if it is loud or not a number, bit by bit."""
    speech = Speech()
    quiet = speech.tokenize(batch_of(LENGTHS))
    features = speech.raw_features(batch_of(LENGTHS))
    for padding in (1e6, torch.nan):
        other = batch_of(LENGTHS, padding)
        assert torch.equal(speech.tokenize(other).content, quiet.content)
        assert torch.equal(speech.raw_features(other), features)


@pytest.mark.parametrize("hops", [26, 100, 301])
def test_channels_that_never_change_are_zero(hops: int) -> None:
    """A sound of the period of a hop that is its own mirror image has the same frames throughout, its ends included."""
    half = noise(81)
    wave = torch.cat([half, half[1:-1].flip(0)]).repeat(hops + 1)[: 160 * hops + 1]
    speech = Speech()
    batch = speech.collate([{"input_values": wave}, {"input_values": noise(50_000)}])
    assert speech.log_mel(batch)[0][0, : hops + 1].std(dim=0).max() < 1e-4
    content = speech.tokenize(batch).content
    assert not content[0].any() and content[1].any()


def test_channels_that_hardly_change_stay_bounded() -> None:
    """n numbers less their mean over their unbiased deviation lie within (n - 1) / sqrt(n); equal ones become zero."""
    speech = Speech(rms_level=None)
    tone = torch.from_numpy(chord())
    half = torch.where(torch.arange(8000) < 4000, tone, 0.0)
    below_floor = 1e-9 * noise(8000)  # power far below the 1e-10 inside the logarithm
    content = speech.tokenize(speech.collate([{"input_values": wave} for wave in (tone, half, below_floor)])).content
    assert content.isfinite().all()
    assert content.abs().max() <= 50 / sqrt(51) + 1e-3
    assert not content[2].any()
    assert content[:2].flatten(1).any(dim=1).all()
    one_frame = speech.tokenize({name: value[:, :100] for name, value in waves(400, 0).items()})
    assert one_frame.content.shape[1] == 1 and not one_frame.content.any()


@pytest.mark.parametrize("level", [-25.0, -10.0, None])
def test_level(level: float | None) -> None:
    wave = noise(5000).numpy()
    out = Speech(rms_level=level).prepare(wave)["input_values"]
    rms = np.sqrt(np.mean(wave.astype(np.float64) ** 2))
    scale = 1.0 if level is None else 10 ** (level / 20) / (rms + 1e-10)
    np.testing.assert_allclose(out, wave * scale, rtol=1e-5)
    if level == -25.0:
        assert out.square().mean().sqrt() == pytest.approx(0.0562341, rel=1e-5)


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "FLOAT", 0.0),
        ("WAV", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.02),
        ("MP3", "MPEG_LAYER_III", 0.02),
    ],
)
def test_sound_files(container: str, subtype: str, tolerance: float) -> None:
    if container not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {container}")
    speech = Speech()
    expected = speech.prepare(chord())["input_values"]
    out = speech.prepare(encoded(chord(), container, subtype))["input_values"]
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


def test_ways_to_hand_a_sample_over(tmp_path: Path) -> None:
    speech, wave = Speech(), chord()
    path = tmp_path / "sound.wav"
    path.write_bytes(data := encoded(wave, subtype="FLOAT"))
    expected = torch.from_numpy(wave) * (LEVEL / (np.sqrt(np.mean(wave.astype(np.float64) ** 2)) + 1e-10))
    ways: list[Any] = [
        str(path),
        path,
        data,
        {"bytes": data, "path": None},
        {"bytes": data, "path": "elsewhere.wav"},
        {"bytes": None, "path": str(path)},
        {"array": wave, "sampling_rate": RATE},
        {"array": wave, "sampling_rate": RATE, "path": "elsewhere.wav"},
        wave,
        wave.astype(np.float64),
        wave.tolist(),
        torch.from_numpy(wave),
    ]
    for way in ways:
        out = speech.prepare(way)["input_values"]
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected.float(), rtol=1e-6, atol=1e-7)
    integers = np.round(wave * 32767).astype(np.int16)
    torch.testing.assert_close(speech.prepare(integers)["input_values"], expected.float(), rtol=0, atol=1e-5)
    assert Speech(rms_level=None).prepare(integers)["input_values"].abs().max() == pytest.approx(wave.max(), rel=1e-3)


@pytest.mark.parametrize("as_file", [False, True], ids=["array", "file"])
def test_stereo_is_mixed_down(as_file: bool) -> None:
    left, right = chord(), noise(8000).numpy()
    sample = encoded(np.stack([left, right], axis=1), subtype="FLOAT") if as_file else np.stack([left, right])
    out = Speech(rms_level=None).prepare(sample)["input_values"]
    np.testing.assert_allclose(out, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("as_file", [False, True], ids=["array", "file"])
@pytest.mark.parametrize("rate", [8000, 22_050, 48_000])
def test_resampling(rate: int, as_file: bool) -> None:
    """Equal to torchaudio's, and a chord of another rate becomes the chord of ours, away from the two ends."""
    wave = chord(rate // 2, rate)
    sample = encoded(wave, subtype="FLOAT", rate=rate) if as_file else {"array": wave, "sampling_rate": rate}
    out = Speech(rms_level=None).prepare(sample)["input_values"]
    assert torch.equal(out, resample(torch.from_numpy(wave), rate, RATE))
    np.testing.assert_allclose(out[200:7800], chord()[200:7800], atol=0.01)


def test_clips_are_cut_after_max_seconds() -> None:
    speech, batch = Speech(max_seconds=0.5), batch_of([16_000, 4000])
    short = {name: value[:, :8000] for name, value in batch.items()}
    cut, expected = speech.tokenize(batch), Speech().tokenize(short)
    assert cut.valid.sum(dim=1).tolist() == [51, 26]
    assert torch.equal(cut.content, expected.content) and torch.equal(cut.valid, expected.valid)


@pytest.mark.parametrize("as_path", [False, True], ids=["bytes", "path"])
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
@pytest.mark.parametrize("channels", [1, 2])
def test_of_a_long_file_training_reads_parts_at_random(
    tmp_path: Path, container: str, channels: int, as_path: bool
) -> None:
    """A ramp, whose values say where they are from; without a generator, all of it."""
    ramp = (np.arange(20_000) / 32_768).astype(np.float32)
    data = encoded(np.stack([ramp] * channels, axis=1), container, "PCM_16")
    (tmp_path / "ramp").write_bytes(data)
    speech = Speech(max_seconds=0.5, rms_level=None)
    sample = speech.prepare(tmp_path / "ramp" if as_path else data)
    starts = []
    for seed in range(30):
        part = speech.excerpt(sample, keyed(seed))["input_values"]
        start = int(part[0] * 32_768)
        assert torch.equal(part, torch.from_numpy(ramp[start : start + 8000]))
        starts.append(start)
    assert min(starts) < 3000 and max(starts) > 9000 and len(set(starts)) > 20
    assert torch.equal(speech.excerpt(sample, None)["input_values"], torch.from_numpy(ramp))


def test_of_a_long_file_silent_parts_are_passed_by() -> None:
    wave = np.zeros(80_000, np.float32)
    wave[40_000:] = chord(40_000)
    speech = Speech(max_seconds=0.5)
    sample = speech.prepare(encoded(wave, subtype="PCM_16"))
    assert all(speech.excerpt(sample, keyed(seed))["input_values"].any() for seed in range(20))
    silent = speech.prepare(encoded(np.zeros(80_000, np.float32)))
    with pytest.raises(ValueError, match="silence"):
        speech.excerpt(silent, keyed(0))


def cut_file(container: str) -> bytes:
    data = encoded(chord(), container, "PCM_16")
    return data[: len(data) // 2]


MALFORMED: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (lambda: b"this is no sound\n" * 9, "not a readable sound file.*expected wav, flac"),
    "empty file": (lambda: b"", "not a readable sound file"),
    "truncated wav": (lambda: cut_file("WAV"), "truncated.*announces 16044 bytes, found 8022"),
    "truncated flac": (lambda: cut_file("FLAC"), "not a readable sound file"),
    "no samples": (lambda: encoded(np.zeros(0, np.float32)), "found no samples"),
    "NaN": (lambda: np.where(np.arange(8000) == 77, np.nan, chord()), "NaN or infinite"),
    "infinite": (lambda: np.where(np.arange(8000) == 77, np.inf, chord()), "NaN or infinite"),
    "NaN in a file": (lambda: encoded(np.full(8000, np.nan, np.float32), subtype="FLOAT"), "NaN or infinite"),
    "silence": (lambda: np.zeros(8000, np.float32), "silence"),
    "silent file": (lambda: encoded(np.zeros(8000, np.float32)), "silence"),
    "one sample": (lambda: np.ones(1, np.float32), "clip of 1 samples.*expected at least one window, 400"),
    "no sample": (lambda: np.ones(0, np.float32), "clip of 0 samples"),
    "one less than a window": (lambda: chord(399), "clip of 399 samples"),
    "short at another rate": (lambda: {"array": chord(700), "sampling_rate": 48_000}, "clip of 234 samples"),
    "three axes": (lambda: np.ones((2, 2, 800), np.float32), r"shape \(2, 2, 800\).*\(channels, samples\)"),
    "null": (lambda: None, "expected"),
    "empty record": (lambda: {"bytes": None, "path": None}, "expected"),
    "another record": (lambda: {"text": "words"}, "expected"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_samples(case: str) -> None:
    make, message = MALFORMED[case]
    with pytest.raises(ValueError, match=message):
        Speech().prepare(make())


def test_malformed_file_by_path(tmp_path: Path) -> None:
    (tmp_path / "words.wav").write_text("this is no sound")
    with pytest.raises(ValueError, match="not a readable sound file"):
        Speech().prepare(tmp_path / "words.wav")


def test_wav_of_unknown_length_is_read() -> None:
    """A stream's header says 0xFFFFFFFF."""
    data = bytearray(encoded(chord(), subtype="PCM_16"))
    data[4:8] = b"\xff" * 4
    assert len(Speech().prepare(bytes(data))["input_values"]) == 8000


@pytest.mark.parametrize(("values", "mask"), [((2, 1, 800), (2, 800)), ((2, 800), (2, 799)), ((800,), (800,))])
def test_malformed_batches(values: tuple[int, ...], mask: tuple[int, ...]) -> None:
    batch = {"input_values": torch.zeros(values), "attention_mask": torch.ones(mask, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"input_values: found shape.*expected"):
        Speech().tokenize(batch)


# ---- TERA's alterations ---------------------------------------------------------------------------------------------


def altering(**options: float) -> Speech:
    """Only the alterations that are named."""
    return Speech(**{"time_ratio": 0.0, "frequency_ratio": 0.0, "noise_probability": 0.0, **options})  # type: ignore[arg-type]


def frames_of(lengths: list[int], channels: int = 1) -> Tokens:
    """Contents that tell utterance, frame and channel: 1 + channel + 128 * (frame + 2048 * utterance)."""
    count, frames = len(lengths), max(lengths)
    row, frame, channel = torch.meshgrid(*map(torch.arange, (count, frames, channels)), indexing="ij")
    content = (1 + channel + 128 * (frame + 2048 * row)).double()
    valid = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return Tokens(content, coords=torch.arange(frames).float()[None, :, None].expand(count, -1, -1), valid=valid)


def within(count: float, trials: int, probability: float, sigmas: float = 5.0) -> bool:
    """Whether a binomial count is as near to its mean as chance allows."""
    return abs(count - trials * probability) <= sigmas * sqrt(trials * probability * (1 - probability)) + 1e-9


def runs(flags: Tensor) -> list[tuple[int, int]]:
    """Beginning and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.int().numpy(), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def covered(frames: int, last_start: int, ratio: float, width: int) -> np.ndarray:
    """Closed form: probability of each frame to lie in one of round(frames * ratio / width) blocks whose begins are
    drawn from 0..last_start without replacement."""
    count, starts = round(frames * ratio / width), last_start + 1
    through = [sum(start <= frame < start + width for start in range(starts)) for frame in range(frames)]
    return np.array([1 - comb(starts - n, count) / comb(starts, count) for n in through])


@pytest.mark.parametrize(("frames", "official"), [(1500, 0.1403), (400, 0.1482), (100, 0.1356)])
def test_closed_form_gives_the_official_fractions(frames: int, official: float) -> None:
    """s3prl's function never begins a block at the last possible frame; otherwise its rule is ours."""
    assert covered(frames, frames - 8, 0.15, 7).mean() == pytest.approx(official, abs=5e-5)


@pytest.mark.parametrize(("ratio", "width"), [(0.15, 7), (0.9, 7), (0.5, 3)])
def test_time_alterations_follow_the_rule(ratio: float, width: int) -> None:
    """Each frame of a padded batch, the last one too, is altered as often as blocks with distinct begins reach it."""
    rows, lengths = 1500, [400, 100, 24, 20, 8]
    tokens = frames_of([length for length in lengths for _ in range(rows)])
    _, altered = altering(time_ratio=ratio, time_width=width).alter(tokens, keyed(0))
    assert not altered[~tokens.valid].any()
    for number, length in enumerate(lengths):
        flags = altered[number * rows : (number + 1) * rows, :length, 0].double()
        expected = covered(length, length - width, ratio, width)
        shares = flags.mean(dim=1)
        assert shares.mean() == pytest.approx(expected.mean(), abs=float(5 * shares.std() / sqrt(rows)))
        assert all(
            within(count, rows, chance) for count, chance in zip(flags.sum(dim=0).tolist(), expected, strict=True)
        )
        assert expected[-1] == 0 or flags[:, -1].any()


def test_time_alterations_of_a_long_utterance() -> None:
    """At 1500 frames the fraction is 0.1403, not 0.15: blocks overlap."""
    _, altered = altering(time_ratio=0.15).alter(frames_of([1500] * 300), keyed(0))
    assert altered.double().mean() == pytest.approx(0.1403, abs=0.0015)


def test_altered_runs_are_never_shorter_than_a_block() -> None:
    """And begins differ: K blocks cover at least 7 + K - 1 frames, at most 7 K."""
    lengths = list(range(7, 207)) * 4
    _, altered = altering(time_ratio=0.6).alter(frames_of(lengths), keyed(0))
    for length, flags in zip(lengths, altered[..., 0], strict=True):
        blocks = round(length * 0.6 / 7)
        assert all(end - begin >= 7 and end <= length for begin, end in runs(flags))
        assert (7 + blocks - 1 if blocks else 0) <= flags.sum() <= 7 * blocks


def test_one_die_for_each_utterance() -> None:
    """Zeros (80%), other segments of the same utterance (10%) or nothing (10%), the same in all its blocks."""
    rows = 2000
    tokens = frames_of([100, 150] * (rows // 2))
    result, altered = altering(time_ratio=0.15).alter(tokens, keyed(0))
    fates = {"zero": 0, "replaced": 0, "unchanged": 0}
    kept_blocks = 0
    for clean, seen, flags, length in zip(
        tokens.content, result.content, altered[..., 0], [100, 150] * 1000, strict=True
    ):
        assert torch.equal(seen[~flags], clean[~flags])
        new, old = seen[flags, 0], clean[flags, 0]
        if not new.any():
            fates["zero"] += 1
        elif torch.equal(new, old):
            fates["unchanged"] += 1  # but labelled
        else:
            fates["replaced"] += 1
            assert torch.isin(new, clean[:length, 0]).all()  # nothing of others, of padding, or zero
            for begin, end in runs(flags):
                steps = seen[begin:end, 0].diff() / 128
                assert end - begin > 7 or (steps == 1).all()  # one block: one contiguous segment
                assert (steps != 1).sum() < (length * 0.15 / 7)  # overlapping blocks: pieces of segments
                kept_blocks += torch.equal(seen[begin:end], clean[begin:end])
    assert within(fates["zero"], rows, 0.8) and within(fates["replaced"], rows, 0.1)
    assert within(fates["unchanged"], rows, 0.1)
    assert kept_blocks <= 0.1 * fates["replaced"]  # a segment replaced by itself: about one in a hundred


def test_replacing_segments_come_from_everywhere() -> None:
    """Any segment of the utterance may be the one that replaces, up to its last frame."""
    tokens = frames_of([40] * 2000)
    result, altered = altering(time_ratio=0.15).alter(tokens, keyed(0))
    replaced = (result.content != tokens.content) & (result.content != 0) & altered
    source = ((result.content - 1) / 128).long() % 2048
    assert set(source[replaced].tolist()) == set(range(40))


def test_frequency_alterations_follow_the_rule() -> None:
    """One block of 0..16 of 80 channels, both included, zero in all valid frames of the utterance."""
    rows = 4000
    tokens = frames_of([3, 2] * (rows // 2), channels=80)
    result, altered = altering(frequency_ratio=0.2).alter(tokens, keyed(0))
    assert torch.equal(result.content, tokens.content.masked_fill(altered, 0.0))
    band = altered[:, 0]
    assert torch.equal(altered, band[:, None] & tokens.valid[..., None])
    assert all(len(runs(flags)) <= 1 for flags in band)
    widths = band.sum(dim=1)
    assert all(within(int((widths == width).sum()), rows, 1 / 17) for width in range(17)) and widths.max() == 16
    assert band.double().mean() == pytest.approx(0.1, abs=5 * sqrt(24) / 80 / sqrt(rows))
    for channel in range(80):
        chance = sum(
            sum(start <= channel < start + width for start in range(81 - width)) / (81 - width) for width in range(17)
        )
        assert within(int(band[:, channel].sum()), rows, chance / 17)
    assert band[:, 0].any() and band[:, 79].any()


def test_time_and_frequency_together() -> None:
    """The label is their union, and the band is zero over whatever the blocks have put there."""
    tokens = frames_of([100, 60] * 200, channels=20)
    result, altered = altering(time_ratio=0.15, frequency_ratio=0.2).alter(tokens, keyed(0))
    frames, band = altered.all(dim=2), (altered | ~tokens.valid[..., None]).all(dim=1)
    assert torch.equal(altered, (frames[..., None] | band[:, None]) & tokens.valid[..., None])
    in_band = band[:, None] & tokens.valid[..., None]
    assert in_band.any() and not result.content[in_band].any()
    assert torch.equal(result.content[~altered], tokens.content[~altered])


def test_magnitude_is_altered_by_batch() -> None:
    """One die for the whole batch; what is added has the standard deviation 0.2; all valid elements are labelled."""
    tokens, speech = frames_of([5, 3, 4], channels=80), altering(noise_probability=0.15)
    noisy = 0
    for seed in range(600):
        result, altered = speech.alter(tokens, keyed(seed))
        changed = result.content != tokens.content
        assert changed[tokens.valid].all() or not changed.any()
        assert not changed[~tokens.valid].any()
        assert torch.equal(altered, tokens.valid[..., None].expand(-1, -1, 80))
        noisy += int(changed.any())
    assert within(noisy, 600, 0.15)


def test_size_of_the_noise() -> None:
    tokens = frames_of([400] * 4, channels=80)
    tokens.content.zero_()
    result, _ = altering(noise_probability=1.0).alter(tokens, keyed(0))
    added = result.content.flatten()
    assert added.std() == pytest.approx(0.2, rel=0.01) and abs(added.mean()) < 5 * 0.2 / sqrt(len(added))
    assert (added.abs() > 0.4).double().mean() == pytest.approx(0.0455, abs=0.003)  # normal: beyond two deviations


def test_noise_goes_over_the_blocks_and_stays_out_of_the_label() -> None:
    tokens = frames_of([200, 100], channels=80)
    tokens.content.zero_()
    result, altered = altering(time_ratio=0.15, noise_probability=1.0).alter(tokens, keyed(0))
    assert result.content[tokens.valid].all() and not result.content[~tokens.valid].any()
    assert within(int(altered[..., 0].sum()), 300, 0.15, sigmas=7)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 23, 24])
def test_short_utterances(length: int) -> None:
    """Below 24 frames round(frames * 0.15 / 7) is 0, so no frame is altered; nothing crashes, alone or in a batch."""
    speech = altering(time_ratio=0.15)
    for lengths in ([length], [length, 300]):
        tokens = frames_of(lengths)
        _, altered = speech.alter(tokens, keyed(0))
        assert altered[0].sum() == (7 if length == 24 else 0)
    everything = altering(time_ratio=1.0, frequency_ratio=0.2, noise_probability=1.0)
    for lengths in ([length], [length, 300]):
        tokens = frames_of(lengths, channels=80)
        result, altered = everything.alter(tokens, keyed(0))
        assert result.content.isfinite().all() and not altered[~tokens.valid].any()
        assert torch.equal(result.content[~tokens.valid], tokens.content[~tokens.valid])


ALL_KINDS: list[dict[str, float]] = [
    {"time_ratio": 0.15},
    {"frequency_ratio": 0.2},
    {"noise_probability": 1.0},
    {"time_ratio": 0.15, "frequency_ratio": 0.2, "noise_probability": 1.0},
    {},
]


@pytest.mark.parametrize("options", ALL_KINDS, ids=["time", "frequency", "magnitude", "all", "none"])
def test_the_clean_tokens_stay_as_they_are(options: dict[str, float]) -> None:
    """The target is read from them: bit by bit the same, and the altered ones share no memory with them."""
    tokens, speech = frames_of([60, 30, 80], channels=80), altering(**options)
    content, valid, target = tokens.content.clone(), tokens.valid.clone(), speech.target(tokens)
    for seed in range(12):
        result, altered = speech.alter(tokens, keyed(seed))
        assert torch.equal(result.content[~tokens.valid], content[~valid]) and not altered[~valid].any()
        assert torch.equal(result.valid, valid) and torch.equal(result.coords, tokens.coords)
        result.content.zero_()
        assert (
            torch.equal(tokens.content, content) and torch.equal(tokens.valid, valid) and torch.equal(target, content)
        )


@pytest.mark.parametrize("act", ["alter", "view"])
def test_randomness_is_keyed(act: str) -> None:
    """The same generator gives the same bits whatever the global one does, which is left alone."""
    speech = Speech(noise_probability=1.0, crop_scale=(0.5, 0.9), gain=6.0, speed=0.1, view_noise=(5.0, 20.0))

    def result(key: int, global_seed: int) -> list[Tensor]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        if act == "alter":
            tokens, altered = speech.alter(speech.tokenize(batch_of(LENGTHS)), keyed(key))
            out = [tokens.content, altered]
        else:
            view = speech.view(batch_of(LENGTHS), keyed(key))
            out = [*view.batch.values(), *view.parameters.values()]
        assert torch.equal(torch.get_rng_state(), state)
        return out

    first, again, other = result(1, 2), result(1, 3), result(4, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


# ---- Views ----------------------------------------------------------------------------------------------------------


def test_a_crop_is_a_contiguous_segment() -> None:
    speech, batch = Speech(crop_scale=(0.3, 0.8)), batch_of([16_000, 9001, 2000] * 20)
    view = speech.view(batch, keyed(0))
    lengths, starts, kept = batch["attention_mask"].sum(dim=1), view.parameters["start"], view.parameters["kept"]
    share = kept / lengths
    assert share.min() >= 0.3 - 1e-3 and share.max() <= 0.8 and share.std() > 0.1
    assert (starts >= 0).all() and (starts + kept <= lengths).all() and (starts / (lengths - kept)).std() > 0.2
    for row, (start, size) in enumerate(zip(starts.tolist(), kept.tolist(), strict=True)):
        out = view.batch["input_values"][row]
        assert torch.equal(out[:size], batch["input_values"][row, start : start + size])
        assert not out[size:].any()
        assert view.batch["attention_mask"][row].tolist() == [1] * size + [0] * (len(out) - size)


def test_a_view_without_options_is_the_clip() -> None:
    batch = batch_of(LENGTHS)
    view = Speech().view(batch, keyed(0)).batch
    assert all(torch.equal(view[name], batch[name]) for name in batch)


@pytest.mark.parametrize(
    "options",
    [{"speed": 0.1}, {"gain": 6.0}, {"speed": 0.2, "gain": 12.0, "crop_scale": (0.3, 1.0)}],
    ids=["speed", "gain", "all"],
)
def test_recorded_parameters_reproduce_a_view(options: dict[str, Any]) -> None:
    """Linear interpolation in float64 at the recorded speed, in the recorded crop, times 10^(dB / 20)."""
    batch = batch_of(LENGTHS)
    view = Speech(**options).view(batch, keyed(0))
    parameters = {name: value.double().numpy() for name, value in view.parameters.items()}
    for name in ("speed", "gain"):
        limit, middle = options.get(name, 0.0), {"speed": 1.0, "gain": 0.0}[name]
        assert np.all(np.abs(parameters[name] - middle) <= limit + 1e-6)
        assert limit == 0.0 or np.abs(parameters[name] - middle).max() > 0.1 * limit
    for row in range(len(LENGTHS)):
        start, kept, rate, gain = (parameters[name][row] for name in ("start", "kept", "speed", "gain"))
        size = int(view.batch["attention_mask"][row].sum())
        assert size == 400 or abs(size - kept / rate) <= 1
        assert view.batch["attention_mask"][row, :size].all()
        place = start + np.minimum(np.arange(size) * rate, kept - 1)
        wave = batch["input_values"][row].double().numpy()
        expected = np.interp(place, np.arange(len(wave)), wave) * 10 ** (gain / 20)
        out = view.batch["input_values"][row]
        # Single precision tells places of a second of sound to a thousandth of a sample.
        np.testing.assert_allclose(out[:size], expected, atol=2e-3)
        assert not out[size:].any()


def test_speed_in_a_long_clip_is_as_smooth_as_in_a_short_one() -> None:
    """The place inside a crop must not lose its fraction where the crop begins late."""
    tone = torch.sin(torch.arange(2**22).double() * 0.1).float()
    batch = {"input_values": tone[None], "attention_mask": torch.ones(1, len(tone), dtype=torch.long)}
    speech = Speech(max_seconds=0.5, speed=0.2)
    for seed in range(4):
        view = speech.view(batch, keyed(seed))
        start, rate = view.parameters["start"].double(), view.parameters["speed"].double()
        expected = torch.sin((torch.arange(6000) * rate + start) * 0.1)
        torch.testing.assert_close(view.batch["input_values"][0, :6000].double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"crop_scale": (0.01, 0.02)}, {"speed": 0.3}], ids=["plain", "crop", "speed"])
def test_a_view_keeps_at_least_one_window(options: dict[str, Any]) -> None:
    speech = Speech(**options)
    batch = batch_of([400, 450, 8000] * 5)
    for seed in range(5):
        view = speech.view(batch, keyed(seed))
        assert view.batch["attention_mask"].sum(dim=1).min() >= 400
        assert (view.parameters["kept"] >= 400).all()
        assert speech.tokenize(view.batch).content.isfinite().all()


def test_a_view_cuts_long_clips_at_random() -> None:
    batch = batch_of([16_000] * 50)
    view = Speech(max_seconds=0.25).view(batch, keyed(0))
    assert (view.batch["attention_mask"].sum(dim=1) == 4000).all()
    starts = view.parameters["start"].double()
    assert starts.mean() == pytest.approx(6000, abs=5 * 12_000 / sqrt(12 * 50)) and starts.std() > 2000


def test_signal_to_noise_ratio_is_the_recorded_one() -> None:
    """The noise is what a noisy view has beyond the same view without noise; padding stays silent."""
    options: dict[str, Any] = {"crop_scale": (0.5, 1.0), "gain": 6.0, "speed": 0.1}
    batch = batch_of([16_000, 12_000, 9000] * 4)
    clean = Speech(**options).view(batch, keyed(0))
    noisy = Speech(**options, view_noise=(0.0, 20.0)).view(batch, keyed(0))
    assert torch.equal(clean.batch["attention_mask"], noisy.batch["attention_mask"])
    ratios = noisy.parameters["signal_to_noise"]
    assert (ratios >= 0).all() and (ratios <= 20).all() and ratios.std() > 2
    for row, ratio in enumerate(ratios.tolist()):
        inside = clean.batch["attention_mask"][row].bool()
        signal = clean.batch["input_values"][row].double()
        added = noisy.batch["input_values"][row].double() - signal
        assert not added[~inside].any()
        measured = 10 * torch.log10(signal[inside].square().mean() / added[inside].square().mean())
        assert float(measured) == pytest.approx(ratio, abs=0.4)  # five deviations of an estimate from 4,000 samples
