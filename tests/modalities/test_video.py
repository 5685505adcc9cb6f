"""Tests of videos: tubelets, clips and their times, tubes, targets and views that all frames share."""

import io
import itertools
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae import modeling_videomae

from mmssl.data.prepared import PreparedSamples
from mmssl.modalities.base import View
from mmssl.modalities.image import Image
from mmssl.modalities.video import Video
from mmssl.processing import MMSSLFeatureExtractor
from mmssl.samples import Samples
from mmssl.tokens import Tokens

pytest.importorskip("av", reason="PyAV is not installed")

from tests.videos import LOSSLESS, STEP, encode, levels, noise

CLIPS = Path(os.environ.get("MMSSL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "video" / "clips.parquet"
VIEWS: dict[str, Any] = {"crop_scale": (0.2, 1.0), "horizontal_flip": 0.5, "color_jitter": 0.4}


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(num_frames: int = 4, image_size: Any = 8, patch_size: Any = 4, num_channels: int = 3, **options: Any) -> Video:
    return Video(num_frames, image_size=image_size, patch_size=patch_size, num_channels=num_channels, **options)


def plain(*args: Any, **options: Any) -> Video:
    """Videos whose pixels stay between 0 and 1, all frames of them one after the other."""
    stride = {} if "frame_rate" in options else {"frame_stride": 1}
    return make(*args, image_mean=0.0, image_std=1.0, **{**stride, **options})


def clip_of(video: Video, sample: Any, seed: int | None = None) -> Tensor:
    """(C, T, H, W) what is read of a sample: from the middle, or with a seed at random."""
    return video.excerpt(video.prepare(sample), None if seed is None else key(seed))["pixel_values_videos"]


def random_pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=key(99))


def tokens_of(video: Video, batch: int = 1, frames: int | None = None, size: tuple[int, int] | None = None) -> Tokens:
    shape = (batch, video.num_channels, frames or video.num_frames, *(size or video.image_size))
    return video.tokenize({"pixel_values_videos": torch.randn(shape, generator=key(0))})


# ---- Tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("frames", "tubelet", "size", "patch"),
    [(4, 2, (8, 8), (4, 4)), (6, 3, (6, 8), (3, 2)), (2, 1, (4, 10), (4, 5)), (2, 2, (4, 4), (4, 4))],
    ids=str,
)
def test_tubelets_equal_a_loop(
    frames: int, tubelet: int, size: tuple[int, int], patch: tuple[int, int], channels: int
) -> None:
    """Time first, then rows, then columns, among the tokens and inside one; channels last."""
    video = make(frames, size, patch, channels, tubelet_size=tubelet, normalize_target=False)
    pixels = torch.arange(2 * channels * frames * size[0] * size[1]).float().view(2, channels, frames, *size)
    tokens = video.tokenize({"pixel_values_videos": pixels})
    (height, width), columns, rows = patch, size[1] // patch[1], size[0] // patch[0]
    assert tokens.valid.all() and tokens.valid.shape == tokens.content.shape[:2] == (
        2,
        frames // tubelet * rows * columns,
    )
    assert tokens.content.shape[2:] == video.content_shape == (tubelet * height * width * channels,)
    for t, y, x, c in itertools.product(range(frames), range(size[0]), range(size[1]), range(channels)):
        token = (t // tubelet * rows + y // height) * columns + x // width
        element = ((t % tubelet * height + y % height) * width + x % width) * channels + c
        assert torch.equal(tokens.content[:, token, element], pixels[:, c, t, y, x])
        assert tokens.coords[:, token].tolist() == [[t // tubelet, y // height, x // width]] * 2


def test_a_clip_of_videomae_has_its_number_of_tokens() -> None:
    """16 frames of 224x224 in tubelets of 2x16x16: 8 x 14 x 14 tokens of 1,536 numbers."""
    assert tokens_of(Video()).content.shape == (1, 1568, 1536)


def test_places_go_on_in_time_and_are_stretched_in_space() -> None:
    """The middle of each patch lies at the same share of the frame; the second of each slice stays what it was."""
    video = make(4, 8, 4)
    coords = tokens_of(video, frames=10, size=(16, 8)).coords[0]
    for token, (t, y, x) in enumerate(coords.tolist()):
        (slice_, place), (row, column) = divmod(token, 8), divmod(token % 8, 2)
        assert t == slice_ and place == token % 8
        assert (y + 0.5) / 2 == pytest.approx((row + 0.5) / 4)
        assert (x + 0.5) / 2 == pytest.approx((column + 0.5) / 2)


def test_embedding_is_the_convolution_of_a_video_transformer() -> None:
    torch.manual_seed(0)
    video = make(4, (8, 16), (4, 8)).build(12)
    pixels = torch.randn(2, 3, 4, 8, 16)
    kernel = video.projection.weight.view(12, 2, 4, 8, 3).permute(0, 4, 1, 2, 3)
    expected = nn.functional.conv3d(pixels, kernel, video.projection.bias, stride=(2, 4, 8)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(video.embed(video.tokenize({"pixel_values_videos": pixels})), expected)
    assert video.bfloat16().embed(video.tokenize({"pixel_values_videos": pixels})).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("width", "shares"), [(12, (4, 4, 4)), (16, (6, 6, 4)), (384, (128,) * 3), (1024, (342, 342, 340))]
)
def test_time_row_and_column_have_shares_of_the_position(width: int, shares: tuple[int, ...]) -> None:
    """V-JEPA's shares of 1,024 are these too."""
    steps = torch.cat([torch.zeros(1, 3), torch.eye(3)])[None]
    origin, *moved = make().positions(width)(steps)[0]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(shares))
    for axis, embedding in enumerate(moved):
        assert torch.equal(embedding[owner != axis], origin[owner != axis])
        assert (embedding - origin)[owner == axis].abs().max() > 0.5


@torch.no_grad()
def test_places_by_number_are_those_of_videomae() -> None:
    """Of a clip of its own size, and of a longer one; nothing is learned."""
    video = make(4, (8, 12), position_embedding="index").build(10)
    table = modeling_videomae.get_sinusoid_encoding_table(24, 10)
    for frames in (4, 8):
        coords = tokens_of(video, frames=frames).coords
        torch.testing.assert_close(video.position(coords), table[:, : 3 * frames], atol=1e-6, rtol=0)
    assert not video.position.state_dict()


@torch.no_grad()
def test_learned_places_are_a_table_that_larger_frames_are_stretched_over() -> None:
    """As torch resizes pictures; in a longer clip the last time stays."""
    video: Any = make(4, (8, 12), position_embedding="learned").build(6)
    table = video.position.grid_tokens
    assert table.shape == (2, 2, 3, 6)
    for size in ((8, 12), (16, 8)):
        expected = nn.functional.interpolate(table.movedim(-1, 1), (size[0] // 4, size[1] // 4), mode="bilinear")
        found = video.position(tokens_of(video, frames=8, size=size).coords)[0].unflatten(0, (4, -1))
        torch.testing.assert_close(found, expected[[0, 1, 1, 1]].flatten(2).mT)
    with pytest.raises(ValueError, match="position_embedding: found 'rope'; expected one of sincos, index, learned"):
        make(position_embedding="rope")


@pytest.mark.parametrize("shape", [(2, 4, 9, 8, 8), (2, 3, 9, 8, 8), (3, 4, 8, 8), (2, 4, 3, 8, 8)], ids=str)
def test_batches_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"found shape \(.*expected \(batch, 3, frames, height, width\).*tubelet_size, 2"
    ):
        make().tokenize({"pixel_values_videos": torch.zeros(shape)})


def test_frames_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="8x10 pixels cannot be cut into patches of 4x4"):
        make().tokenize({"pixel_values_videos": torch.zeros(2, 3, 4, 8, 10)})


# ---- Hidden tokens ---------------------------------------------------------------------------------------------------


def test_tubes_of_videomae_leave_160_tokens() -> None:
    """Of 196 places int(0.9 * 196) = 176 are hidden, at all 8 times."""
    mask = Video().mask(tokens_of(Video(), batch=3), 0.9, key(0), "tube")
    assert mask.hidden.view(3, 8, 196).sum(dim=2).eq(176).all()
    assert mask.visible_index.shape == (3, 160) and mask.hidden_index.shape == (3, 1408)
    assert mask.visible_valid.all() and mask.hidden_valid.all()


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99, 1.0])
def test_tubes_hide_the_same_places_at_all_times(ratio: float) -> None:
    video = make(8, (20, 8), 2)  # 4 slices of 40 places
    mask = video.mask(tokens_of(video, batch=50), ratio, key(0), "tube")
    hidden = mask.hidden.view(50, 4, 40)
    assert (hidden == hidden[:, :1]).all()
    assert (hidden[:, 0].sum(dim=1) == min(max(int(40 * ratio), 1), 39)).all()
    assert len(hidden[:, 0].unique(dim=0)) > 20
    if 0.3 <= ratio <= 0.7:
        assert (hidden[:, 0].float().mean(dim=0) - ratio).abs().max() < 5 * 0.5 / 50**0.5


