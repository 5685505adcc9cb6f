"""Samples that could not be read: they are written down and counted while a run goes on; too many of them stop it."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from mmssl.training.arguments import Source, TrainArguments
from mmssl.training.streams import Stream

FAILED = "failed_samples.jsonl"
FEW = 100  # shares are of at least so many samples, or a run would stop because its first batch has two bad ones
SHOWN = 3  # samples that an error names


class Failures:
    """The unreadable samples of a run with ``data.on_error="skip"``, those of all processes.

    Args:
        accelerator: its first process writes.
        streams: which know what they could not read.
        sources: say how much of it is too much.
        train: where to write.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        streams: Mapping[str, Stream],
        sources: Mapping[str, Source],
        train: TrainArguments,
    ):
        self.accelerator = accelerator
        self.streams = {name: each for name, each in streams.items() if each.dataset.on_error == "skip"}
        self.most = {name: sources[name].data.max_failed for name in self.streams}
        self.path = Path(train.output_dir) / FAILED
        self.known: dict[tuple[str, int], str] = {}

    def begin(self, step: int) -> None:
        """Take over what an earlier session had found up to this step."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            found = [line for line in map(json.loads, lines) if line["step"] <= step]
            self.known = {(line["modality"], line["position"]): line["reason"] for line in found}
            self.path.write_text("".join(json.dumps(line) + "\n" for line in found))

    def gather(self, step: int) -> dict[str, float]:
        """Write what is new; returns what metrics.jsonl holds. All processes have to call this at the same step.

        Raises:
            ValueError: too many; names some of them and says why they could not be read.
        """
        if not self.streams:
            return {}
        own = [(name, stream.read, stream.unreadable, stream.failed) for name, stream in self.streams.items()]
        everyone = gather_object(own)
        for name, stream in self.streams.items():
            failed: dict[int, str] = {}
            for each in everyone:
                failed |= each[3] if each[0] == name else {}
            new = [position for position in sorted(failed) if (name, position) not in self.known]
            self.known |= {(name, position): failed[position] for position in new}
            if new and self.accelerator.is_main_process:
                with self.path.open("a") as file:
                    for position in new:
                        file.write(json.dumps(self.line(step, name, position)) + "\n")
            stream.failed.clear()
            read, unreadable = (sum(each[number] for each in everyone if each[0] == name) for number in (1, 2))
            if unreadable > self.most[name] * max(read, FEW):
                raise ValueError(
                    f"{name}: {unreadable:,} of {read:,} samples could not be read so far, more than the share of "
                    f"{self.most[name]} that data.max_failed allows: {self.some(name, '; ')}. {self.path} lists them; "
                    "repair them, leave them out or raise data.max_failed, and resume"
                )
        return {"failed_samples": len(self.known)}

    def line(self, step: int, name: str, position: int) -> dict[str, Any]:
        sample = self.streams[name].dataset.name(position)
        return {
            "step": step,
            "modality": name,
            "sample": sample,
            "position": position,
            "reason": self.known[name, position],
        }

    def some(self, name: str, between: str, most: int = SHOWN) -> str:
        """The first ones and why they could not be read."""
        known = {position: reason for (modality, position), reason in self.known.items() if modality == name}
        shown = [f"{self.streams[name].dataset.name(i)}: {known[i]}" for i in sorted(known)[:most]]
        return between.join(shown + ["..."] * (len(known) > most))

    def report(self) -> None:
        """At the end of a run: how many there were, and some of them."""
        for name, stream in self.streams.items():
            count = sum(modality == name for modality, _ in self.known)
            among = f" of {len(stream.dataset.samples)}" if hasattr(stream.dataset, "__len__") else ""
            if count:
                self.accelerator.print(
                    f"{name}: {count}{among} samples could not be read and were skipped; {self.path} lists them, "
                    "among them:\n  " + self.some(name, "\n  ", most=10)
                )


@contextmanager
def deaths_of_workers_explained() -> Iterator[None]:
    """Around a run with data workers: torch's error, which may come at any line of the main process, with what to do.

    Raises:
        ChildProcessError: a worker was killed or has died.
    """
    try:
        try:
            yield
        except (EOFError, ConnectionError):
            time.sleep(1)  # a dying worker closes its connections first: torch's error comes within this second
            raise
    except Exception as error:
        death: BaseException | None = error  # or what led to it: code that the signal fell into may have wrapped it
        while death and not str(death).startswith("DataLoader worker (pid"):
            death = death.__cause__ or death.__context__
        if not death:
            raise
        raise ChildProcessError(
            f"a process that prepares samples has died: {' '.join(str(death).split()).rstrip('.')}. If it was killed, "
            "memory has probably run out: lower train.dataloader_num_workers or train.per_device_train_batch_size; "
            "after a bus error enlarge the shared memory, /dev/shm. Then go on with "
            "--train.resume_from_checkpoint latest"
        ) from error
