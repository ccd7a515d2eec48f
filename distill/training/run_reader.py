"""What a run folder says about its run, finished or not. No weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError, load_config
from ..contract.shown import shown
from ..stages import Stage, stage_ranges
from .run_dir import RunDir, read_json

Line = dict[str, Any]

RATIO = "_ratio"
FIGURES = ("step", "seconds_per_step", "samples_per_second", "memory_gib", "preview/score")
FAILED = "preview/failed"


@dataclass(frozen=True)
class RunRecord:
    folder: Path
    config: Config
    training: list[Line]  # lines of the log about steps
    previews: list[Line]  # lines of the log about previews
    chosen: int | None  # the step whose student is the run's LoRA, or would be by now
    machine: dict[str, str]

    @property
    def lora(self) -> Path:
        return RunDir(self.folder).lora(self.config.name)

    @property
    def finished(self) -> bool:
        return self.lora.is_file()

    @property
    def step(self) -> int:
        """The newest one in the log."""
        return max((line["step"] for line in (*self.training, *self.previews)), default=0)

    @property
    def newest_lora(self) -> Path | None:
        """The finished LoRA, else the best student so far."""
        best = RunDir(self.folder).candidate(self.chosen) if self.chosen else None
        found = (path for path in (self.lora, best) if path is not None and path.is_file())
        return next(found, None)

    def preview(self, step: int | None) -> Line | None:
        """The preview of a step; without one the newest."""
        newest = self.previews[-1] if self.previews else None
        return next((line for line in self.previews if line["step"] == step), newest)

    def stages(self) -> Iterator[tuple[Stage, int, int]]:
        """Every stage with its first and last step."""
        for stage, begin, end in stage_ranges(self.config.stages):
            yield stage, begin + 1, end

    def seconds(self) -> float:
        """Time in training steps; previews, saving and loading are not counted."""
        total, before = 0.0, 0
        for line in self.training:
            total += (line.get("seconds_per_step") or 0.0) * (line["step"] - before)
            before = line["step"]
        return total


def read_run(folder: Path) -> RunRecord:
    """Raises ConfigError for a folder that holds no run, or another program's files."""
    paths = RunDir(folder)
    saved = paths.config
    if not saved.is_file():
        raise ConfigError(
            f"{folder}: {saved.name} is missing; expected the run_dir of a training, such as "
            "runs/tiny_cpu."
        )
    lines = read_log(paths.log)
    config, best = load_config(saved), read_json(paths.best).get("best")
    return RunRecord(
        folder,
        config,
        [line for line in lines if "seconds_per_step" in line],
        [line for line in lines if "preview/score" in line],
        best if isinstance(best, int) and config.select == "best" else None,
        {key: str(value) for key, value in read_json(paths.machine).items()},
    )


def read_log(path: Path) -> list[Line]:
    """The lines that are whole. Raises ConfigError where text stands for a number."""
    found = []
    if path.is_file():
        content = path.read_text(encoding="utf-8", errors="replace")
        for number, text in enumerate(content.splitlines(), 1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # cut short
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                _check(line, f"{path}, line {number}")
                found.append(line)
    return found


def _check(line: Line, where: str) -> None:
    for key, value in line.items():
        read = key in FIGURES or (key.startswith("preview/") and key.endswith(RATIO))
        if read and value is not None and not is_figure(value):
            raise ConfigError(
                f"{where}: {shown(key)}: expected a finite number or null, as training writes it; "
                f"found {shown(value)}. Delete the line."
            )
    failed = line.get(FAILED)
    words = isinstance(failed, list) and all(isinstance(gate, str) for gate in failed)
    if "preview/score" in line and not words:
        raise ConfigError(
            f"{where}: {FAILED!r}: expected a list of the gates that failed, as training writes "
            f"it; found {shown(failed)}. Delete the line."
        )


def is_figure(value: object) -> bool:
    """Whether a value of the log is a number that can be computed with."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return whole or (isinstance(value, float) and math.isfinite(value))


def ratios(preview: Line) -> dict[str, float]:
    """Figures of a preview as ratios to the teacher's; nan where the log has none."""
    found = {}
    for key, value in preview.items():
        if key.startswith("preview/") and key.endswith(RATIO):
            name = key.removeprefix("preview/").removesuffix(RATIO)
            found[name] = math.nan if value is None else float(value)
    return found


def summary(run: RunRecord) -> dict[str, Any]:
    """A run in a few figures, ready for JSON."""
    preview = run.preview(run.chosen)
    lora = run.newest_lora
    return {
        "run_dir": str(run.folder),
        "finished": run.finished,
        "step": run.step,
        "total_steps": run.config.total_steps,
        "lora": str(lora) if lora else None,
        "chosen_step": run.chosen,
        "preview": None
        if preview is None
        else {
            "step": preview["step"],
            "score": preview["preview/score"],
            "gates_failed": preview[FAILED],
            "ratios": ratios(preview),
        },
        "training_seconds": round(run.seconds(), 3),
        "memory_gib": max((line.get("memory_gib") or 0 for line in run.training), default=None),
    }