def test_each_clip_may_have_its_own_share_of_tubes() -> None:
    video = make(4, 16, 4)
    ratio = torch.linspace(0.05, 0.95, 30)
    hidden = video.mask(tokens_of(video, batch=30), ratio, key(0), "tube").hidden.view(30, 2, 16)
    assert (hidden[:, 0] == hidden[:, 1]).all()
    assert hidden[:, 0].sum(dim=1).tolist() == [min(max(int(16 * share), 1), 15) for share in ratio.tolist()]


def test_tubes_follow_from_the_key_alone() -> None:
    video = make(4, 32, 4)
    first, again, other = (video.mask(tokens_of(video), 0.5, key(seed), "tube").hidden for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_tubes_need_more_than_one_place() -> None:
    with pytest.raises(ValueError, match="'tube' needs frames of at least two patches; use style 'random'"):
        make(4, 4, 4).mask(tokens_of(make(4, 4, 4)), 0.5, key(0), "tube")


def test_other_styles_hide_the_usual_number_and_unknown_ones_are_refused() -> None:
    video = make(8, 16, 4)
    for style in ("random", "block"):
        assert video.mask(tokens_of(video, batch=5), 0.9, key(0), style).hidden.sum(dim=1).eq(64 - 6).all()
    with pytest.raises(ValueError, match="no mask style 'span'; it offers: random, tube, block"):
        video.mask(tokens_of(video), 0.9, key(0), "span")


@pytest.mark.parametrize(("max_block", "longest"), [(0.1, (1, 1, 1)), (0.5, (2, 4, 2))], ids=str)
def test_blocks_are_boxes_in_time_and_space(max_block: float, longest: tuple[int, ...]) -> None:
    video = make(8, (32, 16), 4, max_block=max_block)
    tokens = tokens_of(video, batch=200)
    first = (video.hiding_order(tokens, key(0), "block").floor() == 0).view(200, 4, 8, 4)
    sides = [first.any(dim=axes).sum(dim=1) for axes in ((2, 3), (1, 3), (1, 2))]
    assert tuple(int(side.max()) for side in sides) == longest
    assert torch.equal(first.flatten(1).sum(dim=1), sides[0] * sides[1] * sides[2])


def test_a_region_is_a_rectangle_at_all_times() -> None:
    video = make(8, (48, 32), 4, region_ratio=(0.5, 2.0))
    tokens = tokens_of(video, batch=20)
    for seed, share in enumerate((0.05, 0.15, 0.4)):
        inside = video.region(tokens, share, key(seed)).view(20, 4, 12, 8)
        assert (inside == inside[:, :1]).all()
        rows, columns = inside[:, 0].any(dim=2).sum(dim=1), inside[:, 0].any(dim=1).sum(dim=1)
        assert torch.equal(rows * columns, inside[:, 0].sum(dim=(1, 2)))
        assert abs(float(rows[0] * columns[0]) / 96 - share) < 0.06
        assert 0.4 < float(rows[0]) / float(columns[0]) < 2.6
    allowed = torch.arange(384) % 2 == 0
    assert not video.region(tokens, 0.4, key(0), allowed.expand(20, -1))[:, ~allowed].any()


# ---- Which frames make up a clip -------------------------------------------------------------------------------------


def starts(video: Video, count: int, draws: int = 200) -> list[list[int]]:
    """Numbers of the frames of clips drawn from a video of so many frames."""
    generator = key(0)
    return [video.frame_numbers(count, None, generator).tolist() for _ in range(draws)]


@pytest.mark.parametrize(("frames", "stride", "count"), [(4, 3, 20), (4, 1, 5), (2, 4, 9), (6, 2, 11)])
def test_a_clip_begins_anywhere_and_in_the_middle_without_a_generator(frames: int, stride: int, count: int) -> None:
    video = make(frames, frame_stride=stride)
    possible = [list(range(first, count, stride))[:frames] for first in range(count)]
    possible = [clip for clip in possible if len(clip) == frames]
    drawn = starts(video, count, 400)
    assert sorted(map(list, set(map(tuple, drawn)))) == possible
    often = [drawn.count(clip) / 400 for clip in possible]
    assert max(abs(share - 1 / len(possible)) for share in often) < 5 * 0.5 / 400**0.5
    middle = video.frame_numbers(count, None, None).tolist()
    before, after = middle[0], count - 1 - middle[-1]
    assert middle in possible and abs(before - after) <= 1


@pytest.mark.parametrize("count", [1, 2, 7, 9])
def test_the_last_frame_of_a_video_that_is_too_short_is_repeated(count: int) -> None:
    expected = [min(3 * number, count - 1) for number in range(4)]
    video = make(4, frame_stride=3)
    assert video.frame_numbers(count, None, None).tolist() == expected
    assert starts(video, count, 5) == [expected] * 5


def test_timed_frames_are_those_on_the_screen() -> None:
    """At even times from a random one on, whatever the frame rate: for each the last frame that was due by then."""
    seconds = torch.tensor([0.0, 0.04, 0.05, 0.4, 0.41, 1.0, 1.5, 1.6, 3.0], dtype=torch.float64)
    video, generator, firsts = make(4, frame_rate=2.0), key(0), set()
    for _ in range(300):
        found = video.frame_numbers(9, seconds, generator).tolist()
        # Some start between 0 and 1.5 seconds explains the four frames, half a second apart.
        options = [
            [max(i for i, due in enumerate(seconds.tolist()) if due <= start + step / 2 + 1e-6) for step in range(4)]
            for start in np.arange(0, 1.5005, 0.005)
        ]
        assert found in options
        firsts.add(found[0])
    assert firsts >= {0, 2, 4, 5}  # frames 1 and 3 are on the screen for a hundredth of a second
    middle = video.frame_numbers(9, seconds, None).tolist()
    assert middle == [4, 5, 7, 7]  # on the screen at 0.75, 1.25, 1.75 and 2.25 seconds


def test_timed_frames_of_an_even_rate_are_every_so_manieth() -> None:
    """Time stamps in thousandths of a second are not exact; the frame that is due is meant all the same."""
    seconds = (torch.arange(90, dtype=torch.float64) / 30).mul(1000).round() / 1000
    for rate, step in ((30.0, 1), (15.0, 2), (10.0, 3), (7.5, 4)):
        found = make(8, frame_rate=rate).frame_numbers(90, seconds, None).diff()
        assert (found - step).abs().max() <= 1 and found.float().mean() == pytest.approx(step, abs=0.2)
    exact = torch.arange(90, dtype=torch.float64) * (1001 / 30_000)
    short = make(4, frame_rate=30_000 / 1001).frame_numbers(4, exact[:4], None)
    assert short.tolist() == [0, 1, 2, 3]
    assert make(4, frame_rate=2.0).frame_numbers(3, exact[:3], key(0)).tolist() == [0, 2, 2, 2]  # too short


# ---- From raw samples to clips ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One video of six frames as a file, as a folder and as arrays."""
    folder = tmp_path_factory.mktemp("forms")
    frames, file = noise(6, 8, 12), folder / "clip.mkv"
    file.write_bytes(encode(frames, **LOSSLESS))
    (folder / "frames").mkdir()
    for number, frame in enumerate(frames):
        PILImage.fromarray(frame).save(folder / "frames" / f"{number + 8}.png")  # 8, 9, 10, ...
    return {
        "path": file,
        "string": str(file),
        "bytes": file.read_bytes(),
        "record of bytes": {"bytes": file.read_bytes(), "path": "gone.mkv"},
        "record of a path": {"bytes": None, "path": str(file)},
        "folder": folder / "frames",
        "channels last": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "floats": (frames / 255).astype(np.float64),
        "tensor": torch.from_numpy(frames),
        "pictures": [PILImage.fromarray(frame) for frame in frames],
    }


FORMS = ["path", "string", "bytes", "record of bytes", "record of a path", "folder", "channels last"]
FORMS += ["channels first", "floats", "tensor", "pictures"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [None, 3])
def test_all_forms_of_a_sample_give_the_same_clip(forms: dict[str, Any], form: str, seed: int | None) -> None:
    video = make(2, (8, 12), frame_stride=2)
    start = 2 if seed is None else int(torch.rand((), generator=key(seed), dtype=torch.float64) * 4)
    values = noise(6, 8, 12)[[start, start + 2]] / 255
    expected = (values - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    found = clip_of(video, forms[form], seed)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.permute(1, 2, 3, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["path", "bytes", "folder", "channels last"])
def test_preparing_keeps_the_video_as_it_is(forms: dict[str, Any], form: str) -> None:
    """What is kept of a sample between two clips is no decoded frame, and a clip leaves it unchanged."""
    video = make(2, (8, 12))
    prepared = video.prepare(forms[form])
    assert all(isinstance(value, Tensor) for value in prepared.values())
    size = sum(value.nbytes for value in prepared.values())
    assert size < {"bytes": len(forms["bytes"]) + 200, "channels last": 6 * 8 * 12 * 3 + 1}.get(form, 2000)
    before = {name: value.clone() for name, value in prepared.items()}
    video.excerpt(prepared, key(0))
    assert all(torch.equal(before[name], value) for name, value in prepared.items())


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, np.bool_])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_arrays_of_any_layout_and_type(channels: int, dtype: type) -> None:
    scale = {np.uint8: 255, np.bool_: 1}.get(dtype, 255)
    values = np.random.default_rng(0).integers(0, scale + 1, (4, 8, 12, channels)) / scale
    array = (values * 255).round().astype(dtype) if dtype == np.uint8 else values.astype(dtype)
    video = plain(4, (8, 12), num_channels=channels)
    for sample in [array, array.transpose(0, 3, 1, 2)] + [array[..., 0]] * (channels == 1):
        np.testing.assert_allclose(clip_of(video, sample).permute(1, 2, 3, 0).numpy(), values, atol=1e-3)
    grey = clip_of(video, array[..., 0])  # (T, H, W) is spread over all channels
    assert torch.equal(grey, clip_of(video, array)[:1].expand(channels, -1, -1, -1))


