"""How fast samples of each modality are read, beside how fast a training step uses them up.

    python benchmarks/input_rates.py --threads 2 --output docs/input_rates.json
    python benchmarks/input_rates.py --modality "[image, video]" --samples 8 --seconds 1

Files of common sizes are made from a seed. Each stage is timed alone on one thread: prepare (decoding and the excerpt
too), collate, and a view, which is made in the step where the objective wants views. Then the loop's own loader with 1
and 2 workers, which only takes batches; a step, forward, backward and AdamW on one batch in memory; and a run, whose
log says which share of its time it waited for batches. Files are small and few: they come from the system's memory, not
from a disk.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jsonargparse import CLI
from peer_steps import STEPS, reconstruction
from rich.console import Console
from rich.table import Table

from mmssl.data import DataArguments, load_samples
from mmssl.discovery import options_of
from mmssl.encoder import EncoderConfig
from mmssl.modalities.base import Modality
from mmssl.modalities.graph import Graph
from mmssl.modalities.tabular import Tabular
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.base import Objective
from mmssl.training import Source, TrainArguments, pretrain
from mmssl.training.allocator import keep_freed_memory
from mmssl.training.setup import make_optimizer
from mmssl.training.streams import Stream, open_stream

WORKERS = (1, 2)
# The last line of the log leaves out the first, slow steps.
RUN: dict[str, Any] = {"max_train_steps": 12, "logging_steps": 6}
EPOCH = 2**18  # samples: no epoch ends while something is timed
ROWS, STEPS_OF_SERIES, GRAPHS, ATOMS = 4096, 17_420, 1000, 7  # a table, a series as long as ETTh1's, molecules

Random = np.random.Generator


# Data


def scene(rng: Random, height: int, width: int) -> np.ndarray:
    """(height, width, 3) bytes with the spectrum of photographs, an amplitude of one over the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((4, height, width)))
    grey, *color = np.fft.irfft2(noise / frequency, (height, width))
    pixels = np.stack([grey + 0.3 * each for each in color], axis=-1)
    return (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


def images(folder: Path, count: int, rng: Random) -> str:
    from PIL import Image

    for number in range(count):
        Image.fromarray(scene(rng, 480, 640)).save(folder / f"{number}.jpg", quality=90)
    return "JPEG, 640x480"


def videos(folder: Path, count: int, rng: Random) -> str:
    """Two scenes that move across each other, with as many bits as such clips have, and few key frames."""
    import av

    for number in range(count):
        one, other = scene(rng, 240, 320) // 2, scene(rng, 240, 320) // 2
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 240, "yuv420p", 500_000
            for t in range(300):
                moved = np.roll(one, (t, 2 * t), axis=(0, 1)) + np.roll(other, -t, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
            container.mux(stream.encode())
    return "H.264, 320x240, 10 s, 500 kbit/s"


def sounds(folder: Path, count: int, rng: Random) -> str:
    import soundfile

    seconds = np.arange(4 * 16_000) / 16_000
    for number in range(count):
        pitch = rng.uniform(80, 250) * (seconds + 0.02 * np.sin(3 * seconds))
        voice = sum(np.sin(2 * np.pi * harmonic * pitch) / harmonic for harmonic in range(1, 20))
        wave = 0.1 * voice * np.sin(5 * seconds) ** 2 + 0.002 * rng.standard_normal(len(seconds))
        soundfile.write(folder / f"{number}.wav", wave, 16_000)
    return "WAV, 4 s"


def clouds(folder: Path, count: int, rng: Random) -> str:
    for number in range(count):
        points = rng.standard_normal((8192, 3))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        np.save(folder / f"{number}.npy", (points * rng.uniform(0.3, 1, 3)).astype(np.float32))
    return "npy, 8,192 points"


def meshes(folder: Path, count: int, rng: Random) -> str:
    import trimesh

    for number in range(count):
        mesh = trimesh.creation.icosphere(subdivisions=4)
        mesh.apply_scale(rng.uniform(0.3, 1, 3))
        mesh.export(folder / f"{number}.ply")
    return "ply, 5,120 triangles"


def molecules(folder: Path, count: int, rng: Random) -> str:
    """Chains with some rings, in one archive, which is read into memory; ``count`` is of files."""
    sizes = rng.integers(12, 28, GRAPHS)
    bonds = []
    for size in sizes:
        chain = np.stack(
            [np.arange(1, size), np.arange(1, size) - rng.integers(1, 3, size - 1).clip(max=np.arange(1, size))]
        )
        start = rng.integers(0, size - 5, 2)
        bonds.append(np.concatenate([chain, [start, start + 5]], axis=1))
    np.savez(
        folder / "data.npz",
        node_ptr=np.concatenate([[0], sizes.cumsum()]),
        edge_ptr=np.cumsum([0] + [each.shape[1] for each in bonds]),
        edge_index=np.concatenate(bonds, axis=1),
        x=np.eye(ATOMS, dtype=np.float32)[rng.integers(0, ATOMS, sizes.sum())],
    )
    return "arrays, 12 to 27 nodes"


def tables(folder: Path, count: int, rng: Random) -> str:
    import pandas as pd

    numbers = {f"number_{i}": rng.standard_normal(ROWS).round(3) for i in range(8)}
    names = np.array([f"value {i}" for i in range(12)])
    pd.DataFrame(numbers | {f"name_{i}": rng.choice(names, ROWS) for i in range(6)}).to_parquet(folder / "data.parquet")
    return "rows, 8 numbers, 6 names"


def series(folder: Path, count: int, rng: Random) -> str:
    import pandas as pd

    walks = rng.standard_normal((STEPS_OF_SERIES, 7)).cumsum(axis=0).round(3)
    frame = pd.DataFrame(walks, columns=[f"channel_{i}" for i in range(7)])
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=STEPS_OF_SERIES, freq="h"))
    frame.to_csv(folder / "data.csv", index=False)
    return "windows, 7 channels of 512"


