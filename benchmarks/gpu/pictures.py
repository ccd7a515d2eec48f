"""Pictures through nodes, prompt to files, of the full model with random weights.

Three casts that are not in memory at once: "bf16" (diffusers, core, ours; one transformer, text
encoder and VAE for all), "8 bits" (baked int8 and fp8) and "beside" (an fp8 file with the LoRA
beside it). The baked weights are those of the first cast, rounded: both are filled from one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import choices, stages
from benchmarks.speed.arms import Arm, Job, TurboArm, TurboImagesArm, arms_of, weight_bytes
from benchmarks.speed.baked import baked_model
from benchmarks.speed.core import Core
from benchmarks.speed.measure import TOTAL, Budget, Clock
from benchmarks.speed.report import memory_table, ratios, stage_table
from benchmarks.speed.world import (
    Size,
    World,
    build_random,
    layers_of,
    random_transformer,
    text_encoder,
    vaes,
    write_lora,
)
from distill.utils.terminal import table

from . import fp8
from .parts import register_fp8

CORE, IMAGES = "B core nodes", "C with Turbo Images"
INT8, FP8_STORED = "C baked int8", "C baked fp8, multiplied in bf16 (the pack today)"
BESIDE = "C fp8 with the LoRA beside it (the pack today)"
MULTIPLIED = {
    "row": "C baked fp8, multiplied in fp8, a scale per token (an experiment)",
    "core": "C baked fp8, multiplied in fp8 by core, scale 1 (an experiment)",
}
EXPERIMENT = "an experiment"
FP8_ATTENTION = "C baked fp8, multiplied in fp8, attention in fp8 (an experiment)"


@dataclass
class Cast:
    """Arms whose models are in memory, and what some small pictures of theirs came to."""

    world: World
    arms: dict[str, Arm]


class MultipliedArm(TurboImagesArm):
    """Turbo Images on a baked fp8 model whose layers multiply in fp8 meanwhile."""

    way = "row"

    def __call__(self, job: Job, clock: Clock) -> None:
        with self.multiplied():
            super().__call__(job, clock)

    def sample(self, positive: list[Any], job: Job, index: int) -> dict[str, Any]:
        with self.multiplied():
            return super().sample(positive, job, index)

    def multiplied(self) -> AbstractContextManager[Any]:
        return fp8.multiplied(self.model.model.diffusion_model, self.way)


class ByCoreArm(MultipliedArm):
    way = "core"


# ------------------------------------------------------------------------------------------ casts


def bf16_cast(core: Core, size: Size) -> Cast:
    world = build_random(core, size)
    return Cast(world, arms_of(world))


def eight_bit_cast(core: Core, size: Size, trial: Job, budget: Budget, fp8_attention: str) -> Cast:
    """At most one bf16 transformer at a time, and each is taken apart while it is rounded.

    fp8_attention: a kernel of the benchmark's own for one more arm, or "".
    """
    world = _world_without_transformer(core, size)
    int8, stored = (_baked(core, size, dtype) for dtype in ("int8", "fp8"))
    makers = {
        INT8: partial(TurboImagesArm, world, own_model=int8),
        FP8_STORED: partial(TurboImagesArm, world, own_model=stored),
        MULTIPLIED["row"]: partial(MultipliedArm, world, own_model=stored),
        MULTIPLIED["core"]: partial(ByCoreArm, world, own_model=stored),
    }
    if fp8_attention:
        register_fp8(core)
        makers[FP8_ATTENTION] = partial(MultipliedArm, world, fp8_attention, own_model=stored)
    return _cast(world, makers, trial, budget)


def beside_cast(core: Core, size: Size, trial: Job, budget: Budget) -> Cast:
    world = _world_without_transformer(core, size)
    model = _beside(core, size)
    return _cast(world, {BESIDE: partial(TurboImagesArm, world, own_model=model)}, trial, budget)


def _cast(
    world: World, makers: Mapping[str, Callable[[], TurboArm]], trial: Job, budget: Budget
) -> Cast:
    found = {name: choices.tried(name, make, trial, budget) for name, make in makers.items()}
    return Cast(world, {name: arm for name, arm in found.items() if arm is not None})


def _world_without_transformer(core: Core, size: Size) -> World:
    """Before the large models: core counts a text encoder that it loads as not yet there."""
    clip = text_encoder(core, size)
    vae, _ = vaes(core, size, tiny=False)
    return World(core, size, None, None, Path("merged already"), clip, vae, None)


def _baked(core: Core, size: Size, dtype: str) -> Any:
    """What Turbo Bake makes of the bf16 cast's transformer."""
    from comfy.model_management import load_models_gpu

    base = random_transformer(core, size)
    weights = dict(base.model.diffusion_model.state_dict())
    del base
    model = baked_model(core, size, weights, dtype, consumed=True)
    load_models_gpu([model], force_full_load=True)
    return model


def _beside(core: Core, size: Size) -> Any:
    """An fp8 file as Load Diffusion Model reads it, with Turbo LoRA Loader behind it."""
    from comfy.model_management import load_models_gpu

    base = random_transformer(core, size, stored=torch.float8_e4m3fn)
    lora = core.models("loras") / "beside.safetensors"
    write_lora(core, lora, layers_of(base), size.rank)
    patched, _ = core.pack("nodes.apply_lora").apply_lora(base, lora)
    load_models_gpu([patched], force_full_load=True)
    return patched


# -------------------------------------------------------------------------------------- measuring


def drawn(cast: Cast, job: Job, rounds: int, budget: Budget) -> tuple[dict[str, Any], str]:
    """Values and text: seconds of every arm in turns, and its memory."""
    core = cast.world.core
    found, peaks = stages.end_to_end(cast.arms, core.device, job, rounds, budget)
    weights = {name: weight_bytes(arm) for name, arm in cast.arms.items()}
    memory = {"weights": weights, "beyond": peaks.added, "with all arms' models": peaks.most}
    better = min(
        (name for name in found if name.startswith("C")), key=lambda n: found[n][TOTAL].median
    )
    text = "\n\n".join(
        [stage_table(found), ratios(found, TOTAL, better), memory_table(weights, peaks)]
    )
    return {"table": found, "bytes": memory}, text


def latents(cast: Cast, job: Job) -> dict[str, torch.Tensor]:
    """Of every arm that starts from core's noise, on the CPU."""
    found = {name: choices.latents(arm, job) for name, arm in cast.arms.items()}
    return {name: value.cpu() for name, value in found.items() if value is not None}


def differences(
    cast: Cast, found: Mapping[str, torch.Tensor], reference: torch.Tensor, job: Job
) -> tuple[dict[str, Any], str]:
    """How far the latents are from core's in bf16, and what attention ran."""
    rows = {
        name: {
            "latents": choices.relative(value, reference),
            "attention": getattr(cast.arms[name], "attention", "core's own"),
        }
        for name, value in found.items()
    }
    header = ["arm", "|latents - B's| / |B's|", "attention"]
    cells = [[name, f"{row['latents']:.2g}", row["attention"]] for name, row in rows.items()]
    text = f"Latents of one image of {job.width} x {job.height}:\n\n{table(header, cells)}"
    return rows, text
