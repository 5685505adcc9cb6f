"""Frames of video files, through PyAV, which brings its own FFmpeg; and folders that hold frames as image files."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.pixels import IMAGE_ENDINGS, Size, check_size, covering, middle
from mmssl.samples import Samples

VIDEO_ENDINGS = (".mp4", ".m4v", ".webm", ".avi", ".mkv", ".mov", ".mpg", ".mpeg", ".wmv", ".gif")
FRAME_ENDINGS = tuple(ending for ending in IMAGE_ENDINGS if ending not in VIDEO_ENDINGS)
PIXEL_FORMATS = {1: "gray", 3: "rgb24", 4: "rgba"}


@dataclass
class FrameIndex:
    """When the frames of a video are shown.

    Attributes:
        stamps: (T,) int, in order: presentation time stamps or, where some are missing or the same, the numbers of the
            frames.
        keys: (K,) int, those of frames that can be decoded without others. Empty: stamps are numbers.
        unit: seconds from one stamp to the next.
    """

    stamps: np.ndarray
    keys: np.ndarray
    unit: float


def index_frames(file: str | bytes) -> FrameIndex:
    """Read a video's packets without decoding them.

    Raises:
        ValueError: no readable video, or one that ends before its header says.
    """
    with opened(file) as (container, stream):
        stamps: list[int | None] = []
        keys: list[int | None] = []
        ends: dict[int, int] = {}  # of all streams: the length in the header is that of the longest
        for packet in container.demux():
            if not packet.size:  # the signal that a stream has ended
                continue
            if packet.pts is not None:
                end = packet.pts + (packet.duration or 0)
                ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
            if packet.stream_index == stream.index and not packet.is_discard:
                stamps.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        if not stamps:
            raise ValueError("found a video without frames; expected at least one")
        if container.duration and ends:
            start = (container.start_time or 0) / 1e6
            expected, found = container.duration / 1e6, -start
            found += max(end * float(container.streams[number].time_base) for number, end in ends.items())
            if expected - found > max(0.1 * expected, 0.5):  # headers may round, or count a pause at the end
                raise ValueError(f"truncated: the header announces {expected:.1f} seconds, found {found:.1f}")
        if None in stamps or len(set(stamps)) < len(stamps) or not keys:
            rate = float(stream.guessed_rate or 25)
            return FrameIndex(np.arange(len(stamps)), np.zeros(0, dtype=np.int64), 1 / rate)
        in_order, keys_in_order = (np.sort(np.array(found, dtype=np.int64)) for found in (stamps, keys))
        return FrameIndex(in_order, keys_in_order, float(stream.time_base))


def read_frames(
    file: str | bytes, stamps: np.ndarray, keys: np.ndarray, size: Size, channels: int, least: Size
) -> np.ndarray:
    """The frames on the screen at these times, resized while they are decoded: (len(stamps), *size, channels) uint8.

    Decodes from the last key before the first of them on; memory is needed for the result alone.

    Args:
        file: path or contents of the file.
        stamps: times in order, from a ``FrameIndex``.
        keys: those of the ``FrameIndex``.
        size: height and width of the result: the shorter side is resized (bicubic) and the centre cropped.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        least: height and width that the frames must have at least.

    Raises:
        ValueError: no readable video, or frames that are too small.
    """
    before = keys[keys <= stamps[0]]
    found = seek_and_read(file, stamps, int(before[-1]), True, size, channels, least) if len(before) else []
    # Some files cannot be sought in, or only inexactly.
    found = found or seek_and_read(file, stamps, None, len(keys) > 0, size, channels, least)
    if not found:
        raise ValueError("found no frame that can be decoded; expected an intact video file")
    return np.stack(found)


def seek_and_read(
    file: str | bytes, stamps: np.ndarray, start: int | None, timed: bool, size: Size, channels: int, least: Size
) -> list[np.ndarray]:
    """As ``read_frames``; nothing where decoding began too late."""
    found: list[np.ndarray] = []
    with opened(file) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream)
        shown = None
        for number, frame in enumerate(container.decode(stream)):
            stamp = frame.pts if timed and frame.pts is not None else number
            # What is on the screen stays there until the next frame is due.
            due = int(np.searchsorted(stamps, stamp)) - len(found)
            if due > 0:
                if shown is None and start is not None:
                    return []
                found += [picture_of(frame if shown is None else shown, size, channels, least)] * due
            if len(found) == len(stamps):
                return found
            shown = frame
        if shown is not None:
            found += [picture_of(shown, size, channels, least)] * (len(stamps) - len(found))
    return found


def picture_of(frame: Any, size: Size, channels: int, least: Size) -> np.ndarray:
    """A decoded frame as an array (*size, channels), turned as the file says."""
    turns = round(frame.rotation / 90)
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    check_size(height, width, least)
    height, width = covering(height, width, size)
    rows, columns = middle(height, width, size)
    if turns % 2:
        height, width = width, height
    picture = frame.reformat(width, height, PIXEL_FORMATS[channels], interpolation="BICUBIC", threads=1).to_ndarray()
    return np.rot90(picture, turns)[rows, columns].reshape(*size, channels)


@contextmanager
def opened(file: str | bytes) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream; pictures that are attached to sound are none."""
    try:
        import av
        from av.stream import Disposition
    except ImportError as error:
        raise ImportError('videos need PyAV: pip install "mmssl[video]"') from error
    try:
        source: Any = io.BytesIO(file) if isinstance(file, bytes) else f"file:{file}"  # never a network protocol
        with av.open(source, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = {"a picture" if stream.type == "video" else stream.type for stream in container.streams}
                raise ValueError(f"found {' and '.join(sorted(kinds)) or 'no stream'} in the file; expected a video")
            streams[0].codec_context.thread_count = 1  # data workers are many already
            yield container, streams[0]
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video ({error}); expected an intact video file") from error


def frame_files(folder: Path) -> list[str]:
    """The image files in a folder, in natural order: frame_9 before frame_10.

    Raises:
        ValueError: there are none.
    """
    names = [name for name in os.listdir(folder) if is_frame(name)]
    if not names:
        raise ValueError(f"found a folder without frames; expected files ending in {', '.join(FRAME_ENDINGS)}")
    return [str(folder / name) for name in sorted(names, key=natural)]


def is_frame(name: str) -> bool:
    return name.lower().endswith(FRAME_ENDINGS) and not name.startswith(".")


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by that reads digits as numbers."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_collection(source: str) -> Samples | None:
    """Folders of frames: FOLDER/*.png, FOLDER/CLIP/*.png, or FOLDER/CLASS/CLIP/*.png with labels.

    None where there are no frames, or tables or video files.

    Raises:
        ValueError: some frames lie deeper than others.
    """
    top = Path(source).expanduser()
    if not top.is_dir() or any(top.glob("*.parquet")):
        return None
    clips: list[Path] = []
    for root, folders, files in os.walk(top, followlinks=True):
        folders[:] = sorted((folder for folder in folders if not folder.startswith(".")), key=natural)
        if any(file.lower().endswith(VIDEO_ENDINGS) and not file.startswith(".") for file in files):
            return None
        if any(is_frame(file) for file in files):
            clips.append(Path(root).relative_to(top))
    if not clips:
        return None
    depth, others = len(clips[0].parts), [clip for clip in clips if len(clip.parts) != len(clips[0].parts)]
    if others or depth > 2:
        found = " and in ".join(str(top / clip) for clip in (clips[0], *others[:1]))
        raise ValueError(
            f"data.source: found frames in {found}; expected them in all of FOLDER/CLIP or in all of FOLDER/CLASS/CLIP"
        )
    paths = [str(top / clip) for clip in clips]
    if depth < 2:
        return Samples(paths, paths.__getitem__)
    classes, labels = np.unique([clip.parts[0] for clip in clips], return_inverse=True)
    return Samples(paths, paths.__getitem__, labels, classes.tolist())
