"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..contract.files import written_whole


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it over `path`; on failure
    nothing is left.
    """
    with written_whole(path) as temporary:
        write(temporary)


def create_file(path: Path, write: Callable[[Path], object]) -> None:
    """The same, but raises FileExistsError where there is a file by then."""
    with written_whole(path, replace=False) as temporary:
        write(temporary)


def replace_text(path: Path, text: str) -> None:
    """The same for text, in UTF-8."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
