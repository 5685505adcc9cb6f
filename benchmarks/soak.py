"""What a long run needs: memory that does not grow, a loader that keeps up, checkpoints that are quick to write.

    python benchmarks/soak.py --steps 10000 --output docs/soak.json

Four measurements, each in a process of its own: memory over the steps of one run, samples per second of the loader with
0, 1 and 2 workers, seconds per GB to save and to load a checkpoint, and seconds from Python's start to the first step.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from jsonargparse import CLI
from rich.console import Console
from rich.table import Table

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import Source, TrainArguments, pretrain
from mmssl.training.loop import Run
from mmssl.training.setup import make_optimizer
from mmssl.training.streams import open_stream

MB, GB = 2**20, 2**30
START = """
import time
from pathlib import Path
import mmssl.training.loop as loop
step = loop.Run.train_step
def first(self, name):
    out = step(self, name)
    print("first step", time.time())
    raise SystemExit
loop.Run.train_step = first
import sys; sys.argv = ["mmssl", "pretrain", "--config", "examples/recipes/mae_digits.yaml", "--train.output_dir", OUT]
from mmssl.cli import main
main()
"""


def main(steps: int = 10_000, output: str = "") -> None:
    """Measure.

    Args:
        steps: of the run whose memory is watched.
        output: JSON file to write the numbers to.
    """
    found = {
        "memory": apart(partial(memory, steps)),
        "loader": {workers: apart(partial(loader, workers)) for workers in (0, 1, 2)},
        "checkpoint": apart(checkpoint),
        "start": start(),
    }
    table = Table("what", "found")
    least, last = min(found["memory"].values()), list(found["memory"].values())[-1]
    table.add_row(
        f"memory after {steps:,} steps, and the least after a tenth of them", f"{last:.0f} MB, {least:.0f} MB"
    )
    for workers, rate in found["loader"].items():
        table.add_row(f"samples per second of the loader, {workers} workers", f"{rate:,.0f}")
    for name, seconds in found["checkpoint"].items():
        table.add_row(f"checkpoint, {name}", f"{seconds:.1f} s per GB")
    table.add_row("start of Python to the first step", f"{found['start']:.1f} s")
    Console().print(table)
    if output:
        Path(output).write_text(json.dumps(found, indent=2) + "\n")


def apart(function: Callable[[], Any]) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def memory(steps: int) -> dict[int, float]:
    """MB of this process at each tenth of the steps of a run that logs, measures its health and saves."""
    found: dict[int, float] = {}
    train_step = Run.train_step

    def watched(self: Run, name: str) -> Any:
        if self.progress.step and self.progress.step % (steps // 10) == 0:
            found[self.progress.step] = psutil.Process().memory_info().rss / MB
        return train_step(self, name)

    Run.train_step = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            Image(image_size=8, patch_size=2, num_channels=1, normalize_target=False, crop_scale=(0.5, 1.0)),
            partial(MaskedReconstruction, decoder_layers=1, decoder_hidden_size=16),
            EncoderConfig(32, 2, 2),
            DataArguments("digits"),
            TrainArguments(
                folder, max_train_steps=steps, per_device_train_batch_size=32, checkpointing_steps=steps // 20
            ),
        )
    return found


def loader(workers: int, samples: int = 2000) -> float:
    """Samples per second of photographs of 256 pixels, decoded from JPEG and cut to 224."""
    import PIL.Image

    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
        for number, pixels in enumerate(noise):
            PIL.Image.fromarray(pixels).resize((256, 256)).save(Path(folder, f"{number}.jpg"))
        source = Source(
            Image(image_size=224, patch_size=16), DataArguments(folder, repeat=samples // len(noise), cache_mb=0)
        )
        train = TrainArguments(per_device_train_batch_size=50, dataloader_num_workers=workers)
        stream = open_stream(source, train, Accelerator(cpu=True))
        batches = iter(stream.loader)
        next(batches)  # workers have started
        begun = time.perf_counter()
        count = sum(len(batch["indices"]) for batch in batches)
        return count / (time.perf_counter() - begun)


def checkpoint() -> dict[str, float]:
    """Seconds per GB to save and load the state of a ViT-B and its optimiser."""
    accelerator = Accelerator(cpu=True)
    config = MMSSLConfig(modalities={"image": {}}, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    module = MaskedReconstruction(MMSSLModel(config))
    optimizer = make_optimizer(module, TrainArguments())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module, optimizer = accelerator.prepare(module, optimizer)
    optimizer.step()
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, function in (("save", accelerator.save_state), ("load", accelerator.load_state)):
            begun = time.perf_counter()
            function(folder)
            seconds[name] = time.perf_counter() - begun
        size = sum(path.stat().st_size for path in Path(folder).rglob("*")) / GB
    return {name: value / size for name, value in seconds.items()}


def start() -> float:
    """Seconds from the start of Python to the end of the first step of ``examples/recipes/mae_digits.yaml``."""
    with tempfile.TemporaryDirectory() as folder:
        code = START.replace("OUT", repr(f"{folder}/run"))
        begun = time.time()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("first step"))
        return float(line.split()[-1]) - begun


if __name__ == "__main__":
    CLI(main)
