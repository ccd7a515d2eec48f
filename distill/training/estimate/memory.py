"""What is on one device, by moment of a stage's step and by item; the fullest moment is the peak.

Between steps: the frozen base, the LoRAs of all roles in float32, Adam's moments, the student's
moving average, a discriminator and its networks. In a step come, for one role after another:

    forward, backward   gradients of earlier micro-batches; what blocks keep; what the block at work
                        needs, or the teacher beside the student's graph, or decoded crops
    update              all gradients; a copy of them, for the ranks' mean or Adam's square root

Not counted: what kernels allocate inside. One H100 had .15 to .77 GB more at the peaks of its
phases than a count of the same steps gives (benchmarks/dry_run). `MARGIN` is for that, for CUDA's
context and for fragmentation, neither of which was measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...config import Config
from ...models.family import family_of
from ...models.roles import FAKE, STUDENT
from ...stages import AnyStage, DMD2Stage, OptimizerSection
from .networks import decode_bytes, has_images, head_parameters, judged_latents, network_bytes
from .shape import (
    Shape,
    base_bytes,
    lora_parameters,
    rank_of,
    tokens,
    tokens_seen,
    unpacked_bytes,
    unpacking_bytes,
    weight_bytes,
)
from .work import rows, share

Items = dict[str, float]  # what -> bytes
MASTER = 4  # bytes of a trained weight and of what stands beside it
EIGHT_BITS = 1 + 4 / 256  # of a moment: a byte, and a scale per block of 256
MARGIN, MARGIN_CPU = 1.5e9, 0.5e9  # the latter: Python and PyTorch, docs/benchmarks.md


def hidden_bytes(config: Config, shape: Shape, stage: AnyStage) -> float:
    """Of one hidden tensor: tokens x width of all samples that are computed together."""
    return tokens(config) * shape.width * weight_bytes(config) * stage.batch


def moment_bytes(settings: OptimizerSection, weights: int) -> float:
    """Adam's two moments; without beta1 only the second."""
    each = EIGHT_BITS if settings.optimizer == "adamw8bit" else MASTER
    return each * weights * (2 if settings.betas[0] > 0 else 1)


def optimised(
    stage: AnyStage, config: Config, shape: Shape
) -> Iterator[tuple[str, OptimizerSection, int]]:
    """(role, its settings, its weights) of everything that the stage trains."""
    yield STUDENT, stage, lora_parameters(shape, rank_of(config, STUDENT))
    if isinstance(stage, DMD2Stage):
        yield FAKE, stage.fake, lora_parameters(shape, rank_of(config, FAKE))
    if gan := getattr(stage, "gan", None):
        yield "discriminator", gan, head_parameters(gan, _feature_channels(gan, shape))


def _feature_channels(gan: object, shape: Shape) -> int:
    return 768 if has_images(gan) else shape.width  # type: ignore[arg-type]


def between_steps(stage: AnyStage, config: Config, shape: Shape) -> Items:
    """What stays on the device throughout a stage."""
    shard = config.engine.shard
    items: Items = {"frozen base": base_bytes(config, shape) / shard}
    if shard > 1:  # the block at work and the next one are whole
        blocks = sum((a + 1) * b for name, (a, b) in shape.linear.items() if "." in name)
        items["blocks gathered"] = 2 * weight_bytes(config) * blocks / shape.blocks
    for role in sorted({name for s in config.stages for name in s.adapters}, reverse=True):
        items[f"LoRA {role}"] = MASTER * lora_parameters(shape, rank_of(config, role))
    trained = list(optimised(stage, config, shape))
    items["Adam's moments"] = sum(moment_bytes(settings, n) for _, settings, n in trained)
    if stage.ema:
        items["moving average"] = MASTER * lora_parameters(shape, rank_of(config, STUDENT))
    if gan := getattr(stage, "gan", None):
        items["GAN's networks"] = MASTER * trained[-1][2]
        if has_images(gan):
            items["GAN's networks"] += network_bytes(gan, config)
    return items


