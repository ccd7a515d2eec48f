"""How often a stage runs the base model, what that takes in FLOP, and how long on a device.

A *pass* is one of one sample (a row) through all blocks: without gradient; trained, with a gradient
to the role's LoRA; or through, with a gradient to its input alone. Guidance takes two rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ...config import Config
from ...models.family import family_of, spec_of
from ...models.roles import FAKE, STUDENT, TEACHER
from ...stages import AnyStage, DiscriminatorSection, DMD2Stage, GANSection, TrajectoryStage
from .networks import decode_flop, dino_flop, judged_latents
from .shape import (
    Shape,
    block_layers,
    quantised_sizes,
    rank_of,
    tokens,
    tokens_seen,
)

Flop = dict[str, float]  # kind of product -> operations, a multiplication and an addition being two
LOW_RANK = "low-rank"  # the LoRA's own products; all others by the dtype of the base's weights
OTHERS = "other networks"  # VAE and DINO, beside the roles

# What one H100 reached (docs/evidence/gpu_h100.md, training section), TFLOP/s. bfloat16: the
# teacher's passes, .414 s for 139 TFLOP. fp8, int8: weights unpacked, then multiplied in bf16, .80
# of the bf16 products beside them. Not measured: float32, two thirds of the card's published 67.
H100 = {"bfloat16": 336.0, "fp8": 270.0, "int8": 270.0, "float32": 45.0}
# What LoRAs of rank 64 add to an iteration of 3.50 s (float32: 3.90 s), over the FLOP of their
# products: 17.7. It goes into small operations and Python, so the rank hardly matters.
H100_LOW_RANK = {"bfloat16": 13.5, "float32": 10.3}
LOW_RANK_MEASURED = 64
HOST_BYTES = 40e9  # per second, of main memory; assumed


@dataclass
class Passes:
    """Of one role, per sample of the student's update, on average over a stage."""

    plain: float = 0.0
    trained: float = 0.0
    through: float = 0.0

    def __iadd__(self, other: Passes) -> Passes:
        self.plain += other.plain
        self.trained += other.trained
        self.through += other.through
        return self


def mean_fake_updates(stage: DMD2Stage) -> float:
    """Per update of the student: the first `fake_warmup` have more of them."""
    warm = min(stage.fake_warmup, stage.steps)
    updates = warm * stage.fake_warmup_updates + (stage.steps - warm) * stage.fake_updates
    return updates / stage.steps


def mean_fresh_samples(stage: DMD2Stage) -> float:
    """Of the fake score's updates, those that draw samples of their own: all but one per step."""
    return mean_fake_updates(stage) - 1 if stage.fake_samples == "fresh" else 0.0


def share(stage: AnyStage, count: int | None) -> float:
    """Of the student's micro-batches that another role's update takes."""
    return (count or stage.accumulate) / stage.accumulate


def first_step(stage: DMD2Stage, steps: int) -> int:
    """The first sampler step that may get a gradient; diversity has one of its own before it."""
    return 1 if stage.diversity > 0 and steps > 1 else 0


def judged(stage: DMD2Stage, steps: int) -> float:
    """Share of the student's updates in which the discriminator has a say and is trained."""
    if not stage.gan or not stage.gan.last_step_only or stage.gradient_step == "last":
        return 1.0 if stage.gan else 0.0
    return 1 / (steps - first_step(stage, steps))


def rows(stage: AnyStage, config: Config) -> int:
    """Of the guided teacher, per sample."""
    scale = config.guidance.scale if stage.guidance_scale is None else stage.guidance_scale
    return rows_of(scale)


def rows_of(scale: float) -> int:
    """Of a teacher at that guidance."""
    return 1 if scale == 1 else 2


def passes(stage: AnyStage, config: Config) -> dict[str, Passes]:
    """By role; the docstrings of methods/dmd2.py and methods/pcm.py say what for."""
    found: dict[str, Passes] = defaultdict(Passes)
    if isinstance(stage, DMD2Stage):
        _dmd2(stage, config, found)
    else:
        _trajectory(stage, config, found)
    return dict(found)


def _dmd2(stage: DMD2Stage, config: Config, found: dict[str, Passes]) -> None:
    steps, guided = spec_of(config).steps, rows(stage, config)
    first = first_step(stage, steps)
    drawn = steps - 1 if stage.gradient_step == "last" else (first + steps - 1) / 2
    part = share(stage, stage.fake_accumulate)
    found[STUDENT] += Passes(drawn + mean_fresh_samples(stage) * part * (drawn + 1), 1)
    found[FAKE] += Passes(1, mean_fake_updates(stage) * part)
    found[TEACHER] += Passes(guided + stage.decoupled)
    if first:
        found[STUDENT] += Passes(trained=1)
        found[TEACHER] += Passes(stage.diversity_steps * guided)
    gan = stage.gan
    if not gan:
        return
    often = judged(stage, steps)
    if gan.features == "latent":
        sources = (gan.real_ratio > 0) + (gan.real_ratio < 1)
        found[TEACHER] += _latent_judge(stage, gan, sources, often, gan.updates)
    if gan.draw_teacher and gan.real_ratio < 1:
        seen = min(1.0, gan.updates * share(stage, gan.accumulate))
        found[TEACHER] += Passes(often * seen * gan.teacher_steps * rows_of(config.guidance.scale))


def _trajectory(stage: TrajectoryStage, config: Config, found: dict[str, Passes]) -> None:
    """The target's pass is none where the teacher's step ends on the phase's edge."""
    found[TEACHER] += Passes(stage.solver_steps * rows(stage, config))
    found[STUDENT] += Passes(0 if getattr(stage, "points", 1) == 1 else 1, 1)
    if gan := getattr(stage, "gan", None):
        found[TEACHER] += _latent_judge(stage, gan, 1, 1.0, 1)


