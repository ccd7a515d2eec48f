"""SIGTERM and Ctrl-C end a run at the end of its step, with a checkpoint.

Exit codes are the shell's: 143 after SIGTERM, 130 after Ctrl-C. torchrun passes both signals on and
gives its processes 30 seconds; a second Ctrl-C ends at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Stopped(SystemExit):
    """Raised once the checkpoint is written; `code` is the exit code of the process."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(128 + number)
        self.reason = f"{signal.Signals(number).name}: saved step {step}; continue with --resume"

    def __str__(self) -> str:
        return self.reason


class StopSignals:
    """While entered, remembers the first SIGTERM or SIGINT instead of dying of it."""

    received: int = 0  # the signal's number

    def __enter__(self) -> StopSignals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
