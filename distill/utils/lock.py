"""One writer per folder.

FOLDER/.lock        held by the operating system, which frees it however the process ends
FOLDER/.owner.json  whose it is, for people and for other machines; removed by an orderly end
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from .files import replace_text
from .launch import Launch

log = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".owner.json"


class FolderInUse(ValueError):
    """Somebody else writes to the folder; the message names the process and the way out."""


@dataclass(frozen=True)
class Owner:
    pid: int
    host: str
    since: str  # UTC
    program: str
    launch: str = ""  # see Launch.id

    @staticmethod
    def of_this_process() -> Owner:
        now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
        launch = Launch.of_this_process().id
        return Owner(os.getpid(), platform.node(), now, " ".join(sys.argv[:2]), launch)

    @staticmethod
    def read(path: Path) -> Owner | None:
        """None where there is none, or nothing that could be one."""
        try:
            return Owner(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.program}, since {self.since})"


@contextmanager
def single_writer(folder: Path) -> Iterator[None]:
    """While entered, no other process enters it for `folder`, which is made.

    What a process that was killed leaves is told and taken over on its own machine. Another
    machine's is not, for locks do not reach across every network file system; but if it was of the
    same launch: torchrun has ended its processes before it starts others. Raises FolderInUse.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / OWNER
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderInUse(
            f"{folder}: {Owner.read(file) or 'another process'} is writing to it. Wait for its "
            "end, stop it, or name another folder."
        ) from None
    try:
        _take_over(folder, file)
        replace_text(file, json.dumps(asdict(Owner.of_this_process())))
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        lock.release()


def _take_over(folder: Path, file: Path) -> None:
    last = Owner.read(file)
    if last is None:
        return
    launch = Launch.of_this_process().id
    if last.host != platform.node() and not (launch and last.launch == launch):
        raise FolderInUse(
            f"{folder}: {last} is writing to it, or ended without saying so. If it has ended, "
            f"delete {file} and start again."
        )
    log.warning("%s: %s ended without releasing it; taken over.", folder, last)
