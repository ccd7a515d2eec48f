"""What becomes of a student past its peak, and whether a run's gates and its choice notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distill.config import GatesSection
from distill.figures import table
from distill.selection import Candidate

from .report import mean_sd, over_seeds

Point = dict[str, Any]  # figures after some updates
Trace = list[Point]

KEYS = ("frechet", "precision", "recall", "mixed_ink", "saturation")
CURVES = ("frechet", "precision", "intra_distance", "saturation")


def best_preview(size: str, trace: Trace) -> Point:
    """What `select: best` takes if previews have so many images."""

    def rank(point: Point) -> tuple[bool, float]:
        return Candidate(point["updates"], point["previews"][size]["ratios"]).rank(GatesSection())

    return min(trace, key=rank)


def first_failure(size: str, trace: Trace) -> str:
    """Updates after which a gate is not kept for the first time, and which."""
    for point in trace:
        for failure in point["previews"][size]["failed"]:
            return f"{point['updates']} ({failure.partition(' ')[0]})"
    return "never"


def selection_tables(arms: dict[str, list[Trace]]) -> str:
    """Markdown; traces of every seed by the name of their arm."""
    sizes = list(next(iter(arms.values()))[0][0]["previews"])
    choices: dict[str, Callable[[Trace], Point]] = {
        "smallest Frechet distance": lambda trace: min(trace, key=lambda p: p["frechet"]),
        **{f"`select: best`, {size}": partial(best_preview, size) for size in sizes},
        "`select: last`": lambda trace: trace[-1],
    }
    chosen = []
    for name, traces in arms.items():
        for rule, choose in choices.items():
            points = [choose(trace) for trace in traces]
            updates = mean_sd([point["updates"] for point in points], digits=0)
            chosen.append([name, rule, updates, *over_seeds(points, KEYS)])
    failed = [
        [name, size, "; ".join(first_failure(size, trace) for trace in traces)]
        for name, traces in arms.items()
        for size in sizes
    ]
    titles = [key.replace("_", " ") for key in KEYS]
    parts = ["### Which student is taken", table(["arm", "by", "updates", *titles], chosen)]
    parts += ["### First update that fails a gate, seed by seed"]
    return "\n\n".join([*parts, table(["arm", "previews of", "updates (gate)"], failed)]) + "\n"


def figure_of(arms: dict[str, list[Trace]], teacher: Sequence[Point]) -> Any:
    """A row per arm, a line per seed; dotted: the teacher, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.5 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), len(CURVES), squeeze=False)
    for axes, (name, traces) in zip(grid, arms.items(), strict=True):
        axes[0].set_ylabel(name)
        for axis, key in zip(axes, CURVES, strict=True):
            for trace in traces:
                axis.plot([p["updates"] for p in trace], [p[key] for p in trace])
            axis.axhline(sum(t[key] for t in teacher) / len(teacher), color="black", linestyle=":")
            axis.set(xlabel="updates, PCM's included", title=key.replace("_", " "))
    return figure
