"""Tests of ``mmssl embed``: what is in the file is what the model says of each sample, under its own name."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from transformers import AutoModel, AutoProcessor

from mmssl.cli import COMMANDS
from mmssl.data import DataArguments
from mmssl.data.guided import clusters_of
from mmssl.evaluation import embed
from mmssl.evaluation.parts import Parts
from mmssl.modalities.image import Image
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.processing import MMSSLFeatureExtractor, MMSSLProcessor

IMAGES: dict[str, dict[str, Any]] = {"image": {"image_size": 8, "patch_size": 4, "num_channels": 1}}


def save(path: Path, modalities: dict[str, dict[str, Any]], seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **options}
    MMSSLModel(MMSSLConfig(modalities=modalities, **shape)).save_pretrained(path)
    MMSSLProcessor(MMSSLFeatureExtractor(modalities)).save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "run", IMAGES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images, and one that cannot be read."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, kind in enumerate(("cat", "cat", "dog", "dog")):
        (tmp_path / "images" / kind).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{number}.png")
    (tmp_path / "images" / "cat" / "0b.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_each_embedding_is_the_models_of_the_sample_of_that_name(
    checkpoint: Path, folder: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside transformers' own way; the unreadable image is left out, and no other one stands under its name."""
    output = tmp_path / f"found.{ending}"
    flags = ["--data", str(folder), "--data.on_error", "skip", "--output", str(output)]
    COMMANDS["embed"]([str(checkpoint), *flags])
    assert "1 of 5 samples could not be read and are left out" in capsys.readouterr().out
    found = np.load(output) if ending == "npz" else datasets.Dataset.from_parquet(str(output)).to_dict()
    assert [Path(name).name for name in found["name"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert list(found["label"]) == ["cat", "cat", "dog", "dog"]
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(**processor([str(name) for name in found["name"]])).pooler_output
    np.testing.assert_allclose(np.array(found["embedding"]), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("found.csv", r"output: found .*found\.csv; expected a file that ends in \.parquet, \.npz, \.npy"),
        ("none/found.npz", "output: there is no folder .*none; make it first"),
    ],
)
def test_bad_outputs_are_refused_before_anything_is_computed(tmp_path: Path, output: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed("no-such-checkpoint", DataArguments("digits"), tmp_path / output)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Three clips of different lengths."""
    (tmp_path / "sounds").mkdir()
    rng = np.random.default_rng(0)
    for number, length in enumerate((3000, 8000, 5000)):
        soundfile.write(tmp_path / "sounds" / f"{number}.wav", rng.normal(0, 0.1, length), 16_000)
    return tmp_path / "sounds"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Shards of 40 and 30 labelled images; embedded by 8 in a batch and 2 batches in a part, these are five parts."""
    rng = np.random.default_rng(1)
    (tmp_path / "shards").mkdir()
    for shard, count in enumerate((40, 30)):
        rows = {
            "image": list(rng.random((count, 8, 8), dtype=np.float32)),
            "label": rng.choice(["cat", "dog"], count),
        }
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "shards" / f"{shard}.parquet"))
    return tmp_path / "shards"


SMALL: dict[str, Any] = {"batch_size": 8, "save_steps": 2}


def test_all_tokens_of_samples_of_different_lengths(tmp_path: Path, sounds: Path) -> None:
    """Each as transformers encodes it alone; class and register tokens are left out."""
    run = save(tmp_path / "run", {"speech": {}}, class_token=True, num_register_tokens=1)
    path = embed(run, DataArguments(str(sounds)), tmp_path / "tokens.parquet", pooling="tokens")
    found = pq.read_table(path)
    model, processor = AutoModel.from_pretrained(run), AutoProcessor.from_pretrained(run)
    lengths = set()
    for name, tokens in zip(found["name"].to_pylist(), found["embedding"].to_pylist(), strict=True):
        with torch.no_grad():
            expected = model(**processor(name)).last_hidden_state[0, 2:]
        lengths.add(len(tokens))
        np.testing.assert_allclose(np.array(tokens), expected.numpy(), atol=1e-4)
    assert len(lengths) == 3


