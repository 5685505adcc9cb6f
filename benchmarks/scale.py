"""What grows with what: tokens, processes and data; and what many GPUs would need.

    python benchmarks/scale.py --output docs/scale.json
    python benchmarks/scale.py --part data --rows 1000000 --seconds_of_sound 3600 --images 100000

A step is forward, backward and AdamW of masked reconstruction (three quarters of the tokens dropped, one narrow block
as decoder) in fp32 on one thread, on a batch in memory. Each row of a table is a process of its own. Times of single
processes are those of the CPU, which other work on the machine changes little; memory is what a process takes at most
beyond what it had before the model or the data. Graphs of a million nodes: benchmarks/graph_scale.py.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from jsonargparse import CLI
from rich.console import Console
from rich.table import Table

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments, PreparedSamples
from mmssl.modalities.image import Image
from mmssl.modalities.speech import Speech
from mmssl.modalities.tabular import Tabular
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.samples import Samples
from mmssl.training import Source, TrainArguments
from mmssl.training.allocator import keep_freed_memory
from mmssl.training.prepare import prepare
from mmssl.training.setup import make_optimizer
from mmssl.training.speed import peak_memory
from mmssl.training.streams import open_stream

MB, GB = 1e6, 1e9
PATCH = 4  # pixels; so 64 tokens are an image of 32 pixels, 4096 one of 256
DEPTH = 4
READ_AT_ONCE = 1000  # rows of a batch and of a stream's buffer
Part = Literal["tokens", "checkpointing", "processes", "data", "reckon"]


def main(
    part: tuple[Part, ...] = ("tokens", "checkpointing", "processes", "data", "reckon"),
    lengths: tuple[int, ...] = (64, 256, 1024, 4096),
    batches: tuple[int, ...] = (1, 4, 16, 64),
    widths: tuple[int, ...] = (64, 192, 384, 768),
    rounds: int = 5,
    rows: int = 1_000_000,
    images: int = 1_000_000,
    seconds_of_sound: int = 3600,
    peak_tflops: float = 989.0,
    share: float = 0.4,
    link_inside: float = 400.0,
    link_between: float = 50.0,
    loader_rate: float = 372.0,
    output: str = "",
) -> None:
    """Measure.

    Args:
        part: what to measure.
        lengths: tokens of a sequence, square numbers; the last one is that of checkpointing.
        batches: samples of a batch, of 64 tokens each.
        widths: of the encoder, on sequences of 256 tokens.
        rounds: timed steps, after two of warm-up.
        rows: of the table that is streamed.
        images: so many are streamed, a tenth of them different.
        seconds_of_sound: length of the recording.
        peak_tflops: of reckon: 10^12 operations a second that a GPU does at its best.
        share: of reckon: how much of that a training step reaches.
        link_inside: of reckon: GB/s that each GPU exchanges with those of its machine.
        link_between: of reckon: GB/s that each GPU exchanges with other machines.
        loader_rate: of reckon: samples a second that one worker prepares.
        output: JSON file that the figures of these parts are written to, beside those of others that it has.
    """
    file = Path(output) if output else None
    found: dict[str, Any] = json.loads(file.read_text()) if file and file.is_file() else {}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "tokens": lambda: by_tokens(lengths, batches, widths, rounds),
        "checkpointing": lambda: checkpointing(lengths[-1], rounds),
        "processes": lambda: processes(rounds),
        "data": lambda: data(rows, images, seconds_of_sound),
        "reckon": lambda: reckon(peak_tflops, share, link_inside, link_between, loader_rate),
    }
    for name in part:
        found[name] = parts[name]()
        for titles, group in groupby(found[name], key=tuple):
            table = Table(*titles, title=name)
            for row in group:
                table.add_row(*map(shown, row.values()))
            Console(width=140).print(table)
        if file:
            file.write_text(json.dumps(found, indent=1) + "\n")


def shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def apart(function: Callable[[], Any]) -> Any:
    """What a function returns in a new process with one thread."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function).result()


def megabytes() -> float:
    """What this process holds."""
    return psutil.Process().memory_info().rss / MB


