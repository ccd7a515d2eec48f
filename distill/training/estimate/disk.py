"""What a run and its cache take on disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ...config import Config, DataSection
from ...models.family import family_of
from ...stages import AnyStage
from .memory import MASTER, moment_bytes, optimised
from .shape import Shape, lora_parameters, rank_of

PROMPT_TOKENS = 200  # of a long caption


def checkpoint_bytes(stage: AnyStage, config: Config, shape: Shape) -> float:
    """In a stage: all LoRAs in float32, Adam's moments, the student's moving average, a
    discriminator's own weights.
    """
    roles = {name for s in config.stages for name in s.adapters}
    saved = sum(MASTER * lora_parameters(shape, rank_of(config, role)) for role in roles)
    for role, settings, weights in optimised(stage, config, shape):
        saved += moment_bytes(settings, weights) + MASTER * weights * (role == "discriminator")
    return saved + MASTER * lora_parameters(shape, config.adapter.rank) * bool(stage.ema)


def checkpoints(config: Config) -> int:
    """That lie there at a time: those that are kept, and the one that is being written."""
    every = config.save_every or config.total_steps
    written = math.ceil(config.total_steps / every)
    return min(written, config.keep_checkpoints + 1) if config.keep_checkpoints else written


def checkpoints_bytes(config: Config, shape: Shape) -> float:
    """All that lie there at a time."""
    return checkpoints(config) * max(checkpoint_bytes(s, config, shape) for s in config.stages)


def run_bytes(config: Config, shape: Shape) -> dict[str, float]:
    """Of the run folder, the largest checkpoint; previews and logs are small beside that."""
    count, whole = checkpoints(config), checkpoints_bytes(config, shape)
    return {
        "a checkpoint": whole / count,
        f"{count} of them": whole,
        "the LoRA": 2 * lora_parameters(shape, config.adapter.rank),
    }


def cache_bytes(config: Config, shape: Shape) -> dict[str, float]:
    """Of the cache that `prepare` writes: 1,000 prompts of 200 tokens, 1,000 images' latents, and
    all of the teacher's images.
    """
    family, data = family_of(config.model.path), config.data
    if not isinstance(data, DataSection):
        return {}
    size = 2 if data.dtype == "bfloat16" else 4
    latents = size * family.vae.channels * (data.resolution // family.vae.pixels) ** 2
    items = {"1,000 images": 1000 * latents, "the teacher's images": data.teacher_images * latents}
    items = {"1,000 prompts": 1000 * PROMPT_TOKENS * shape.text_width * size, **items}
    return {name: float(value) for name, value in items.items() if value}


def free_bytes(folder: Path) -> int:
    """On the disk where `folder` lies or will lie."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
