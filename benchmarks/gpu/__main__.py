"""Everything that only a GPU can tell, in order of worth, with random weights made on the device.

    python -m benchmarks.gpu --minutes 12 --out docs/evidence      one GPU of 78 GiB or more
    python -m benchmarks.gpu --small                               its code on the CPU, toy size

gpu.json and gpu.md are written anew after every section. --skip-done goes on where an earlier run
into the same folder was cut off. A section that fails or does not fit says so and the next begins.
Nothing is downloaded. What each section needs and takes: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import choices
from benchmarks.speed.arms import Job
from benchmarks.speed.core import Core, start
from benchmarks.speed.measure import Budget, Spread, first_line
from benchmarks.speed.nodes import show
from benchmarks.speed.targets import speed_targets, target_table, training_targets
from benchmarks.speed.train import CHOICES, GB, GPU_CHOICES, Trainee
from benchmarks.speed.world import FULL, SMALL, Size
from distill.machine import describe_machine

from . import parts, pictures, products, training
from .pictures import Cast
from .results import FAILED, MEASURED, SKIPPED, Entry, Results

MINUTE = 60.0
TITLE = "Speed on a GPU"
SMALL_TITLE = "One image of 1024 x 1024 and of 1328 x 1328, {}"
HEADLINE = ("bf16 2048", "8 bits 2048", "beside 2048", "compiled")
Found = tuple[dict[str, Any], str]


class Lab:
    """What sections share: the device, ComfyUI, and one set of models at a time."""

    def __init__(self, small: bool, rounds: int, budget: Budget, folder: Path) -> None:
        self.small, self.rounds, self.budget, self.folder = small, rounds, budget, folder
        self.device = torch.device("cpu" if small else "cuda")
        self.size: Size = SMALL if small else FULL
        self.fp8_attention = ""  # the benchmark's own kernel, where it is the fastest
        self._cast: tuple[str, Cast] | None = None
        self._reference: torch.Tensor | None = None

    @cached_property
    def core(self) -> Core:
        return start(self.folder, cpu=self.small)

    @property
    def trial(self) -> Job:
        """A picture that says whether an arm runs, and how far its latents are off."""
        side = 64 if self.small else 1024
        return Job("a trial", side, side)

    def jobs(self, *sides: int, count: int = 1) -> list[Job]:
        if self.small:
            return [Job("", 64, 64, 2)]
        return [Job("", side, side, count) for side in sides]

    def cast(self, name: str) -> Cast:
        """Arms of "bf16" or "8 bits"; the others leave the memory first."""
        if self._cast is None or self._cast[0] != name:
            self.free()
            self._cast = name, self._new_cast(name)
        return self._cast[1]

    def _new_cast(self, name: str) -> Cast:
        if name == "bf16":
            return pictures.bf16_cast(self.core, self.size)
        if name == "beside":
            return pictures.beside_cast(self.core, self.size, self.trial, self.budget)
        return pictures.eight_bit_cast(
            self.core, self.size, self.trial, self.budget, self.fp8_attention
        )

    def reference(self) -> torch.Tensor:
        """Core's latents of the trial, in bf16."""
        if self._reference is None:
            found = pictures.latents(self.cast("bf16"), self.trial)
            self._reference = found[pictures.CORE]
        return self._reference

    def free(self) -> None:
        """Drops all models at once: core's own unloading would copy them to main memory first."""
        self._cast = None
        if "core" in self.__dict__:
            import comfy.model_management as management

            for loaded in management.current_loaded_models:
                if loaded.model_finalizer is not None:
                    loaded.model_finalizer.detach()
            management.current_loaded_models.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / GB if self.device.type == "cuda" else None

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Section:
    """seconds, gigabytes: expected on an H100; gigabytes of GPU memory at the peak."""

    key: str
    title: str
    seconds: float
    gigabytes: float
    run: Callable[[Lab], Found]


# --------------------------------------------------------------------------------------- sections


def machine(lab: Lab) -> Found:
    _ = lab.core  # core's layouts of 8-bit weights
    return products.machine(lab.device, lab.small, lab.budget)


def large(cast: str) -> Callable[[Lab], Found]:
    def run(lab: Lab) -> Found:
        reference = lab.reference()
        (job,) = lab.jobs(2048, count=4)
        values, text = pictures.drawn(lab.cast(cast), job, min(lab.rounds, 3), lab.budget)
        found = pictures.latents(lab.cast(cast), lab.trial)
        rows, more = pictures.differences(lab.cast(cast), found, reference, lab.trial)
        return {**values, "latents": rows}, f"{text}\n\n{more}"

    return run


def small_pictures(cast: str) -> Callable[[Lab], Found]:
    def run(lab: Lab) -> Found:
        values, text = {}, []
        for job in lab.jobs(1024, 1328):
            key = f"{job.count} x {job.width} x {job.height}"
            values[key], found = pictures.drawn(lab.cast(cast), job, lab.rounds, lab.budget)
            text += [key, found]
        return values, "\n\n".join(text)

    return run


def compiled(lab: Lab) -> Found:
    """Turbo Accelerate's `compile` on one of the arms, in turns with itself without."""
    (job,) = lab.jobs(2048, count=4)
    cast = lab.cast("bf16")
    plain = cast.arms[pictures.IMAGES]
    if lab.small:
        lab.budget.skip("compiled blocks: on a GPU only")
        return {}, ""
    make = partial(choices.compiled_like, cast.world, plain)
    arm = choices.tried(COMPILED, make, replace(job, prompt="a trial", count=1), lab.budget)
    if arm is None:
        return {}, ""
    both = Cast(cast.world, {pictures.IMAGES: plain, COMPILED: arm})
    return pictures.drawn(both, job, 2, lab.budget)