def peak() -> float:
    """The most MB that it has held."""
    return peak_memory(torch.device("cpu")) * 2**30 / MB


# Steps


def objective_of(tokens: int, width: int, depth: int = DEPTH) -> MaskedReconstruction:
    side = PATCH * round(tokens**0.5)
    config = MMSSLConfig(
        modalities={"image": {"image_size": side, "patch_size": PATCH}},
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
    )
    return MaskedReconstruction(MMSSLModel(config), mask_ratio=0.75, views=False, decoder_layers=1).train()


def pixels(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    side = PATCH * round(tokens**0.5)
    return {"pixel_values": torch.randn(batch, 3, side, side)}


def step(tokens: int, batch: int, width: int, depth: int, recompute: bool, rounds: int) -> dict[str, float]:
    """CPU seconds of a step and the memory that training adds."""
    keep_freed_memory()
    take_steps(16, 1, 64, 1, recompute, 1)  # what torch imports and sets up once is not counted
    before = megabytes()
    seconds = take_steps(tokens, batch, width, depth, recompute, rounds + 2)
    return {"CPU ms": 1e3 * median(seconds[2:]), "adds MB": peak() - before}


def take_steps(tokens: int, batch: int, width: int, depth: int, recompute: bool, steps: int) -> list[float]:
    objective, inputs = objective_of(tokens, width, depth), pixels(batch, tokens)
    if recompute:
        objective.model.activation_checkpointing_enable()
    optimizer = make_optimizer(objective, TrainArguments())
    seconds = []
    for number in range(steps):
        begun = time.process_time()
        objective(inputs, torch.Generator().manual_seed(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begun)
    return seconds


def by_tokens(
    lengths: tuple[int, ...], batches: tuple[int, ...], widths: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Cost of a token by length (as many tokens in each batch), by batch and by width."""
    sizes = [(tokens, max(lengths) // tokens, 192) for tokens in lengths]
    sizes += [(64, batch, 192) for batch in batches]
    sizes += [(256, 4, width) for width in widths]
    table = []
    for tokens, batch, width in sizes:
        found = apart(partial(step, tokens, batch, width, DEPTH, False, rounds))
        row = {"tokens": tokens, "batch": batch, "width": width, **found}
        table.append(row | {"us a token": 1e3 * found["CPU ms"] / (batch * tokens)})
    return table


def checkpointing(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A deeper encoder on long sequences, with and without the recomputation of its blocks."""
    table = [
        {"blocks recomputed": str(recompute).lower(), "tokens": tokens}
        | apart(partial(step, tokens, 2, 192, 3 * DEPTH, recompute, rounds))
        for recompute in (False, True)
    ]
    kept, saved = table
    for row in table:
        row |= {"of the time": row["CPU ms"] / kept["CPU ms"], "of the memory": row["adds MB"] / kept["adds MB"]}
    return [kept, saved]


# Processes: ViT-Tiny, 16 images of 256 tokens in each process


def processes(rounds: int, batch: int = 16) -> list[dict[str, Any]]:
    """One process and two, by Accelerate's launcher, in turn; each has one thread and half of two cores."""
    table: list[dict[str, Any]] = []
    for count in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            several = ["--multi_gpu"] if count > 1 else []  # --cpu would start one without a word
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count), *several),
                    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
                    *("--main_process_port", "0", __file__, "worker", str(batch), str(rounds), f"{folder}/found"),
                ],
                env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found = json.loads(Path(folder, "found").read_text())
        assert found["processes"] == count
        table.append(found | {"samples a second": count * batch / found["seconds"]})
    for number, row in enumerate(table):
        one = table[number - number % 2]
        row["times one"] = row["samples a second"] / one["samples a second"]
        row["by CPU time"] = row["processes"] * one["CPU seconds each"] / row["CPU seconds each"]
    return table


