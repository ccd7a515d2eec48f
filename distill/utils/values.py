"""Values that people write: paths, names, seeds."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..contract.shown import shown

SEED_MAX = 2**63 - 1  # a seed plus the number of a stage or an image is still one for torch
PART_BYTES = 255  # of a file's or folder's name, on common file systems
NAME_BYTES = 180  # fewer: steps, seeds and suffixes are added to it
WINDOWS = '<>"|?*' if os.name == "nt" else ""
FORBIDDEN = re.compile(rf"[\x00-\x1f\x7f/\\:{WINDOWS}]")  # separators of any system, and controls
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # a drive has one letter
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)


def readable(text: str) -> str:
    """The text itself. Raises ValueError for what no header, log or report could hold."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"expected text in UTF-8 without NUL, found {shown(text)}")
    return text


def with_home(text: str) -> str:
    """`~` and `~user` as a shell expands them; all else, hub ids too, as it is.

    Raises ValueError if it is not readable.
    """
    return os.path.expanduser(readable(text))


def user_path(text: str | Path) -> Path:
    """The path that somebody wrote, with his home for `~`.

    Raises ValueError if it is empty, not readable, or the address of something elsewhere: files are
    mapped, locked and renamed.
    """
    if not str(text):
        raise ValueError("expected a path, found nothing")
    if ADDRESS.match(str(text)):
        raise ValueError(
            f"expected a local path, found an address: {shown(str(text))}. Copy it to a disk, or "
            "mount it there (docs/scale_out.md)"
        )
    path = Path(with_home(str(text)))
    # "./~x" names a folder here, and has to when it is written down and read again
    return path.absolute() if str(path).startswith("~") else path


def storable(path: Path) -> Path:
    """The path itself. Raises ValueError where a name in it is longer than disks take."""
    for part in path.parts:
        if (length := len(os.fsencode(part))) > PART_BYTES:
            raise ValueError(
                f"expected a path of names of at most {PART_BYTES} bytes, found {length:,}: "
                f"{shown(part)}"
            )
    return path


def file_name(text: str) -> str:
    """The name of a file without its suffix, which others can open on their systems.

    Raises ValueError.
    """
    if not text or text != text.strip() or text[0] in ".~" or text[-1] == ".":
        raise ValueError(
            "expected the name of a file, which begins with neither a dot nor ~ and ends with no "
            f"dot, without spaces around it; found {shown(text)}"
        )
    if wrong := FORBIDDEN.search(text):
        raise ValueError(
            f"expected the name of a file, which has no {wrong[0]!r} in it; found {shown(text)}"
        )
    if RESERVED.fullmatch(text):
        raise ValueError(f"expected another name, for Windows keeps {shown(text)} for a device")
    if len(readable(text).encode()) > NAME_BYTES:
        raise ValueError(
            f"expected at most {NAME_BYTES} bytes, found {len(text.encode())}: {shown(text)}"
        )
    return text
