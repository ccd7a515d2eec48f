"""What was to be reached, and whether it was: computed from measurements, never from estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.utils.terminal import table

from .measure import FIRST, TOTAL, Spread, short


@dataclass(frozen=True)
class Target:
    """One figure that was measured (None: it was not) and the limit it is held against."""

    what: str
    limit: float
    unit: str
    found: float | None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        met = self.found >= self.limit if self.at_least else self.found < self.limit
        return "met" if met else "missed"

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.at_least else 'under'} {self.limit:g} {self.unit}"


def speed_targets(found: Mapping[str, Mapping[str, Spread]]) -> tuple[str | None, list[Target]]:
    """Our fastest arm and what it reaches, of medians of 4 images of 2048 x 2048 on a GPU.

    found: arm -> stage -> seconds, empty where that was not measured. Arms have names that start
    with A (diffusers), B (core's nodes) and C (ours).
    """
    totals = {arm: stages[TOTAL].median for arm, stages in found.items()}
    best = min((arm for arm in totals if arm.startswith("C")), key=totals.__getitem__, default=None)

    def against(letter: str) -> float | None:
        other = next((totals[arm] for arm in totals if arm.startswith(letter)), None)
        return other / totals[best] if best and other is not None else None

    job = "4 images of 2048 x 2048, files on disk"
    first = found[best][FIRST].median if best else None
    return best, [
        Target(f"C: {job}", 5.0, "s", totals[best] if best else None),
        Target("C: the first of them", 1.5, "s", first),
        Target("B / C: core's nodes against ours", 1.7, "x", against("B"), at_least=True),
        Target("A / C: diffusers against ours", 1.7, "x", against("A"), at_least=True),
    ]


def training_targets(seconds: float | None, gigabytes: float | None) -> list[Target]:
    """Of the trainer at 1024 x 1024, batch 1, all 60 blocks, one fake update per student update."""
    job = "1024 x 1024, batch 1, 1:1"
    return [
        Target(f"{job}: one iteration", 1.8, "s", seconds),
        Target(f"{job}: peak memory", 65, "GB", gigabytes),
    ]


def target_table(targets: Sequence[Target], card: str) -> str:
    """card: what they were measured on."""
    rows = [
        [t.what, t.wanted, "-" if t.found is None else f"{short(t.found)} {t.unit}", t.verdict]
        for t in targets
    ]
    return table([f"target, on {card}", "wanted", "found", "verdict"], rows)


def target_values(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"what": t.what, "wanted": t.wanted, "found": t.found, "verdict": t.verdict}
        for t in targets
    ]
