"""What strangers' files and texts may do to a program: be used, or be refused in so many words.

A surface is where such input comes in, with the exceptions that it documents. An attempt runs in a
process of its own with a limit of time and memory, so that what hangs, crashes or fills the memory
is told like any other wrong outcome.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from distill import cli

FORK = multiprocessing.get_context("fork")  # what is imported stays imported: 20 ms
LONGEST_MESSAGE = 4000  # characters: a node and a terminal have to show it


@dataclass(frozen=True)
class Limits:
    """Of one attempt. memory_mib: beyond what the process has at its start."""

    cpu_s: int = 5
    wall_s: float = 20  # for what waits for ever
    memory_mib: int = 512


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `value`, or an exception, or `killed` by a limit or a signal."""

    value: Any = None
    kinds: tuple[str, ...] = ()  # the exception's class and its bases
    message: str = ""
    trace: str = ""
    killed: str = ""


@dataclass(frozen=True)
class Surface:
    """Where strangers' input comes in. documented: the exceptions that its docstring names."""

    name: str
    read: Callable[[Any], Any]
    documented: tuple[type[BaseException], ...]
    limits: Limits = field(default_factory=Limits)


def attempt(work: Callable[[], Any], limits: Limits) -> Outcome:
    """Runs `work` in a child process."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_work_within, args=(work, limits, sender))
    child.start()
    sender.close()
    try:
        if not receiver.poll(limits.wall_s):
            return Outcome(killed=f"not done after {limits.wall_s:g} s")
        return receiver.recv()
    except EOFError:  # it ended without a word
        child.join()
        return Outcome(killed=signal.Signals(-(child.exitcode or 0)).name)
    finally:
        child.kill()
        child.join()
        receiver.close()


def _work_within(work: Callable[[], Any], limits: Limits, sender: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 1))
    most = _data_bytes() + limits.memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    try:
        outcome = Outcome(work())
    except BaseException as error:
        kinds = tuple(map(name_of, type(error).__mro__))
        outcome = Outcome(None, kinds, str(error), traceback.format_exc())
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    sender.send(outcome)


def _data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA limits."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# ---------------------------------------------------------------------------------------- verdicts


def row(name: str, make: Any, refused: str | None = None, marks: Any = ()) -> Any:
    """A row of a table. refused: pattern of the message; without one the input is read."""
    return pytest.param(make, refused, id=name, marks=marks)


def few(rows: Sequence[Any], every: int = 9) -> list[Any]:
    """Every ninth row of a table, the first among them; the others are slow."""
    return [row if n % every == 0 else _slow(row) for n, row in enumerate(rows)]


def _slow(row: Any) -> Any:
    param = row if hasattr(row, "marks") else pytest.param(row)
    return pytest.param(*param.values, id=param.id, marks=[*param.marks, pytest.mark.slow])


def pending(item: str) -> pytest.MarkDecorator:
    """Right only with the item of that name; it fails as soon as it is right."""
    return pytest.mark.xfail(strict=True, reason=item)


def check(surface: Surface, given: Any, refused: str | None = None) -> Any:
    """The value of what is read; fails where the outcome is not the row's."""
    outcome = attempt(lambda: surface.read(given), surface.limits)
    assert not outcome.killed, f"{surface.name}: {outcome.killed}"
    if refused is None:
        assert not outcome.kinds, outcome.trace
        return outcome.value
    assert outcome.kinds, f"{surface.name}: expected a refusal, found {outcome.value!r}"
    assert set(map(name_of, surface.documented)) & set(outcome.kinds), outcome.trace
    assert re.search(refused, outcome.message, re.DOTALL), outcome.message
    check_message(outcome.message)
    return None


def survive(
    surface: Surface,
    examples: SearchStrategy[Any],
    put: Callable[[Any], Any],
    count: int,
    always_the_same: bool = True,
) -> None:
    """Reads `count` examples; fails where anything comes of one but what is documented.

    put: makes an example into what the surface reads.
    """

    @settings(
        max_examples=count,
        derandomize=always_the_same,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(examples)
    def each(example: Any) -> None:
        given = put(example)
        signal.setitimer(signal.ITIMER_PROF, surface.limits.cpu_s)
        with suppress(*surface.documented):
            surface.read(given)

    def read_all() -> None:
        signal.signal(signal.SIGPROF, _too_long)
        each()

    outcome = attempt(read_all, Limits(cpu_s=60 + count, wall_s=600, memory_mib=1024))
    assert not outcome.killed, f"{surface.name}: {outcome.killed}"
    assert not outcome.kinds, outcome.trace


class TooLong(Exception):
    """An example took more than the surface's time."""


def _too_long(*_: object) -> None:
    raise TooLong


def check_message(message: str) -> None:
    """Short, and nothing in it that a terminal would obey."""
    assert 0 < len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]!r}"
    odd = {c for c in message if not c.isprintable() and c != "\n"}
    assert not odd, f"{odd} in {message[:500]!r}"


# ------------------------------------------------------------------------------------ command line


class Refused(Exception):
    """Exit code 2: wrong usage or input. Its text is what stood on stderr."""


class Failed(Exception):
    """Exit code 1: the run failed."""


def command(*words: object) -> str:
    """Runs `turbo-distill` in this process; what it writes to stdout.

    The streams are as strict as a pipe's. Raises Refused, Failed, and whatever escapes.
    """
    out = TextIOWrapper(BytesIO(), "utf-8", write_through=True)
    err = TextIOWrapper(BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as exit:
            code = exit.code
    said = err.buffer.getvalue().decode()
    if code:
        raise {1: Failed, 2: Refused}[code](said)
    return out.buffer.getvalue().decode()
