"""Where samples come from: folders, parquet files, Hub data sets (never reached here) and what the packages bring."""

import io
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from mmssl.data import DataArguments, Samples, load_samples
from mmssl.modalities.base import Modality
from mmssl.modalities.image import Image
from mmssl.modalities.speech import Speech
from mmssl.samples import Rows

datasets = pytest.importorskip("datasets")

IMAGE = Image(image_size=4, patch_size=2, num_channels=1, image_mean=0.0, image_std=1.0)
NAMES = ["cat", "dog", "emu"]
LABELS = [1, 0, 2, 1, 0, 2]
YEARS = [1998, 1998, 1999, 1999, 2000, 2000]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cached with the test, and nothing asks the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def picture(grey: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("L", (4, 4), grey).save(file, format="PNG")
    return file.getvalue()


def greys(samples: Samples) -> list[int]:
    """The grey of each sample, through the modality."""
    return [round(255 * float(IMAGE.prepare(value)["pixel_values"].mean())) for value in samples.values]


def folder_of(root: Path, files: dict[str, int]) -> Path:
    for name, grey in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(grey))
    return root


def table(count: int = 6, first: int = 0, **columns: Any) -> Any:
    """Images whose grey is ten times their row, with class labels and years."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "year": datasets.Value("int32")}
    )
    images = [{"bytes": picture(10 * row), "path": None} for row in range(first, first + count)]
    values = {"image": images, "label": LABELS[:count], "year": YEARS[:count]} | columns
    return datasets.Dataset.from_dict(values, features=features)


def load(source: Path | str, **arguments: Any) -> Samples:
    return load_samples(DataArguments(source=str(source), **arguments), IMAGE)


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path: Path) -> None:
    """Labels are the first sub-folder's, files go by name, any case of the ending counts, other files do not."""
    files = {"dog/b.PNG": 20, "dog/a.png": 10, "cat/z.png": 0, "emu/deep/er/x.jpg.png": 30, "emu/a.Png": 25}
    folder = folder_of(tmp_path / "data", files)
    (folder / "readme.txt").write_text("no image")
    (folder / "dog" / "notes.json").write_text("{}")
    folder_of(folder, {"dog/._a.png": 99, ".hidden.png": 99})
    samples = load(folder)
    assert greys(samples) == [0, 10, 20, 25, 30]
    assert [samples.name(i) for i in range(5)] == [
        str(folder / name) for name in ("cat/z.png", "dog/a.png", "dog/b.PNG", "emu/a.Png", "emu/deep/er/x.jpg.png")
    ]
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 1, 2, 2]
    assert list(samples.classes) == ["cat", "dog", "emu"]


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    """Notebooks and file managers leave copies in them."""
    samples = load(folder_of(tmp_path / "data", {"cat/a.png": 1, "dog/b.png": 2, ".ipynb_checkpoints/a.png": 3}))
    assert list(samples.classes) == ["cat", "dog"] and greys(samples) == [1, 2]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    samples = load(folder_of(tmp_path / "data", {"b.png": 2, "a.png": 1, "more/c.png": 3}))
    assert greys(samples) == [1, 2, 3] and samples.labels is None and not samples.classes


def test_folder_of_sound(tmp_path: Path) -> None:
    """Each modality looks for its own endings."""
    folder = folder_of(tmp_path / "data", {"a.png": 1, "b.WAV": 2, "c.flac": 3, "d.mp3": 4, "e.wav.txt": 5})
    samples = load_samples(DataArguments(source=str(folder)), Speech())
    assert [Path(value).name for value in samples.values] == ["b.WAV", "c.flac", "d.mp3"]


