"""Checkpoints that are either whole or not there, and a run's own record of what it is."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmssl.training.arguments import TrainArguments

RECORD = "run.json"


def step_folders(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, the oldest first; one that is being written has another name."""
    found = [path for path in output_dir.glob("step_*") if path.name[5:].isdigit() and (path / RECORD).is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, record: dict, limit: int | None) -> Path:
    """Write the state of a run to ``step_<n>``: under another name first, then renamed, then the oldest ones go.

    Raises:
        OSError: the disk is full, say; the message names the folder, and earlier checkpoints stay as they are.
    """
    final, temporary = output_dir / f"step_{step}", output_dir / f".step_{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / RECORD).write_text(json.dumps(record, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in step_folders(output_dir)[: -limit or None] if limit else []:
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"could not save the checkpoint {final} ({error}); free some space there, then go on with "
            "--train.resume_from_checkpoint latest: earlier checkpoints are whole"
        ) from error
    accelerator.wait_for_everyone()
    return final


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
    saved = json.loads((checkpoint / RECORD).read_text())
    here = json.loads(json.dumps(record))
    differences = []
    for group in (
        "modality",
        "objective",
        "encoder",
        "data",
        "also",
        "train",
        "processes",
        "mixed_precision",
        "samples",
    ):
        old, new = flatten(saved.get(group), group), flatten(here.get(group), group)
        for key in sorted(set(old) | set(new)):
            if key.removeprefix("train.") in TrainArguments.FREE or old.get(key) == new.get(key):
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
