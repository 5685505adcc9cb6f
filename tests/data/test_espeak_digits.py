"""Tests of the synthetic spoken digits; they need eSpeak NG, which is an optional dependency."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")

from mmssl.data import espeak_digits as module
from mmssl.data.espeak_digits import VOICES, WORDS, EspeakDigits, espeak_digits


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives each test an empty cache and returns its folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mmssl"


def assert_same(first: EspeakDigits, second: EspeakDigits) -> None:
    assert [clip.tobytes() for clip in first.waveforms] == [clip.tobytes() for clip in second.waveforms]
    assert first.sampling_rate == second.sampling_rate
    assert np.array_equal(first.digits, second.digits)
    assert first.voices == second.voices


def no_synthesis(*_: object) -> None:
    raise AssertionError("synthesised although cached")


def test_same_bits_with_and_without_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = espeak_digits(repeats=2)
    (file,) = cache.iterdir()  # and no temporary file is left beside it
    with monkeypatch.context() as patch:
        patch.setattr(module, "_synthesise", no_synthesis)
        assert_same(fresh, espeak_digits(repeats=2))
    file.unlink()
    assert_same(fresh, espeak_digits(repeats=2))


def test_content() -> None:
    data = espeak_digits(repeats=2)
    assert len(data.waveforms) == len(data.digits) == len(data.voices) == 2 * 10 * 24
    assert data.sampling_rate >= 16000
    assert set(data.voices) == set(VOICES)
    assert set(Counter(zip(data.digits.tolist(), data.voices, strict=True)).values()) == {2}
    for clip in data.waveforms:
        assert clip.dtype == np.float32 and clip.ndim == 1
        assert 0.1 < len(clip) / data.sampling_rate < 2
        assert np.isfinite(clip).all() and np.abs(clip).max() <= 1
        assert np.sqrt(np.mean(clip**2)) > 0.01
        assert clip[0] != 0 and clip[-1] != 0
        assert np.array_equal(clip * 32768, np.round(clip * 32768))
    assert len({clip.tobytes() for clip in data.waveforms}) == len(data.waveforms)


def test_voices_differ_at_equal_rate_and_pitch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def integers(self, low: int, high: int, size: int) -> np.ndarray:
            return np.full(size, (low + high) // 2)

    monkeypatch.setattr(module.np.random, "default_rng", lambda seed: Constant())
    data = espeak_digits(repeats=1)
    frames = [np.array_split(clip, 8) for clip in data.waveforms]
    # The spectral shape by eighths of the word, in dB: 4 for one voice spoken twice, 8 for the nearest two.
    spectra = [[np.abs(np.fft.rfft(part, 4096)[8:1024]).reshape(-1, 8).mean(1) for part in parts] for parts in frames]
    shape = 20 * np.log10(np.array(spectra) + 1e-3).reshape(len(VOICES), len(WORDS), -1)
    distance = np.sqrt(np.mean((shape[:, None] - shape[None]) ** 2, axis=(2, 3)))
    assert distance[~np.eye(len(VOICES), dtype=bool)].min() > 6


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "other content", "other labels"])
def test_broken_cache_is_made_again(cache: Path, damage: str) -> None:
    fresh = espeak_digits(repeats=1)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    if damage == "other content":
        np.savez(file, samples=np.zeros(3, np.int16))
    elif damage == "other labels":
        with np.load(file) as arrays:
            np.savez(file, **{**arrays, "digits": arrays["digits"][::-1]})
    else:
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
        file.write_bytes({"empty": b"", "truncated": good[:middle], "flipped": flipped}[damage])
    assert_same(fresh, espeak_digits(repeats=1))
    with np.load(file) as arrays:
        assert len(arrays["lengths"]) == len(fresh.waveforms)


def test_unwritable_cache_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot cache"):
        assert len(espeak_digits(repeats=1).waveforms) == 240


def test_missing_loader_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r'pip install "mmssl\[examples\]"'):
        espeak_digits(repeats=1)


def test_missing_variant_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VOICES", ("en+no-such-variant",))
    with pytest.raises(RuntimeError, match="no-such-variant"):
        espeak_digits(repeats=1)
    monkeypatch.setattr(module, "VOICES", ("no-such-accent+m1",))
    with pytest.raises(RuntimeError, match="cannot set voice no-such-accent"):
        espeak_digits(repeats=1)


def test_repeats_must_be_positive() -> None:
    with pytest.raises(ValueError, match="repeats"):
        espeak_digits(repeats=0)