def test_folder_without_files_of_the_modality(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", {"a.png": 1})
    with pytest.raises(ValueError, match=r"no speech file in .*data.*ending in \.wav, \.flac.*below it"):
        load_samples(DataArguments(source=str(folder)), Speech())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image file in .*empty.*ending in \.png, \.jpg"):
        load(tmp_path / "empty")


# ---- Tables ---------------------------------------------------------------------------------------------------------


def test_parquet_with_features(tmp_path: Path) -> None:
    """Labels are numbered in the order of the class names; images arrive undecoded, as records."""
    table().to_parquet(path := tmp_path / "a.parquet")
    samples = load(path)
    assert greys(samples) == [0, 10, 20, 30, 40, 50]
    assert samples.labels is not None and samples.labels.tolist() == LABELS and list(samples.classes) == NAMES
    assert samples.values[3] == {"bytes": picture(30), "path": None}
    assert "a.parquet" in samples.name(3) and samples.name(3).endswith("row 3")


def test_parquet_of_plain_structs(tmp_path: Path) -> None:
    """Written by another library: no features, labels of text, the column named on the command line."""
    records = [{"bytes": picture(10 * row), "path": f"{row}.png"} for row in range(3)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"photo": records, "kind": ["owl", "ant", "owl"]}), path)
    samples = load(path, column="photo", label_column="kind")
    assert greys(samples) == [0, 10, 20]
    assert (
        samples.labels is not None and samples.labels.tolist() == [1, 0, 1] and list(samples.classes) == ["ant", "owl"]
    )
    assert load(path, column="photo").labels is None  # "kind" is no usual name


