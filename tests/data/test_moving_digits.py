"""The built-in moving digits: the same ones everywhere, whose middle frame says nothing about the motion."""

import itertools
import pickle
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from mmssl.data.moving_digits import DIRECTIONS, PATHS, MovingDigits, coverage, digit_images
from mmssl.modalities.video import Video

SCREEN = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}  # (y, x), rows counted downwards


@lru_cache
def clips(split: str, num_frames: int = 8) -> np.ndarray:
    return np.stack(list(MovingDigits(split, num_frames=num_frames)))


def test_every_combination_of_labels_is_as_frequent() -> None:
    for split, size in (("train", 1920), ("test", 480)):
        made = [MovingDigits(split, label) for label in ("direction", "speed", "digit")]
        assert [len(each.classes) for each in made] == [8, 3, 10] and {len(each) for each in made} == {size}
        combinations, count = np.unique(np.stack([each.labels for each in made]), axis=1, return_counts=True)
        assert combinations.shape == (3, 240) and set(count) == {size // 240}
    assert MovingDigits("test").classes == list(DIRECTIONS)


def test_each_clip_is_always_the_same_and_unlike_the_others() -> None:
    train, test = MovingDigits("train"), pickle.loads(pickle.dumps(MovingDigits("test")))
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    first = [train[index] for index in range(10)]
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    for index in (9, 3):  # in any order
        assert np.array_equal(MovingDigits("train", "digit")[index], first[index])
        assert not np.array_equal(test[index], first[index])
    assert first[0].shape == (8, 32, 32) and first[0].dtype == np.uint8
    assert len({clip.tobytes() for clip in clips("train")}) == 1920
    with pytest.raises(IndexError):
        test[480]


def test_splits_show_different_images() -> None:
    train, test = (
        {image.tobytes() for images in digit_images(split) for image in images} for split in ("train", "test")
    )
    assert len(train) + len(test) == 1797 and not train & test


def test_digits_move_as_their_labels_say() -> None:
    """The centre of mass goes in a straight line, so far in each step; the image stays what it is."""
    for split in ("train", "test"):
        frames = clips(split).astype(float)
        mass = frames.sum(axis=(2, 3))
        place = np.arange(32)
        y, x = (frames.sum(axis=3) @ place) / mass, (frames.sum(axis=2) @ place) / mass
        step = np.stack([y, x], axis=-1)[:, 1:] - np.stack([y, x], axis=-1)[:, :-1]
        direction, speed = MovingDigits(split, "direction"), MovingDigits(split, "speed")
        for number, (way, path) in enumerate(zip(direction.labels, speed.labels, strict=True)):
            wanted = np.sum([SCREEN[word] for word in direction.classes[way].split()], axis=0).astype(float)
            wanted *= PATHS[speed.classes[path]] / 7 / np.linalg.norm(wanted)
            assert np.abs(step[number] - wanted).max() < 0.03
        assert (mass.max(axis=1) / mass.min(axis=1)).max() < 1.01  # nothing leaves the frame


def test_pixels_are_means_of_a_bilinear_interpolation() -> None:
    image = digit_images("train")[3][0]
    centres = np.array([[16.0, 16.0], [10.3, 20.75]])
    y, x = (coverage(centres[:, axis]) for axis in (0, 1))
    fine = (np.arange(32 * 16) + 0.5) / 16
    for frame, (top, left) in zip(y @ image @ x.swapaxes(1, 2), centres - 6, strict=True):  # 12 pixels large
        grid = np.meshgrid(*((fine - start) / 1.5 - 0.5 for start in (top, left)), indexing="ij")
        drawn = map_coordinates(image, grid, order=1, mode="grid-constant")
        np.testing.assert_allclose(frame, drawn.reshape(32, 16, 32, 16).mean(axis=(1, 3)), atol=0.02)


@pytest.mark.parametrize(("label", "chance", "least"), [("direction", 1 / 8, 0.5), ("speed", 1 / 3, 0.5)])
def test_the_motion_is_in_no_single_middle_frame(label: Any, chance: float, least: float) -> None:
    """A probe of the middle one of nine frames guesses; one of all frames does not."""
    labels = [MovingDigits(split, label).labels for split in ("train", "test")]
    frames = [clips(split, 9) / 255 for split in ("train", "test")]
    spread = (chance * (1 - chance) / 480) ** 0.5
    middle = [part[:, 4].reshape(len(part), -1) for part in frames]
    for probe in (RidgeClassifier(100.0), KNeighborsClassifier(10)):
        assert probe.fit(middle[0], labels[0]).score(middle[1], labels[1]) < chance + 4 * spread
    whole = [part[:, ::4].reshape(len(part), -1) for part in frames]
    assert RidgeClassifier(100.0).fit(whole[0], labels[0]).score(whole[1], labels[1]) > least


def test_the_video_modality_reads_them() -> None:
    video = Video(8, frame_stride=1, image_size=32, patch_size=8, num_channels=1, image_mean=0.0, image_std=1.0)
    clip = MovingDigits("train")[5]
    found = video.excerpt(video.prepare(clip), None)["pixel_values_videos"]
    np.testing.assert_allclose(found[0].numpy(), clip / 255, atol=1e-6)


def test_more_frames_show_the_same_path() -> None:
    for index, count in itertools.product((3, 100), (15, 22)):  # every second, and every third, frame is one of eight
        some = MovingDigits("test", num_frames=count)[index][:: (count - 1) // 7]
        assert np.abs(some.astype(int) - MovingDigits("test")[index]).max() <= 1


@pytest.mark.parametrize("options", [{"split": "validation"}, {"label": "colour"}, {"num_frames": 0}], ids=str)
def test_what_there_is_not_is_refused(options: dict[str, Any]) -> None:
    value = next(iter(options.values()))
    with pytest.raises(ValueError, match=rf"moving digits: found .*{value}.*expected train or test; direction, speed"):
        MovingDigits(**{"split": "train", **options})
