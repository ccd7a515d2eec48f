"""Files of strangers: every one below a folder is found or named, none is opened that is not a
file, and none is read that is larger than allowed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

PICTURE_BYTES = 256 << 20  # of one picture as a file
TEXT_BYTES = 1 << 20  # of one caption
SPECIAL = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISDIR, "folder"))


@dataclass
class Listing:
    """What lies below a folder, by POSIX path from there, in order."""

    files: dict[str, None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # with the reason


def list_files(top: Path, skip: Path | None = None) -> Listing:
    """All files below `top` but those in the folder `skip`.

    Links are followed. Each folder is read once, so that links cannot go round in circles: under
    its own name, or else that of the first link to it.
    """
    found = Listing()
    own = _identity(skip) if skip is not None and skip.exists() else None
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        name = folders.pop() if folders else links.pop(0)
        try:
            identity = _identity(top / name)
            if identity in seen:  # all that lies there has been found
                continue
            seen.add(identity)
            entries = [] if identity == own else list(os.scandir(top / name))
        except OSError as error:
            found.refused[name] = f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif entry.is_file():
                    found.files[path] = None
                else:
                    found.refused[path] = _kind(entry.stat())
            except OSError as error:
                what = "a link to nothing" if entry.is_symlink() else error.strerror
                found.refused[path] = f"cannot be read: {what}"
        links.sort()
    found.files = dict.fromkeys(sorted(found.files, key=lambda path: path.split("/")))
    return found


def read_file(path: Path, limit: int) -> bytes:
    """Raises OSError, also for what is no file, such as a pipe, or larger than `limit` bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(_kind(status))
    require_size(status.st_size, limit)
    return path.read_bytes()


def require_size(size: int, limit: int) -> None:
    """Raises OSError where something is larger than is read into memory."""
    if size > limit:
        raise OSError(f"has {size / 2**20:,.0f} MiB; up to {limit >> 20} MiB are read")


def stamp_of_files(top: Path, listing: Listing, *columns: str) -> str:
    """Of a data set whose rows lie anywhere in its files."""
    files = (f"{Path(name).name} {file_stamp(top / name)}" for name in listing.files)
    text = "\n".join((*columns, *files)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def file_stamp(path: Path) -> str:
    """Size and time of change: differs when the content does."""
    if not path.exists():
        return "missing"
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _kind(status: os.stat_result) -> str:
    kind = next((word for test, word in SPECIAL if test(status.st_mode)), "device")
    return f"is a {kind}, not a file"
