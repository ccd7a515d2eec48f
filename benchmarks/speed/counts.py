"""How often: figures that are the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .arms import Job, arms_of
from .measure import Clock
from .world import World

COND, UNCOND = 0, 1  # core's numbers for them


def forwards(world: World, job: Job) -> dict[str, dict[str, int]]:
    """Of the transformer and the text encoder for one image, per arm; negatives are images too."""
    modules = {
        "A diffusers": (world.pipeline.transformer, world.pipeline.text_encoder),
        "B core nodes": (world.patched.model.diffusion_model, encoder_of(world)),
        "C turbo distill": (world.patched.model.diffusion_model, encoder_of(world)),
        "C with Turbo Images": (world.patched.model.diffusion_model, encoder_of(world)),
    }
    found = {}
    for name, arm in arms_of(world).items():
        transformer, encoder = modules[name]
        with calls_of(transformer) as drawn, calls_of(encoder) as encoded:
            arm(job, Clock(world.core.device))
        options = [kwargs.get("transformer_options", {}) for kwargs in drawn]
        found[name] = {
            "transformer forwards": len(drawn),
            "of them negative": sum(UNCOND in entry.get("cond_or_uncond", ()) for entry in options),
            "encoder forwards": len(encoded),
        }
    return found


def repeated_prompt(world: World, job: Job) -> dict[str, int]:
    """Encoder forwards for the prompts X, Y, X. Core's executor keeps the outputs of the latest
    workflow only, so there X is encoded again.
    """
    found = {}
    for name, arm in arms_of(world).items():
        encoder = world.pipeline.text_encoder if name[0] == "A" else encoder_of(world)
        with calls_of(encoder) as encoded:
            for prompt in ("x", "y", "x"):
                arm(replace(job, prompt=f"counted prompt {prompt}"), Clock(world.core.device))
        found[name] = len(encoded)
    return found


def encoder_of(world: World) -> torch.nn.Module:
    return world.clip.cond_stage_model.qwen25_7b.transformer


@contextmanager
def calls_of(module: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every call of `module`, positional ones of core's by their names."""
    calls: list[dict[str, Any]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def patches(world: World, baked: Any, job: Job) -> dict[str, list[int]]:
    """Weights that core patches for the first prompt, for a second one, and for a third after
    another model has needed the memory: with a LoRA on the MODEL, and with one baked in.
    """
    from comfy.model_management import load_models_gpu, unload_all_models

    found = {}
    for name, model in (("B LoRA on the MODEL", world.patched), ("C baked", baked)):
        unload_all_models()
        counts = []
        for prompt in range(3):
            if prompt == 2:
                unload_all_models()
            with patched_weights(type(model)) as keys, torch.inference_mode():
                load_models_gpu([model])
            counts.append(len(keys))
        found[name] = counts
    load_models_gpu([world.patched])
    return found


@contextmanager
def patched_weights(kind: type) -> Iterator[list[str]]:
    """Names of the weights that a LoRA is computed into meanwhile."""
    import comfy.lora

    keys: list[str] = []
    original = comfy.lora.calculate_weight

    def counted(patches: Any, weight: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        keys.append(key)
        return original(patches, weight, key, *args, **kwargs)

    comfy.lora.calculate_weight = counted
    try:
        yield keys
    finally:
        comfy.lora.calculate_weight = original
