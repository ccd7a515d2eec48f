"""The plan of a recipe: what `turbo-distill train CONFIG --dry-run` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config import Config
from ...models.family import family_of, spec_of, trained_sizes
from ...models.roles import FAKE, STUDENT
from ...stages import AnyStage
from .disk import cache_bytes, run_bytes
from .memory import memory_bytes
from .problems import problems
from .shape import Shape, host_bytes, lora_parameters, model_shape, rank_of, tokens
from .work import (
    HOST_BYTES,
    LOW_RANK,
    Speeds,
    forward_flop,
    forwards,
    host_passes,
    low_rank_flop,
    passes,
    rows_of,
    speeds,
    stage_flop,
)

MB, GB, TERA, HOUR = 1e6, 1e9, 1e12, 3600


def count(number: int) -> str:
    """20.43 B, 3.86 M"""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def plan_values(config: Config, tflops: float) -> dict[str, Any]:
    """The plan, ready for JSON; `tflops`: what the device reaches in products of the base
    (work.speeds). Times, FLOP and bytes are estimates.
    """
    shape, spec = model_shape(config), spec_of(config)
    speed = speeds(config, tflops)
    stages = [stage_values(stage, config, shape, speed) for stage in config.stages]
    preview_s = preview_seconds(config, shape, speed)
    trained_s = sum(stage["seconds_per_step"] * stage["steps"] for stage in stages)
    moment, memory = memory_bytes(config, shape)
    schedules = schedules_by_size(config)
    return {
        "base": config.model.path,
        "base_is_assumed": shape.assumed,
        "parameters": shape.parameters,
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "sigmas": next(iter(schedules.values())),
        "schedules": schedules,
        "sampler": spec.sampler,
        "rank": config.adapter.rank,
        "fake_rank": rank_of(config, FAKE),
        "adapted_layers": len(shape.lora),
        "adapter_parameters": lora_parameters(shape, config.adapter.rank),
        "tokens": tokens(config),
        "tflop_per_forward": sum(forward_flop(config, shape).values()) / TERA,
        "tflops": tflops,
        "tflops_by_kind": {**speed.kinds, LOW_RANK: speed.low_rank},
        "stages": stages,
        "total_steps": config.total_steps,
        "preview_hours": preview_s / HOUR,
        "hours_per_rank": (trained_s + preview_s) / HOUR,
        "memory_moment": moment,
        "memory_bytes": memory,
        "memory_bytes_total": sum(memory.values()),
        "host_memory_bytes": host_bytes(config, shape),
        "disk_bytes": run_bytes(config, shape),
        "cache_bytes": cache_bytes(config, shape),
        "to_look_at": list(problems(config, shape)),
    }


def schedules_by_size(config: Config) -> dict[str, list[float]]:
    """The sigmas of every trained size, "width x height"; of the first alone where all agree."""
    spec, family = spec_of(config), family_of(config.model.path)
    found = {
        f"{width}x{height}": list(spec.sigmas(family.tokens((width, height))))
        for width, height in trained_sizes(config)
    }
    first = next(iter(found))
    return (
        found if any(sigmas != found[first] for sigmas in found.values()) else {first: found[first]}
    )


def stage_values(stage: AnyStage, config: Config, shape: Shape, speed: Speeds) -> dict[str, Any]:
    """Of a step: all samples of one rank, on average over the stage."""
    flop, samples = stage_flop(stage, config, shape), stage.samples
    seconds = {
        role: samples * speed.seconds(kinds, rank_of(config, role)) for role, kinds in flop.items()
    }
    if host := host_bytes(config, shape):
        passed = host_passes(passes(stage, config), stage, config) * samples / stage.batch
        seconds["modulation in main memory"] = passed * host / HOST_BYTES
    return {
        "method": stage.label,
        "steps": stage.steps,
        "samples_per_rank": samples,
        "accumulate": stage.accumulate,
        "samples_per_update": samples * (config.engine.world or 1),
        "forwards_per_sample": round(forwards(flop, config, shape), 3),
        "tflop_per_step": {
            role: {kind: samples * n / TERA for kind, n in kinds.items()}
            for role, kinds in flop.items()
        },
        "seconds_by_role": seconds,
        "seconds_per_step": sum(seconds.values()),
    }


def preview_seconds(config: Config, shape: Shape, speed: Speeds) -> float:
    """The teacher draws once, the student in every preview; decoding is not counted."""
    section = config.preview
    if not section.every:
        return 0.0
    images = section.prompts * section.images
    one = forward_flop(config, shape)
    teacher = images * section.teacher_steps * rows_of(config.guidance.scale)
    drawn = -(-config.total_steps // section.every) * images * spec_of(config).steps
    low = {LOW_RANK: low_rank_flop(config, shape, STUDENT)}
    student = speed.seconds(one) + speed.seconds(low, config.adapter.rank)
    return teacher * speed.seconds(one) + drawn * student


def _shares(stage: Mapping[str, Any]) -> str:
    """How the samples of an update are divided, where they are."""
    ranks = stage["samples_per_update"] // stage["samples_per_rank"]
    parts = [f"{stage['samples_per_rank']} on each of {ranks} ranks"] if ranks > 1 else []
    if stage["accumulate"] > 1:
        parts.append(f"{stage['samples_per_rank'] // stage['accumulate']} at a time")
    return f" ({', '.join(parts)})" if parts else ""


def plan_text(plan: Mapping[str, Any]) -> str:
    """`plan_values` for people."""
    blocks = f", blocks in {plan['quantize']}" if plan["quantize"] != "none" else ""
    fake = plan["fake_rank"]
    lines = [
        f"base      {plan['base']}: {count(plan['parameters'])} parameters, "
        f"{plan['dtype']}{blocks}",
        *(["          (no local copy: the published model is assumed)"] * plan["base_is_assumed"]),
        *_schedules(plan),
        f"adapter   rank {plan['rank']} on {plan['adapted_layers']} layers: "
        f"{count(plan['adapter_parameters'])} parameters"
        + (f"; the fake score's rank {fake}" if fake != plan["rank"] else ""),
        f"sample    {plan['tokens']} tokens, {plan['tflop_per_forward']:.3g} TFLOP per forward",
        "stages (estimates; a backward pass counts as the forwards it takes)",
    ]
    for stage in plan["stages"]:
        lines += _stage(stage)
    lines += [
        f"total {plan['total_steps']} steps, {plan['hours_per_rank']:.3g} h per rank (estimate)",
        *_times(plan),
        f"memory per device (estimate), at its fullest: {plan['memory_moment']}",
        *_sizes({**plan["memory_bytes"], "total": plan["memory_bytes_total"]}),
    ]
    if plan["host_memory_bytes"]:
        lines.append("memory of the host per rank (estimate)")
        lines += _sizes({"modulation": plan["host_memory_bytes"]})
    lines += ["on disk (estimate)", *_sizes({**plan["disk_bytes"], **_of_cache(plan)})]
    found = plan["to_look_at"]
    lines += ["to look at", *(f"  {p}" for p in found)] if found else ["no inconsistency found"]
    return "\n".join(lines) + "\n"


def _schedules(plan: Mapping[str, Any]) -> Iterator[str]:
    """One line, or one per size where they differ."""
    schedules = plan["schedules"]
    for i, (size, sigmas) in enumerate(schedules.items()):
        of_size = f" at {size}" if len(schedules) > 1 else ""
        yield (
            f"{'sigmas' if not i else '':<10}{', '.join(f'{s:.6g}' for s in sigmas)}"
            + (f"; {plan['sampler']}; {len(sigmas) - 1} forwards per image" if not i else "")
            + of_size
        )


def _stage(stage: Mapping[str, Any]) -> Iterator[str]:
    samples, seconds = stage["samples_per_update"], stage["seconds_per_step"]
    steps = f"{stage['steps']:>5} steps x {samples} sample{'s' * (samples > 1)}"
    yield f"  {stage['method']:<12} {steps}{_shares(stage)}"
    yield f"{'':<15}{stage['forwards_per_sample']:.1f} forwards each, {seconds:.3g} s per step"
    roles = stage["seconds_by_role"].items()
    yield f"{'':<15}" + ", ".join(f"{r} {s:.3g} s" for r, s in roles if s > seconds / 1000)


def _times(plan: Mapping[str, Any]) -> Iterator[str]:
    """Where the hours come from."""
    used = {
        kind
        for stage in plan["stages"]
        for kinds in stage["tflop_per_step"].values()
        for kind in kinds
    }
    kinds = plan["tflops_by_kind"]
    shown = ", ".join(f"{kind} {kinds[kind]:.3g}" for kind in kinds if kind in used)
    if plan["preview_hours"]:
        yield f"  of that, previews {plan['preview_hours']:.2g} h"
    yield f"  TFLOP/s assumed: {shown}"


def _of_cache(plan: Mapping[str, Any]) -> dict[str, float]:
    return {f"cache, {what}": size for what, size in plan["cache_bytes"].items()}


def _sizes(items: Mapping[str, float]) -> Iterator[str]:
    for name, value in items.items():
        unit, size = ("GB", GB) if value >= GB / 100 else ("MB", MB)
        yield f"  {name:<28} {value / size:>8.2f} {unit}"