def test_parquet_with_sound(tmp_path: Path) -> None:
    """An audio column is not decoded by datasets, and becomes a waveform through the modality."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 1000).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format="WAV", subtype="FLOAT")
    rows = datasets.Dataset.from_dict({"audio": [{"bytes": file.getvalue(), "path": None}], "labels": [7]})
    rows.cast_column("audio", datasets.Audio()).to_parquet(path := tmp_path / "a.parquet")
    speech = Speech(rms_level=None)
    samples = load_samples(DataArguments(source=str(path)), speech)
    np.testing.assert_array_equal(speech.prepare(samples.values[0])["input_values"], wave)
    assert samples.labels is not None and samples.labels.tolist() == [0] and list(samples.classes) == ["7"]


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("label=dog", [0, 3]),
        ("label!=dog", [1, 2, 4, 5]),
        (" label != dog ", [1, 2, 4, 5]),
        ("year=1999", [2, 3]),
        ("year!=1999", [0, 1, 4, 5]),
    ],
)
def test_filter(condition: str, rows: list[int], tmp_path: Path) -> None:
    """Rows that are left keep the names of their classes."""
    table().to_parquet(path := tmp_path / "a.parquet")
    samples = load(path, filter=condition)
    assert greys(samples) == [10 * row for row in rows]
    assert samples.labels is not None
    assert [samples.classes[label] for label in samples.labels] == [NAMES[LABELS[row]] for row in rows]


def test_errors_name_the_row_of_the_file(tmp_path: Path) -> None:
    """Not the row of what a filter has left."""
    table().to_parquet(path := tmp_path / "a.parquet")
    samples = load(path, filter="label=dog")
    assert [samples.name(i).rpartition("row ")[2] for i in range(2)] == ["0", "3"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("label=cow", "no row has label=cow; found cat, dog, emu"),
        ("year!=1066", "no row has year=1066; found 1998, 1999, 2000"),
        ("colour=red", "expected COLUMN=VALUE.*image, label, year"),
        ("label", "expected COLUMN=VALUE.*image, label, year"),
    ],
)
def test_malformed_filters(condition: str, message: str, tmp_path: Path) -> None:
    table().to_parquet(path := tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        load(path, filter=condition)


def test_filter_that_leaves_nothing(tmp_path: Path) -> None:
    table(2, label=[0, 0]).to_parquet(path := tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="found no samples; check the filter 'label!=cat'"):
        load(path, filter="label!=cat")


def test_labels_that_are_not_known(tmp_path: Path) -> None:
    """The Hub writes -1 for a label that is held back: it must not take the name of the last class."""
    table(4, label=[0, -1, 1, 2]).to_parquet(path := tmp_path / "a.parquet")
    samples = load(path)
    assert samples.labels is not None
    named = [samples.classes[label] if label >= 0 else None for label in samples.labels]
    assert [named[row] for row in (0, 2, 3)] == NAMES and named[1] not in NAMES


def test_missing_labels_do_not_stop_pretraining(tmp_path: Path) -> None:
    """Labels are for probes only; a table with nulls among them can be read."""
    table(4, label=[0, None, 1, 2]).to_parquet(path := tmp_path / "a.parquet")
    assert greys(load(path)) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"column": "picture"}, "data.column: expected picture; found the columns .*image, label, year"),
        ({"label_column": "class"}, "data.label_column: expected class; found the columns .*image, label, year"),
    ],
)
def test_missing_columns(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    table().to_parquet(path := tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        load(path, **arguments)


def test_no_column_with_a_usual_name(tmp_path: Path) -> None:
    table().rename_column("image", "scan").to_parquet(path := tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data.column: expected one of image, img, pixel_values; found.*scan, label"):
        load(path)


@pytest.mark.parametrize("source", ["shard-*.parquet", "", "."], ids=["pattern", "folder", "folder with a dot"])
def test_several_parquet_files(source: str, tmp_path: Path) -> None:
    """A pattern, or all in a folder, one after the other by name."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for number, first in ((2, 3), (1, 0)):
        table(3, first, label=LABELS[first : first + 3]).to_parquet(folder / f"shard-{number}.parquet")
    samples = load(folder / source)
    assert greys(samples) == [0, 10, 20, 30, 40, 50]
    assert samples.labels is not None and samples.labels.tolist() == LABELS


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name, the configuration and the split reach ``load_dataset``; no image or sound column is ever decoded."""
    calls: list[tuple[Any, ...]] = []
    audio = [{"bytes": b"never decoded", "path": None}] * 6
    data = table().add_column("audio", audio).cast_column("audio", datasets.Audio(sampling_rate=8000))

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load("someone/pictures", config_name="small", split="validation[:10]")
    assert calls == [(("someone/pictures",), {"name": "small", "split": "validation[:10]", "streaming": False})]
    assert greys(samples) == [0, 10, 20, 30, 40, 50] and list(samples.classes) == NAMES
    assert samples.values[0] == {"bytes": picture(0), "path": None}
    assert "someone/pictures" in samples.name(4) and samples.name(4).endswith("row 4")
    sounds = load_samples(DataArguments(source="someone/pictures"), Speech())
    assert sounds.values[0] == audio[0]
    assert calls[1] == (("someone/pictures",), {"name": None, "split": "train", "streaming": False})


def test_hub_errors_name_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no way there")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"cannot load someone/pictures \(ConnectionError: no way there\)"):
        load("someone/pictures")


# ---- Sources that are not there, and what the packages bring --------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/nowhere", "found nothing at .*/nowhere; expected a folder"),
        ("./nowhere", "found nothing at ./nowhere; expected a folder"),
        ("{}/words.txt", "found a file at .*words.txt; expected a folder"),
        ("{}/none.parquet", "no file .*none.parquet; expected an existing parquet file"),
        ("{}/none-*.parquet", r"no file .*none-\*.parquet; expected an existing parquet file or a pattern"),
        ("{}/broken.parquet", "cannot load .*broken.parquet"),
        (None, "data.source is not set; expected a folder, parquet files"),
    ],
)
def test_missing_sources(source: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "broken.parquet").write_text("words")
    with pytest.raises(ValueError, match=message):
        load_samples(DataArguments(source=source and source.format(tmp_path)), IMAGE)


def test_digits() -> None:
    """The two splits share scikit-learn's digits out among themselves: each image with its label in one of them."""
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    data = load_digits()
    everything = Counter((image.tobytes(), label) for image, label in zip(data.images, data.target, strict=True))
    found: Counter[tuple[bytes, int]] = Counter()
    for samples in (train, test):
        assert samples.labels is not None and list(samples.classes) == list("0123456789")
        assert set(samples.labels.tolist()) == set(range(10))
        for value, label in zip(samples.values, samples.labels, strict=True):
            assert value.min() >= 0 and value.max() <= 1
            found[(value.astype(np.float64) * 16).tobytes(), label] += 1
    assert found == everything
    np.testing.assert_array_equal(load("digits").values, train.values)