@pytest.mark.parametrize("shape", [(40, 60), (47, 33), (9, 100), (4, 6)], ids=str)
def test_frames_are_resized_and_cropped_as_images_are(shape: tuple[int, int], tmp_path: Path) -> None:
    frames = noise(4, *shape)
    image = Image((8, 12), 4, image_mean=0.0, image_std=1.0)
    expected = torch.stack([image.prepare(frame)["pixel_values"] for frame in frames], dim=1)
    torch.testing.assert_close(clip_of(plain(4, (8, 12)), frames), expected)
    for number, frame in enumerate(frames):
        PILImage.fromarray(frame).save(tmp_path / f"{number}.png")
    expected = torch.stack([image.prepare(PILImage.fromarray(frame))["pixel_values"] for frame in frames], dim=1)
    assert torch.equal(clip_of(plain(4, (8, 12)), tmp_path), expected)


def test_a_video_of_one_frame_works() -> None:
    frame = noise(1, 8, 8)
    for sample in (frame, encode(frame, **LOSSLESS)):
        for video in (plain(4), plain(4, frame_rate=10.0)) if isinstance(sample, bytes) else (plain(4),):
            found = clip_of(video, sample, seed=0)
            np.testing.assert_allclose(found.permute(1, 2, 3, 0).numpy(), frame.repeat(4, axis=0) / 255, atol=1e-6)