def training_step(lab: Lab) -> Found:
    lab.free()
    side, rank = (32, 4) if lab.small else (1024, 64)
    trainee = Trainee(lab.size, side, lab.device, rank)
    each_s = 0 if lab.small else 4 * (lab.rounds + 2)
    choices = GPU_CHOICES[:2] if lab.small else GPU_CHOICES
    return training.steps(trainee, choices, min(lab.rounds, 3), lab.budget, each_s)


def qwen_image_21(lab: Lab) -> Found:
    lab.free()
    numbers, side = (training.SMALL_21, 64) if lab.small else ({}, 1024)
    model = training.model_21(lab.device, **numbers)
    return training.passes_21(model, side, lab.rounds, lab.device)


def attention(lab: Lab) -> Found:
    counts = (64,) if lab.small else (16384 + 77, 6889 + 77, 4096 + 77)
    return parts.attention(lab.core, lab.size, counts, lab.rounds, lab.budget)


def vae(lab: Lab) -> Found:
    lab.free()
    sides = (64,) if lab.small else (1024, 1328, 2048)
    return parts.vae(lab.core, lab.size, sides, min(lab.rounds, 3), lab.budget)


SECTIONS = (
    Section("machine", "What the machine reaches", 25, 11, machine),
    Section("attention", "Attention kernels", 40, 3, attention),
    Section("bf16 2048", "4 images of 2048 x 2048, bf16", 150, 73, large("bf16")),
    Section("bf16 small", SMALL_TITLE.format("bf16"), 30, 73, small_pictures("bf16")),
    Section("8 bits 2048", "4 images of 2048 x 2048, 8 bits", 150, 71, large("8 bits")),
    Section("8 bits small", SMALL_TITLE.format("8 bits"), 30, 50, small_pictures("8 bits")),
    Section("training", "A DMD2 step at 1024 x 1024, 20 B", 120, 62, training_step),
    Section("beside 2048", "4 images of 2048 x 2048, LoRA beside fp8", 50, 45, large("beside")),
    Section("2.1", "Qwen-Image-2.1 (7 B), raw passes at 1024 x 1024", 20, 25, qwen_image_21),
    Section("vae", "VAE", 30, 16, vae),
    Section("compiled", "Compiled blocks, 4 images of 2048 x 2048, bf16", 110, 63, compiled),
)
COMPILED = "C with Turbo Images, compiled"
T2 = "T2 in full: python -m benchmarks.recipe.t2 SHARDS; it takes an hour, so not in here"


def measure(section: Section, lab: Lab) -> Entry:
    """One section: its figures, or why there are none."""
    entry = Entry(section.key, section.title, FAILED, section.seconds, section.gigabytes)
    if not lab.budget.allows(section.title, 0 if lab.small else section.seconds):
        entry.status, entry.notes = SKIPPED, [lab.budget.skipped[-1]]
        return entry
    seen = len(lab.budget.skipped)
    lab.forget_peak()
    begin = time.monotonic()
    try:
        entry.values, entry.text = section.run(lab)
        entry.status = MEASURED
    except Exception as error:  # whatever it is, the next section is worth its time
        traceback.print_exc()
        entry.notes = [f"{type(error).__name__}: {first_line(error)}"]
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        lab.free()
    entry.seconds, entry.peak_gb = time.monotonic() - begin, lab.peak_gb()
    entry.notes += lab.budget.skipped[seen:]
    return entry


def verdicts(results: Results, small: bool) -> Found:
    """All targets against what has been measured so far; at toy size none is."""
    found = {}
    for key in () if small else HEADLINE:
        for arm, stages in results.values(key).get("table", {}).items():
            found[arm] = {stage: Spread(**spread) for stage, spread in stages.items()}
    best, targets = speed_targets(found)
    own = results.values("training").get(CHOICES[0].name)
    if own is None or small:
        targets += training_targets(None, None)
    else:
        targets += training_targets(own["iteration"]["median"], own["peak GB"])
    values = {"C": best, "verdicts": [t.verdict for t in targets]}
    return values, f"C is {best}.\n\n{target_table(targets)}"


def run(
    keys: list[str], small: bool, rounds: int, minutes: float, out: Path | None, skip_done: bool
) -> Results:
    """The sections named by `keys`, then the verdicts."""
    if not small and not torch.cuda.is_available():
        raise SystemExit("A CUDA device is needed; found none. --small tests the code on a CPU.")
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="turbo-distill-gpu-") as folder:
        lab = Lab(small, rounds, Budget(minutes * MINUTE), Path(folder))
        results = Results(TITLE, describe_machine(1, lab.device), out)
        if skip_done:
            results.resume()
        for section in SECTIONS:
            lab.fp8_attention = parts.fastest_fp8(results.values("attention"))
            if section.key not in keys or (skip_done and results.is_done(section.key)):
                continue
            entry = measure(section, lab)
            results.add(entry)
            show(f"## {entry.title}: {entry.status}, {entry.seconds:.0f} s, GB {entry.peak_gb}")
            show("\n\n".join([entry.text, *entry.notes]))
        values, text = verdicts(results, small)
        text += f"\n\n- {T2}"
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
    parser.add_argument("--small", action="store_true", help="the same code on a CPU, toy size")
    chosen = parser.parse_args(arguments)
    keys = chosen.sections.split(",")
    if unknown := sorted(set(keys) - set(known)):
        parser.error(f"--sections: expected some of {', '.join(known)}; found {unknown[0]!r}")
    results = run(keys, chosen.small, chosen.rounds, chosen.minutes, chosen.out, chosen.skip_done)
    failed = [entry.key for entry in results.entries.values() if entry.status == FAILED]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
