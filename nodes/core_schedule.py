"""The trained schedule for core's own samplers: a plain KSampler, a detailer or an upscaler that
asks a MODEL from Turbo LoRA Loader for a number of steps that the LoRA has gets the trained sigmas.

Two parts. The MODEL's `model_sampling` gets the table that `simple` reads (so Basic Scheduler shows
it too); how sigmas and timesteps belong together stays the model's own. And a wrapper around the
sampler puts the trained sigmas where `simple`, `normal` or `sgm_uniform` asked for such a
number of steps: it alone knows the size of the latent, and it sees what nodes downstream did to
`model_sampling`.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..distill.contract.latent_grid import USUAL_SIZE
from .latents import size_tokens, tokens_of
from .spec_attachment import Attached, attached_to

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "turbo_distill.schedule"
SCHEDULERS = ("simple", "normal", "sgm_uniform")  # even steps in time, whatever the shift
TOLERANCE = 1e-6
CORES = "comfy."  # where core's samplers are
SAMPLERS = {"euler": "sample_euler", "renoise": "sample_lcm"}  # of a spec -> core's name
ORIGINAL = "turbo_distill_original"  # attribute of the `model_sampling` that `follow` makes


class PlannedSampler(comfy.samplers.KSAMPLER):
    """A sampler whose sigmas were decided by Turbo Sampler: they stay as they are."""


@dataclass(frozen=True)
class Original:
    """What was in the place of a `model_sampling` with our table."""

    model_sampling: Any
    shift: str | None  # in words, where a node had set one


def follow(model: ModelPatcher) -> None:
    """Lets core's samplers follow the spec on `model`, in place: callers own a fresh clone.

    A model that is no flow model keeps its own schedule: its sigmas are of another scale.
    """
    if not is_flow(model):
        return leave(model)
    attached = attached_to(model)
    assert attached is not None
    present = model.get_model_object("model_sampling")
    original = getattr(present, ORIGINAL, None)
    if original is None:
        shifted = "model_sampling" in model.object_patches
        original = Original(present, _shift_of(present) if shifted else None)
    spec = attached.spec
    tokens = size_tokens(model, USUAL_SIZE, spec.family) if spec.by_size else None
    model.add_object_patch("model_sampling", _with_table(original, spec.sigmas(tokens)))
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _sample)


def is_flow(model: ModelPatcher) -> bool:
    """Whether its sigmas are those of x_t = (1 - sigma) x0 + sigma eps."""
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


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


def _with_table(original: Original, sigmas: Sequence[float]) -> Any:
    """A copy of a model's `model_sampling` whose table gives `sigmas` to the scheduler `simple`."""
    own = original.model_sampling
    patched = copy.copy(own)
    patched._buffers = dict(own._buffers)  # a copy of a module shares them
    patched.sigmas = _table(own.sigmas, sigmas)
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
    guider = executor.class_obj
    model = guider.model_patcher
    attached = attached_to(model)
    if attached is not None and is_flow(model) and not isinstance(sampler, PlannedSampler):
        for warning in _other_settings(attached, sampler, getattr(guider, "cfg", None)):
            logging.warning("Turbo Distill: %s", warning)
        shapes = kwargs.get("latent_shapes")
        shape = shapes[0] if shapes else latent_image.shape
        sigmas = _trained(model, attached, shape, sigmas)
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _trained(
    model: ModelPatcher, attached: Attached, shape: Sequence[int], sigmas: torch.Tensor
) -> torch.Tensor:
    """`sigmas`, or in their place the trained ones, and a line in the log."""
    spec = attached.spec
    tokens = tokens_of(model, shape, spec.family) if spec.by_size else None
    counts = sorted(spec.step_counts, key=lambda steps: steps != spec.steps)  # the usual one first
    offered = [torch.tensor(spec.in_steps(steps).sigmas(tokens)) for steps in counts]
    given = sigmas.detach().float().cpu()
    for cut in (False, True):
        for wanted in offered:
            name, start = _place(model, shape, given, wanted, cut)
            if start is None:
                continue
            found = wanted[start : start + len(given)].clone()
            if cut:
                found[-1] = 0  # core's "force full denoise"
                logging.warning("Turbo Distill: %s", _untrained(attached, found, wanted))
            if not name:
                return sigmas
            logging.info(
                "Turbo Distill: %s steps of %s at the trained sigmas %s",
                len(wanted) - 1,
                name,
                listed(found),
            )
            if conflict := shift_conflict(model):
                logging.warning("Turbo Distill: %s", conflict)
            return found.to(sigmas)
    logging.warning("Turbo Distill: %s", _untrained(attached, given, offered[0]))
    return sigmas


def _place(
    model: ModelPatcher, shape: Sequence[int], given: torch.Tensor, wanted: torch.Tensor, cut: bool
) -> tuple[str, int | None]:
    """Where `given` begins in the trained sigmas ("") or in as many even steps (a scheduler)."""
    start = _window(given, wanted, cut)
    if start is not None:
        return "", start
    for name, even in _even_steps(model, shape, len(wanted) - 1):
        start = _window(given, even, cut)
        if start is not None:
            return name, start
    return "", None


def _other_settings(attached: Attached, sampler: Any, cfg: float | None) -> Iterator[str]:
    """What else a person chose otherwise than the LoRA was trained."""
    spec, function = attached.spec, getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", "")
    trained = SAMPLERS[spec.sampler]
    if getattr(function, "__module__", "").startswith(CORES) and name != trained:
        yield (
            f"{attached.file} was trained for sampler {trained.removeprefix('sample_')}, and this "
            f"one is {name.removeprefix('sample_').removesuffix('_function')}."
        )
    if cfg is not None and cfg != spec.cfg:
        yield (
            f"{attached.file} was trained for CFG {spec.cfg:g}, and this sampler runs at {cfg:g}."
        )


def _even_steps(
    model: ModelPatcher, shape: Sequence[int], steps: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """What KSampler would go through; in newer cores that may depend on the latent's shape."""
    ksampler = comfy.samplers.KSampler
    takes_shape = "latent_shape" in inspect.signature(ksampler.__init__).parameters
    more = {"latent_shape": tuple(shape)} if takes_shape else {}
    for name in SCHEDULERS:
        yield name, ksampler(model, steps, "cpu", "euler", name, **more).sigmas


def _window(given: torch.Tensor, schedule: torch.Tensor, cut: bool) -> int | None:
    """Where `given` begins in a schedule; cut: whose last level was set to 0, so that the last of
    its steps is none of the schedule's.
    """
    for start in range(len(schedule) - len(given) + 1):
        part = schedule[start : start + len(given)]
        same = torch.isclose(given, part, rtol=0, atol=TOLERANCE)
        if same[:-1].all() and (same[-1] or (cut and given[-1] == 0)):
            return start
    return None


def _untrained(attached: Attached, given: torch.Tensor, wanted: torch.Tensor) -> str:
    steps = len(wanted) - 1
    text = (
        f"{attached.file} was trained for {steps} step(s) at {listed(wanted)}, and this sampler "
        f"goes through {listed(given)}: expect noise or blur. Set {steps} steps and one of the "
        f"schedulers {', '.join(SCHEDULERS)}, or use Turbo Sampler."
    )
    if given[0] < wanted[0] - TOLERANCE:
        text += (
            " A denoise below 1 starts between the trained sigmas: for image-to-image use "
            "start_step of Turbo Sampler, which starts on one of them."
        )
    return text


def listed(sigmas: torch.Tensor) -> str:
    """Noise levels for people."""
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas.tolist())
