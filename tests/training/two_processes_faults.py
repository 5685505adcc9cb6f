"""Two processes: one meets a loss that is not finite, and both stop, or skip the step; and runs that are measured."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from tests.training import test_failures as failing
from tests.training.test_health import digits_run
from tests.training.test_nonfinite import Poisoned, train


def main(folder: Path) -> None:
    Accelerator.end_training = lambda self: None  # several runs share the processes
    if os.environ["RANK"] == "0":
        Poisoned.first = 100  # never
    try:
        train(folder / "stop", Poisoned, max_train_steps=4)
    except FloatingPointError as error:
        assert "the loss is nan at step 3;" in str(error), error
    else:
        raise AssertionError("went on")
    Poisoned.calls = 0
    train(folder / "skip", Poisoned, max_train_steps=4, on_nonfinite="skip")
    assert json.loads((folder / "skip" / "run.json").read_text())["processes"] == 2
    digits_run(folder / "health", "VICReg", 4, health_steps=2, logging_steps=3)
    failing.train(folder / "images", folder / "failures", num_train_epochs=2)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
