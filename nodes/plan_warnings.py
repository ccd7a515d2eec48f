"""What a person should know before a MODEL is sampled: settings elsewhere that spoil few steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..distill.contract.spec import TurboSpec
from .core_schedule import shift_conflict

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SIGMA_TOLERANCE = 1e-3  # given sigmas this close to a trained one count as trained
FEW_STEPS = 16  # more than that without a spec is no few-step schedule

_GUIDANCE_PATCHES = {
    "disable_cfg1_optimization",
    "sampler_cfg_function",
    "sampler_calc_cond_batch_function",
}

# In what core's EasyCache and LazyCache, TeaCache, MagCache, FBCache, DeepCache and CacheDiT leave
# on a MODEL; a cache of keys and values skips no step.
_CACHE = re.compile(r"(?<!kv)(?<!kv_)cache|rel_l1_thresh", re.IGNORECASE)


def plan_warnings(
    model: ModelPatcher,
    spec: TurboSpec | None,
    trained: Sequence[float] | None,
    sigmas: torch.Tensor,
    latent: dict[str, Any],
    start_step: int,
    positive: Sequence[Any] | None = None,
) -> list[str]:
    """Sentences that each say what to remove or to set; trained: the sigmas of `spec` here."""
    found = (
        _untrained(trained, sigmas),
        _half_a_model(spec, sigmas),
        shift_conflict(model),
        _other_guidance(spec, positive),
        _unfinished(sigmas),
        _from_nothing(sigmas, latent, start_step),
        _patched_guidance(model),
        _step_skipping(model) if spec is not None or len(sigmas) - 1 <= FEW_STEPS else None,
        None if positive is None else _without_prompt(model, positive, sigmas),
    )
    return [warning for warning in found if warning]


def _untrained(trained: Sequence[float] | None, sigmas: torch.Tensor) -> str | None:
    if trained is None:
        return None
    untrained = [
        sigma
        for sigma in sigmas.tolist()
        if min(abs(sigma - level) for level in trained) > SIGMA_TOLERANCE
    ]
    if not untrained:
        return None
    return (
        f"the LoRA was not trained at sigma {_listed(untrained)} (trained: "
        f"{_listed(trained)}). Unplug `sigmas` to use the trained schedule."
    )


def _half_a_model(spec: TurboSpec | None, sigmas: torch.Tensor) -> str | None:
    if (
        spec is None
        or spec.boundary is None
        or len(sigmas) <= max(spec.boundary, spec.steps - spec.boundary) + 1
    ):
        return None
    return (
        f"this LoRA is for one of two experts, and one MODEL goes through all steps here. Sample "
        f"with SamplerCustomAdvanced twice: the high-noise MODEL with Turbo Sigmas up to end_step "
        f"{spec.boundary}, then the low-noise MODEL from start_step {spec.boundary} on."
    )


def _other_guidance(spec: TurboSpec | None, positive: Sequence[Any] | None) -> str | None:
    if spec is None or spec.guidance is None:
        return None
    others = [
        options["guidance"]
        for _, options in positive or ()
        if abs(options.get("guidance", spec.guidance) - spec.guidance) > SIGMA_TOLERANCE
    ]
    if not others:
        return None
    return (
        f"the prompt asks for guidance {_listed(others)}, and the LoRA was trained at "
        f"{spec.guidance:g}. Remove FluxGuidance to use that."
    )


def _unfinished(sigmas: torch.Tensor) -> str | None:
    if sigmas[-1] > 0:
        return f"the last sigma is {sigmas[-1]:g}, not 0: noise stays in the result."
    return None


def _from_nothing(sigmas: torch.Tensor, latent: dict[str, Any], start_step: int) -> str | None:
    if sigmas[0] < 1 and start_step and torch.count_nonzero(latent["samples"]) == 0:
        return (
            f"start_step {start_step} begins at sigma {sigmas[0]:g} from an empty latent: wire the "
            f"encoded image in, or set start_step to 0 for text-to-image."
        )
    return None


def _patched_guidance(model: ModelPatcher) -> str | None:
    guided = sorted(_GUIDANCE_PATCHES & model.model_options.keys())
    if not guided:
        return None
    return (
        f"a node upstream patched the guidance of this MODEL ({', '.join(guided)}). A few-step "
        f"LoRA has guidance built in and runs once per step without a negative, which such "
        f"patches (CFG rescaling, CFGNorm, PAG and the like) do not expect. Remove that node."
    )


# ------------------------------------------------------------------------------------- the caches


def _step_skipping(model: ModelPatcher) -> str | None:
    caches = sorted({name for name in _patch_names(model) if _CACHE.search(name)})
    if not caches:
        return None
    return (
        f"a node upstream put a step-skipping cache on this MODEL ({', '.join(caches)}). It reuses "
        f"what an earlier step gave, and a few-step LoRA needs every step. Remove that node "
        f"(EasyCache, LazyCache, TeaCache and the like)."
    )


def _patch_names(model: ModelPatcher) -> Iterator[str]:
    """How those who patched a MODEL's forward call themselves: keys, and classes of functions."""
    options = model.model_options
    transformer_options = options.get("transformer_options", {})
    yield from map(str, transformer_options)
    for kinds in (model.wrappers, transformer_options.get("wrappers", {})):
        for wrappers in kinds.values():
            yield from (str(key) for key in wrappers if key is not None)
            yield from _owners(function for each in wrappers.values() for function in each)
    yield from _owners([options.get("model_function_wrapper"), *model.object_patches.values()])


def _owners(functions: Iterable[Any]) -> Iterator[str]:
    """TeaCache for a function that was defined in TeaCache.apply."""
    for function in functions:
        yield getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]


# ------------------------------------------------------------------------------- the conditioning


def _without_prompt(
    model: ModelPatcher, positive: Sequence[Any], sigmas: torch.Tensor
) -> str | None:
    ranges = [_active_range(model, options) for _, options in positive]
    bare = [
        sigma.item()
        for sigma in sigmas[:-1]
        if not any(low <= sigma <= high for low, high in ranges)
    ]
    if not bare:
        return None
    return (
        f"no conditioning is active at sigma {_listed(bare)}: the timestep ranges of `positive` "
        f"leave the model without a prompt there. Remove ConditioningSetTimestepRange, or let one "
        f"conditioning reach from start 0 to end 1."
    )


def _active_range(model: ModelPatcher, options: dict[str, Any]) -> tuple[float, float]:
    """The lowest and the highest sigma at which core uses a conditioning.

    Both kinds of limits as in calculate_start_end_timesteps of comfy/samplers.py.
    """
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    start = max(options.get("clip_start_percent", 0.0), options.get("start_percent", 0.0))
    end = min(options.get("clip_end_percent", 1.0), options.get("end_percent", 1.0))
    return float(to_sigma(end)), float(to_sigma(start))


def _listed(sigmas: Iterable[float]) -> str:
    return ", ".join(f"{sigma:g}" for sigma in sigmas)
