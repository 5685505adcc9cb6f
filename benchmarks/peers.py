"""Our training steps beside those of peers at equal sizes; what a step costs at least; where our time goes.

    pip install -e ".[bench]"                  # the peers
    python benchmarks/peers.py --threads 2 --output docs/peers.json
    python benchmarks/peers.py --step "[mae_tiny, simclr]" --rounds 9 --profile true

    python benchmarks/peers.py --step "[mae_base, mae_large, videomae_base, tera_base, point_mae_large]" \
        --device cuda --dtype bfloat16 --compile true --output docs/peers_gpu.json   # on a GPU

A step is forward, backward and AdamW on a batch in memory. Each side is a process of its own, with its own
allocator and its own peak memory; they take steps in turn, so that what else the machine does slows down all. Ours runs
as ``mmssl pretrain`` would run it, peers as they come. Ratios are of steps that followed each other.

The floor is what matrix products and attention cost at the speed of large matrix products, measured in the same run,
and, in a second column, the traffic of all other operations at the speed of a large copy on top of that.
"""

import importlib.util
import json
import multiprocessing as mp
import platform
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import CLI
from peer_steps import GPU_STEPS, Side, Step
from peer_steps import STEPS as CPU_STEPS
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmssl.training.allocator import keep_freed_memory
from mmssl.training.prepare import compile_blocks

NEEDS = {
    "lightly": "lightly",
    "stable-pretraining": "stable_pretraining",
    "s3prl": "s3prl",
    "transformers": "transformers",
    "torch-geometric GATConv": "torch_geometric",
}
STEPS: dict[str, Step] = {**CPU_STEPS, **GPU_STEPS}
VIEW_OPS = ("view", "reshape", "permute", "transpose", "expand", "select", "slice", "unsqueeze", "squeeze", "detach")


def main(
    step: tuple[str, ...] = tuple(CPU_STEPS),
    rounds: int = 5,
    processes: int = 2,
    threads: int = torch.get_num_threads(),
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compile: bool = False,
    profile: bool = False,
    output: str = "",
) -> None:
    """Compare.

    Args:
        step: names of the steps to time.
        rounds: timed steps of each side in each of its processes, after two of warm-up.
        processes: how often all sides are started anew.
        threads: of each side.
        device: where steps are taken.
        dtype: with "bfloat16" under autocast, all sides alike.
        compile: compile our blocks, as Accelerate's dynamo options do, and the peers' modules.
        profile: time the stages of our step too.
        output: JSON file that the figures of these steps are written to, beside those of others that it has.
    """
    if unknown := set(step) - set(STEPS):
        raise SystemExit(f"step: found {', '.join(sorted(unknown))}; expected some of {', '.join(STEPS)}")
    file = Path(output) if output else None
    found = json.loads(file.read_text()) if file and file.is_file() else {"steps": {}}
    how = How(threads, device, dtype, compile)
    with started(limits, how) as ask:
        found["machine"] = {"processor": platform.machine(), "torch": torch.__version__, **asdict(how), **ask()}
    for name in step:
        found["steps"][name] = compare(name, rounds, processes, how, profile)
        if file:
            file.write_text(json.dumps(found, indent=1))
    Console().print(table(found))
    for name in step if profile else ():
        Console().print(stage_table(name, found["steps"][name]["stages"]))


