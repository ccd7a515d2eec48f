"""What a command has done. `cli.py` shows it: text for people, one JSON document for programs, and
a line on stderr at the end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..utils.terminal import duration, paint


@dataclass(frozen=True)
class Result:
    """`text` goes to stdout, or `values` with --json; `done` is the last line's first half, `next`
    what usually follows. `quiet`: another process says all this.
    """

    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    done: str = "done"
    wrote: tuple[Path, ...] = ()
    next: str = ""
    code: int = 0
    quiet: bool = False


def is_rank_zero() -> bool:
    """Whether this process is the first one of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Result, command: str, seconds: float, stdout: TextIO, as_json: bool) -> None:
    """Writes text or JSON to `stdout`, and the last line to stderr."""
    if result.quiet:
        return
    if as_json:
        document = {
            "command": command,
            "exit_code": result.code,
            "seconds": round(seconds, 3),
            "wrote": [str(path) for path in result.wrote],
            **result.values,
        }
        write_json(document, stdout)
    else:
        stdout.write(result.text)
        stdout.flush()
    sys.stderr.write(last_line(result, seconds) + "\n")


def last_line(result: Result, seconds: float) -> str:
    line = f"{result.done} in {duration(seconds)}"
    if result.wrote:
        names = [str(path) for path in result.wrote]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        line += f", wrote {', '.join(names[:3])}{more}"
    style = "yellow" if result.code else "green"
    hint = paint(f"  Next: {result.next}", "dim", sys.stderr) if result.next else ""
    return paint(f"{line}.", style, sys.stderr) + hint


def show_failure(
    error: BaseException, command: str, code: int, stdout: TextIO, as_json: bool
) -> None:
    """With --json an error is a document too, so that a program always finds one."""
    if as_json and is_rank_zero():
        what = {"type": type(error).__name__, "message": str(error)}
        write_json({"command": command, "exit_code": code, "error": what}, stdout)


def write_json(document: Mapping[str, Any], stdout: TextIO) -> None:
    stdout.write(json.dumps(finite(document), indent=2, ensure_ascii=False, default=str) + "\n")
    stdout.flush()


def finite(value: Any) -> Any:
    """`value` for JSON, which has no number for inf and nan: they become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
