"""One image with its caption as it lies in a source, or the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Protocol


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
    culprit: str = ""  # the file that has the problem, where it is not `name`


class ImageSource(Protocol):
    """A sequence of samples that can be listed cheaply and read in order."""

    @property
    def label(self) -> str:
        """As the configuration names it."""
        ...

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        """(name, stamp) of every sample in a fixed order, and what else lies there and why it is
        not read; a stamp changes when the sample does.
        """
        ...

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        """These samples, which stand in the order of `entries`, one at a time and in one pass."""
        ...


def not_read(source: str, files: Sequence[str], beside: str) -> list[Problem]:
    """Files that belong to what is read and are not needed: one problem for each suffix."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        kinds.setdefault("".join(PurePosixPath(file).suffixes[-2:]).lower(), []).append(file)
    return [
        Problem(
            source, f"*{kind}", f"{len(some):,} files beside {beside} are not read, e.g. {some[0]}"
        )
        for kind, some in sorted(kinds.items())
    ]
