"""Tables (mean and standard deviation over seeds) and figures of an experiment's JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distill.utils.files import replace_file
from distill.utils.terminal import table

Row = dict[str, float]
Point = dict[str, Any]  # figures after some updates
Trace = list[Point]


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """0.931 ± .004; a single value stands alone, and so does one that is infinite."""
    mean = statistics.fmean(values)
    if len(values) == 1 or math.isinf(mean):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def over_seeds(rows: Sequence[Row], keys: Iterable[str]) -> list[str]:
    """A cell per key; empty where an older run has not measured it."""
    return [mean_sd([r[key] for r in rows]) if all(key in r for r in rows) else "" for key in keys]


def arm_table(
    title: str,
    runs: Sequence[dict[str, Any]],
    name: str,
    keys: Sequence[str],
    references: bool = False,
) -> str:
    """A Markdown table of one group of arms, with the references above them or without."""
    rows = []
    if references:
        for reference in runs[0]["references"]:
            found = [run["references"][reference] for run in runs]
            rows.append([f"*{reference}*", "", *over_seeds(found, keys)])
    for arm in runs[0]["arms"]:
        group, _, label = arm.partition("/")
        if group == name:
            found = [run["arms"][arm] for run in runs]
            updates = f"{statistics.fmean(row['updates'] for row in found):.0f}"
            rows.append([label, updates, *over_seeds(found, keys)])
    header = ["arm", "updates", *(key.replace("_", " ") for key in keys)]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return f"### {title} (seeds {seeds})\n\n{table(header, rows)}\n"


def trace_figure(
    arms: dict[str, dict[int, Trace]], dotted: Sequence[Row], keys: Sequence[str], counted: str
) -> Any:
    """A row per arm, a line per seed; dotted: the mean of what they are compared with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.8 * len(keys), 2.5 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), len(keys), squeeze=False)
    for axes, (name, traces) in zip(grid, arms.items(), strict=True):
        axes[0].set_ylabel(name)
        for axis, key in zip(axes, keys, strict=True):
            for seed, trace in traces.items():
                axis.plot([p["updates"] for p in trace], [p[key] for p in trace], label=seed)
            mean = statistics.fmean(row[key] for row in dotted)
            axis.axhline(mean, color="black", linestyle=":")
            axis.set(xlabel=counted, title=key.replace("_", " "))
    grid[0][0].legend(title="seed", fontsize=7)
    return figure


def save_text(path: Path, text: str) -> None:
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def save_figure(figure: Any, path: Path) -> None:
    replace_file(path, lambda p: figure.savefig(p, format="png", dpi=120, bbox_inches="tight"))
