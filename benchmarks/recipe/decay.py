"""What becomes of a student past its peak, and whether a run's gates and its choice notice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from distill.config import GatesSection
from distill.evaluation.gates import failures
from distill.training.selection import Candidate
from distill.utils.terminal import table

from .report import Point, Trace, mean_sd, over_seeds

KEYS = ("frechet", "precision", "recall", "mixed_ink", "saturation")


def best_preview(size: str, trace: Trace) -> Point:
    """What `select: best` takes if previews have so many images."""

    def rank(point: Point) -> tuple[bool, float]:
        return Candidate(point["updates"], point["previews"][size]).rank(GatesSection())

    return min(trace, key=rank)


def first_failure(size: str, trace: Trace) -> str:
    """Updates after which a gate is not kept for the first time, and which."""
    for point in trace:
        for failure in failures(point["previews"][size], GatesSection()):
            return f"{point['updates']} ({failure.partition(' ')[0]})"
    return "never"


def selection_tables(arms: dict[str, dict[int, Trace]]) -> str:
    """Markdown; traces by the name of their arm and by seed."""
    some = next(iter(next(iter(arms.values())).values()))
    sizes = list(some[0]["previews"])
    choices: dict[str, Callable[[Trace], Point]] = {
        "smallest Frechet distance": lambda trace: min(trace, key=lambda p: p["frechet"]),
        **{f"`select: best`, {size}": partial(best_preview, size) for size in sizes},
        "`select: last`": lambda trace: trace[-1],
    }
    chosen = []
    for name, traces in arms.items():
        for rule, choose in choices.items():
            points = [choose(trace) for trace in traces.values()]
            updates = mean_sd([point["updates"] for point in points], digits=0)
            chosen.append([name, rule, updates, *over_seeds(points, KEYS)])
    failed = [
        [name, size, "; ".join(first_failure(size, trace) for trace in traces.values())]
        for name, traces in arms.items()
        for size in sizes
    ]
    titles = [key.replace("_", " ") for key in KEYS]
    parts = ["### Which student is taken", table(["arm", "by", "updates", *titles], chosen)]
    parts += ["### First update that fails a gate, seed by seed"]
    return "\n\n".join([*parts, table(["arm", "previews of", "updates (gate)"], failed)]) + "\n"