# What is trained on them


@dataclass
class Kind:
    """Samples and what is trained on them.

    Attributes:
        write: makes the data in a folder and says what they are.
        modality: with views that change something.
        objective: as a run takes it.
        encoder: its shape.
        batch_size: samples of a step.
    """

    write: Callable[[Path, int, Random], str]
    modality: Modality
    objective: Callable[[MMSSLModel], Objective]
    encoder: EncoderConfig
    batch_size: int


def as_in(step: str, write: Callable[[Path, int, Random], str], **views: Any) -> Kind:
    """Modality, encoder and objective of one of peers.py's steps."""
    module = STEPS[step].sides["mmssl"]().module
    assert isinstance(module, Objective)
    modality: Modality = next(iter(module.model.adapters.values()))
    shape = {field.name: getattr(module.model.config, field.name) for field in fields(EncoderConfig)}
    return Kind(
        write,
        type(modality)(**modality.options() | views),
        partial(type(module), **options_of(module)),
        EncoderConfig(**shape),
        STEPS[step].samples,
    )


def graphs() -> Kind:
    """As in examples/recipes/graphmae_tu.yaml."""
    modality = Graph(ATOMS, random_walk_steps=16, encoding_gate=1.0, gamma=1, drop_edges=0.2, mask_features=0.2)
    objective = reconstruction(
        (128, 1, 1), corruption="replace", mask_ratio=0.5, mask_token_space="input", replace_ratio=0.1, remask=True
    )
    return Kind(molecules, modality, objective, EncoderConfig(128, 3, 4), 32)


def rows() -> Kind:
    return Kind(tables, Tabular(corruption_ratio=0.6), reconstruction((64, 1, 2)), EncoderConfig(192, 3, 8), 256)


CROP: dict[str, Any] = {"crop_scale": (0.2, 1.0), "horizontal_flip": 0.5}
MOVE: dict[str, Any] = {"scale": (2 / 3, 3 / 2), "translate": 0.2}
KINDS: dict[str, Callable[[], Kind]] = {
    "image": lambda: as_in("mae_small", images, **CROP),
    "video": lambda: as_in("videomae", videos, **CROP),
    "speech": lambda: as_in("tera", sounds, crop_scale=(0.5, 1.0), speed=0.1, gain=6.0),
    "point_cloud": lambda: as_in("point_mae", clouds, **MOVE),
    "point_cloud_mesh": lambda: as_in("point_mae", meshes, **MOVE),
    "graph": graphs,
    "tabular": rows,
    "time_series": lambda: as_in("patchtst", series, crop_scale=(0.5, 1.0), jitter=0.1, scale=(0.8, 1.2)),
}


