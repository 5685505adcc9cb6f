"""Spoken English digits synthesised by eSpeak NG: a small labelled set for examples and tests.

This is *synthetic speech*, made on the user's machine by a rule-based formant synthesiser. It holds no recordings and
no human speakers, so an accuracy on it says little about real speech.

Licence note: eSpeak NG is GPL-3.0-or-later. It is not part of this package: it is an optional program library that the
user installs separately (``pip install "mmssl[examples]"`` brings ``espeakng-loader``) and that is loaded at run time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, CFUNCTYPE, POINTER, c_char_p, c_int, c_long, c_short, c_size_t, c_uint, c_void_p, string_at
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Each accent has three timbres (male, female, odd) and no timbre comes twice: a voice left out is new in timbre too.
# Variants of the kind "klatt 6" are avoided: they draw noise from libc's rand(), which is not ours to seed.
_VARIANTS = {
    "en": ("m1", "f1", "croak"),
    "en-us": ("m3", "f2", "Michael"),
    "en-gb-scotland": ("m4", "f3", "klatt3"),
    "en-gb-x-rp": ("m5", "f4", "Denis"),
    "en-029": ("m7", "f5", "Alex"),
    "en-gb-x-gbclan": ("m8", "Annie", "grandpa"),
    "en-gb-x-gbcwmd": ("m6", "belinda", "whisper"),
    "en-us-nyc": ("m2", "linda", "grandma"),
}
VOICES = tuple(f"{accent}+{variant}" for accent, variants in _VARIANTS.items() for variant in variants)

# Values and signatures (result, then arguments) from eSpeak NG's speak_lib.h and espeak_ng.h.
_SYNCHRONOUS, _DONT_EXIT, _POS_CHARACTER, _CHARS_UTF8, _RATE, _PITCH, _RANGE = 2, 0x8000, 1, 1, 1, 3, 4
_Callback = CFUNCTYPE(c_int, POINTER(c_short), c_int, c_void_p)
_SIGNATURES = {
    "espeak_Initialize": (c_int, c_int, c_int, c_char_p, c_int),
    "espeak_SetSynthCallback": (None, _Callback),
    "espeak_SetVoiceByName": (c_int, c_char_p),
    "espeak_SetParameter": (c_int, c_int, c_int, c_int),
    "espeak_ng_SetRandSeed": (c_int, c_long),
    "espeak_Synth": (c_int, c_char_p, c_size_t, c_uint, c_int, c_uint, c_uint, POINTER(c_uint), c_void_p),
    "espeak_Synchronize": (c_int,),
    "espeak_Terminate": (c_int,),
}


@dataclass(frozen=True, eq=False)
class EspeakDigits:
    """Synthetic spoken digits.

    Attributes:
        waveforms: Mono float32 clips in [-1, 1], on the int16 grid, without leading and trailing silence.
        sampling_rate: Samples per second of every clip.
        digits: The digit (0 to 9) spoken in each clip, shape ``(n,)``.
        voices: The eSpeak NG voice of each clip, for splits that leave voices out.
    """

    waveforms: list[np.ndarray]
    sampling_rate: int
    digits: np.ndarray
    voices: list[str]


def espeak_digits(repeats: int = 10) -> EspeakDigits:
    """Returns the ten digit words spoken by 24 eSpeak NG voices, ordered by voice, digit and repeat.

    Rate (120 to 220 words per minute), pitch and pitch range vary from clip to clip. Each call on one machine gives the
    same bits; another build of eSpeak NG may give others. The first call synthesises the set and keeps it in ``mmssl/``
    under ``$XDG_CACHE_HOME`` (else ``~/.cache``), where later calls read it.

    Args:
        repeats: Clips of each digit by each voice; the default makes 2,400 clips.

    Raises:
        ImportError: The set is not cached and ``espeakng_loader`` is not installed.
        RuntimeError: eSpeak NG reports an error, lacks a voice or yields no sound.
        ValueError: ``repeats`` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    digits = np.tile(np.repeat(np.arange(len(WORDS)), repeats), len(VOICES))
    voices = np.repeat(VOICES, len(WORDS) * repeats)
    name = "espeak_digits-v1.npz" if repeats == 10 else f"espeak_digits-v1-{repeats}.npz"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmssl" / name
    cached = _read(path, digits, voices)
    clips, rate = cached or _synthesise(digits, voices)
    if cached is None:
        try:
            _write(path, clips, rate, digits, voices)
        except OSError as error:  # without a cache only time is lost
            warnings.warn(f"cannot cache the digits in {path}: {error}", stacklevel=2)
    return EspeakDigits([clip.astype(np.float32) / 32768 for clip in clips], rate, digits, voices.tolist())


