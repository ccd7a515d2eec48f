"""Items that cannot be used: set aside with a reason, counted, and never a reason to stop."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Problem:
    source: str  # the folder, archive or file as the configuration names it
    item: str
    reason: str

    def line(self) -> dict[str, str]:
        return asdict(self)