def test_a_frame_rate_reads_a_file_by_its_time_stamps() -> None:
    stamps = [0, 40, 50, 400, 401, 1000, 1500, 1600, 3000]
    file = encode(levels(9, 8, 8), **LOSSLESS, stamps=stamps)
    found = clip_of(plain(4, frame_rate=2.0), file).mean(dim=(0, 2, 3)) * 255 / STEP
    assert found.round().tolist() == [4, 5, 7, 7]
    counted = encode(levels(9, 8, 8), container="h264", options={"g": "4"})  # ten in a second, says the stream
    found = clip_of(plain(4, frame_rate=5.0), counted).mean(dim=(0, 2, 3)) * 255 / STEP
    assert found.round().tolist() == [1, 3, 5, 7]


def test_clips_differ_between_epochs_and_follow_from_the_seed() -> None:
    samples = Samples([encode(levels(24, 8, 8), options={"g": "5"})], ["clip 0"].__getitem__)

    def drawn(seed: int | None, epoch: int) -> Tensor:
        dataset = PreparedSamples(samples, plain(4), seed=seed)
        dataset.set_epoch(epoch)
        return dataset[0][0]["pixel_values_videos"]

    assert torch.equal(drawn(1, 0), drawn(1, 0)) and torch.equal(drawn(None, 0), drawn(None, 1))
    assert len({tuple(drawn(1, epoch)[0, :, 0, 0].tolist()) for epoch in range(8)}) > 3
    assert (drawn(None, 0).mean(dim=(0, 2, 3)) * 255 / STEP).round().tolist() == [10, 11, 12, 13]


