"""The best student so far, for recipes with `select: best`: distribution matching drifts after its
peak. To rank students a preview needs hundreds of images.

RUN/best.json                    candidates with their ratios to the teacher, the best one named
RUN/lora/step-000100.safetensors   the student of a candidate, its moving average

A run that continues from a checkpoint has to know the best candidate up to there. So a candidate
that was overtaken is kept as long as it is the best at some checkpoint that is left.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, GatesSection
from ..contract.shown import shown
from ..evaluation.gates import Metrics, failures, teacher_distance
from ..utils.files import replace_text
from .run_dir import RunDir, read_json
from .tensor_files import is_intact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    step: int
    ratios: Metrics  # to the teacher's

    def rank(self, gates: GatesSection) -> tuple[bool, float]:
        """Smaller is better: all gates passed first, then the distance."""
        return bool(failures(self.ratios, gates)), teacher_distance(self.ratios)

    def record(self, gates: GatesSection) -> dict[str, Any]:
        """As JSON, which has no number for what is not finite."""
        ratios = {k: v if math.isfinite(v) else None for k, v in self.ratios.items()}
        distance = teacher_distance(self.ratios)
        return {
            "step": self.step,
            "lora": RunDir(Path()).candidate(self.step).as_posix(),
            "score": distance if math.isfinite(distance) else None,
            "failed": failures(self.ratios, gates),
            "ratios": ratios,
        }


class Selection:
    """Candidates of a run, in the order of their steps. Lives on the main rank."""

    def __init__(self, run_dir: Path, gates: GatesSection) -> None:
        self.run_dir, self.gates = RunDir(run_dir), gates
        self.candidates: list[Candidate] = []

    @property
    def best(self) -> Candidate | None:
        """The first of equals."""
        return self._best(self.candidates)

    def lora(self, candidate: Candidate) -> Path:
        return self.run_dir.candidate(candidate.step)

    def restore(self, first: int, begin: int = 0) -> None:
        """Continues from step `first`: what came after it is made again. Candidates are those of
        the last stage, which begins after step `begin`. Raises ConfigError.
        """
        path = self.run_dir.best
        if not path.is_file():
            return
        listed = read_json(path)
        try:
            self.candidates = [
                Candidate(
                    int(record["step"]),
                    {k: math.nan if v is None else float(v) for k, v in record["ratios"].items()},
                )
                for record in listed["candidates"]
            ]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path}: expected candidates with step and ratios ({shown(error)}). Delete the "
                "file; the run goes on without."
            ) from error
        lost = "it can no longer be chosen"
        kept = [
            c for c in self.candidates if begin < c.step <= first and is_intact(self.lora(c), lost)
        ]
        self._keep(kept)

    def offer(
        self,
        candidate: Candidate,
        export: Callable[[Path], object],
        checkpoints: Iterable[int],
    ) -> bool:
        """Has `export` write the student if it is better than all before, and says whether it is.

        checkpoints: the steps that the run could be continued from.
        """
        best = self.best
        if best is not None and candidate.rank(self.gates) >= best.rank(self.gates):
            return False
        export(self.lora(candidate))
        candidates = [*self.candidates, candidate]
        needed = [self._best([c for c in candidates if c.step <= step]) for step in checkpoints]
        self._keep([c for c in candidates if c is candidate or c in needed])
        return True

    def _best(self, candidates: Sequence[Candidate]) -> Candidate | None:
        return min(candidates, key=lambda c: c.rank(self.gates), default=None)

    def _keep(self, candidates: list[Candidate]) -> None:
        """Files of the others go last, so that whatever is listed is there."""
        gone = [c for c in self.candidates if c not in candidates]
        self.candidates = candidates
        best = self.best
        value = {
            "best": best.step if best else None,
            "candidates": [c.record(self.gates) for c in candidates],
        }
        text = json.dumps(value, indent=2)
        replace_text(self.run_dir.best, text)
        for candidate in gone:
            self.lora(candidate).unlink(missing_ok=True)
