"""What a run writes down: `log.jsonl`, one object per line, and TensorBoard in `tb/`.

Units: `seconds_per_step`, `samples_per_second` (all ranks), `memory_gib` (the fullest rank's peak).
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.files import replace_text
from .engine import Engine
from .run_dir import RunDir

log = logging.getLogger(__name__)


class RunLog:
    """Only the main rank writes. Continuing from step `first` drops what came after it, for those
    steps are made again. Leaving it closes TensorBoard's file.
    """

    def __init__(self, run_dir: Path, engine: Engine, first: int = 0) -> None:
        self.path = RunDir(run_dir).log
        self._board = None
        self._writes = engine.is_main
        if self._writes:
            drop_lines_after(self.path, first)
            self._board = _board(RunDir(run_dir).tensorboard, first)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Non-finite numbers have no JSON and become null."""
        if not self._writes:
            return
        values = {key: value if _writable(value) else None for key, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:  # closing flushes
                file.write(json.dumps({"step": step, **values}) + "\n")
            if self._board:
                for key, value in values.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(key, value, step)
                self._board.flush()
        except OSError as error:
            raise OSError(
                f"{self.path}: step {step} could not be written ({error.strerror or error}). The "
                "checkpoints are untouched: free some space, then continue with --resume."
            ) from error

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """To TensorBoard alone."""
        if self._board:
            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")
            self._board.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._board:
            self._board.close()


def _writable(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _board(folder: Path, first: int) -> Any:
    """A SummaryWriter, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed: no %s, only log.jsonl", folder)
        return None
    return SummaryWriter(folder, purge_step=first + 1 if first else None)


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a line that was cut short is dropped too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    replace_text(path, "".join(kept))


class Window:
    """Means over the steps since the last line of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._steps = self._samples = 0
        self._seconds = 0.0

    def add(self, values: dict[str, float], seconds: float, samples: int) -> None:
        """One step: what the method reports, its duration, and its samples on all ranks. A value
        that is not finite counts for nothing: its update was skipped.
        """
        for key, value in values.items():
            finite = math.isfinite(value)
            self._sums[key] = self._sums.get(key, 0.0) + (value if finite else 0.0)
            self._counts[key] = self._counts.get(key, 0.0) + finite
        self._steps += 1
        self._samples += samples
        self._seconds += seconds

    def take(self, engine: Engine) -> dict[str, float]:
        """The means over steps and ranks, throughput and memory; the window is empty afterwards."""
        sums, counts = engine.sum(self._sums), engine.sum(self._counts)
        values = {
            key: total / counts[key] if counts[key] else math.nan for key, total in sums.items()
        }
        seconds = engine.max(self._seconds)
        values["seconds_per_step"] = seconds / self._steps
        values["samples_per_second"] = self._samples / seconds if seconds else math.nan
        values["memory_gib"] = engine.max(engine.peak_memory_gib())
        self.__init__()
        return values
