"""Our MAE step beside transformers' ``ViTMAEForPreTraining`` at the same size, and the time a run waits for its data.

    python benchmarks/step_time.py [--rounds 7] [--batch_size 8] [--threads 2]

Both models alternate in one process, on the same batch; a step is forward, backward and AdamW. The table quotes
medians, and the ratio of each round's pair. The second table runs the loop on JPEG files and reads ``data_wait``
from its log.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, pretrain

SIZES = {"ViT-S/16": (384, 12, 6)}
DECODER: dict[str, Any] = {"decoder_layers": 8, "decoder_hidden_size": 512, "decoder_attention_heads": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs of steps, after two of warm-up")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="JSON file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = {"step": compare(arguments.batch_size, arguments.rounds), "loader": loader_share(arguments.batch_size)}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=2))


def compare(batch_size: int, rounds: int) -> dict[str, float]:
    """Time one step of each in turn."""
    width, depth, heads = SIZES["ViT-S/16"]
    torch.manual_seed(0)
    pixels = torch.randn(batch_size, 3, 224, 224)
    config = MMSSLConfig(
        modalities={"image": {}},
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        class_token=True,
    )
    ours = MaskedReconstruction(MMSSLModel(config), views=False, **DECODER)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=DECODER["decoder_hidden_size"],
            decoder_num_hidden_layers=DECODER["decoder_layers"],
            decoder_num_attention_heads=DECODER["decoder_attention_heads"],
            decoder_intermediate_size=4 * DECODER["decoder_hidden_size"],
            norm_pix_loss=True,
        )
    )
    generator = torch.Generator().manual_seed(0)
    steps = {
        "mmssl": stepper(ours, lambda: ours({"pixel_values": pixels}, generator).loss),
        "transformers": stepper(theirs, lambda: theirs(pixels).loss),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    times = {name: values[2:] for name, values in times.items()}
    ratios = [ours / theirs for ours, theirs in zip(times["mmssl"], times["transformers"], strict=True)]
    table = Table(
        "step", "parameters", "median ms", "min", "max", title=f"MAE ViT-S/16, 224 pixels, batch {batch_size}"
    )
    for (name, values), module in zip(times.items(), (ours, theirs), strict=True):
        count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        table.add_row(name, f"{count / 1e6:.1f} M", *(f"{1000 * f(values):.0f}" for f in (statistics.median, min, max)))
    Console().print(table)
    print(
        f"ratio mmssl / transformers of each pair: median {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f}-{max(ratios):.3f}"
    )
    return {
        **{f"{name}_ms": 1000 * statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def stepper(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def loader_share(batch_size: int) -> dict[str, float]:
    """Share of time that the loop waits for batches of JPEG files, with different numbers of workers."""
    width, depth, heads = SIZES["ViT-S/16"]
    table = Table("workers", "samples per second", "waiting for data", title="The loop on JPEG files of 640x480 pixels")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for number in range(8 * batch_size):
            small = generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            PILImage.fromarray(small).resize((640, 480)).save(f"{folder}/{number}.jpg", quality=85)
        for workers in (0, 1, 2):
            output = Path(folder) / f"run{workers}"
            pretrain(
                Image(crop_scale=(0.2, 1.0), horizontal_flip=0.5),
                partial(MaskedReconstruction, **DECODER),
                EncoderConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, class_token=True),
                DataArguments(folder),
                TrainArguments(
                    str(output),
                    per_device_train_batch_size=batch_size,
                    max_train_steps=8,
                    logging_steps=4,
                    dataloader_num_workers=workers,
                ),
            )
            last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
            table.add_row(str(workers), f"{last['samples_per_second']:.1f}", f"{100 * last['data_wait']:.1f}%")
            figures[f"data_wait_{workers}_workers"] = last["data_wait"]
    Console().print(table)
    return figures


if __name__ == "__main__":
    main()
