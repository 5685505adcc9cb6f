"""Video files of many kinds, intact and broken, and folders of frames."""

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="PyAV is not installed")

import av

from mmssl import video_files
from mmssl.data import DataArguments
from mmssl.data.sources import load_samples
from mmssl.modalities.video import Video
from mmssl.video_files import frame_files, index_frames, read_collection, read_frames
from tests.videos import LOSSLESS, encode, levels, noise, numbers, sound

COUNT = 30
GROUPS = {"g": "12", "bf": "2"}  # three keyframes, and frames that are decoded in another order than they are shown
FINE = {"b": "4000000", "qmax": "3"}
FASTSTART = {"movflags": "faststart"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
KINDS: dict[str, dict[str, Any]] = {
    "mp4": {"options": GROUPS},
    "mp4 of open groups": {"options": {**GROUPS, "x264-params": "open-gop=1"}},
    "mp4 in fragments": {"options": GROUPS, "muxer": FRAGMENTS},
    "mov": {"container": "mov", "codec": "mpeg4", "options": {**GROUPS, **FINE}},
    "mkv": LOSSLESS,
    "webm of VP8": {"container": "webm", "codec": "libvpx", "options": {"g": "12", "auto-alt-ref": "1"}},
    "webm of VP9": {"container": "webm", "codec": "libvpx-vp9", "options": {"g": "12", "lag-in-frames": "12"}},
    "avi": {"container": "avi", "codec": "mpeg4", "options": {"g": "12", **FINE}},
    "avi of H.264": {"container": "avi", "options": GROUPS},
    "wmv": {"container": "asf", "codec": "wmv2", "options": {"g": "12", **FINE}},
    "mpg": {"container": "mpeg", "codec": "mpeg2video", "rate": 25, "options": {**GROUPS, **FINE}},
    "gif": {"container": "gif", "codec": "gif", "pixel_format": "gray"},
    "raw H.264": {"container": "h264", "options": GROUPS},  # has no time stamps
}


def read(
    file: str | bytes, which: Any = slice(None), size: tuple[int, int] = (32, 48), channels: int = 3
) -> np.ndarray:
    """The frames of these numbers."""
    index = index_frames(file)
    return read_frames(file, np.atleast_1d(index.stamps[which]), index.keys, size, channels, (1, 1))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> tuple[dict[str, Any], bytes]:
    return KINDS[request.param], encode(levels(COUNT), **KINDS[request.param])


def test_frames_are_found_where_the_frame_rate_says(kind: tuple[dict[str, Any], bytes]) -> None:
    options, file = kind
    index = index_frames(file)
    seconds = (index.stamps - index.stamps[0]) * index.unit
    np.testing.assert_allclose(seconds, np.arange(COUNT) / options.get("rate", 10), atol=1.1e-3)
    assert set(index.keys) <= set(index.stamps)


def test_each_frame_is_read_alone_and_among_others(kind: tuple[dict[str, Any], bytes]) -> None:
    """Whichever keyframe decoding begins at: the frames are those of a decoder that reads all from the beginning."""
    file = kind[1]
    with av.open(io.BytesIO(file), "r") as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert numbers(whole) == list(range(COUNT))
    for number in range(COUNT):
        assert np.abs(read(file, number)[0].astype(int) - whole[number]).max() <= 1
    assert numbers(read(file)) == list(range(COUNT))
    some = [0, 0, 3, 11, 12, 13, 13, 29, 29]
    assert numbers(read(file, some)) == some


def test_lossless_frames_come_back_as_they_were() -> None:
    frames = noise(9, 32, 48)
    assert np.array_equal(read(encode(frames, **LOSSLESS)), frames)


def test_a_path_gives_what_its_bytes_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that FFmpeg could take for the name of a protocol."""
    monkeypatch.chdir(tmp_path)
    file = encode(levels(4))
    for name in ("clip.mp4", "http:clip.mp4", "no ending ü"):
        Path(name).write_bytes(file)
        assert np.array_equal(read(name), read(file)) and np.array_equal(read(str(tmp_path / name)), read(file))


def test_a_variable_frame_rate_shows_each_frame_until_the_next() -> None:
    stamps = [0, 40, 50, 400, 401, 1000, 5000]
    file = encode(levels(len(stamps)), **LOSSLESS, stamps=stamps)
    index = index_frames(file)
    assert index.stamps.tolist() == stamps and index.unit == 1e-3
    wanted = [0, 39, 40, 49, 50, 399, 400, 401, 999, 1000, 4999, 5000, 9000]
    shown = [max(number for number, stamp in enumerate(stamps) if stamp <= time) for time in wanted]
    assert numbers(read_frames(file, np.array(wanted), index.keys, (32, 48), 3, (1, 1))) == shown
    for time, number in zip(wanted, shown, strict=True):
        assert numbers(read_frames(file, np.array([time]), index.keys, (32, 48), 3, (1, 1))) == [number]


def test_a_video_that_begins_late_shows_its_first_frame_before() -> None:
    file = encode(levels(3), **LOSSLESS, stamps=[500, 600, 700])
    index = index_frames(file)
    assert index.stamps.tolist() == [500, 600, 700]
    assert numbers(read_frames(file, np.array([0, 450, 600]), index.keys, (32, 48), 3, (1, 1))) == [0, 0, 1]


def test_frames_without_stamps_of_their_own_are_counted(tmp_path: Path) -> None:
    """As in files whose frames all have the same stamp: the frame rate of the stream says when they are shown."""
    path = tmp_path / "same.mkv"
    with av.open(io.BytesIO(encode(levels(6), options={"g": "3"})), "r") as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts = packet.dts = 0
                packet.stream = stream
                output.mux(packet)
    for file in (str(path), encode(levels(6), container="h264")):
        index = index_frames(file)
        assert index.stamps.tolist() == list(range(6)) and not len(index.keys)
        assert index.unit == pytest.approx(0.1)
        assert [numbers(read(file, number)) for number in range(6)] == [[number] for number in range(6)]


def test_a_file_that_cannot_be_sought_in_is_read_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeking may end up behind the frame; here it always goes to the last keyframe."""
    file = encode(levels(COUNT), options=GROUPS)
    index = index_frames(file)
    real, starts = video_files.seek_and_read, []

    def elsewhere(file, stamps, start, *rest):
        starts.append(start)
        return real(file, stamps, None if start is None else int(index.keys[-1]), *rest)

    monkeypatch.setattr(video_files, "seek_and_read", elsewhere)
    assert numbers(read(file, [13, 20, 29])) == [13, 20, 29]
    assert starts == [index.keys[1], None]


def test_only_wanted_frames_are_resized_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, resized = video_files.picture_of, []

    def counted(frame, *rest):
        resized.append(frame.pts)
        return real(frame, *rest)

    monkeypatch.setattr(video_files, "picture_of", counted)
    file = encode(levels(COUNT), options=GROUPS)
    read(file, [4, 4, 17, 29, 29, 29])
    assert resized == index_frames(file).stamps[[4, 17, 29]].tolist()


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = [np.sin(3 * y + 2 * x), np.cos(4 * x - y), np.sin(2 * x * y + 1)]
    return ((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8)


@pytest.mark.parametrize("shape", [(48, 64), (64, 40), (33, 97), (16, 16), (20, 24)], ids=str)
def test_resizing_and_cropping_agree_with_pil(shape: tuple[int, int]) -> None:
    size, picture = (16, 24), smooth(*shape)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    height, width = max(size[0], round(shape[0] * scale)), max(size[1], round(shape[1] * scale))
    resized = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    expected = resized[top : top + size[0], left : left + size[1]].astype(int)
    found = read(encode(picture[None], **LOSSLESS), size=size)[0].astype(int)
    assert np.abs(found - expected).mean() < 1.5 and np.abs(found - expected).max() < 8


def test_channels_are_grey_or_colour_or_opaque() -> None:
    frames = noise(2, 16, 16)
    file = encode(frames, **LOSSLESS)
    grey = read(file, size=(16, 16), channels=1)
    assert np.abs(grey[..., 0] - frames @ np.array([0.299, 0.587, 0.114])).max() < 2  # ITU-R BT.601
    opaque = read(file, size=(16, 16), channels=4)
    assert np.array_equal(opaque[..., :3], frames) and (opaque[..., 3] == 255).all()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_turned_as_the_file_says(degrees: int) -> None:
    """By the matrix in the header of an mp4 file's track, which says where a player shall put the pixel (x, y)."""
    picture = smooth(32, 48)
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]  # x' = ax + cy, y' = bx + dy
    file = bytearray(encode(picture[None].repeat(2, axis=0), options={"qp": "0"}, pixel_format="yuv444p"))
    matrix = file.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", file[matrix : matrix + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", file, matrix, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    expected = np.zeros((48, 32, 3) if b else (32, 48, 3), dtype=int)
    for y in range(32):
        for x in range(48):
            right, down = a * (x + 0.5) + c * (y + 0.5), b * (x + 0.5) + d * (y + 0.5)
            # What comes to lie left of or above the origin is shifted into the picture.
            expected[int(down % expected.shape[0]), int(right % expected.shape[1])] = picture[y, x]
    found = read(bytes(file), size=(expected.shape[0], expected.shape[1]))[0].astype(int)
    assert np.abs(found - expected).mean() < 3


# ---- What is no video, or no more ------------------------------------------------------------------------------------

INTACT = encode(noise(40, 32, 32))
BROKEN: dict[str, tuple[Any, list[str]]] = {
    "text": (b"these are notes\n" * 100, ["not a readable video", "expected an intact video file"]),
    "no bytes": (b"", ["not a readable video"]),
    "no such file": ("no/such/file.mp4", ["not a readable video", "no/such/file.mp4"]),
    "sound": (sound(), ["found audio in the file", "expected a video"]),
    "sound with a cover": (sound(picture=True), ["found a picture and audio in the file", "expected a video"]),
    "a cut mp4": (INTACT[: len(INTACT) // 2], ["not a readable video", "expected an intact video file"]),
    "a cut mp4 with its header in front": (
        encode(noise(40, 32, 32), muxer=FASTSTART)[: len(INTACT) * 6 // 10],
        [r"truncated: the header announces 4\.0 seconds, found 2\.\d"],
    ),
    "a cut mkv": (
        encode(levels(40), **LOSSLESS)[: len(encode(levels(40), **LOSSLESS)) * 6 // 10],
        [r"truncated: the header announces 4\.0 seconds, found 2\.\d"],
    ),
    "a cut webm": (
        encode(noise(40, 32, 32), container="webm", codec="libvpx")[:20_000],
        [r"truncated: the header announces 4\.0 seconds, found \d\.\d"],
    ),
    "an avi without frames": (encode(levels(0), container="avi", codec="mpeg4"), ["without frames", "at least one"]),
    "an mp4 without frames": (encode(levels(0), muxer=FRAGMENTS), ["without frames", "at least one"]),
    "an mkv without frames": (encode(levels(0), **LOSSLESS), ["not a readable video"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_refused_and_says_why(case: str) -> None:
    file, patterns = BROKEN[case]
    for pattern in patterns:
        with pytest.raises(ValueError, match=pattern):
            index_frames(file)


@pytest.mark.parametrize(("spoilt", "readable"), [(0.05, slice(24, 30)), (0.8, slice(0, 12))], ids=["first", "last"])
def test_only_the_frames_around_a_clip_are_decoded(spoilt: float, readable: slice) -> None:
    """Contents are overwritten in the first or in the last group of frames; the others can be read all the same."""
    file = bytearray(encode(noise(30, 32, 32), options={"g": "6"}))
    contents, header = file.index(b"mdat"), file.index(b"moov")
    start = contents + int(spoilt * (header - contents))
    file[start : start + 1500] = bytes(1500)
    index = index_frames(bytes(file))
    assert len(index.stamps) == 30 and len(index.keys) > 4
    assert len(read_frames(bytes(file), index.stamps[readable], index.keys, (32, 32), 3, (1, 1)))
    with pytest.raises(ValueError, match=r"not a readable video \(.*expected an intact video file"):
        read_frames(bytes(file), index.stamps, index.keys, (32, 32), 3, (1, 1))


def test_frames_smaller_than_a_patch_are_refused() -> None:
    file = encode(levels(2, 16, 32))
    index = index_frames(file)
    with pytest.raises(ValueError, match=r"found 16x32 pixels; expected at least one patch, 17x8"):
        read_frames(file, index.stamps, index.keys, (34, 34), 3, (17, 8))


def test_tags_in_other_alphabets_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "tagged.mp4"
    with av.open(str(path), "w") as output:
        output.metadata["title"] = "abcdefgh"
        stream: Any = output.add_stream("libx264", rate=10)
        stream.height, stream.width = 32, 48
        for pixels in levels(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        output.mux(stream.encode())
    file = path.read_bytes()
    assert b"abcdefgh" in file
    assert numbers(read(file.replace(b"abcdefgh", "ÄÖÜäöüß!".encode("latin-1")))) == [0, 1, 2]


def test_a_video_that_is_shorter_than_its_sound_is_intact(tmp_path: Path) -> None:
    """The length in the header is that of the longest stream."""
    path = tmp_path / "both.mp4"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=10)
        stream.height, stream.width = 32, 48
        other: Any = output.add_stream("aac", rate=16_000, layout="mono")
        for pixels in levels(10):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        output.mux(stream.encode())
        for start in range(0, 64_000, 1000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
            output.mux(other.encode(frame))
        output.mux(other.encode())
    assert numbers(read(str(path))) == list(range(10))


# ---- Folders of frames -----------------------------------------------------------------------------------------------


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels(1)[0]).save(path)


def test_frames_are_in_natural_order(tmp_path: Path) -> None:
    names = ["a2.png", "a10.JPG", "a10_9.png", "a10_10.png", "b1.webp"]
    save(*(tmp_path / name for name in reversed(names)))
    for other in ("notes.txt", ".a3.png", "a4.gif"):  # a gif is a video
        (tmp_path / other).write_text("")
    assert [Path(file).name for file in frame_files(tmp_path)] == names
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"found a folder without frames; expected files ending in \.png"):
        frame_files(empty)


def test_folders_of_frames_are_clips(tmp_path: Path) -> None:
    save(*(tmp_path / f"clip{clip}" / f"{frame}.png" for clip in (1, 10, 2) for frame in range(3)))
    save(tmp_path / ".hidden" / "0.png")
    (tmp_path / "notes.txt").write_text("")
    samples = load_samples(DataArguments(source=str(tmp_path)), Video())
    assert list(samples.values) == [str(tmp_path / f"clip{clip}") for clip in (1, 2, 10)]
    assert samples.labels is None and samples.name(2) == str(tmp_path / "clip10")


def test_folders_of_folders_of_frames_have_labels(tmp_path: Path) -> None:
    save(*(tmp_path / kind / clip / "0.png" for kind in ("walk", "run") for clip in ("x", "y")))
    save(tmp_path / "run" / "z" / "0.jpg")
    samples = load_samples(DataArguments(source=str(tmp_path)), Video())
    assert samples.labels is not None and samples.classes == ["run", "walk"]
    for path, label in zip(samples.values, samples.labels, strict=True):
        assert Path(path).parent.name == samples.classes[label]
    assert len(samples) == 5


def test_a_folder_of_frames_is_one_clip(tmp_path: Path) -> None:
    save(tmp_path / "0.png", tmp_path / "1.png")
    assert list(load_samples(DataArguments(source=str(tmp_path)), Video()).values) == [str(tmp_path)]


@pytest.mark.parametrize(
    "files", [["0.png", "clip/0.png"], ["clip/0.png", "class/clip/0.png"], ["a/b/c/0.png"]], ids=str
)
def test_frames_at_different_depths_are_refused(files: list[str], tmp_path: Path) -> None:
    save(*(tmp_path / file for file in files))
    with pytest.raises(ValueError, match=r"found frames in .*; expected them in all of FOLDER/CLIP or .*CLASS/CLIP"):
        read_collection(str(tmp_path))


def test_what_holds_videos_or_tables_is_no_folder_of_frames(tmp_path: Path) -> None:
    assert read_collection("moving_digits") is None and read_collection(str(tmp_path)) is None
    save(tmp_path / "class" / "cover.png")
    (tmp_path / "class" / "one.MP4").write_bytes(encode(levels(2)))
    (tmp_path / "class" / "two.webm").write_bytes(b"")
    assert read_collection(str(tmp_path)) is None
    samples = load_samples(DataArguments(source=str(tmp_path)), Video())
    assert [Path(path).name for path in samples.values] == ["one.MP4", "two.webm"] and samples.classes == ["class"]
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "clip" / "0.png")
    (tmp_path / "other" / "table.parquet").write_bytes(b"")
    assert read_collection(str(tmp_path / "other")) is None
