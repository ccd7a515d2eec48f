"""The sections in order of worth. Each yields its figures and text as often as there is more, so
that what has been measured is on disk when a run is cut off; one that yields nothing was skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.speed import choices
from benchmarks.speed.train import GPU_CHOICES, Trainee

from . import parts, pictures, products, training
from .lab import Lab
from .pictures import Cast

Found = Iterator[tuple[dict[str, Any], str]]  # all values and all text so far

COMPILED = "C with Turbo Images, compiled"
STEP_S = 4.5  # one training step, about


@dataclass(frozen=True)
class Section:
    """seconds, gigabytes: expected on an H100; gigabytes of GPU memory at the peak."""

    key: str
    title: str
    seconds: float
    gigabytes: float
    run: Callable[[Lab], Found]


def machine(lab: Lab) -> Found:
    _ = lab.core  # core's layouts of 8-bit weights
    yield products.machine(lab.device, lab.small, lab.budget)


def attention(lab: Lab) -> Found:
    counts = (64,) if lab.small else (16384 + 77, 6889 + 77, 4096 + 77)
    yield parts.attention(lab.core, lab.size, counts, lab.rounds, lab.budget)


def large(cast: str) -> Callable[[Lab], Found]:
    """Four large pictures, and the latents of a small one against core's."""

    def run(lab: Lab) -> Found:
        reference = lab.reference()
        (job,) = lab.jobs(2048, count=4)
        values, text = pictures.drawn(lab.cast(cast), job, min(lab.rounds, 3), lab.budget)
        yield values, text
        found = pictures.latents(lab.cast(cast), lab.trial)
        rows, more = pictures.differences(lab.cast(cast), found, reference, lab.trial)
        yield {**values, "latents": rows}, f"{text}\n\n{more}"

    return run


def small_pictures(cast: str) -> Callable[[Lab], Found]:
    def run(lab: Lab) -> Found:
        values, text = {}, []
        for job in lab.jobs(1024, 1328):
            key = f"{job.count} x {job.width} x {job.height}"
            values[key], found = pictures.drawn(lab.cast(cast), job, lab.rounds, lab.budget)
            text += [key, found]
            yield values, "\n\n".join(text)

    return run


def compiled(lab: Lab) -> Found:
    """Turbo Accelerate's `compile` on one of the arms, in turns with itself without."""
    if lab.small:
        lab.budget.skip("compiled blocks: on a GPU only")
        return
    (job,) = lab.jobs(2048, count=4)
    cast = lab.cast("bf16")
    plain = cast.arms[pictures.IMAGES]
    make = partial(choices.compiled_like, cast.world, plain)
    arm = choices.tried(COMPILED, make, replace(job, prompt="a trial", count=1), lab.budget)
    if arm is not None:
        both = Cast(cast.world, {pictures.IMAGES: plain, COMPILED: arm})
        yield pictures.drawn(both, job, 2, lab.budget)


def training_step(lab: Lab) -> Found:
    lab.free()
    side, rank = (32, 4) if lab.small else (1024, 64)
    trainee = Trainee(lab.size, side, lab.device, rank)
    rounds = min(lab.rounds, 3)
    each_s = 0 if lab.small else STEP_S * (training.WARM + rounds + 1)
    which = GPU_CHOICES[:2] if lab.small else GPU_CHOICES
    yield from training.steps(trainee, which, rounds, lab.budget, each_s)


def qwen_image_21(lab: Lab) -> Found:
    lab.free()
    numbers, side = (training.SMALL_21, 64) if lab.small else ({}, 1024)
    model = training.model_21(lab.device, **numbers)
    yield training.passes_21(model, side, lab.rounds, lab.device)


def vae(lab: Lab) -> Found:
    lab.free()
    sides = (64,) if lab.small else (1024, 1328, 2048)
    yield parts.vae(lab.core, lab.size, sides, min(lab.rounds, 3), lab.budget)


def t2(lab: Lab) -> Found:
    """In a process and a folder of its own, which it can go on in."""
    if lab.shards is None:
        lab.budget.skip("T2 in full: it needs --shards and hours")
        return
    out = lab.folder / "t2"
    command = [sys.executable, "-m", "benchmarks.recipe.t2", str(lab.shards), "--out", str(out)]
    options = ["--size", "small" if lab.small else "full", "--device", lab.device.type]
    subprocess.run([*command, *options], check=True, timeout=max(1.0, lab.budget.left))
    yield {}, (out / "t2.md").read_text(encoding="utf-8")


SMALL_TITLE = "One image of 1024 x 1024 and of 1328 x 1328, {}"
SECTIONS = (
    Section("machine", "What the machine reaches", 15, 11, machine),
    Section("attention", "Attention kernels", 20, 3, attention),
    Section("bf16 2048", "4 images of 2048 x 2048, bf16", 165, 75, large("bf16")),
    Section("bf16 small", SMALL_TITLE.format("bf16"), 30, 65, small_pictures("bf16")),
    Section("8 bits 2048", "4 images of 2048 x 2048, 8 bits", 150, 71, large("8 bits")),
    Section("8 bits small", SMALL_TITLE.format("8 bits"), 35, 50, small_pictures("8 bits")),
    Section("training", "A DMD2 step at 1024 x 1024, 20 B", 150, 62, training_step),
    Section("2.1", "Qwen-Image-2.1 (7 B), raw passes at 1024 x 1024", 20, 25, qwen_image_21),
    Section("beside 2048", "4 images of 2048 x 2048, LoRA beside fp8", 50, 45, large("beside")),
    Section("vae", "VAE", 30, 16, vae),
    Section("compiled", "Compiled blocks, 4 images of 2048 x 2048, bf16", 110, 63, compiled),
    Section("t2", "T2 in full", 3600, 20, t2),
)
