"""Clocks, repetitions in turns, and figures of them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distill.contract.shown import first_line

TOTAL = "total"
FIRST = "first image"
WARM_UP = 1  # rounds
GB = 1e9


class Clock:
    """Seconds by stage, the device waited for at both ends of each; and moments since its start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.moments: dict[str, float] = {}
        self._start = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[stage] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Spread:
    """median, lowest and highest of `count` repetitions."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        if self.count == 1:
            return short(self.median)
        return f"{short(self.median)} ({short(self.low)} to {short(self.high)})"


def short(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.3g}" if 0.001 <= abs(value) < 1000 else f"{value:,.6g}"


Run = Callable[[Clock], object]


def in_turns(
    arms: Mapping[str, Run],
    device: torch.device,
    rounds: int,
    budget: Budget,
    total: bool = True,
) -> dict[str, dict[str, Spread]]:
    """Runs A, B, C, A, B, C ... and returns arm -> stage -> spread.

    total: adds TOTAL, the sum of the stages. The first round does not count. Ends early, after a
    whole round, where time is up. An arm that runs out of memory is left out from then on.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in arms}
    fitting = dict(arms)
    for index in range(WARM_UP + rounds):
        if index > WARM_UP and budget.left <= 0:
            budget.skip(f"{WARM_UP + rounds - index} of {rounds} rounds of {', '.join(arms)}")
            break
        for name, run in list(fitting.items()):
            clock = Clock(device)
            try:
                run(clock)
            except torch.OutOfMemoryError as error:
                del fitting[name]
                budget.skip(f"{name}: {first_line(error)}")
                continue
            if index < WARM_UP:
                continue
            stages = dict(clock.seconds)
            if total:
                stages[TOTAL] = sum(stages.values())
            stages |= clock.moments
            for stage, value in stages.items():
                seconds[name][stage].append(value)
    return {
        name: {stage: Spread.of(values) for stage, values in stages.items()}
        for name, stages in seconds.items()
        if stages
    }


class HighWater:
    """Most bytes on a GPU; PyTorch's own count is begun anew for every arm and phase meanwhile."""

    def __init__(self) -> None:
        self._before = 0

    def restart(self, device: torch.device) -> None:
        """Begins PyTorch's count anew and keeps what it came to."""
        if device.type == "cuda":
            self._before = self.so_far(device)
            torch.cuda.reset_peak_memory_stats(device)

    def so_far(self, device: torch.device) -> int:
        """Since `forget`; 0 without a GPU to ask."""
        if device.type != "cuda":
            return 0
        return max(self._before, torch.cuda.max_memory_allocated(device))

    def forget(self, device: torch.device) -> None:
        self.restart(device)
        self._before = 0


HIGH_WATER = HighWater()


class Peaks:
    """Most bytes on a GPU per arm, over all of its runs; empty where there is none to ask."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.most: dict[str, int] = {}  # with what else is in memory
        self.added: dict[str, int] = {}  # beyond what was there before

    @contextmanager
    def __call__(self, arm: str) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(self.device)
        HIGH_WATER.restart(self.device)
        yield
        most = torch.cuda.max_memory_allocated(self.device)
        self.most[arm] = max(most, self.most.get(arm, 0))
        self.added[arm] = max(most - before, self.added.get(arm, 0))


class Budget:
    """Seconds for all of a benchmark, and what there was no time for."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def skip(self, what: str) -> None:
        self.skipped.append(what)

    def allows(self, what: str, seconds: float) -> bool:
        """Whether there is time for `what`, which takes about `seconds`; noted where not."""
        if self.left >= seconds:
            return True
        self.skip(f"{what}: {seconds:.0f} s expected, {max(0, self.left):.0f} s left")
        return False


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x, and how much of y's variance it explains."""

    intercept: float
    slope: float
    r2: float

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        slope, intercept = statistics.linear_regression(x, y)
        residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        mean = statistics.fmean(y)
        total = sum((b - mean) ** 2 for b in y)
        return cls(intercept, slope, 1 - residual / total)


def plain(value: Any) -> Any:
    """Dataclasses and tuples inside `value` as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return asdict(value) if isinstance(value, Spread | Line) else value
