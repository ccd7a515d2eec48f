"""What was measured, section by section: JSON for machines and for resuming, Markdown to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.recipe.report import save_text
from benchmarks.speed.measure import plain
from distill.utils.terminal import table

MEASURED, SKIPPED, FAILED, CUT_OFF = "measured", "skipped", "failed", "cut off"


@dataclass
class Entry:
    """One section of a run. expected_s and planned_gb were written down before it ran."""

    key: str
    title: str
    status: str
    expected_s: float
    planned_gb: float
    seconds: float = 0.0
    peak_gb: float | None = None  # None: no GPU to ask
    values: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    notes: list[str] = field(default_factory=list)  # what is missing in it, and why


class Results:
    """Entries by key; both files are written anew, whole or not at all, after each."""

    def __init__(self, title: str, machine: Mapping[str, str], out: Path | None) -> None:
        self.title, self.machine, self.out = title, dict(machine), out
        self.entries: dict[str, Entry] = {}

    def resume(self) -> None:
        """Takes over what an earlier run has left in the folder."""
        if self.out is not None and (path := self.out / "gpu.json").is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.entries = {key: Entry(**entry) for key, entry in saved["sections"].items()}

    def is_done(self, key: str) -> bool:
        return key in self.entries and self.entries[key].status == MEASURED

    def values(self, key: str) -> dict[str, Any]:
        """A section's figures as JSON has them, also of one that was cut off; empty where there are
        none.
        """
        return self.entries[key].values if key in self.entries else {}

    def add(self, entry: Entry) -> None:
        self.entries[entry.key] = replace(entry, values=plain(entry.values))
        self.write()

    def write(self) -> None:
        if self.out is None:
            return
        sections = {key: asdict(entry) for key, entry in self.entries.items()}
        text = json.dumps({"machine": self.machine, "sections": sections}, indent=1)
        save_text(self.out / "gpu.json", text + "\n")
        save_text(self.out / "gpu.md", self.to_text())

    def to_text(self) -> str:
        parts = [
            f"# {self.title}",
            "; ".join(f"{key} {value}" for key, value in self.machine.items()),
            self.overview(),
        ]
        for entry in self.entries.values():
            notes = "\n".join(f"- {note}" for note in entry.notes)
            parts += [f"## {entry.title}", *filter(None, (entry.text, notes))]
        return "\n\n".join(parts) + "\n"

    def overview(self) -> str:
        """What was planned and what it came to."""
        rows = [
            [
                entry.key,
                entry.status,
                f"{entry.expected_s:.0f}",
                f"{entry.seconds:.0f}",
                f"{entry.planned_gb:.0f}",
                "-" if entry.peak_gb is None else f"{entry.peak_gb:.1f}",
            ]
            for entry in self.entries.values()
        ]
        header = ["section", "", "s expected", "s", "GB planned", "GB at the peak"]
        return table(header, rows)
