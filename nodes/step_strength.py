"""A LoRA whose strength is another at each step: the wrapper that sets it before each forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "turbo_distill.step_strength"
_SAME = 1e-4  # relative; a sigma on its way through the model's dtypes


class StepStrength:
    """strengths: of the trained steps, first to last."""

    def __init__(self, strengths: Sequence[float]) -> None:
        self.strengths = tuple(strengths)
        self.now = torch.tensor(self.strengths[0])  # a tensor: compiled code holds for all steps

    def set_for(self, sigma: float, sigmas: Sequence[float]) -> None:
        """sigma: of the forward to come; sigmas: of this run, falling."""
        self.now = torch.tensor(self.strengths[step_of(sigma, sigmas, len(self.strengths))])

    def __str__(self) -> str:
        return ", ".join(f"{strength:g}" for strength in self.strengths)


def step_of(sigma: float, sigmas: Sequence[float], steps: int) -> int:
    """The trained step, of `steps`, that a forward at `sigma` belongs to.

    Step i covers sigmas[i] down to, and without, sigmas[i + 1]. Steps count from the end, where a
    run that starts late has those that it was trained with; what comes before them is the first.
    """
    left = sum(level < sigma * (1 - _SAME) for level in sigmas)
    return min(max(steps - max(left, 1), 0), steps - 1)


def follow_steps(model: ModelPatcher, key: str, steps: StepStrength) -> None:
    """Sets the strength before each forward of `model`, in place: callers own a fresh clone."""

    def wrapper(
        executor: Callable[..., Any], x: Any, t: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        options = kwargs.get("transformer_options") or next(
            (arg for arg in args if isinstance(arg, dict)), {}
        )
        sigma, sigmas = float(t.max()), options.get("sample_sigmas")
        steps.set_for(sigma, [sigma, 0.0] if sigmas is None else sigmas.tolist())
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"{KEY}.{key}", wrapper)


def follow_no_steps(model: ModelPatcher) -> None:
    """Takes all such wrappers off, in place."""
    wrappers = model.wrappers.get(WrappersMP.APPLY_MODEL, {})
    for key in [key for key in wrappers if str(key).startswith(KEY)]:
        model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, key)
