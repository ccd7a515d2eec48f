"""Files that appear whole or not at all, and what killed processes left of them.

A temporary file carries the mark of its process: place, process id, session. A place is where a
process id means something: a host since its start, and a container in it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LEFTOVER_S = 3600  # unchanged for so long, the file of a process of another place is nobody's

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("(os error 28)", "(os error 112)", "(os error 122)")  # of the safetensors library
_SESSION = secrets.token_hex(4)  # a process may have the id of one that has ended
_COUNT = itertools.count()
MARK = re.compile(r"(?P<place>[0-9a-f]{6})-(?P<pid>\d{1,10})-(?P<session>[0-9a-f]{8})-\d+")
_TEMPORARY = re.compile(rf"\..+\.(?P<mark>{MARK.pattern}|[0-9a-f]{{8}})\.tmp")  # 8: no mark yet
_swept: set[Path] = set()


class NoRoomError(OSError):
    """A disk is full: names the file, the bytes it needs and those that are free."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def written_whole(path: Path, *, replace: bool = True, size: int = 0) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place at the end; on failure nothing is left.
    Folders are made; what killed processes left in the folder is removed first.

    replace: whether it takes the place of a file too. size: bytes, where they are known before.
    Raises NoRoomError; without `replace` FileExistsError where a file has appeared meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_once(path.parent)
    check_room(path, size)
    # 50 characters, so that a name of any length that a disk takes remains one with the mark
    temporary = path.with_name(f".{path.name[:50]}.{new_mark()}.tmp")
    try:
        with full_disk_named(path, size, temporary):
            yield temporary
            (os.replace if replace else _rename_new)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read. Raises OSError, also for a pipe or device, which may never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open refuses a folder by itself
        raise OSError(errno.EINVAL, "not a regular file, but a pipe or device", str(path))
    return path.open("rb")


def check_room(path: Path, size: int) -> None:
    """Raises NoRoomError unless `size` bytes fit on the disk of `path`'s folder."""
    if size > shutil.disk_usage(path.parent).free:
        raise _no_room(path, size)


@contextmanager
def full_disk_named(path: Path, size: int = 0, partial: Path | None = None) -> Iterator[None]:
    """Makes a NoRoomError of whatever says in here that the disk is full.

    size: bytes that `path` needs; where that is 0, those that have come to `partial` are told.
    """
    try:
        yield
    except Exception as error:
        code = getattr(error, "errno", None)
        if isinstance(error, NoRoomError) or not (
            code in _FULL or any(text in str(error) for text in _FULL_TEXTS)
        ):
            raise
        if not size and partial is not None and partial.exists():
            size = partial.stat().st_size
        raise _no_room(path, size) from error


def size_text(count: float) -> str:
    """Bytes as 512 B, 1.3 MB, 40.9 GB"""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def _no_room(path: Path, size: int) -> NoRoomError:
    free = shutil.disk_usage(path.parent).free
    return NoRoomError(
        errno.ENOSPC,
        f"{path}: no space left: it needs {size_text(size)}, and {path.parent} has "
        f"{size_text(free)} free. Make room, or write to another disk.",
    )


def _rename_new(temporary: Path, path: Path) -> None:
    """Renames, but never over another file."""
    try:
        try:
            os.link(temporary, path)  # the one call that is atomic and refuses, on every system
        except FileExistsError:
            raise
        except OSError:  # no hard links here, as on FAT
            path.open("xb").close()
            os.replace(temporary, path)
    except FileExistsError:
        raise FileExistsError(
            f"{path} appeared while it was being written, and was not replaced. Remove it, or "
            f"choose another name, and run this again."
        ) from None


# ------------------------------------------------------------------------------ what is left behind


def new_mark() -> str:
    """Tells whose a temporary file is; another one at each call."""
    return f"{_place()}-{os.getpid()}-{_SESSION}-{next(_COUNT)}"


def is_running(mark: str) -> bool | None:
    """Whether the process of a mark has not ended; None where that cannot be known from here."""
    found = MARK.fullmatch(mark)
    if found is None or found["place"] != _place():
        return None
    if (pid := int(found["pid"])) == os.getpid():
        return found["session"] == _SESSION
    if os.name == "nt":  # os.kill would end the process there
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def is_leftover(path: Path, mark: str) -> bool:
    """Whether nobody will finish a temporary file: its process has ended, or is not known and has
    not touched it for an hour.
    """
    running = is_running(mark)
    return running is False or (running is None and _age_s(path) > LEFTOVER_S)


def sweep_once(folder: Path) -> None:
    """Removes what `written_whole` left in a folder in processes that have ended, and names what
    may be of a living one elsewhere. Once per process and folder; never raises OSError.
    """
    if folder in _swept:
        return
    _swept.add(folder)
    for path in folder.glob(".*.tmp"):
        if found := _TEMPORARY.fullmatch(path.name):
            try:
                _sweep(path, found["mark"])
            except OSError as error:  # gone meanwhile, or not ours to remove
                logging.warning("Turbo Distill: %s could not be removed: %s", path, error)


def _sweep(path: Path, mark: str) -> None:
    size = size_text(path.stat().st_size)
    if is_leftover(path, mark):
        path.unlink()
        logging.warning(
            "Turbo Distill: removed %s (%s), left by a process that was killed.",
            path,
            size,
        )
    elif is_running(mark) is None:
        logging.warning(
            "Turbo Distill: %s (%s) was left by a process that was killed, unless one on "
            "another computer or in another container is writing it now. Remove it to make room; "
            "an hour after its last change the next start does.",
            path,
            size,
        )


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


@functools.cache
def _place() -> str:
    """Six hexadecimal digits of the host, its start and the container."""
    linux = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    boot, container = (path.exists() for path in linux)
    facts = (
        platform.node(),
        linux[0].read_text(encoding="ascii") if boot else "",
        os.readlink(linux[1]) if container else "",
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:6]
