"""Checkpoints that are either whole or not there, and a run's own record of what it is."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from mmssl.training.arguments import TrainArguments

RECORD = "run.json"
KEPT = "kept"  # in the record of a checkpoint that is not to be deleted: where the learning rate's anneal begins


def read_record(folder: Path) -> dict[str, Any]:
    """What a run, or the run of a checkpoint, says of itself."""
    return json.loads((folder / RECORD).read_text())


def step_folders(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, the oldest first; one that is being written has another name."""
    found = [path for path in output_dir.glob("step_*") if path.name[5:].isdigit() and (path / RECORD).is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, record: dict, limit: int | None, keep: bool = False
) -> Path:
    """Write the state of a run to ``step_<n>``, which is there as a whole or not at all; then the oldest ones go.

    What is to be kept says so in its record, and neither goes nor counts.

    Raises:
        OSError: the disk is full, say; the message names the folder, and earlier checkpoints stay as they are.
    """
    final = output_dir / f"step_{step}"
    with whole_or_not(accelerator, final) as temporary:
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            (temporary / RECORD).write_text(json.dumps(record | ({KEPT: True} if keep else {}), indent=2))
    if accelerator.is_main_process and limit:
        for old in [folder for folder in step_folders(output_dir) if KEPT not in read_record(folder)][:-limit]:
            remove(old)
    return final


@contextmanager
def whole_or_not(accelerator: Accelerator, final: Path) -> Iterator[Path]:
    """A folder to write to under another name, which takes the place of ``final`` when all processes have written.

    Raises:
        OSError: what could not be written, and what to do.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield temporary
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())  # the name must not survive a power cut that its content does not
            remove(final)
            temporary.rename(final)
    except (OSError, RuntimeError, SafetensorError) as error:  # how Python, torch and safetensors report a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"could not write {final} ({error}); free some space there, then go on with "
            "--train.resume_from_checkpoint latest: earlier checkpoints are whole"
        ) from error
    accelerator.wait_for_everyone()


def remove(folder: Path) -> None:
    """Delete a folder, under another name first: what is left where this is cut short is never taken for whole."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def find_checkpoint(resume: str, output_dir: Path) -> Path:
    """The checkpoint to resume from.

    Raises:
        ValueError: no whole checkpoint there.
    """
    if resume == "latest":
        if not (folders := step_folders(output_dir)):
            raise ValueError(f"resume_from_checkpoint latest: found no checkpoint step_<n> in {output_dir}")
        return folders[-1]
    if not (Path(resume) / RECORD).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {resume} is no checkpoint (it has no {RECORD}); expected a folder step_<n> "
            "of a run, or 'latest'"
        )
    return Path(resume)


def check_same_run(checkpoint: Path, record: dict[str, Any]) -> None:
    """Refuse to resume from a checkpoint of another configuration.

    Raises:
        ValueError: lists each option that differs, with both values.
    """
    saved = read_record(checkpoint)
    here = json.loads(json.dumps(record))
    differences = []
    for group in (
        "modality",
        "objective",
        "encoder",
        "data",
        "also",
        "train",
        "model",
        "processes",
        "mixed_precision",
        "samples",
    ):
        old, new = flatten(saved.get(group), group), flatten(here.get(group), group)
        for key in sorted(set(old) | set(new)):
            free = key.removeprefix("train.") in TrainArguments.FREE or key == "model.init_from"  # not read again
            if free or old.get(key) == new.get(key):
                continue
            differences.append(f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now")
    if differences:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is of another configuration:\n  " + "\n  ".join(differences)
        )


def flatten(value: Any, prefix: str) -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flatten(inner, f"{prefix}.{name}").items()}
