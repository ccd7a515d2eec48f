"""What has to be done before the process ends by a signal or is replaced by another program.

An ordinary end (Ctrl-C, sys.exit, the server's own stop) runs `atexit` and needs none of this.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# By docker stop and systemd; by a terminal that closes, here and on Windows
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)


def before_stop(finish: Callable[[], None]) -> None:
    """Calls `finish` before a signal ends this process, and before `os.exec*` replaces it, as
    ComfyUI-Manager's restart does. What the process does with a signal stays what it was.
    """
    if threading.current_thread() is threading.main_thread():  # Python refuses it elsewhere
        for number in SIGNALS:
            _before_signal(number, finish)
    process = os.getpid()

    def audit(event: str, _: tuple[Any, ...]) -> None:
        if event == "os.exec" and os.getpid() == process:  # not in a fork on its way to another
            finish()

    sys.addaudithook(audit)


def _before_signal(number: signal.Signals, finish: Callable[[], None]) -> None:
    before = signal.getsignal(number)
    if before is None or before is signal.SIG_IGN:  # not Python's; ignored, as by nohup
        return

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, before)  # a second one is not held up
        finish()
        signal.raise_signal(number)

    signal.signal(number, handle)
