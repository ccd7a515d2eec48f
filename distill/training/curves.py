"""Curves of a run as SVG that lies in a page: no background, text in the page's colour."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from .run_reader import RATIO, Line, RunRecord, is_figure

POINTS = 250  # per curve; of more, neighbours are averaged
COLOURS = ("#3b82d6", "#e0742a", "#1f9d72", "#c2519b", "#9b7bdb", "#b08d1f", "#4aa3b5")
INK = "#010203"  # replaced by the page's text colour
STYLE = {
    "svg.fonttype": "none",
    "axes.formatter.limits": (-3, 4),
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
TITLES = {
    "grad_norm": "gradient norms",
    "gan/accuracy": "discriminator: share told right",
    "gan": "GAN",
    "student": "student's samples, beside the data's",
    "seconds_per_step": "seconds per step",
    "memory_gib": "memory in GiB, fullest rank's peak",
    "ratio": "previews: ratio to the teacher (1 = alike)",
    "score": "previews: distance to the teacher (0 = alike)",
}


@dataclass(frozen=True)
class Series:
    label: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    title: str
    series: tuple[Series, ...]
    log: bool = False
    even: float | None = None  # a level to compare with
    mark: int | None = None  # the chosen step

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Label and colour of every curve, where there are several."""
        labels = [curve.label for curve in self.series]
        return list(zip(labels, cycle(COLOURS), strict=False)) if len(labels) > 1 else []


def charts(run: RunRecord) -> list[Chart]:
    """Previews first, then losses, gradients and the rest, in the order of the log."""
    return [chart for chart in _charts(run) if chart.series]


def _charts(run: RunRecord) -> Iterator[Chart]:
    if run.previews:
        names = [key for key in run.previews[0] if key.endswith(RATIO)]
        yield Chart(TITLES["ratio"], _all(run.previews, names), log=True, even=1, mark=run.chosen)
        yield Chart(TITLES["score"], _all(run.previews, ["preview/score"]), mark=run.chosen)
    for title, keys in grouped(key for line in run.training for key in line).items():
        log = title == "grad_norm"
        yield Chart(TITLES.get(title, title), _all(run.training, keys), log=log)


def grouped(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys of the log by the chart that they share; every loss has its own, for scales differ."""
    groups: dict[str, list[str]] = {}
    known = list(dict.fromkeys(keys))
    for key in known:
        prefix, slash, name = key.partition("/")
        if prefix == "loss":
            groups.setdefault(key, []).append(key)
        elif name.startswith("accuracy"):
            groups.setdefault(f"{prefix}/accuracy", []).append(key)
        elif slash and name != "r1":
            groups.setdefault(prefix, []).append(key)
    for key in ("seconds_per_step", "memory_gib"):
        if key in known:
            groups[key] = [key]
    return groups


def _all(lines: Sequence[Line], keys: Iterable[str]) -> tuple[Series, ...]:
    return tuple(found for key in keys if (found := series(lines, key)).steps)


def series(lines: Sequence[Line], key: str) -> Series:
    """What is finite, thinned out to POINTS by averaging neighbours."""
    pairs = [(line["step"], line[key]) for line in lines if is_figure(line.get(key))]
    label = key.rpartition("/")[2]
    if key.startswith("preview/"):
        label = label.removesuffix(RATIO)
    if not pairs:
        return Series(label, (), ())
    parts = np.array_split(np.array(pairs, dtype=float), min(POINTS, len(pairs)))
    steps, values = np.array([part.mean(0) for part in parts]).T.tolist()
    return Series(label, tuple(steps), tuple(values))


@lru_cache(maxsize=64)  # those of finished stages do not change any more
def draw(chart: Chart, ends: tuple[int, ...]) -> str:
    """An `<svg>` element; dotted lines at the steps where a stage ends."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.11, 0.11, 0.87, 0.81))  # a constrained layout takes twice as long
        for curve, colour in zip(chart.series, cycle(COLOURS), strict=False):
            shape = "o" if len(curve.steps) == 1 else "-"
            axes.plot(curve.steps, curve.values, shape, color=colour, lw=1.4, ms=4)
        low, high = axes.get_xlim()
        for end in (end for end in ends if low < end < high):
            axes.axvline(end, color=INK, lw=0.8, ls=":", alpha=0.5)
        if chart.even is not None:
            axes.axhline(chart.even, color=INK, lw=0.8, alpha=0.5)
        if chart.mark is not None and low <= chart.mark <= high:
            axes.axvline(chart.mark, color=COLOURS[2], lw=5, alpha=0.25)
        if chart.log and all(value > 0 for curve in chart.series for value in curve.values):
            axes.set_yscale("log")
            _plain_ticks(axes)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.grid(color=INK, alpha=0.12, lw=0.6)
        axes.tick_params(which="both", length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), chart.title)


def _plain_ticks(axes: Axes) -> None:
    """0.5 and 20 rather than powers of ten, where few decades are shown."""
    low, high = axes.get_ylim()
    if high / low < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def _inline(svg: str, title: str) -> str:
    """What HTML takes: no prolog, no style sheet (it would be the page's), a name for readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # the same in every drawing, used by none
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return svg.replace(INK, "currentColor")
