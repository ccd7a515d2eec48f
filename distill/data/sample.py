"""One image with its caption as it lies in a source, or the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Problem:
    source: str  # the folder, archive or file as the configuration names it
    item: str
    reason: str

    def line(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One image as it lies in the source; `problem` says why there is none."""

    name: str
    image: bytes = b""
    caption: str = ""
    problem: str = ""


class ImageSource(Protocol):
    """A sequence of samples that can be listed cheaply and read in order."""

    @property
    def label(self) -> str:
        """As the configuration names it."""
        ...

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        """(name, stamp) of every sample in a fixed order; a stamp changes when the sample does."""
        ...

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        """These samples in the order of `entries`, in one pass."""
        ...


def file_stamp(path: Path) -> str:
    """Size and time of change: differs when the content does."""
    if not path.exists():
        return "missing"
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"