@dataclass
class How:
    """How steps are taken: see ``main``."""

    threads: int
    device: str
    dtype: str
    compile: bool

    def begin(self, side: str) -> None:
        """In the process of a side: its threads and device, and ours as ``pretrain`` begins."""
        torch.set_num_threads(self.threads)
        torch.set_default_device(self.device)
        torch.manual_seed(0)
        if side == "mmssl" and self.device == "cpu":
            keep_freed_memory()

    def built(self, name: str, side: str) -> Side:
        built = STEPS[name].sides[side]()
        if self.compile and side == "mmssl":
            compile_blocks(built.module)
        elif self.compile:
            built.module.compile()
        return built

    def loss(self, side: Side) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return side.loss()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> float:
        """Greatest memory so far, in MB."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(name: str, rounds: int, processes: int, how: How, profile: bool) -> dict[str, Any]:
    """Times of all sides of a step, in seconds, and what they need."""
    step = STEPS[name]
    sides = [side for side in step.sides if side not in NEEDS or importlib.util.find_spec(NEEDS[side])]
    for side in step.sides:
        if side not in sides:
            Console().print(f'{name}: without {side}, which is not installed: pip install -e ".[bench]"')
    times: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(processes):
        workers = {side: begin(serve, name, side, how) for side in sides}
        for number in range(rounds + 2):
            for side, (_, pipe) in workers.items():
                pipe.send("step")
                seconds = pipe.recv()
                if number >= 2:
                    times[side].append(seconds)
        for side, (process, pipe) in workers.items():
            pipe.send("stop")
            peaks[side].append(pipe.recv())
            process.join()
    with started(costs, name, how, profile) as ask:
        about = ask()
    return {
        "title": step.title,
        "samples": step.samples,
        "unit": step.unit,
        "seconds": times,
        "peak_mb": {side: max(values) for side, values in peaks.items()},
        **about,
    }


# Processes


def begin(target: Callable[..., None], *given: Any) -> tuple[Any, Connection]:
    """A process with one end of a pipe."""
    context = mp.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=target, args=(other, *given), daemon=True)
    process.start()
    other.close()
    return process, own


@contextmanager
def started(target: Callable[..., None], *given: Any) -> Iterator[Callable[[], Any]]:
    process, pipe = begin(target, *given)
    yield pipe.recv
    process.join()


def serve(pipe: Connection, name: str, side: str, how: How) -> None:
    """Take a step whenever asked for one; at the end say the peak memory in MB."""
    how.begin(side)
    take = stepper(how.built(name, side), how, fused=side == "mmssl")
    while pipe.recv() == "step":
        start = time.perf_counter()
        take()
        pipe.send(time.perf_counter() - start)
    pipe.send(how.peak())


def stepper(side: Side, how: How, fused: bool = True) -> Callable[[], None]:
    optimizer = adamw(side, fused)

    def take() -> None:
        optimizer.zero_grad()
        how.loss(side).backward()
        optimizer.step()
        side.after_step()
        how.wait()

    return take


# What a step costs at least


def limits(pipe: Connection, how: How) -> None:
    """Speed of large matrix products and of a large copy, the best of several: what the machine can do."""
    how.begin("mmssl")
    size = 2048 if how.device == "cpu" else 8192
    one, copy = torch.randn(size, size).to(getattr(torch, how.dtype)), torch.empty(64 * 2**20)
    product, source = torch.empty_like(one), torch.randn_like(copy)
    pipe.send(
        {
            "gflops": 2 * size**3 / seconds_of(lambda: torch.mm(one, one, out=product), how) / 1e9,
            "copy_gb": 2 * 4 * copy.numel() / seconds_of(lambda: copy.copy_(source), how) / 1e9,
        }
    )


def seconds_of(what: Callable[[], object], how: How, times: int = 15) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        what()
        how.wait()
        found.append(time.perf_counter() - start)
    return min(found)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations other than matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not any(word in name for word in ("mm", "attention", *VIEW_OPS)):
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return out


def costs(pipe: Connection, name: str, how: How, profile: bool) -> None:
    """Floating-point operations and bytes of our step, and the seconds of its stages."""
    how.begin("mmssl")
    side = STEPS[name].sides["mmssl"]()
    take = stepper(side, how)
    take()
    with FlopCounterMode(display=False) as flops:
        take()
    with Traffic() as traffic:
        take()
    about: dict[str, Any] = {"flops": flops.get_total_flops(), "bytes": traffic.bytes}
    if profile:
        about["stages"] = stages(side, how)
    pipe.send(about)


def adamw(side: Side, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW([each for each in side.module.parameters() if each.requires_grad], lr=1e-4, fused=fused)


def stages(side: Side, how: How, times: int = 5) -> dict[str, float]:
    """Seconds of each stage of our step: medians over steps; what a stage calls of another is the other's."""
    optimizer = adamw(side, fused=True)
    spent: defaultdict[str, float] = defaultdict(float)
    running: list[tuple[str, float]] = []

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            if running:
                spent[running[-1][0]] += now - running[-1][1]
            running.append((what, now))
            try:
                return function(*args, **kwargs)
            finally:
                how.wait()
                now = time.perf_counter()
                spent[running[-1][0]] += now - running.pop()[1]
                if running:
                    running[-1] = (running[-1][0], now)

        return call

    whole: Any = side.module
    if side.batch is not None and hasattr(whole, "model"):
        modality = whole.model.modality_of(side.batch)
        for what in ("view", "tokenize", "mask", "alter", "embed", "target", "reconstruction_loss"):
            setattr(modality, what, timed(what, getattr(modality, what)))
        for what in ("position", "encoder", "decoder", "teacher", "projector", "predictor"):
            for owner in (modality, whole.model, whole):
                if isinstance(getattr(owner, what, None), torch.nn.Module):
                    getattr(owner, what).forward = timed(what, getattr(owner, what).forward)
    loss = timed("rest of the forward pass", lambda: how.loss(side))
    backward = timed("backward", Tensor.backward)
    update, after = timed("optimizer", optimizer.step), timed("after_step", side.after_step)
    found: list[dict[str, float]] = []
    for _ in range(times + 1):
        spent.clear()
        optimizer.zero_grad()
        backward(loss())
        update()
        after()
        found.append(dict(spent))
    return {what: statistics.median(each[what] for each in found[1:]) for what in found[-1]}