def test_errors_name_the_file_and_the_frame(tmp_path: Path) -> None:
    for number in range(3):
        PILImage.fromarray(noise(1, 8, 8)[0]).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_text("no image")
    dataset = PreparedSamples(Samples([str(tmp_path)], [str(tmp_path)].__getitem__), plain(2, frame_stride=1))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: 1\.png: not a readable image"):
        dataset[0]
    bad = encode(noise(20, 8, 8))[:-100]
    dataset = PreparedSamples(Samples([noise(4, 8, 8), bad], ["good", "bad"].__getitem__), plain(2), on_error="skip")
    assert dataset[1][1] == [1] and torch.equal(
        dataset[1][0]["pixel_values_videos"], dataset[0][0]["pixel_values_videos"]
    )


def test_the_processor_reads_what_training_reads(forms: dict[str, Any]) -> None:
    options = {"num_frames": 2, "image_size": [8, 12], "patch_size": 4}
    extractor = MMSSLFeatureExtractor({"video": options})
    batch = extractor([forms["string"], forms["channels last"]])
    expected = clip_of(make(2, (8, 12)), forms["bytes"])
    assert list(batch) == ["pixel_values_videos"] and batch["pixel_values_videos"].shape == (2, 3, 2, 8, 12)
    torch.testing.assert_close(batch["pixel_values_videos"], torch.stack([expected, expected]))


