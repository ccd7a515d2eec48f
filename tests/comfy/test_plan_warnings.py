"""Turbo Sampler's plan tells what elsewhere in the graph spoils few steps, and what to remove."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

SIGMAS = (1.0, 0.7155, 0.0)
LATENT = {"samples": torch.zeros(1, 16, 8, 6)}
Patch = Callable[[Any], Any]


@pytest.fixture
def warnings_of(pack: Any) -> Callable[..., list[str]]:
    """(model, **options) -> the warnings of the plan."""
    make_plan = pack("nodes.sampling").make_plan
    return lambda model, **options: make_plan(model, LATENT, **options).warnings


# -------------------------------------------------------------------------------- timestep ranges


def limited(prompt: Any, start: float, end: float) -> Any:
    """By core's ConditioningSetTimestepRange."""
    from nodes import ConditioningSetTimestepRange

    return ConditioningSetTimestepRange().set_range(prompt, start, end)[0]


@pytest.mark.parametrize(
    ("ranges", "bare"),
    [
        ([(0.0, 1.0)], None),
        ([(0.0, 0.1)], "0.7155"),
        ([(0.2, 1.0)], "1"),
        ([(0.0, 0.1), (0.1, 1.0)], None),  # prompts that follow one another
        ([(0.9, 1.0)], "1, 0.7155"),
        ([], "1, 0.7155"),
    ],
)
def test_a_step_without_a_prompt(
    ranges: list[tuple[float, float]],
    bare: str | None,
    warnings_of: Any,
    turbo_model: Any,
    prompt: Any,
) -> None:
    positive = [one for limits in ranges for one in limited(prompt, *limits)]
    warnings = warnings_of(turbo_model(nodes=SIGMAS), positive=positive)
    if bare is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith(f"no conditioning is active at sigma {bare}: ")
        assert "Remove ConditioningSetTimestepRange" in warning


@pytest.mark.parametrize("limits", [(0.0, 0.1), (0.2, 1.0), (0.0, 0.3), (0.5, 0.6)])
def test_core_leaves_it_out_where_the_plan_says_so(
    limits: tuple[float, float],
    warnings_of: Any,
    sample: Any,
    turbo_model: Any,
    prompt: Any,
    count_forwards: Any,
) -> None:
    model = turbo_model(nodes=SIGMAS)
    positive = limited(prompt, *limits)
    forwards = count_forwards(model)
    sample(model, positive, LATENT, 1)
    warned = " ".join(warnings_of(model, positive=positive))
    bare = [sigma for sigma in ("1", "0.7155") if f" {sigma}" in warned.split(":")[0]]
    assert len(forwards) == 2 - len(bare)


# ----------------------------------------------------------------------------------------- caches


def easy_cache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0]


def lazy_cache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0]


class TeaCache:
    """Thresholds in transformer_options, and a wrapper that swaps the forward for a moment."""

    def __call__(self, model: Any) -> Any:
        def wrapper(function: Any, arguments: dict[str, Any]) -> Any:
            return function(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.model_options["transformer_options"]["rel_l1_thresh"] = 0.4
        model.set_model_unet_function_wrapper(wrapper)
        return model


class ApplyFBCacheOnModel:
    """A wrapper alone."""

    def __call__(self, model: Any) -> Any:
        def wrapper(function: Any, arguments: dict[str, Any]) -> Any:
            return function(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model


class MagCache:
    """A forward in the place of the model's."""

    def __call__(self, model: Any) -> Any:
        model = model.clone()
        model.add_object_patch("diffusion_model.forward", self.forward)
        return model

    def forward(self, *arguments: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("patch", "name"),
    [
        (easy_cache, "easycache"),
        (lazy_cache, "lazycache"),
        (TeaCache(), "TeaCache"),
        (ApplyFBCacheOnModel(), "ApplyFBCacheOnModel"),
        (MagCache(), "MagCache"),
    ],
    ids=["EasyCache", "LazyCache", "TeaCache", "FBCache", "MagCache"],
)
def test_a_step_skipping_cache(patch: Patch, name: str, warnings_of: Any, turbo_model: Any) -> None:
    (warning,) = warnings_of(patch(turbo_model()))
    assert name in warning
    assert "Remove that node (EasyCache, LazyCache, TeaCache and the like)" in warning


def test_a_cache_on_many_steps_is_nobodys_fault(warnings_of: Any, model: Any) -> None:
    cached = easy_cache(model)
    assert warnings_of(cached, sigmas=torch.linspace(1, 0, 51)) == []
    assert len(warnings_of(cached, sigmas=torch.linspace(1, 0, 9))) == 1


def test_other_patches_are_no_caches(pack: Any, warnings_of: Any, turbo_model: Any) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    model, _ = pack("nodes.accelerate").accelerate(turbo_model(), "auto", False)
    model = ModelSamplingAuraFlow().patch_aura(model, 3.1)[0]
    model.model_options["transformer_options"]["kv_cache"] = object()
    assert warnings_of(model) == []
