"""What a terminal shows: colours where they are wanted, durations and sizes that people read.

Colours follow https://no-color.org and https://force-color.org: NO_COLOR turns them off,
FORCE_COLOR on, and else a terminal has them and a file has not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

from ..contract.files import size_text

Style = Literal["bold", "dim", "red", "green", "yellow"]
CODES: dict[Style, int] = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}


def is_terminal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what was written can be drawn over."""
    return stream.isatty() and environ.get("TERM") != "dumb"


def has_colours(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    if environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or is_terminal(stream, environ)


def paint(text: str, style: Style, stream: TextIO) -> str:
    """`text` in a colour, if `stream` shows colours."""
    return f"\x1b[{CODES[style]}m{text}\x1b[0m" if text and has_colours(stream) else text


class LogFormatter(logging.Formatter):
    """The message alone; warnings yellow, errors red."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__("%(message)s")
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.ERROR:
            return paint(text, "red", self.stream)
        return paint(text, "yellow", self.stream) if record.levelno >= logging.WARNING else text


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 6 h 12 min"""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


size = size_text


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = (
        "|"
        + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
