"""Small video files for tests, written with PyAV."""

import os
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np

LOSSLESS: dict[str, Any] = {"container": "matroska", "codec": "ffv1", "pixel_format": "bgr0"}
STEP = 8  # between the levels of grey of two frames


def levels(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """(count, height, width, 3) bytes: frames of one grey each, which tells their number."""
    return np.broadcast_to(STEP * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3))


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of such frames, after a lossy codec too."""
    assert np.ptp(frames.astype(int), axis=(1, 2, 3)).max() < STEP
    return np.round(frames.mean(axis=(1, 2, 3)) / STEP).astype(int).tolist()


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encode(
    frames: np.ndarray,
    container: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rate: int = 10,
    options: dict[str, str] | None = None,
    stamps: list[int] | None = None,
    muxer: dict[str, str] | None = None,
) -> bytes:
    """A video file.

    Args:
        frames: (T, H, W, 3) bytes; of a file without frames (0, H, W, 3).
        rate: frames per second.
        options: of the codec.
        stamps: when each frame is shown, in milliseconds. None: as the rate says.
        muxer: options of the container.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=container, options=muxer or {}) as output:
            stream: Any = output.add_stream(codec, rate=rate, options=options or {})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pixel_format
            if stamps is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            output.start_encoding()
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                if stamps is not None:
                    frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return path.read_bytes()


def sound(picture: bool = False) -> bytes:
    """A second of sound, with the picture of a cover if wanted."""
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "sound")
        with av.open(path, "w", format="mp4") as output:
            stream: Any = output.add_stream("aac", rate=16_000, layout="mono")
            if picture:
                cover: Any = output.add_stream("png", rate=1)
                cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
                cover.disposition = av.stream.Disposition.attached_pic
                output.mux(cover.encode(av.VideoFrame.from_ndarray(noise(1, 16, 16)[0], format="rgb24")))
                output.mux(cover.encode())
            for start in range(0, 16_000, 1000):
                wave = np.sin(np.arange(start, start + 1000)[None] / 10).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16_000, start
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return Path(path).read_bytes()