def _latent_judge(
    stage: AnyStage, gan: DiscriminatorSection, sources: int, often: float, updates: int
) -> Passes:
    """The teacher as feature extractor: once with a gradient to the student's sample, then of it,
    of `sources` real ones and, with R1, of those once more.
    """
    shown = 1 + sources * (2 if gan.r1_lambda > 0 else 1)
    return Passes(often * updates * share(stage, gan.accumulate) * shown, through=often)


def forward_flop(config: Config, shape: Shape) -> Flop:
    """Of a pass without gradient through the base alone: 2 in out per token and linear layer, 4
    tokens^2 width in attention.
    """
    kinds: Flop = defaultdict(float)
    quantised = quantised_sizes(config, shape)
    for name, (a, b) in block_layers(config, shape).items():
        kind = config.model.quantize if name in quantised else config.model.dtype
        kinds[kind] += 2 * a * b * tokens_seen(config, name)
    kinds[config.model.dtype] += attention_flop(config, shape)
    return dict(kinds)


def attention_flop(config: Config, shape: Shape) -> float:
    return 4 * tokens(config) ** 2 * shape.width * shape.blocks


def low_rank_flop(config: Config, shape: Shape, role: str) -> float:
    """Of a pass through the role's LoRA, none of the teacher's."""
    if role == TEACHER:
        return 0.0
    rank = rank_of(config, role)
    layers = shape.lora.items()
    return sum(2 * rank * (a + b) * tokens_seen(config, name) for name, (a, b) in layers)


def pass_flop(config: Config, shape: Shape, role: str, count: Passes) -> Flop:
    """A backward pass over frozen weights takes one product for each of the forward's, attention
    2.5 times its two, a low-rank product two for each. Checkpointed blocks run forward again.
    """
    again = 1 + config.model.gradient_checkpointing
    graphs = count.trained + count.through
    kinds: Flop = defaultdict(float)
    for kind, flop in forward_flop(config, shape).items():
        kinds[kind] += flop * (count.plain + graphs * (again + 1))
    kinds[config.model.dtype] += 1.5 * attention_flop(config, shape) * graphs
    if low := low_rank_flop(config, shape, role):
        kinds[LOW_RANK] += low * (count.plain + count.trained * (again + 2))
    return dict(kinds)


def others_flop(stage: AnyStage, config: Config) -> Flop:
    """VAE and DINO where images are judged: with a gradient to the student's crops, of which the
    VAE's blocks run again, then of its and the real ones'.
    """
    gan = getattr(stage, "gan", None)
    if not isinstance(stage, DMD2Stage) or not isinstance(gan, GANSection):
        return {}
    if gan.features == "latent":
        return {}
    latents = judged_latents(gan, config)
    sources = (gan.real_ratio > 0) + (gan.real_ratio < 1)
    shown = gan.updates * share(stage, gan.accumulate)
    decode, look = decode_flop(latents, config) * gan.crops, dino_flop(gan, config) * gan.crops
    views = 1 + sources * (2 if gan.r1_lambda > 0 else 1)
    flop = decode * (3 + shown * (1 + sources)) + look * (2 + shown * views)
    return {config.model.dtype: judged(stage, spec_of(config).steps) * flop}


def stage_flop(stage: AnyStage, config: Config, shape: Shape) -> dict[str, Flop]:
    """By role and kind, per sample of the student's update."""
    found = {
        role: pass_flop(config, shape, role, count) for role, count in passes(stage, config).items()
    }
    others = others_flop(stage, config)
    return found | ({OTHERS: others} if others else {})


@dataclass(frozen=True)
class Speeds:
    """TFLOP/s by kind of product."""

    kinds: Flop
    low_rank: float  # of a LoRA of rank 64

    def seconds(self, flop: Flop, rank: int = LOW_RANK_MEASURED) -> float:
        """rank: of the LoRA whose low-rank products are among them."""
        low = self.low_rank * rank / LOW_RANK_MEASURED
        speeds = {**self.kinds, LOW_RANK: low}
        return sum(count / speeds[kind] for kind, count in flop.items()) / 1e12


def speeds(config: Config, tflops: float) -> Speeds:
    """tflops: that products of the base reach in its family's usual dtype; the rest in proportion
    to what one H100 reached. A family that is not for a GPU has one speed for all.
    """
    family = family_of(config.model.path)
    usual = str(family.gpu_dtype).removeprefix("torch.")
    if usual == "float32":
        return Speeds(dict.fromkeys(H100, tflops), tflops)
    factor = tflops / H100[usual]
    kinds = {kind: speed * factor for kind, speed in H100.items()}
    return Speeds(kinds, H100_LOW_RANK[config.model.dtype] * factor)


def forwards(found: dict[str, Flop], config: Config, shape: Shape) -> float:
    """What the roles do, in forward passes of the base: of all FLOP but the low-rank ones."""
    one = sum(forward_flop(config, shape).values())
    done = [flop for role, kinds in found.items() if role != OTHERS for flop in _frozen(kinds)]
    return math.fsum(done) / one


def _frozen(kinds: Flop) -> Iterator[float]:
    return (flop for kind, flop in kinds.items() if kind != LOW_RANK)


def host_passes(found: dict[str, Passes], stage: AnyStage, config: Config) -> float:
    """In which the host computes the modulation of a time: that of a sampler step is known from the
    last time, that of a checkpointed block from its forward pass, and guidance's two rows share it.
    """
    asked = {role: p.plain + p.trained + p.through for role, p in found.items()}
    asked[TEACHER] /= rows(stage, config)
    if isinstance(stage, DMD2Stage):
        asked[STUDENT] = 0.0
    return sum(asked.values())
