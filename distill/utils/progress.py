"""Progress with rate and time left: a bar on a terminal, a plain line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from .terminal import is_terminal

EVERY_S = 10  # between two lines in a file
LINE = "{desc}{n_fmt} of {total_fmt} {unit}s ({percentage:.0f} %), {rate_fmt}, {remaining} left"


class Lines(tqdm):
    """tqdm for a stream that cannot be drawn over, such as a log file or a pipe."""

    last_line: float | None = None

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def write_line(text: str) -> None:
            file.write(f"{text.rstrip()}\n")
            file.flush()

        return write_line

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        now = time.monotonic()
        if self.last_line is None:  # nothing is done yet
            self.last_line = now
        elif now - self.last_line >= EVERY_S:
            self.last_line = now
            self.sp(str(self))
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """A line stays."""

    def moveto(self, n: int) -> None:
        """There is no cursor."""

    def close(self) -> None:
        if not self.disable and self.sp is not None:
            self.sp(str(self))
            self.sp = None  # tqdm's own end is a line break
        super().close()


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    what: str = "",
    unit: str = "step",
    total: int | None = None,
    done: int = 0,
    hidden: bool = False,
) -> tqdm:
    """tqdm on stderr. `done` of `total` were there before; they do not count for the rate."""
    kwargs = {
        "desc": f"{what}: " if what else None,
        "unit": unit,
        "total": total,
        "initial": done,
    }
    if is_terminal(sys.stderr):
        return tqdm(
            iterable, mininterval=0.5, disable=hidden, dynamic_ncols=True, file=sys.stderr, **kwargs
        )
    form = f"{LINE}{{postfix}}"
    return Lines(
        iterable, mininterval=1, disable=hidden, bar_format=form, file=sys.stderr, **kwargs
    )