# Tables


def table(found: dict[str, Any]) -> Table:
    machine = found["machine"]
    shown = Table(
        "step", "side", "median ms", "min to max", "a second", "time over ours", "of GEMM", "peak MB",
        title=", ".join(str(machine[what]) for what in ("device", "dtype", "threads")) + " threads, "
        f"{machine['gflops']:,.0f} GFLOP/s, copies {machine['copy_gb']:.0f} GB/s",
    )  # fmt: skip
    for about in found["steps"].values():
        floor = about["flops"] / machine["gflops"] / 1e9
        for side, seconds in about["seconds"].items():
            ours = about["seconds"]["mmssl"]
            median = statistics.median(seconds)
            ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            shown.add_row(
                about["title"] if side == "mmssl" else "",
                side,
                f"{1000 * median:,.0f}" if median > 0.1 else f"{1000 * median:.1f}",
                f"{1000 * min(seconds):,.0f} to {1000 * max(seconds):,.0f}",
                f"{about['samples'] / median:.1f} {about['unit']}",
                "" if side == "mmssl" else ratio,
                f"{floor / median:.2f}" if side == "mmssl" else "",
                f"{about['peak_mb'][side]:,.0f}",
            )
        traffic = floor + about["bytes"] / machine["copy_gb"] / 1e9
        shown.add_row(
            "", "floor of ours", f"{1000 * floor:,.0f}", f"{1000 * traffic:,.0f} with traffic", "", "", "", ""
        )
        shown.add_section()
    return shown


def stage_table(name: str, stages: dict[str, float]) -> Table:
    shown = Table("stage", "ms", "share", title=f"Stages of {STEPS[name].title}")
    for what, seconds in sorted(stages.items(), key=lambda each: -each[1]):
        shown.add_row(what, f"{1000 * seconds:.1f}", f"{100 * seconds / sum(stages.values()):.1f} %")
    return shown


if __name__ == "__main__":
    CLI(main, as_positional=False)