@pytest.mark.parametrize("source", ["digits", "espeak_digits"])
def test_unknown_split_of_a_builtin_source(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmssl.data.espeak_digits.espeak_digits", lambda: spoken())
    with pytest.raises(ValueError, match=f"data.split: found 'valid'; {source} has the splits train and test"):
        load(source, split="valid")


def spoken() -> Any:
    """One clip of each digit by each voice, without the synthesiser."""
    from mmssl.data.espeak_digits import VOICES, EspeakDigits

    digits, voices = np.tile(np.arange(10), len(VOICES)), np.repeat(VOICES, 10)
    clips = [np.full(500, 0.001 * (number + 1), np.float32) for number in range(len(digits))]
    return EspeakDigits(clips, 22_050, digits, voices.tolist())


def test_spoken_digits_are_split_by_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    data = spoken()
    monkeypatch.setattr("mmssl.data.espeak_digits.espeak_digits", lambda: data)
    voices: dict[str, set[str]] = {}
    seen: list[int] = []
    for split in ("train", "test"):
        samples = load_samples(DataArguments(source="espeak_digits", split=split), Speech())
        clips = [round(1000 * float(record["array"][0])) - 1 for record in samples.values]
        assert samples.labels is not None and samples.labels.tolist() == [data.digits[clip] for clip in clips]
        assert {record["sampling_rate"] for record in samples.values} == {22_050}
        voices[split] = {data.voices[clip] for clip in clips}
        seen += clips
    assert sorted(seen) == list(range(240))
    assert not voices["train"] & voices["test"] and len(voices["test"]) == 6


# ---- A part of the samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("maximum", "expected"), [(2, 2), (6, 6), (100, 6), (None, 6)])
def test_max_samples(maximum: int | None, expected: int, tmp_path: Path) -> None:
    table().to_parquet(path := tmp_path / "a.parquet")
    samples = load(path, max_samples=maximum)
    assert greys(samples) == [0, 10, 20, 30, 40, 50][:expected]
    assert samples.labels is not None and samples.labels.tolist() == LABELS[:expected]


@pytest.mark.parametrize("maximum", [0, -1])
def test_max_samples_of_nothing(maximum: int) -> None:
    with pytest.raises(ValueError, match="found no samples"):
        load("digits", max_samples=maximum)


def test_select_of_select() -> None:
    """Values, names, labels and classes stay together."""
    values = [f"value {i}" for i in range(10)]
    samples = Samples(values, lambda i: f"name {i}", np.arange(10) * 11, [str(i) for i in range(110)])
    part = samples.select(np.array([7, 3, 5, 3])).select(np.array([2, 0, 1]))
    assert list(part.values) == ["value 5", "value 7", "value 3"] and len(part) == 3
    assert [part.name(i) for i in range(3)] == ["name 5", "name 7", "name 3"]
    assert part.labels is not None and part.labels.tolist() == [55, 77, 33] and part.classes is samples.classes
    unlabelled = Samples(values, str).select(np.array([4]))
    assert unlabelled.labels is None and unlabelled.values[0] == "value 4" and unlabelled.name(0) == "4"


# ---- Tables of arrays -----------------------------------------------------------------------------------------------


def archive_of(path: Path, **arrays: Any) -> Path:
    """Six grey images, ten times their row, with columns that the test names."""
    np.savez(path, images=np.full((6, 4, 4), 10, np.uint8) * np.arange(6, dtype=np.uint8)[:, None, None], **arrays)
    return path


PART = np.array(["train", "test", "train", "train", "test", "train"])
KIND = np.array([2, 0, -1, 0, 2, -1], dtype=np.int16)


def test_arrays_are_columns_and_their_names_are_classes(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.npz", label=LABELS, names=NAMES, scalar=3, few=[1, 2])
    samples = load(path, column="images")
    assert greys(samples) == [0, 10, 20, 30, 40, 50]
    assert samples.labels is not None and samples.labels.tolist() == LABELS and list(samples.classes) == NAMES
    assert samples.name(3) == f"{path}, row 3"
    text = archive_of(tmp_path / "b.npz", kind=["owl", "ant", "owl", "ant", "owl", "bee"])
    samples = load(text, column="images", label_column="kind")
    assert samples.labels is not None and samples.labels.tolist() == [2, 0, 2, 0, 2, 1]
    assert list(samples.classes) == ["ant", "bee", "owl"] and load(text, column="images").labels is None


def test_rows_without_a_label_are_left_out_only_where_labels_are_asked_for(tmp_path: Path) -> None:
    """Names of the column itself go before "names"; classes without a sample have no number."""
    path = archive_of(tmp_path / "a.npz", kind=KIND, kind_names=NAMES, names=["no", "not", "never"], part=PART)
    assert greys(load(path, column="images")) == [0, 10, 20, 30, 40, 50]
    samples = load(path, column="images", label_column="kind")
    assert greys(samples) == [0, 10, 30, 40] and [samples.name(i)[-1] for i in range(4)] == list("0134")
    assert samples.labels is not None and samples.labels.tolist() == [1, 0, 0, 1]
    assert list(samples.classes) == ["cat", "emu"]
    usual = archive_of(tmp_path / "b.npz", label=KIND, names=NAMES)
    samples = load(usual, column="images")
    assert len(samples) == 6 and samples.labels is not None
    assert [samples.classes[label] for label in samples.labels] == ["emu", "cat", "-1", "cat", "emu", "-1"]
    assert greys(load(usual, column="images", label_column="label")) == [0, 10, 30, 40]


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("part=train", [0, 3]),
        ("part != train", [1, 4]),
        ("kind=emu", [0, 4]),
        ("kind!=emu", [1, 3]),
        ("year=1999", [3]),
    ],
)
def test_filter_of_arrays(condition: str, rows: list[int], tmp_path: Path) -> None:
    """Among the rows that have a label; labels go by their names, other columns as they are."""
    path = archive_of(tmp_path / "a.npz", kind=KIND, kind_names=NAMES, part=PART, year=YEARS)
    samples = load(path, column="images", label_column="kind", filter=condition)
    assert greys(samples) == [10 * row for row in rows]
    assert samples.labels is not None and [samples.name(i)[-1] for i in range(len(samples))] == [str(r) for r in rows]
    assert [samples.classes[label] for label in samples.labels] == [NAMES[KIND[row]] for row in rows]


