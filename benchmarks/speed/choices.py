"""Arms that may not run everywhere: each draws a picture first, and is left out, and said so, where
that fails. And what an arm samples, to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distill.contract.shown import first_line

from .arms import Arm, CoreArm, Job, TurboArm, TurboImagesArm
from .measure import Budget, Clock
from .world import World


def compiled_like(world: World, arm: Arm) -> TurboArm:
    """One of our arms again, with `compile` of Turbo Accelerate on."""
    assert isinstance(arm, TurboArm)
    attention = "core" if arm.kernel is None else arm.kernel.kernel.name
    return TurboImagesArm(world, attention, compiled=True, own_model=arm.model)


def tried(name: str, make: Callable[[], TurboArm], trial: Job, budget: Budget) -> TurboArm | None:
    """An arm that has drawn the trial picture; None, and noted, where it cannot be."""
    try:
        arm = make()
        arm(trial, Clock(arm.world.core.device))
    except (RuntimeError, ValueError) as error:  # a kernel, a compiler, a format, memory
        budget.skip(f"{name}: {first_line(error)}")
        return None
    return arm


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