def block_bytes(config: Config, shape: Shape, stage: AnyStage, role: str) -> float:
    """What a block keeps of its forward pass for its backward pass: hidden tensors, the LoRA's
    inner products and its weights as they are multiplied, and quantised weights unpacked.
    """
    family, size, rank = family_of(config.model.path), weight_bytes(config), rank_of(config, role)
    inner = sum(tokens_seen(config, name) for name in shape.lora) * rank * size * stage.batch
    cast = size * lora_parameters(shape, rank) if size < MASTER else 0
    return (
        family.block_tensors.kept * hidden_bytes(config, shape, stage)
        + (inner + cast) / shape.blocks
        + unpacked_bytes(config, shape)
    )


def graph_bytes(config: Config, shape: Shape, stage: AnyStage, role: str) -> tuple[float, float]:
    """What all blocks keep until the backward pass, and what it adds at the block at work."""
    hidden = hidden_bytes(config, shape, stage)
    block = block_bytes(config, shape, stage, role)
    work = family_of(config.model.path).block_tensors.backward * hidden
    work += unpacking_bytes(config, shape)
    if config.model.gradient_checkpointing:
        return (shape.blocks + 1) * hidden, block + work
    return shape.blocks * block, work


def in_step(stage: AnyStage, config: Config, shape: Shape) -> dict[str, Items]:
    """What comes on top, by moment."""
    hidden = hidden_bytes(config, shape, stage)
    forward = family_of(config.model.path).block_tensors.forward * hidden
    gan = getattr(stage, "gan", None)
    moments: dict[str, Items] = {}
    for role, settings, weights in optimised(stage, config, shape):
        gradients: float = MASTER * weights
        copies = (config.engine.world or 1) > 1 or settings.optimizer == "adamw"
        copied = gradients if copies else 0
        moments[f"{role}: update"] = {"gradients": gradients, "copy of gradients": copied}
        if role not in (STUDENT, FAKE):
            continue
        kept, work = graph_bytes(config, shape, stage, role)
        parts = stage.accumulate
        if role == FAKE and isinstance(stage, DMD2Stage):
            parts = round(parts * share(stage, stage.fake_accumulate))
        if role == STUDENT:
            crops = gan and has_images(gan) and decode_bytes(judged_latents(gan, config), config)
            work = max(work, forward * rows(stage, config), (crops or 0) * _crops(stage))
            kept *= 1 + (getattr(stage, "diversity", 0) > 0)
            if gan and not has_images(gan):
                kept *= 2  # the teacher's graph beside the student's
        if parts == 1:  # gradients come while blocks are done with
            gradients, work = 0.0, work + max(0.0, gradients - kept)
        moments[f"{role}: backward"] = {
            "gradients": gradients,
            "kept by blocks": kept,
            "block at work": work,
        }
    return moments


def _crops(stage: AnyStage) -> int:
    """That are decoded together."""
    gan = getattr(stage, "gan", None)
    return stage.batch * getattr(gan, "crops", 1)


def stage_memory(stage: AnyStage, config: Config, shape: Shape) -> tuple[str, Items]:
    """The fullest moment of a stage, and what is on the device then."""
    held = between_steps(stage, config, shape)
    moments = in_step(stage, config, shape)
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    family = family_of(config.model.path)
    margin = {"CUDA and a margin": MARGIN}
    if family.gpu_dtype == torch.float32:  # a family that is not for a GPU
        margin = {"Python and PyTorch": MARGIN_CPU}
    return fullest, held | moments[fullest] | margin


def memory_bytes(config: Config, shape: Shape) -> tuple[str, Items]:
    """The fullest moment of a recipe, and what is on one device then."""
    found = [(stage, *stage_memory(stage, config, shape)) for stage in config.stages]
    stage, moment, items = max(found, key=lambda f: sum(f[2].values()))
    return f"{stage.label}, {moment}", {name: size for name, size in items.items() if size}