NAN = np.where(np.arange(256).reshape(4, 8, 8) == 5, np.nan, 0.5).astype(np.float32)
MALFORMED: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "NaN": (NAN, {"num_channels": 1}, ["NaN", "expected finite"]),
    "infinity": (np.where(np.isnan(NAN), np.inf, NAN), {"num_channels": 1}, ["infinite", "expected finite"]),
    "small": (noise(4, 3, 8), {}, ["3x8", "4x4"]),
    "an image": (noise(1, 8, 8)[0], {}, ["8x3", "4x4"]),  # taken for eight frames of 8x3 pixels
    "one grey image": (noise(1, 8, 8)[0, ..., 0], {}, ["(8, 8)", "(T, H, W)"]),
    "4 channels for 3": (np.zeros((4, 8, 8, 4), np.uint8), {}, ["(4, 8, 8, 4)", "(T, H, W, 3)", "(T, 3, H, W)"]),
    "5 axes": (noise(4, 8, 8)[None], {}, ["(1, 4, 8, 8, 3)", "(T, H, W)"]),
    "no frames": (noise(0, 8, 8), {}, ["without frames", "at least one"]),
    "int64": (np.zeros((4, 8, 8, 3), np.int64), {}, ["int64", "expected uint8"]),
    "uint16": (np.zeros((4, 8, 8, 3), np.uint16), {}, ["uint16", "expected uint8"]),
    "text": (b"not a video at all", {}, ["not a readable video", "expected an intact video file"]),
    "None": (None, {}, ["expected"]),
    "empty record": ({"bytes": None, "path": None}, {}, ["expected"]),
    "file for 5 channels": (b"", {"num_channels": 5}, ["a video file", "num_channels=5", "(T, H, W, C)"]),
    "no such file": ("no/such/clip.mp4", {}, ["no/such/clip.mp4"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_samples_are_refused_and_say_why(case: str) -> None:
    sample, options, fragments = MALFORMED[case]
    with pytest.raises(ValueError) as error:
        make(**options).prepare(sample)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_a_frame_rate_needs_time_stamps(forms: dict[str, Any]) -> None:
    for form in ("folder", "channels last"):
        with pytest.raises(ValueError, match=r"frame_rate=5\.0: .* no time stamps; set frame_stride"):
            clip_of(make(2, (8, 12), frame_rate=5.0), forms[form])


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"frame_stride": 2, "frame_rate": 8.0}, ["frame_stride=2", "frame_rate=8.0", "one of them"]),
        ({"frame_stride": 0}, ["frame_stride=0", "at least 1"]),
        ({"frame_rate": 0.0}, ["frame_rate=0.0", "above 0"]),
        ({"num_frames": 5}, ["num_frames: found 5", "multiple of tubelet_size, 2"]),
        ({"num_frames": 0}, ["num_frames: found 0", "at least 1"]),
        ({"image_size": 10}, ["10x10", "4x4", "multiple of patch_size"]),
        ({"image_mean": (0.5, 0.5)}, ["image_mean", "found 2 values", "3"]),
        ({"image_std": 0.0}, ["image_std", "positive"]),
        ({"num_channels": 1, "color_jitter": 0.4}, ["color_jitter", "3 channels", "num_channels=1"]),
        ({"patch_size": 1, "tubelet_size": 1}, ["normalize_target", "at least two pixels"]),
        ({"distance": "l3"}, ["distance", "'l3'", "l1, l2"]),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make(**options)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_options_make_the_same_modality_again() -> None:
    for options in ({}, {"frame_rate": 8.0}, {"frame_stride": 2}):
        video = Video(**options)
        assert Video(**video.options()).options() == video.options()
    assert Video().frame_stride == 4 and Video(frame_rate=8.0).frame_stride is None


@pytest.mark.skipif(not CLIPS.is_file(), reason=f"no {CLIPS}; set MMSSL_DATA")
def test_real_clips_are_read() -> None:
    import pyarrow.parquet

    video = plain(8, 64, 16, frame_stride=3)
    rows = pyarrow.parquet.read_table(CLIPS).to_pylist()
    assert len(rows) == 7
    for row in rows:
        prepared = video.prepare(row["video"])
        assert len(prepared["stamps"]) == row["num_frames"]
        unit = video.prepare(row["video"])["unit"]
        length = float((prepared["stamps"][-1] - prepared["stamps"][0]) * unit)
        assert length == pytest.approx((row["num_frames"] - 1) / row["fps"], rel=0.02)
        for generator in (None, key(0)):
            clip = video.excerpt(prepared, generator)["pixel_values_videos"]
            assert clip.shape == (3, 8, 64, 64) and clip.min() >= 0 and clip.max() <= 1
            assert clip.std(dim=(2, 3)).min() > 0.02, "a blank frame"
            change = clip.diff(dim=1).abs().mean(dim=(0, 2, 3))
            assert 1e-4 < change.mean() < 0.2, "frames that stand still or jump"


# ---- Targets ---------------------------------------------------------------------------------------------------------


