"""The trained schedule for core's own samplers: a plain KSampler, a detailer or an upscaler that
asks a MODEL from Turbo LoRA Loader for the trained number of steps gets the trained sigmas.

Two parts. The MODEL's `model_sampling` gets the table that `simple` reads (so Basic Scheduler shows
it too); how sigmas and timesteps belong together stays the model's own. And a wrapper around the
sampler puts the trained sigmas where `simple`, `normal` or `sgm_uniform` asked for the trained
number of steps: it alone knows the size of the latent, and it sees what nodes downstream did to
`model_sampling`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..distill.contract.latent_grid import sigmas_at
from ..distill.contract.spec import TurboSpec
from .latents import tokens_of
from .spec_attachment import Attached, attached_to

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "turbo_distill.schedule"
SCHEDULERS = ("simple", "normal", "sgm_uniform")  # even steps in time, whatever the shift
TOLERANCE = 1e-6
ORIGINAL = "turbo_distill_original"  # attribute of the `model_sampling` that `follow` makes


class PlannedSampler(comfy.samplers.KSAMPLER):
    """A sampler whose sigmas were decided by Turbo Sampler: they stay as they are."""


@dataclass(frozen=True)
class Original:
    """What was in the place of a `model_sampling` with our table."""

    model_sampling: Any
    shift: str | None  # in words, where a node had set one


def follow(model: ModelPatcher) -> None:
    """Lets core's samplers follow the spec on `model`, in place: callers own a fresh clone."""
    attached = attached_to(model)
    assert attached is not None
    present = model.get_model_object("model_sampling")
    original = getattr(present, ORIGINAL, None)
    if original is None:
        shifted = "model_sampling" in model.object_patches
        original = Original(present, _shift_of(present) if shifted else None)
    model.add_object_patch("model_sampling", _with_table(original, attached.spec))
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _sample)


def leave(model: ModelPatcher) -> None:
    """Takes back what `follow` did upstream, in place: callers own a fresh clone."""
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    original = getattr(model.get_model_object("model_sampling"), ORIGINAL, None)
    if original is not None:
        model.add_object_patch("model_sampling", original.model_sampling)


def shift_conflict(model: ModelPatcher) -> str | None:
    """A sentence about a node that set a shift on a MODEL whose trained schedule is followed."""
    attached = attached_to(model)
    if attached is None or not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        return None
    present = model.get_model_object("model_sampling")
    original = getattr(present, ORIGINAL, None)
    shift = _shift_of(present) if original is None else original.shift
    if shift is None:
        return None
    where = "after" if original is None else "before"
    return (
        f"a node {where} the Turbo LoRA Loader set another shift on this MODEL ({shift}). It is "
        f"ignored, for the trained sigmas of {attached.file} have theirs in them: remove that node "
        f"(ModelSamplingAuraFlow, ModelSamplingFlux and the like)."
    )


def _shift_of(model_sampling: Any) -> str:
    shift = getattr(model_sampling, "shift", None)
    return type(model_sampling).__name__ if shift is None else f"shift {float(shift):g}"


# -------------------------------------------------------------------------------------- the table


def _with_table(original: Original, spec: TurboSpec) -> Any:
    """A copy of a model's `model_sampling` whose table gives the trained sigmas to `simple`."""
    own = original.model_sampling
    patched = copy.copy(own)
    patched._buffers = dict(own._buffers)  # a copy of a module shares them
    patched.sigmas = _table(own.sigmas, sigmas_at(spec))
    setattr(patched, ORIGINAL, original)
    return patched


def _table(own: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Ascending noise levels, as many as `own`, in which `simple` finds `sigmas`.

    Linear in between; the lowest is the model's own where that is below them.
    """
    size, steps = len(own), len(sigmas) - 1
    places = [int(step * (size / steps)) for step in range(steps)]  # as core counts, from the end
    lowest = min(float(own[0]), sigmas[-2] / 2)
    levels: list[torch.Tensor] = []
    for (start, end), (high, low) in zip(
        pairwise([*places, size]), pairwise([*sigmas[:-1], lowest]), strict=True
    ):
        levels.append(torch.linspace(high, low, end - start + 1, dtype=torch.float64)[:-1])
    return torch.cat(levels).flip(0).to(own)


# ------------------------------------------------------------------------------------- the wrapper


def _sample(
    executor: Any,
    noise: Any,
    latent_image: Any,
    sampler: Any,
    sigmas: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around a guider's sampling: the trained sigmas at this size for those of even steps."""
    model = executor.class_obj.model_patcher
    attached = attached_to(model)
    if attached is not None and not isinstance(sampler, PlannedSampler):
        shapes = kwargs.get("latent_shapes")
        shape = shapes[0] if shapes else latent_image.shape
        sigmas = _trained(model, attached, shape, sigmas)
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _trained(
    model: ModelPatcher, attached: Attached, shape: Sequence[int], sigmas: torch.Tensor
) -> torch.Tensor:
    """`sigmas`, or in their place the trained ones, and a line in the log."""
    spec = attached.spec
    wanted = torch.tensor(spec.sigmas(tokens_of(model, shape)), dtype=torch.float32)
    given = sigmas.detach().float().cpu()
    if _window(given, wanted) is not None:
        return sigmas
    for name, even in _even_steps(model.get_model_object("model_sampling"), spec.steps):
        start = _window(given, even)
        if start is not None:
            found = wanted[start : start + len(given)].clone()
            if given[-1] == 0:
                found[-1] = 0  # core's "force full denoise"
            logging.info(
                "Turbo Distill: %s steps of %s at the trained sigmas %s",
                spec.steps,
                name,
                _listed(found),
            )
            if conflict := shift_conflict(model):
                logging.warning("Turbo Distill: %s", conflict)
            return found.to(sigmas)
    logging.warning("Turbo Distill: %s", _untrained(attached, given, wanted))
    return sigmas


def _even_steps(model_sampling: Any, steps: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name in SCHEDULERS:
        yield name, comfy.samplers.calculate_sigmas(model_sampling, name, steps)


def _window(given: torch.Tensor, schedule: torch.Tensor) -> int | None:
    """Where `given` begins in a schedule; its last level may have been set to 0."""
    for start in range(len(schedule) - len(given) + 1):
        part = schedule[start : start + len(given)]
        same = torch.isclose(given, part, rtol=0, atol=TOLERANCE)
        if same[:-1].all() and (same[-1] or given[-1] == 0):
            return start
    return None


def _untrained(attached: Attached, given: torch.Tensor, wanted: torch.Tensor) -> str:
    steps = attached.spec.steps
    text = (
        f"{attached.file} was trained for {steps} step(s) at {_listed(wanted)}, and this sampler "
        f"goes through {_listed(given)}: expect noise or blur. Set {steps} steps and one of the "
        f"schedulers {', '.join(SCHEDULERS)}, or use Turbo Sampler."
    )
    if given[0] < wanted[0] - TOLERANCE:
        text += (
            " A denoise below 1 starts between the trained sigmas: for image-to-image use "
            "start_step of Turbo Sampler, which starts on one of them."
        )
    return text


def _listed(sigmas: torch.Tensor) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas.tolist())
