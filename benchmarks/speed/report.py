"""Results as they come in: JSON for machines, Markdown rows for docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.recipe.report import save_text
from distill.utils.terminal import table

from .measure import FIRST, TOTAL, Peaks, Spread, plain, short

Stages = Mapping[str, Mapping[str, Spread]]


class Report:
    """Sections of one run. Written anew after each, so that a run that is cut short leaves its
    finished part.
    """

    def __init__(self, title: str, machine: Mapping[str, str], out: Path | None, name: str) -> None:
        self.machine, self.out, self.name = dict(machine), out, name
        self.values: dict[str, Any] = {"machine": self.machine}
        on = "; ".join(f"{key} {value}" for key, value in self.machine.items())
        self.text = [f"# {title}", f"{on}"]

    def add(self, title: str, values: Any, *parts: str) -> str:
        """Keeps a section and returns its text."""
        self.values[title] = plain(values)
        text = "\n\n".join([f"## {title}", *parts])
        self.text.append(text)
        self._write()
        return text

    def _write(self) -> None:
        if self.out is None:
            return
        save_text(self.out / f"{self.name}.json", json.dumps(self.values, indent=1) + "\n")
        save_text(self.out / f"{self.name}.md", "\n\n".join(self.text) + "\n")


def stage_table(stages: Stages) -> str:
    """Arms by stages, in seconds: median (lowest to highest)."""
    names = list(dict.fromkeys(stage for found in stages.values() for stage in found))
    names.sort(key=lambda name: (name == FIRST, name == TOTAL))  # the others keep their order
    rows = [
        [arm, *(str(found[name]) if name in found else "" for name in names)]
        for arm, found in stages.items()
    ]
    return table(["seconds", *names], rows)


def value_table(header: Sequence[str], rows: Mapping[str, Any]) -> str:
    """One row per entry; a mapping or a list fills the columns after the first."""
    cells = []
    for name, row in rows.items():
        values = row.values() if isinstance(row, Mapping) else row
        values = values if not isinstance(values, int | float) else [values]
        cells.append([name, *(short(value) if value else "0" for value in values)])
    return table(header, cells)


def memory_table(weights: Mapping[str, int], peaks: Peaks) -> str:
    """GB per arm at its peak: alone (its own weights and what it adds), and with all arms' models.

    weights: bytes.
    """

    def gigabytes(arm: str, found: Mapping[str, int], more: int = 0) -> str:
        return f"{(found[arm] + more) / 1e9:.1f}" if arm in found else "-"

    rows = [
        [arm, gigabytes(arm, peaks.added, own), gigabytes(arm, peaks.most)]
        for arm, own in weights.items()
    ]
    return table(["peak on the GPU, GB", "alone", "with all arms' models"], rows)


def ratios(stages: Stages, stage: str, better: str) -> str:
    """How much longer the other arms take than `better`, of medians."""
    if better not in stages:
        return f"{stage}: {better} was not measured"
    ours = stages[better][stage].median
    others = [
        f"{arm} / {better}: {found[stage].median / ours:.2f}x"
        for arm, found in stages.items()
        if arm != better
    ]
    return f"{stage}: {', '.join(others)}"
