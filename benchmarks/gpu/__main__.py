"""Everything that only a GPU can tell, in order of worth, with random weights made on the device.

    python -m benchmarks.gpu --minutes 12 --out docs/evidence      one GPU of 78 GiB or more
    python -m benchmarks.gpu --small                               its code on the CPU, toy size

gpu.json and gpu.md are written anew whenever there is more to say. --skip-done goes on where an
earlier run into the same folder was cut off. A section that fails or does not fit says so and the
next begins. Nothing is downloaded. What each section needs and takes: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measure import HIGH_WATER, Budget, Spread
from benchmarks.speed.nodes import show
from benchmarks.speed.targets import (
    speed_targets,
    target_table,
    target_values,
    training_targets,
)
from benchmarks.speed.train import CHOICES
from distill.contract.shown import first_line
from distill.training.environment import describe_machine

from . import parts
from .lab import Lab
from .pictures import EXPERIMENT
from .results import CUT_OFF, FAILED, MEASURED, SKIPPED, Entry, Results
from .sections import SECTIONS, Section

MINUTE = 60.0
TITLE = "Speed on a GPU"
HEADLINE = ("bf16 2048", "8 bits 2048", "beside 2048", "compiled")


def measure(section: Section, lab: Lab, results: Results) -> Entry:
    """One section: its figures, or why there are none. Written whenever there are more."""
    entry = Entry(section.key, section.title, CUT_OFF, section.seconds, section.gigabytes)
    seen, begin = len(lab.budget.skipped), time.monotonic()
    HIGH_WATER.forget(lab.device)
    if lab.budget.allows(section.title, 0 if lab.small else section.seconds):
        try:
            for entry.values, entry.text in section.run(lab):
                results.add(_so_far(entry, lab, seen, begin))
            entry.status = MEASURED if entry.text else SKIPPED
        except Exception as error:  # whatever it is, the next section is worth its time
            traceback.print_exc()
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            lab.free()
            entry.status = FAILED
            lab.budget.skip(f"{type(error).__name__}: {first_line(error)}")
    else:
        entry.status = SKIPPED
    results.add(_so_far(entry, lab, seen, begin))
    return entry


def _so_far(entry: Entry, lab: Lab, seen: int, begin: float) -> Entry:
    entry.seconds, entry.peak_gb = time.monotonic() - begin, lab.peak_gb()
    entry.notes = lab.budget.skipped[seen:]
    return entry


def verdicts(results: Results, small: bool) -> tuple[dict[str, Any], str]:
    """All targets against what has been measured so far: as the pack is, and with experiments. At
    toy size nothing is.
    """
    found: dict[str, dict[str, Spread]] = {}
    for key in () if small else HEADLINE:
        for arm, stages in results.values(key).get("table", {}).items():
            found[arm] = {stage: Spread(**spread) for stage, spread in stages.items()}
    shipped = {arm: stages for arm, stages in found.items() if EXPERIMENT not in arm}
    own = {} if small else results.values("training").get(CHOICES[0].name, {})
    seconds = own["iteration"]["median"] if own else None
    best, speed = speed_targets(shipped)
    targets = [*speed, *training_targets(seconds, own.get("peak GB"))]
    tried, more = speed_targets(found)
    card = results.machine["device"]
    text = [f"As the pack is, C being {best}:", target_table(targets, card)]
    if tried != best:
        text += [f"With an arm that it does not have, C being {tried}:", target_table(more, card)]
    values = {"C": best, "targets": target_values(targets)}
    return values | {"tried": tried, "with it": target_values(more)}, "\n\n".join(text)


def run(
    keys: list[str],
    small: bool = False,
    rounds: int = 5,
    minutes: float = 12,
    out: Path | None = None,
    skip_done: bool = False,
    shards: Path | None = None,
) -> Results:
    """The sections named by `keys`, then the verdicts."""
    if not small and not torch.cuda.is_available():
        raise SystemExit("A CUDA device is needed; found none. --small tests the code on a CPU.")
    with tempfile.TemporaryDirectory(prefix="turbo-distill-gpu-") as folder:
        lab = Lab(small, rounds, Budget(minutes * MINUTE), Path(folder), shards)
        results = Results(TITLE, describe_machine(1, lab.device), out)
        if skip_done:
            results.resume()
        for section in SECTIONS:
            if section.key not in keys or (skip_done and results.is_done(section.key)):
                continue
            lab.fp8_attention = parts.fastest_fp8(results.values("attention"))
            entry = measure(section, lab, results)
            show(f"## {entry.title}: {entry.status}, {entry.seconds:.0f} s, {entry.peak_gb} GB")
            show("\n\n".join([entry.text, *entry.notes]))
        values, text = verdicts(results, small)
        results.add(Entry("targets", "Targets", MEASURED, 0, 0, values=values, text=text))
        show(f"{text}\n\n{results.overview()}")
        lab.free()
    return results


def main(arguments: list[str] | None = None) -> None:
    known = [section.key for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=12, help="time limit")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--sections", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions at most")
    parser.add_argument("--skip-done", action="store_true", help="go on with what --out has")
    parser.add_argument("--shards", type=Path, help="CIFAR-10 for T2, see benchmarks.recipe.t2")
    parser.add_argument("--small", action="store_true", help="the same code on a CPU, toy size")
    chosen = parser.parse_args(arguments)
    keys = chosen.sections.split(",")
    if unknown := sorted(set(keys) - set(known)):
        parser.error(f"--sections: expected some of {', '.join(known)}; found {unknown[0]!r}")
    logging.getLogger().setLevel(logging.ERROR)
    results = run(
        keys,
        chosen.small,
        chosen.rounds,
        chosen.minutes,
        chosen.out,
        chosen.skip_done,
        chosen.shards,
    )
    if failed := [key for key, entry in results.entries.items() if entry.status == FAILED]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