def test_class_token(tmp_path: Path, folder: Path) -> None:
    run = save(tmp_path / "run", IMAGES, class_token=True)
    (folder / "cat" / "0b.png").unlink()
    found = np.load(embed(run, DataArguments(str(folder)), tmp_path / "cls.npz", pooling="cls"))
    model, processor = AutoModel.from_pretrained(run), AutoProcessor.from_pretrained(run)
    with torch.no_grad():
        expected = model(**processor([str(name) for name in found["name"]])).last_hidden_state[:, 0]
    np.testing.assert_allclose(found["embedding"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("layers", [["1", "2"], ["all"]])
@pytest.mark.parametrize("ending", ["parquet", "npz", "npy"])
def test_hidden_layers(checkpoint: Path, folder: Path, tmp_path: Path, layers: list[str], ending: str) -> None:
    """By transformers' own hidden states, means over the four patches; the last one is the output."""
    (folder / "cat" / "0b.png").unlink()
    output = tmp_path / f"layers.{ending}"
    COMMANDS["embed"]([str(checkpoint), "--data", str(folder), "--output", str(output), "--layers", *layers])
    names = pq.read_table(tmp_path / "layers.names.parquet")["name"].to_pylist() if ending == "npy" else None
    wanted = [1, 2] if layers == ["1", "2"] else [0, 1, 2]
    if ending == "npy":
        found = np.load(output)
        assert found.shape == (4, len(wanted), 16)
    else:
        columns = np.load(output) if ending == "npz" else pq.read_table(output).to_pydict()
        assert set(columns) == {"name", "label", *(f"layer_{number}" for number in wanted)}
        names = [str(name) for name in columns["name"]]
        found = np.stack([np.array(columns[f"layer_{number}"]) for number in wanted], axis=1)
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        out = model(**processor(names), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    expected = [*(state.mean(dim=1) for state in out.hidden_states[:2]), out.last_hidden_state.mean(dim=1)]
    for column, number in enumerate(wanted):
        np.testing.assert_allclose(found[:, column], expected[number].numpy(), atol=1e-5)


def test_npy_has_the_embeddings_and_a_file_beside_it_the_names(checkpoint: Path, table: Path, tmp_path: Path) -> None:
    data = DataArguments(str(table))
    found = np.load(embed(checkpoint, data, tmp_path / "e.npy", **SMALL))
    other = np.load(embed(checkpoint, data, tmp_path / "e.npz", **SMALL), allow_pickle=False)
    names = pq.read_table(tmp_path / "e.names.parquet").to_pydict()
    assert found.dtype == np.float32 and np.array_equal(found, other["embedding"])
    assert names["name"] == other["name"].tolist() and names["label"] == other["label"].tolist()
    assert len(set(names["name"])) == 70 and not (tmp_path / "e.npy.parts").exists()


def test_what_is_written_guides_batches(checkpoint: Path, table: Path, tmp_path: Path) -> None:
    data = DataArguments(str(table))
    one, other = (
        clusters_of(str(embed(checkpoint, data, tmp_path / name, **SMALL)), 70, 4, seed=0)
        for name in ("e.parquet", "e.npz")
    )
    assert torch.equal(one, other) and set(one.tolist()) == set(range(4))


@contextmanager
def killed(monkeypatch: pytest.MonkeyPatch, parts: int) -> Iterator[None]:
    """What is done in here ends when so many parts are whole, before the next one is written."""
    add = Parts.add

    def stopped(self: Parts, *arguments: Any) -> None:
        if len(self.paths) == parts:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Parts, "add", stopped)
        yield


def spy_on_preparation(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The samples that are prepared from now on, in order."""
    seen: list[Any] = []
    prepare = Image.prepare

    def recorded(self: Image, sample: Any) -> dict[str, torch.Tensor]:
        seen.append(sample)
        return prepare(self, sample)

    monkeypatch.setattr(Image, "prepare", recorded)
    return seen


KILLED = """
import os, signal, sys
import pyarrow.parquet as pq
from mmssl.data import DataArguments
from mmssl.evaluation import embed

write, written = pq.write_table, []

def write_half(table, path):
    written.append(path)
    if len(written) == 4:
        path.write_bytes(b"PAR1 and no more")
        os.kill(os.getpid(), signal.SIGKILL)
    write(table, path)

pq.write_table = write_half
embed(sys.argv[1], DataArguments(sys.argv[2]), sys.argv[3], batch_size=8, save_steps=2)
"""


@pytest.mark.parametrize("ending", [pytest.param("parquet", marks=pytest.mark.slow), "npz", "npy"])
def test_a_killed_run_goes_on_and_writes_the_same_file(
    checkpoint: Path, table: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was whole is not encoded again. One is really killed, while it writes the fourth of five parts."""
    data, whole, output = DataArguments(str(table)), tmp_path / f"whole.{ending}", tmp_path / f"killed.{ending}"
    embed(checkpoint, data, whole, **SMALL)
    if ending == "parquet":
        command = [sys.executable, "-c", KILLED, str(checkpoint), str(table), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    else:
        with killed(monkeypatch, 3):
            embed(checkpoint, data, output, **SMALL)
    parts = tmp_path / f"killed.{ending}.parts"
    assert len(list(parts.glob("part_*"))) == 3 and not output.exists()

    encoded: list[int] = []
    forward = MMSSLModel.forward

    def counted(self: MMSSLModel, **batch: Any) -> Any:
        encoded.append(len(batch["pixel_values"]))
        return forward(self, **batch)

    monkeypatch.setattr(MMSSLModel, "forward", counted)
    embed(checkpoint, data, output, **SMALL)
    assert sum(encoded) == 70 - 3 * 16
    assert not parts.exists()
    if ending == "npz":  # a zip file has dates in it
        one, other = np.load(whole), np.load(output)
        assert {name: one[name].tobytes() for name in one} == {name: other[name].tobytes() for name in other}
    else:
        assert whole.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_read_in_order_and_goes_on(
    checkpoint: Path, table: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows as without streaming, of both shards."""
    data = DataArguments(str(table))
    expected = np.load(embed(checkpoint, data, tmp_path / "e.npz", **SMALL))
    stream = replace(data, streaming=True)
    options = SMALL | {"dataloader_num_workers": workers}
    with killed(monkeypatch, 3):
        embed(checkpoint, stream, tmp_path / "s.npz", **options)
    prepared = spy_on_preparation(monkeypatch)
    found = np.load(embed(checkpoint, stream, tmp_path / "s.npz", **options))
    assert {name: found[name].tobytes() for name in found} == {name: expected[name].tobytes() for name in expected}
    assert workers or len(prepared) == 70 - 3 * 16  # what was whole is read past


def test_workers_change_nothing(checkpoint: Path, table: Path, tmp_path: Path) -> None:
    data = DataArguments(str(table))
    one = embed(checkpoint, data, tmp_path / "one.parquet", **SMALL)
    other = embed(checkpoint, data, tmp_path / "other.parquet", dataloader_num_workers=2, **SMALL)
    assert one.read_bytes() == other.read_bytes()


def test_samples_are_read_once_and_unreadable_ones_left_out_on_the_way(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The unreadable one ends no run that goes on after it either: its place is counted."""
    seen = spy_on_preparation(monkeypatch)
    data = DataArguments(str(folder), on_error="skip")
    with killed(monkeypatch, 3):
        embed(checkpoint, data, tmp_path / "e.npz", batch_size=1, save_steps=1)
    found = np.load(embed(checkpoint, data, tmp_path / "e.npz", batch_size=1, save_steps=1))
    assert [Path(name).name for name in found["name"]] == ["0.png", "1.png", "2.png", "3.png"]
    # The part that was lost is read again.
    assert [Path(sample).name for sample in seen] == ["0.png", "0b.png", "1.png", "2.png", "2.png", "3.png"]
    assert "1 of 5 samples could not be read and are left out" in capsys.readouterr().out


def test_unreadable_samples_end_a_run_that_may_not_skip_them(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^[^\n]*0b\.png: not a readable image[^\n]*$"):
            embed(checkpoint, DataArguments(str(folder)), tmp_path / "e.npz", dataloader_num_workers=workers)


def test_nothing_readable(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 5 samples could be read; the first is .*0\.png: not a readable"):
        embed(checkpoint, DataArguments(str(folder), on_error="skip"), tmp_path / "e.npz")
    assert not (tmp_path / "e.npz.parts").exists()


def test_parts_of_another_model_or_other_data_or_flags_are_not_joined(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time the error says what differs, and nothing else."""
    (folder / "cat" / "0b.png").unlink()
    data, output = DataArguments(str(folder)), tmp_path / "e.npz"
    few: dict[str, Any] = {"batch_size": 1, "save_steps": 1}
    with killed(monkeypatch, 2):
        embed(checkpoint, data, output, **few)

    def refused(message: str, checkpoint: Path = checkpoint, data: DataArguments = data, **options: Any) -> None:
        with pytest.raises(ValueError, match=rf"e\.npz\.parts has 2 parts .*of which differ: {message}\. Give"):
            embed(checkpoint, data, output, **(few | options))

    refused("batch_size: 1 in the parts, 2 now", batch_size=2)
    refused("pooling: 'mean' in the parts, 'max' now", pooling="max")
    refused(r"layers: \[\] in the parts, \[1\] now", layers=[1])
    refused("the model's weights", checkpoint=save(tmp_path / "other", IMAGES, seed=1))
    refused("data.max_samples: None .*; samples: 4 .* 3 now; names or labels.*", data=replace(data, max_samples=3))
    changed = folder / "dog" / "3.png"
    before, content = changed.stat(), changed.read_bytes()
    changed.write_bytes((folder / "dog" / "2.png").read_bytes())
    refused("sizes or dates of files")
    (folder / "cat" / "1b.png").write_bytes(changed.read_bytes())
    refused("samples: 4 in the parts, 5 now; names or labels of samples; sizes or dates of files")
    assert before.st_mtime_ns != changed.stat().st_mtime_ns

    model = AutoModel.from_pretrained(checkpoint)
    model.config.layer_norm_eps = 1e-3
    model.save_pretrained(tmp_path / "eps")
    (folder / "cat" / "1b.png").unlink()
    changed.write_bytes(content)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused("the model's config", checkpoint=tmp_path / "eps")
    assert not output.exists()


@pytest.mark.parametrize(
    ("most", "what", "parts"),
    [(2_500, r"samples 0 to 16 to .*part_000000\.parquet", 0), (8_000, r"all samples to .*e\.npz", 5)],
)
def test_a_full_disk_is_one_error_and_what_is_whole_is_kept(
    checkpoint: Path, table: Path, tmp_path: Path, most: int, what: str, parts: int
) -> None:
    """A limit on the size of files that a part or the joined file is above; then the same call without it."""
    data, output = DataArguments(str(table)), tmp_path / "e.npz"
    expected = np.load(embed(checkpoint, data, tmp_path / "whole.npz", **SMALL))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^could not write {what} .*from the {parts} whole parts in .*parts$"):
            embed(checkpoint, data, output, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list((tmp_path / "e.npz.parts").glob("part_*"))) == parts and not output.exists()
    found = np.load(embed(checkpoint, data, output, **SMALL))
    assert np.array_equal(found["embedding"], expected["embedding"])
    assert not (tmp_path / "e.npz.parts").exists()


def test_what_else_lies_in_the_folder_of_the_parts_stays(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "e.npz.parts").mkdir()
    (tmp_path / "e.npz.parts" / "mine.txt").write_text("mine")
    embed(checkpoint, DataArguments(str(folder), on_error="skip"), tmp_path / "e.npz")
    assert [path.name for path in (tmp_path / "e.npz.parts").iterdir()] == ["mine.txt"]


MEMORY = """
import json, resource, sys
from mmssl.data import DataArguments
from mmssl.evaluation import embed

peaks = []
for count in (200, 5_000, 20_000):
    embed(sys.argv[1], DataArguments(sys.argv[2], max_samples=count), f"{sys.argv[3]}/{count}.parquet",
          pooling="tokens", batch_size=128, save_steps=4)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    """All embeddings of 20,000 samples are 41 MB: 16 tokens of 32 numbers each."""
    run = save(
        tmp_path / "run",
        {"image": {"image_size": 8, "patch_size": 2, "num_channels": 1}},
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "pixels.npz", image=pixels)
    command = [sys.executable, "-c", MEMORY, str(run), str(tmp_path / "pixels.npz"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    _, some, many = json.loads(done.stdout)
    assert pq.read_metadata(tmp_path / "20000.parquet").num_rows == 20_000
    assert (many - some) * 1024 < 12e6, f"{some} kB of memory for 5,000 samples, {many} kB for 20,000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "e.npz", "pooling": "tokens"}, r"pooling: .*\.npz cannot hold; use \.parquet"),
        ({"batch_size": 0}, "batch_size: found 0; expected at least 1"),
        ({"save_steps": 0}, "save_steps: found 0; expected at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: found -1; expected at least 0"),
        ({"pooling": "cls"}, "pooling: found cls, but the encoder has no class token"),
        ({"layers": [3]}, "layers: found 3; expected some of 0 to 2, or all"),
        ({"layers": [-1]}, "layers: found -1; expected some of 0 to 2, or all"),
    ],
)
def test_wrong_flags(checkpoint: Path, table: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    output = tmp_path / options.pop("output", "e.parquet")
    with pytest.raises(ValueError, match=message):
        embed(checkpoint, DataArguments(str(table)), output, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "label=cat"}, "data.filter: a stream has no such choice"),
        ({"source": "digits"}, "data.streaming: digits is no table"),
        ({"label_column": "kind"}, "data.label_column: expected kind; found the columns image, label"),
    ],
)
def test_wrong_streams(checkpoint: Path, table: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(checkpoint, replace(DataArguments(str(table), streaming=True), **options), tmp_path / "e.npz")
    with pytest.raises(ValueError, match="dataloader_num_workers: one process reads a stream"):
        embed(checkpoint, DataArguments(str(table), streaming=True), tmp_path / "e.npz", dataloader_num_workers=2)


def test_flatten_of_samples_of_different_lengths(tmp_path: Path, sounds: Path) -> None:
    run = save(tmp_path / "run", {"speech": {}})
    with pytest.raises(ValueError, match="pooling: found flatten, and samples of different lengths"):
        embed(run, DataArguments(str(sounds)), tmp_path / "e.npz", pooling="flatten", batch_size=1)