def _read(path: Path, digits: np.ndarray, voices: np.ndarray) -> tuple[list[np.ndarray], int] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            samples, lengths, rate = file["samples"], file["lengths"], int(file["sampling_rate"])
            sound = np.array_equal(file["digits"], digits) and np.array_equal(file["voices"], voices)
        sound = sound and samples.dtype == np.int16 and lengths.shape == digits.shape and lengths.min() > 0
        return (np.split(samples, np.cumsum(lengths)[:-1]), rate) if sound and lengths.sum() == len(samples) else None
    except Exception:  # none yet, or a damaged one: an archive can fail in nearly any way, and all mean "make it anew"
        return None


def _write(path: Path, clips: list[np.ndarray], rate: int, digits: np.ndarray, voices: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples, lengths = np.concatenate(clips), np.array([len(clip) for clip in clips])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # on the same file system, so os.replace is atomic
        part = Path(folder) / path.name
        np.savez(part, samples=samples, lengths=lengths, sampling_rate=rate, digits=digits, voices=voices)
        os.replace(part, path)


@contextmanager
def _espeak() -> Iterator[tuple[CDLL, Path, int]]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError('the spoken digits need eSpeak NG: pip install "mmssl[examples]"') from error
    data = Path(espeakng_loader.get_data_path())
    # The synthesiser keeps its phase in static variables that nothing resets. A private copy of the library starts
    # fresh, so that each call gives the same bits, and shares no state with other users of eSpeak NG in the process.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows cannot remove a loaded library
        lib = CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    # The echo of a voice is cut at the end of a buffer (in ms), so a buffer must hold a whole word and its echo.
    rate = lib.espeak_Initialize(_SYNCHRONOUS, 2000, os.fsencode(data), _DONT_EXIT)
    if rate <= 0:  # 0 where the data were not found, -1 on other errors
        raise RuntimeError(f"eSpeak NG does not start with its data in {data} (it takes paths below 160 characters)")
    try:
        yield lib, data, rate
    finally:
        lib.espeak_Terminate()


def _synthesise(digits: np.ndarray, voices: np.ndarray) -> tuple[list[np.ndarray], int]:
    rng = np.random.default_rng(0)
    ranges = {_RATE: (120, 221), _PITCH: (20, 81), _RANGE: (20, 81)}
    settings = {parameter: rng.integers(*bounds, len(digits)) for parameter, bounds in ranges.items()}
    chunks: list[bytes] = []
    clips: list[np.ndarray] = []

    @_Callback  # this frame keeps it alive for as long as the library may call it
    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(string_at(samples, 2 * count))
        return 0

    def check(code: int, what: str) -> None:
        if code != 0:
            raise RuntimeError(f"eSpeak NG cannot {what} (error code {code})")

    with _espeak() as (lib, data, sampling_rate):
        lib.espeak_SetSynthCallback(collect)
        for index, (digit, voice) in enumerate(zip(digits, voices, strict=True)):
            if index == 0 or voice != voices[index - 1]:
                if not (data / "voices" / "!v" / voice.split("+")[1]).is_file():  # eSpeak NG would ignore it silently
                    raise RuntimeError(f"eSpeak NG has no variant for voice {voice}")
                check(lib.espeak_SetVoiceByName(voice.encode()), f"set voice {voice}")
            for parameter, values in settings.items():
                check(lib.espeak_SetParameter(parameter, int(values[index]), 0), f"set parameter {parameter}")
            check(lib.espeak_ng_SetRandSeed(index + 1), "seed its noise")  # else seeded from the clock
            word = WORDS[digit].encode()
            chunks.clear()
            code = lib.espeak_Synth(word, len(word) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
            check(code or lib.espeak_Synchronize(), f"speak {WORDS[digit]!r} by {voice}")
            clip = np.frombuffer(b"".join(chunks), dtype=np.int16)
            loud = np.flatnonzero(np.abs(clip.astype(np.int32)) > 32)  # one thousandth of full scale
            if loud.size == 0:
                raise RuntimeError(f"eSpeak NG gave no sound for {WORDS[digit]!r} by {voice}")
            clips.append(clip[loud[0] : loud[-1] + 1])
    return clips, sampling_rate
