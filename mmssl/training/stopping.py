"""What asks a run to stop before its end: a checkpoint after the step at hand, and an exit code of its own.

SIGTERM and SIGUSR1 are what schedulers send before they take a machine away; SIGINT is Ctrl-C, and a second one aborts.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PREEMPTED = 75  # the exit code: "temporary failure, try again" among those of BSD


class StopSignals:
    """While it is entered, signals that ask to stop are remembered, not obeyed; not so outside the main thread.

    Attributes:
        asked: a signal has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process has been asked to; all processes have to call this at the same step."""
        if accelerator.num_processes == 1:
            return self.asked
        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device)))


def ignore_stop_signals(worker: int, main: int) -> None:
    """For a loader's worker, which schedulers signal too: it lives as long as the main process wants it to.

    Args:
        worker: its number.
        main: the main process, whose SIGTERM it does obey.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