@pytest.mark.parametrize("label", [[0.5] * 6, [0, 1], 7], ids=["floats", "two", "one"])
def test_an_array_called_label_that_holds_no_classes_does_not_stop_pretraining(label: Any, tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.npz", label=label)
    samples = load(path, column="images")
    assert samples.labels is None and len(samples) == 6
    with pytest.raises(ValueError, match=r"data.label_column: the array label is .*each of the 6 samples"):
        load(path, column="images", label_column="label")


def test_names_that_do_not_reach_all_labels_are_not_used(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.npz", year=YEARS, names=NAMES)
    assert list(load(path, column="images", label_column="year").classes) == ["1998", "1999", "2000"]


def test_only_the_arrays_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """One that needs pickle is no trouble as long as nobody wants it; a modality's own collection goes first."""
    path = archive_of(tmp_path / "a.npz", words=np.array([{"a": 1}] * 6, dtype=object), label=LABELS)
    assert len(load(path, column="images")) == 6
    for flags in ({"column": "words"}, {"column": "images", "label_column": "words"}):
        with pytest.raises(ValueError, match="cannot read the array words"):
            load(path, **flags)

    class Own(Image):
        def collection(self, source: str) -> Samples | None:
            return Samples(["mine"], str) if source.endswith(".npz") else None

    assert load_samples(DataArguments(source=str(path)), Own()).values == ["mine"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "data.column: expected one of image, img, pixel_values; found the columns images, part, one"),
        ({"column": "x"}, "data.column: expected x; found the columns images, part, one"),
        ({"column": "one"}, "data.column: the array one of .* is one value"),
        ({"column": "images", "label_column": "kind"}, "data.label_column: expected kind; found the columns images"),
        ({"column": "images", "filter": "split=test"}, "data.filter: .*a column of images, part, one"),
        ({"column": "images", "filter": "one=3"}, "data.filter: the array one is int64 of shape"),
        ({"column": "images", "filter": "part=valid"}, "no row has part=valid; found test, train"),
    ],
)
def test_flags_that_do_not_fit_the_arrays(flags: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(archive_of(tmp_path / "a.npz", part=PART, one=3), **flags)


def test_archives_that_are_broken_or_not_there(tmp_path: Path) -> None:
    whole = archive_of(tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.npz").write_text("words")
    (tmp_path / "empty.npz").write_text("")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    for name in ("cut", "words", "empty", "one"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name}.npz .*expected an intact .npz file"):
            load(tmp_path / f"{name}.npz", column="images")
    at = whole.index(bytes([30] * 16))  # a pixel that the checksum does not agree with
    (tmp_path / "flipped.npz").write_bytes(whole[:at] + b"\x00" + whole[at + 1 :])
    with pytest.raises(ValueError, match="cannot read the array images"):
        load(tmp_path / "flipped.npz", column="images")
    for source in ("nowhere.npz", tmp_path / "nowhere.npz"):
        with pytest.raises(ValueError, match=r"no file .*nowhere.npz; expected an existing .npz file"):
            load(source)


# ---- Whole rows, and quantities -------------------------------------------------------------------------------------


class Row(Modality):
    """A sample is a whole row of a table."""

    name: ClassVar = "row"
    extensions: ClassVar = ()
    columns: ClassVar = ()


ROWS = """age,job,own,label,price
30,smith,True,yes,10.5
,baker,False,no,20.25
41,,True,yes,-3.0
52,smith,False,yes,1e3
"""
CELLS = {
    "age": [30, None, 41, 52],
    "job": ["smith", "baker", None, "smith"],
    "own": [True, False, True, False],
    "price": [10.5, 20.25, -3, 1000],
}


def rows_file(path: Path, text: str = ROWS) -> Path:
    """The rows as .csv or, by pandas, as .parquet."""
    if path.suffix == ".csv":
        path.write_text(text)
    else:
        pd.read_csv(io.StringIO(text)).to_parquet(path)
    return path


def load_rows(source: Path | str, **arguments: Any) -> Samples:
    return load_samples(DataArguments(source=str(source), **arguments), Row())


def column(samples: Samples, name: str) -> list[Any]:
    """A column row by row, None where nothing is there; the same as the column as a whole."""
    assert isinstance(samples.values, Rows)
    cells = [None if pd.isna(row[name]) else row[name] for row in samples.values]
    assert cells == [None if pd.isna(cell) else cell for cell in samples.values.columns[name]]
    return cells


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_whole_rows(ending: str, tmp_path: Path) -> None:
    """Each cell as it came, missing ones as NaN or None; the label is no part of a row."""
    path = rows_file(tmp_path / f"a{ending}")
    samples = load_rows(path)
    assert len(samples) == 4 and list(samples.values[0]) == list(CELLS)
    for name, cells in CELLS.items():
        assert column(samples, name) == cells
    assert samples.labels is not None and samples.labels.tolist() == [1, 0, 1, 1]
    assert list(samples.classes) == ["no", "yes"]
    assert samples.name(2) == f"{path}, row 2"


def test_whole_rows_of_numbers_are_arrays_of_numbers(tmp_path: Path) -> None:
    """So that a whole column can be read at once."""
    samples = load_rows(rows_file(tmp_path / "a.csv"))
    assert isinstance(samples.values, Rows)
    kinds = {name: array.dtype.kind for name, array in samples.values.columns.items()}
    assert kinds == {"age": "f", "job": "O", "own": "b", "price": "f"}


def test_named_label_column_leaves_the_rows_and_the_usual_one_stays(tmp_path: Path) -> None:
    samples = load_rows(rows_file(tmp_path / "a.csv"), label_column="job")
    assert list(samples.values[0]) == ["age", "own", "label", "price"]
    assert samples.labels is not None
    assert [samples.classes[label] for label in samples.labels] == ["smith", "baker", "None", "smith"]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_floats_are_quantities(ending: str, tmp_path: Path) -> None:
    samples = load_rows(rows_file(tmp_path / f"a{ending}"), label_column="price")
    assert samples.labels is not None and samples.labels.dtype == np.float64
    assert samples.labels.tolist() == CELLS["price"] and not samples.classes
    assert "price" not in samples.values[0] and "label" in samples.values[0]
    part = samples.select(np.array([3, 1]))
    assert part.labels is not None and part.labels.tolist() == [1e3, 20.25]


def test_integers_and_texts_are_classes(tmp_path: Path) -> None:
    text = "x,label\n1,7\n2,-3\n3,7\n"
    samples = load_rows(rows_file(tmp_path / "a.csv", text))
    assert samples.labels is not None and samples.labels.tolist() == [1, 0, 1] and list(samples.classes) == ["-3", "7"]


def test_quantities_of_images_too(tmp_path: Path) -> None:
    """Not only of whole rows; and a .csv file may list paths."""
    for row in range(3):
        (tmp_path / f"{row}.png").write_bytes(picture(10 * row))
    lines = "".join(f"{tmp_path / str(row)}.png,{row / 4}\n" for row in range(3))
    (tmp_path / "a.csv").write_text("image,label\n" + lines)
    samples = load(tmp_path / "a.csv")
    assert greys(samples) == [0, 10, 20]
    assert samples.labels is not None and samples.labels.tolist() == [0, 0.25, 0.5]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_missing_quantity_is_refused_by_its_row(ending: str, tmp_path: Path) -> None:
    path = rows_file(tmp_path / f"a{ending}")
    with pytest.raises(ValueError, match=r"data.label_column: row 1 of age is (None|nan); expected a number"):
        load_rows(path, label_column="age")


def test_missing_quantity_is_refused_by_its_row_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 of age"):
        load_rows(rows_file(tmp_path / "a.csv"), label_column="age", filter="job=baker")


def test_classes_with_gaps_do_not_stop_pretraining(tmp_path: Path) -> None:
    """Nobody has asked for labels: a column of the usual name is there, with classes for some rows only."""
    assert column(load_rows(rows_file(tmp_path / "a.csv", "x,label\n1,7\n2,\n3,8\n")), "x") == [1, 2, 3]


def test_whole_rows_of_several_files(tmp_path: Path) -> None:
    """A folder of .csv files or of .parquet files, or a pattern, in the order of their names."""
    for ending in (".csv", ".parquet"):
        folder = tmp_path / ending
        folder.mkdir()
        for number in (2, 1):
            rows_file(folder / f"part-{number}{ending}", f"x,label\n{number},a\n{10 * number},b\n")
        for source in (folder, folder / f"part-*{ending}"):
            samples = load_rows(source)
            assert column(samples, "x") == [1, 10, 2, 20]
            assert samples.labels is not None and samples.labels.tolist() == [0, 1, 0, 1]


def test_whole_rows_are_filtered_and_cut_with_their_labels_and_names(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.csv")
    samples = load_rows(path, filter="label=yes", max_samples=2)
    assert column(samples, "age") == [30, 41] and samples.labels is not None and samples.labels.tolist() == [0, 0]
    assert [samples.name(i) for i in range(2)] == [f"{path}, row 0", f"{path}, row 2"]


def test_whole_rows_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"x": [1.5, 2.5], "label": ["b", "a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    samples = load_rows("someone/table")
    assert list(samples.values) == [{"x": 1.5}, {"x": 2.5}]
    assert samples.labels is not None and samples.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("a.csv", {"column": "age"}, "data.column: found age; a sample of row is a whole row"),
        ("a.csv", {"label_column": "sex"}, "data.label_column: expected sex; found the columns age, job, own, label"),
        ("a.csv", {"filter": "sex=f"}, "data.filter.*expected COLUMN=VALUE.*age, job, own, label"),
        ("a.npz", {}, r"found .*a.npz; expected a table of whole rows: \.parquet or \.csv"),
        ("empty", {}, r"found no table in .*empty; expected \.parquet or \.csv files"),
        ("none.csv", {}, "no file .*none.csv; expected an existing csv file or a pattern"),
        ("none-*.csv", {}, r"no file .*none-\*.csv; expected an existing csv file or a pattern"),
        ("blank.csv", {}, "cannot load .*blank.csv"),
        ("head.csv", {}, "cannot load .*head.csv.*no data"),
    ],
)
def test_tables_that_are_no_rows(source: str, arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    rows_file(tmp_path / "a.csv")
    archive_of(tmp_path / "a.npz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.csv").write_text("")
    (tmp_path / "head.csv").write_text("age,job\n")
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / source, **arguments)


def test_folder_of_tables_is_none_of_images(tmp_path: Path) -> None:
    rows_file(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"no image file in .*ending in \.png"):
        load(tmp_path)


def test_a_cache_of_less_than_nothing() -> None:
    with pytest.raises(ValueError, match=r"data.cache_mb: found -1; expected megabytes, or 0"):
        DataArguments(cache_mb=-1)