def test_target_is_that_of_videomae(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels that transformers' VideoMAE compares with, caught on their way into the loss."""
    labels = []

    class Caught(nn.MSELoss):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            labels.append(target)
            return super().forward(prediction, target)

    monkeypatch.setattr(modeling_videomae, "MSELoss", Caught)
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "hidden_size": 8}
    config = VideoMAEConfig(**sizes, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.update({"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1})
    pixels = torch.randn(2, 3, 4, 16, 16, generator=key(0))
    video = make(4, 16, 8)
    tokens = video.tokenize({"pixel_values_videos": pixels})
    hidden = video.mask(tokens, 0.5, key(0), "tube").hidden
    for normalize in (True, False):
        config.norm_pix_loss = normalize
        VideoMAEForPreTraining(config)(pixels.transpose(1, 2), bool_masked_pos=hidden)
        ours = make(4, 16, 8, normalize_target=normalize)
        if not normalize:  # transformers takes pixels from 0 to 1 as the plain target
            mean, std = video.statistics(pixels)
            tokens = video.tokenize({"pixel_values_videos": pixels * std + mean})
        torch.testing.assert_close(ours.target(tokens)[hidden].view_as(labels[-1]), labels[-1], atol=1e-4, rtol=1e-4)


def test_target_is_normalised_for_each_channel_by_its_unbiased_deviation() -> None:
    """Tubelets of common and of tiny spread: the latter tell where the epsilon stands, and of what."""
    spread = torch.tensor([1.0, 1e-5, 0.0])[:, None]
    video = make(2, 4, 2, image_mean=0.3, image_std=0.2)
    content = (0.1 + spread * torch.randn(2, 3, 24, generator=key(0), dtype=torch.float64)).requires_grad_()
    tokens = Tokens(content, torch.zeros(2, 3, 3), torch.ones(2, 3, dtype=torch.bool))
    target = video.target(tokens)
    assert not target.requires_grad and target.shape == content.shape
    x = content.detach().float().double().numpy().reshape(2, 3, 8, 3) * 0.2 + 0.3
    expected = (x - x.mean(axis=2, keepdims=True)) / (x.std(axis=2, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(target[:, 0].numpy(), expected.reshape(2, 3, 24)[:, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(target[:, 1].numpy(), expected.reshape(2, 3, 24)[:, 1], atol=0.1)  # rounding errors
    assert target[:, 1].std() < 0.8, "the epsilon belongs to the deviation of pixels from 0 to 1"
    assert target[:, 2].abs().max() < 0.1 and target.isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
def test_content_of_undoes_the_target(normalize: bool) -> None:
    video = make(normalize_target=normalize)
    tokens = tokens_of(video, batch=2)
    target = video.target(tokens)
    assert torch.equal(target, tokens.content) is not normalize
    torch.testing.assert_close(video.content_of(target, tokens), tokens.content, atol=1e-4, rtol=1e-4)


# ---- Views -----------------------------------------------------------------------------------------------------------


def view(video: Video, pixels: Tensor, seed: int = 0) -> View:
    return video.view({"pixel_values_videos": pixels}, key(seed))


@pytest.mark.parametrize("options", [{name: VIEWS[name]} for name in VIEWS] + [VIEWS], ids=str)
def test_all_frames_of_a_clip_are_changed_alike(options: dict[str, Any]) -> None:
    """The view of a clip shows at each time what the view of that frame alone, at all times, shows."""
    video, pixels = plain(6, 16, 8, **options), random_pixels(5, 3, 6, 16, 16)
    whole = view(video, pixels, seed=1).batch["pixel_values_videos"]
    for t in range(6):
        still = pixels[:, :, t : t + 1].expand(-1, -1, 6, -1, -1)
        seen = view(video, still, seed=1).batch["pixel_values_videos"]
        torch.testing.assert_close(seen, whole[:, :, t : t + 1].expand_as(seen))
    assert whole.shape == pixels.shape and not torch.equal(whole, pixels)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_one_frame_is_that_of_an_image(name: str) -> None:
    """The same key does to a frame what it does to an image."""
    options, frames = {name: VIEWS[name]}, random_pixels(4, 3, 16, 16)
    video, image = plain(1, 16, 8, tubelet_size=1, **options), Image(16, 8, 3, 0.0, 1.0, **options)
    seen = view(video, frames[:, :, None]).batch["pixel_values_videos"][:, :, 0]
    torch.testing.assert_close(seen, image.view({"pixel_values": frames}, key(0)).batch["pixel_values"])


def test_clips_of_a_batch_are_changed_differently_and_parameters_are_recorded() -> None:
    video = plain(4, 16, 8, **{**VIEWS, "horizontal_flip": 0.5})
    found = view(video, random_pixels(1, 3, 4, 16, 16).expand(6, -1, -1, -1, -1))
    out = found.batch["pixel_values_videos"]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(out, 2))
    assert {name.split("_")[0] for name in found.parameters} == {"crop", "flip", "color"}
    assert all(len(value) == 6 for value in found.parameters.values())


def test_recorded_flips_reproduce_the_view() -> None:
    pixels = random_pixels(400, 1, 2, 4, 8)
    found = view(plain(2, (4, 8), 4, 1, horizontal_flip=0.3), pixels)
    flipped = found.parameters["flip_batch_prob"] > 0.5
    expected = torch.where(flipped.view(-1, 1, 1, 1, 1), pixels.flip(-1), pixels)
    assert torch.equal(found.batch["pixel_values_videos"], expected)
    assert abs(flipped.float().mean().item() - 0.3) < 5 * (0.3 * 0.7 / 400) ** 0.5


def test_recorded_crops_reproduce_the_view() -> None:
    """On frames whose pixels tell their column and their row a crop shows where it begins and ends."""
    y, x = torch.meshgrid(torch.arange(32).float(), torch.arange(48).float(), indexing="ij")
    pixels = torch.stack([x, y])[None, :, None].expand(40, -1, 3, -1, -1)
    found = view(plain(3, (32, 48), 8, 2, tubelet_size=1, crop_scale=(0.25, 0.5)), pixels)
    low, high = found.parameters["crop_src"][:, 0], found.parameters["crop_src"][:, 2]  # (x, y) of opposite corners
    for channel, length in ((0, 48), (1, 32)):
        line = torch.linspace(0, 1, length)
        expected = low[:, channel, None] + (high - low)[:, channel, None] * line
        out = found.batch["pixel_values_videos"][:, channel]
        shown = out if channel == 0 else out.transpose(2, 3)
        torch.testing.assert_close(shown, expected[:, None, None].expand_as(shown), atol=1e-2, rtol=0)


def test_view_depends_on_its_key_alone_and_leaves_the_global_state() -> None:
    video, pixels = make(4, 16, 8, **VIEWS), random_pixels(3, 3, 4, 16, 16)
    before, views = pixels.clone(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"], random.getstate()
        views.append(view(video, pixels, seed=7).batch["pixel_values_videos"])
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
        assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], states[1])
    assert torch.equal(*views) and torch.equal(pixels, before)
    assert not torch.equal(view(video, pixels, seed=8).batch["pixel_values_videos"], views[0])


def test_views_are_those_of_pixels_from_0_to_1() -> None:
    """Colours are changed before pixels are normalised again."""
    pixels = random_pixels(4, 3, 4, 16, 16)
    video = make(4, 16, 8, **VIEWS)
    mean, std = video.statistics(pixels)
    seen = view(video, (pixels - mean) / std).batch["pixel_values_videos"]
    expected = view(plain(4, 16, 8, **VIEWS), pixels).batch["pixel_values_videos"]
    torch.testing.assert_close(seen * std + mean, expected, atol=1e-4, rtol=1e-4)


def test_view_with_all_off_is_the_sample() -> None:
    pixels = random_pixels(2, 3, 4, 8, 8)
    found = view(make(), pixels)
    assert torch.equal(found.batch["pixel_values_videos"], pixels) and not found.parameters


# ---- Baseline and pictures -------------------------------------------------------------------------------------------


def test_raw_features_are_pixels_or_small_grey_frames() -> None:
    small = random_pixels(2, 1, 8, 32, 32)
    assert torch.equal(make(8, 32, 8, 1).raw_features({"pixel_values_videos": small}), small.flatten(1))
    large = random_pixels(2, 3, 4, 96, 64)
    found = make(4, (96, 64), 8).raw_features({"pixel_values_videos": large})
    expected = np.zeros((2, 4, 16, 16))
    for t, row, column in itertools.product(range(4), range(16), range(16)):
        box = large[:, :, t, 6 * row : 6 * row + 6, 4 * column : 4 * column + 4]
        expected[:, t, row, column] = box.mean(dim=(1, 2, 3))
    np.testing.assert_allclose(found.numpy(), expected.reshape(2, -1), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("frames", "layout"), [(2, [[0]]), (6, [[0, 2, 4]]), (8, [[0, 2], [4, 6]]), (20, [[0, 6], [12, 18]])]
)
def test_picture_shows_frames_side_by_side(frames: int, layout: list[list[int]], channels: int) -> None:
    video = make(frames, (8, 12), (4, 3), channels, image_mean=0.4, image_std=0.3)
    pixels = torch.rand(2, channels, frames, 8, 12, generator=key(0))
    tokens = video.tokenize({"pixel_values_videos": (pixels - 0.4) / 0.3})
    shown = pixels[:, [0, 1, 2] if channels >= 3 else [0, 0, 0]].permute(0, 2, 3, 4, 1)
    expected = torch.cat([torch.cat([shown[:, t] for t in row], dim=2) for row in layout], dim=1)
    torch.testing.assert_close(video.picture(tokens), expected)
    tokens.content = tokens.content * 10
    tokens.content[:, 0] = torch.nan
    picture = video.picture(tokens)
    blank = torch.zeros(picture.shape[1:3], dtype=torch.bool)
    blank[:4, :3] = True
    assert torch.equal(picture[0].isnan().all(dim=-1), blank)
    assert picture[0][~blank].min() >= 0 and picture[0][~blank].max() <= 1


def test_gifs_are_videos() -> None:
    file = io.BytesIO()
    frames = [PILImage.fromarray(frame) for frame in levels(6, 8, 8)[..., 0]]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=[100, 100, 100, 500, 100, 100])
    found = clip_of(plain(6), file.getvalue()).mean(dim=(0, 2, 3)) * 255 / STEP
    assert found.round().tolist() == [0, 1, 2, 3, 4, 5]
    timed = clip_of(plain(10, frame_rate=10.0), file.getvalue()).mean(dim=(0, 2, 3)) * 255 / STEP
    assert timed.round().tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 4, 5]