def worker(batch: str, rounds: str, file: str) -> None:
    """Take steps, each process on a batch of its own; the first one writes what it saw."""
    torch.set_num_threads(1)
    keep_freed_memory()
    accelerator, train, before = Accelerator(), TrainArguments(), megabytes()
    objective, inputs = objective_of(256, 192, 12), pixels(int(batch), 256)
    size = sum(each.numel() * each.element_size() for each in objective.parameters())  # of the gradients too
    module, optimizer = prepare(accelerator, objective, make_optimizer(objective, train), train)
    wall, cpu, exchange = [], [], [0.0]
    for number in range(int(rounds) + 2):
        accelerator.wait_for_everyone()
        begun, used = time.perf_counter(), time.process_time()
        accelerator.backward(module(inputs, torch.Generator().manual_seed(number)).loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.wait_for_everyone()
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    if accelerator.num_processes > 1:
        gradient = torch.zeros(size // 4)
        for _ in range(int(rounds) + 2):
            accelerator.wait_for_everyone()
            begun = time.perf_counter()
            torch.distributed.all_reduce(gradient)
            exchange.append(time.perf_counter() - begun)
    found = {
        "processes": accelerator.num_processes,
        "seconds": median(wall[2:]),
        "CPU seconds each": median(cpu[2:]),
        "gradients MB": size / MB,
        "all_reduce s": median(exchange[-int(rounds) :]),
        "adds MB": peak() - before,
    }
    if accelerator.is_main_process:
        Path(file).write_text(json.dumps(found))
    accelerator.end_training()


# Data


def data(rows: int, images: int, seconds: int) -> list[dict[str, Any]]:
    """Memory after a tenth of the data and after all of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        apart(partial(write_table, folder / "rows.parquet", rows))
        apart(partial(write_images, folder / "images-0.parquet", images // 10))
        for number in range(1, 10):
            os.link(folder / "images-0.parquet", folder / f"images-{number}.parquet")
        table = [
            apart(partial(streamed, "rows of a table", Tabular(), str(folder / "rows.parquet"), rows, True)),
            apart(partial(streamed, "the same, not a stream", Tabular(), str(folder / "rows.parquet"), rows, False)),
            apart(partial(streamed, "images", Image(32, 4), str(folder / "images-*.parquet"), images, True)),
        ]
        for part in (seconds // 10, seconds):
            apart(partial(write_sound, folder / "sound.wav", part))
            table.append(apart(partial(recording, folder / "sound.wav", part)))
    return table


def write_table(file: Path, rows: int, columns: int = 10) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    writer = None
    for start in range(0, rows, 10_000):
        count = min(10_000, rows - start)
        cells = {f"x{number}": generator.normal(size=count) for number in range(columns)}
        chunk = pa.table(cells | {"kind": generator.choice(list("abcdefgh"), count)})
        writer = writer or pq.ParquetWriter(file, chunk.schema)
        writer.write_table(chunk)
    if writer:
        writer.close()


def write_images(file: Path, images: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image as PILImage

    generator = np.random.default_rng(0)
    writer = pq.ParquetWriter(file, pa.schema({"image": pa.binary()}))
    for start in range(0, images, 1000):
        encoded = []
        for noise in generator.integers(0, 256, (min(1000, images - start), 32, 32, 3), dtype=np.uint8):
            stream = io.BytesIO()
            PILImage.fromarray(noise).save(stream, "jpeg")
            encoded.append(stream.getvalue())
        writer.write_table(pa.table({"image": encoded}, schema=writer.schema))
    writer.close()


def write_sound(file: Path, seconds: int, rate: int = 16_000) -> None:
    import soundfile

    generator = np.random.default_rng(0)
    with soundfile.SoundFile(file, "w", rate, 1) as sound:
        for _ in range(seconds):
            sound.write(0.1 * generator.standard_normal(rate))


def streamed(what: str, modality: Any, source: str, samples: int, streaming: bool) -> dict[str, Any]:
    """Peak memory after a tenth of the samples and after all, as the loop reads them, without workers."""
    before, begun = megabytes(), time.process_time()
    batch = min(READ_AT_ONCE, samples // 10)
    arguments = DataArguments(source, streaming=streaming, shuffle_buffer_size=READ_AT_ONCE)
    train = TrainArguments(per_device_train_batch_size=batch)
    accelerator = Accelerator(cpu=True)
    stream = open_stream(Source(modality, arguments), train, accelerator)
    if not streaming:
        stream.loader = accelerator.prepare(stream.loader)
    opened, after = peak() - before, []
    for number in range(samples // batch):
        stream.next_inputs()
        if number + 1 in (samples // batch // 10, samples // batch):
            after.append(peak() - before)
    rate = samples / (time.process_time() - begun)
    found = {"what": what, "samples": samples, "opened, MB": opened, "after a tenth, MB": after[0]}
    return found | {"after all, MB": after[-1], "samples a CPU second": rate}


def recording(file: Path, seconds: int) -> dict[str, Any]:
    """Peak memory and time of a batch of one recording, up to its log-mel frames."""
    modality = Speech().train()
    dataset = PreparedSamples(Samples([str(file)], str), modality, seed=0)
    import torchaudio.functional  # noqa: F401  # as every worker has after its first sample

    before, begun = megabytes(), time.process_time()
    sample = dataset[0]
    prepared, read = peak() - before, time.process_time() - begun
    batch = dataset.collate([sample])["inputs"]
    collated = peak() - before
    kept = batch["input_values"].shape[1] / modality.sampling_rate
    frames = modality.tokenize(batch).valid.shape[1]
    return {
        "what": f"recording of {seconds} s",
        "prepared, MB": prepared,
        "collated, MB": collated,
        "tokenized, MB": peak() - before,
        "CPU seconds to prepare": read,
        "seconds in the batch": kept,
        "frames": frames,
    }


# Many GPUs


def reckon(
    peak_tflops: float, share: float, link_inside: float, link_between: float, loader_rate: float
) -> list[dict[str, Any]]:
    """What MAE ViT-B/16 at 224 pixels (encoder 12 x 768 on 50 tokens, decoder 8 x 512 on 197) needs; nothing is run.

    operations of a sample  3 * blocks * (24 n d^2 + 4 n^2 d), forward once and backward twice, of both parts
    seconds of computing    batch * operations / (peak * share); the backward pass is two thirds of it
    exchange                2 (g - 1) / g * 4 bytes * parameters / link, a ring of all g GPUs over its slowest link
    hidden                  what fits beside the backward pass, all but the last bucket of 25 MB
    samples a second        of a machine of 8 GPUs; its workers are that over what one worker prepares
    checkpoint              12 bytes * parameters, at the seconds a GB of docs/soak.json
    """
    encoder: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    decoder: dict[str, Any] = {"decoder_hidden_size": 512, "decoder_layers": 8, "decoder_attention_heads": 16}
    image = {"image_size": 224, "patch_size": 16}
    with torch.device("meta"):
        model = MMSSLModel(MMSSLConfig(modalities={"image": image}, class_token=True, **encoder))
        parameters = sum(each.numel() for each in MaskedReconstruction(model, views=False, **decoder).parameters())
    operations = 3 * sum(
        blocks * (24 * tokens * width**2 + 4 * tokens**2 * width)
        for blocks, tokens, width in ((12, 50, 768), (8, 197, 512))
    )
    saving = json.loads((Path(__file__).parent.parent / "docs" / "soak.json").read_text())["checkpoint"]["save"]
    table = []
    for gpus in (8, 512):
        for batch in (8, 64, 512):
            seconds = batch * operations / (peak_tflops * 1e12 * share)
            link = (link_inside if gpus <= 8 else link_between) * GB
            exchange = 2 * (gpus - 1) / gpus * 4 * parameters / link
            hidden = min(exchange * (1 - 25 * MB / (4 * parameters)), 2 / 3 * seconds)
            rate = 8 * batch / (seconds + exchange - hidden)
            table.append(
                {
                    "GPUs": gpus,
                    "batch of each": batch,
                    "global batch": gpus * batch,
                    "computing, ms": 1e3 * seconds,
                    "exchange, ms": 1e3 * exchange,
                    "hidden": hidden / exchange,
                    "samples/s a machine": rate,
                    "workers": rate / loader_rate,
                    "checkpoint, s": 12 * parameters / 2**30 * saving,
                }
            )
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:  # started by processes()
        worker(*sys.argv[2:])
    else:
        CLI(main, as_positional=False)