def main(
    modality: tuple[str, ...] = tuple(KINDS),
    samples: int = 32,
    threads: int = torch.get_num_threads(),
    seconds: float = 5.0,
    output: str = "",
) -> None:
    """Measure.

    Args:
        modality: which of the kinds of samples.
        samples: files to generate of each; graphs, a table and a series are read as a whole, and always as large.
        threads: of the step and of the run; all else has one.
        seconds: how long each rate is measured, at least.
        output: JSON file to write the figures to.
    """
    if unknown := set(modality) - set(KINDS):
        raise SystemExit(f"modality: found {', '.join(sorted(unknown))}; expected some of {', '.join(KINDS)}")
    keep_freed_memory()
    found: dict[str, Any] = {"threads": threads, "torch": torch.__version__, "modalities": {}}
    for name in modality:
        with tempfile.TemporaryDirectory() as folder:
            found["modalities"][name] = measure(KINDS[name](), Path(folder), samples, threads, seconds)
        if output:
            Path(output).write_text(json.dumps(found, indent=1) + "\n")
    Console().print(stages(found), balance(found))


def measure(kind: Kind, folder: Path, samples: int, threads: int, seconds: float) -> dict[str, Any]:
    """Samples per second of each stage, of loaders and of the step, and the share of its time that a run waits."""
    about = kind.write(folder, samples, np.random.default_rng(0))
    source = next(folder.glob("data.*"), folder)  # one file that holds all, or a folder of them
    data = DataArguments(str(source), cache_mb=0)  # a large data set is prepared anew in each epoch
    size = kind.batch_size
    torch.set_num_threads(1)
    data = replace(data, repeat=math.ceil(EPOCH / len(load_samples(data, kind.modality))))
    stream = opened(kind, data, 0)
    dataset, places = stream.dataset, iter(np.random.default_rng(0).permutation(len(stream.dataset)).tolist())
    items = [dataset[next(places)] for _ in range(size)]
    inputs, generator = stream.next_inputs(), torch.Generator().manual_seed(0)
    rates = {
        "prepare": rate(lambda: dataset[next(places)], 1, seconds),
        "collate": rate(lambda: dataset.collate(items), size, seconds),
        "view": rate(lambda: kind.modality.view(inputs, generator), size, seconds),
    }
    for workers in WORKERS:
        loading = opened(kind, data, workers)
        for _ in range(3 * workers):  # what workers have in store when the time begins
            loading.next_inputs()
        rates[f"loader_{workers}"] = rate(loading.next_inputs, size, seconds)
        del loading
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = {kind.modality.name: kind.modality.options()}
    module = kind.objective(MMSSLModel(MMSSLConfig(modalities=options, **asdict(kind.encoder)))).train()
    optimizer = make_optimizer(module, TrainArguments())

    def step() -> None:
        module(inputs, generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module.after_step(0.5)

    rates["step"] = rate(step, size, seconds)
    run = folder / ".run"
    train = TrainArguments(str(run), per_device_train_batch_size=size, health_steps=None, **RUN)
    pretrain(kind.modality, kind.objective, kind.encoder, data, train)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"data": about, "batch_size": size, **rates, "run": last["samples_per_second"], "waits": last["data_wait"]}


def opened(kind: Kind, data: DataArguments, workers: int) -> Stream:
    """Batches as the loop reads them."""
    train = TrainArguments(per_device_train_batch_size=kind.batch_size, dataloader_num_workers=workers)
    accelerator = Accelerator(cpu=True)
    stream = open_stream(Source(kind.modality, data), train, accelerator)
    stream.loader = accelerator.prepare(stream.loader)
    return stream


def rate(what: Callable[[], object], samples: int, seconds: float) -> float:
    """Samples per second, where a call is of so many; of three calls at least, after one."""
    what()
    calls, begun = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - begun < seconds:
        what()
        calls += 1
    return samples * calls / (time.perf_counter() - begun)


def stages(found: dict[str, Any]) -> Table:
    shown = Table("samples", "of", "prepare", "collate", "view", title="Samples per second, on one thread")
    for name, figures in found["modalities"].items():
        shown.add_row(name, figures["data"], *(shortly(figures[each]) for each in ("prepare", "collate", "view")))
    return shown


def balance(found: dict[str, Any]) -> Table:
    shown = Table(
        "samples", *(f"loader, {workers} workers" for workers in WORKERS), "step", "workers needed", "a run waits",
        title=f"Samples per second; step on {found['threads']} threads",
    )  # fmt: skip
    for name, figures in found["modalities"].items():
        loaders = [shortly(figures[f"loader_{workers}"]) for workers in WORKERS]
        needed, waits = figures["step"] / figures["loader_1"], figures["waits"]
        shown.add_row(name, *loaders, shortly(figures["step"]), f"{needed:.2f}", f"{100 * waits:.1f} %")
    return shown


def shortly(number: float) -> str:
    return f"{number:,.0f}" if number > 20 else f"{number:.1f}"


if __name__ == "__main__":
    CLI(main, as_positional=False)
