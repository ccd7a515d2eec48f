"""Arms beside those of `arms.py`: other attention, baked 8-bit weights, compiled blocks.

None may end the run: each draws one small picture first, and is left out, and said so, where that
fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .arms import Arm, CoreArm, Job, TurboArm, TurboImagesArm, arms_of
from .baked import baked_model
from .measure import Budget, Clock, first_line
from .world import World, dtype_of

BAKED = ("fp8", "int8")


def arms(world: World, fastest: str, trial: Job, budget: Budget) -> dict[str, Arm]:
    """As shipped; our nodes with the fastest attention and with 8-bit attention, where those are
    others; and with baked weights under the fastest one.
    """
    found = arms_of(world)
    shipped = found["C with Turbo Images"]
    assert isinstance(shipped, TurboArm)
    auto = "core" if shipped.kernel is None else shipped.kernel.kernel.name
    makers: dict[str, Callable[[], TurboArm]] = {
        f"C {name} attention": partial(TurboImagesArm, world, name)
        for name in dict.fromkeys([fastest, *low_precision(world, budget)])
        if name not in (auto, "auto")
    }
    for dtype in BAKED:
        makers[f"C baked {dtype}"] = partial(baked_arm, world, dtype, fastest)
    for name, make in makers.items():
        if (arm := tried(name, make, trial, budget)) is not None:
            found[name] = arm
    return found


def baked_arm(world: World, dtype: str, attention: str) -> TurboArm:
    weights = world.patched.model.diffusion_model.state_dict()
    own = baked_model(world.core, world.size, weights, dtype)
    return TurboImagesArm(world, attention, own_model=own)


def compiled_like(world: World, arm: Arm) -> TurboArm:
    """One of our arms again, with `compile` of Turbo Accelerate on."""
    assert isinstance(arm, TurboArm)
    attention = "core" if arm.kernel is None else arm.kernel.kernel.name
    return TurboImagesArm(world, attention, compiled=True, own_model=arm.model)


def low_precision(world: World, budget: Budget) -> list[str]:
    """The kernels that compute in 8 bits and can be imported; the others are skipped aloud."""
    kernels = world.core.pack("nodes.attention").KERNELS.values()
    here = []
    for kernel in kernels:
        if kernel.low_precision and (missing := kernel.missing()):
            budget.skip(f"8-bit attention, {kernel.name}: it needs {missing}")
        elif kernel.low_precision:
            here.append(kernel.name)
    return here


def tried(name: str, make: Callable[[], TurboArm], trial: Job, budget: Budget) -> TurboArm | None:
    """An arm that has drawn the trial picture; None, and noted, where it cannot be."""
    try:
        arm = make()
        arm(trial, Clock(arm.world.core.device))
    except (RuntimeError, ValueError) as error:  # a kernel, a compiler, a format, memory
        budget.skip(f"{name}: {first_line(error)}")
        return None
    return arm


def what_ran(world: World, arms: Mapping[str, Arm], job: Job) -> dict[str, list[str]]:
    """Of every arm: how linear layers are stored, its attention, and |latents - B's| / |B's|."""
    drawn = {name: latents(arm, job) for name, arm in arms.items()}
    reference = next(drawn[name] for name, arm in arms.items() if isinstance(arm, CoreArm))
    plain = str(dtype_of(world.core)).removeprefix("torch.")
    rows = {}
    for name, arm in arms.items():
        stored = next((dtype for dtype in BAKED if f"baked {dtype}" in name), plain)
        ours = isinstance(arm, TurboArm)
        attention = arm.attention if ours else "diffusers'" if name[0] == "A" else "core's own"
        found = drawn[name]
        rows[name] = [
            f"{stored}, folded" if stored in BAKED else stored,
            attention,
            "-" if found is None else f"{relative(found, reference):.2g}",
        ]
    return rows


def relative(found: torch.Tensor, expected: Any) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@torch.inference_mode()
def latents(arm: Arm, job: Job) -> torch.Tensor | None:
    """What an arm samples; None of diffusers, which draws other noise, and of compiled blocks, as
    another size would be compiled anew.
    """
    import nodes

    if not isinstance(arm, CoreArm | TurboArm) or (isinstance(arm, TurboArm) and arm.compiled):
        return None
    positive = nodes.CLIPTextEncode().encode(arm.world.clip, job.prompt)[0]
    return arm.sample(positive, job, 0)["samples"]
