"""`turbo-distill train CONFIG --dry-run`: the memory and time that a recipe would take, estimated
from the configuration alone.

No weight is read. Parameter counts are exact (the model is built without storage); memory and time
are estimates, and the arithmetic is in the functions' docstrings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from ..config import Config, DataSection
from ..contract.latent_grid import sigmas_at
from ..models.family import family_of, spec_of
from ..models.quantise import ROW_BYTES, block_modulation, quantised_layers
from ..stages import AnyStage

GB = 1e9
BLOCK_TENSORS = 23  # hidden-sized tensors that one block keeps for its backward pass
ADAM_BYTES = 20  # fp32 weight, gradient, two moments and moving average
BACKWARD = 1.3  # backward pass over a frozen base in forward passes, at 1024x1024


@dataclass(frozen=True)
class Shape:
    """The numbers of a base model that the estimates need."""

    parameters: int
    width: int
    blocks: int
    linear: dict[str, tuple[int, int]]  # linear layer -> (in, out)
    lora: dict[str, tuple[int, int]]  # those that are adapted
    assumed: bool  # no local config: the published Qwen-Image is assumed


def model_shape(config: Config) -> Shape:
    family = family_of(config.model.path)
    file = Path(family.locate(config.model.path)) / "transformer" / "config.json"
    values = {}
    if file.is_file():
        loaded = json.loads(file.read_text(encoding="utf-8"))
        values = {k: v for k, v in loaded.items() if not k.startswith("_")}
    with torch.device("meta"):
        model = resolve_name(family.transformer)(**values)
    targets = tuple(f".{name}" for name in family.targets(config.adapter.modulation))
    linear = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        width=family.width(model),
        blocks=len(family.blocks_of(model)),
        linear=linear,
        lora={name: size for name, size in linear.items() if name.endswith(targets)},
        assumed=not file.is_file(),
    )


def lora_parameters(shape: Shape, rank: int) -> int:
    """rank (in + out) per adapted layer."""
    return sum(rank * (a + b) for a, b in shape.lora.values())


def tokens(config: Config) -> int:
    """Image and text tokens of one sample."""
    family, data = family_of(config.model.path), config.data
    size = (data.resolution,) * 2 if isinstance(data, DataSection) else family.size
    return family.tokens(size) + family.text_tokens


def weight_bytes(config: Config) -> int:
    """Of a weight in the precision that the base computes in."""
    return 2 if config.model.dtype == "bfloat16" else 4


def host_bytes(config: Config, shape: Shape) -> int:
    """Modulation that stays in main memory: weights and biases."""
    if not config.model.offload_modulation:
        return 0
    modulation = block_modulation(family_of(config.model.path))
    sizes = [size for name, size in shape.linear.items() if re.fullmatch(modulation, name)]
    return weight_bytes(config) * sum((a + 1) * b for a, b in sizes)


def quantised_sizes(config: Config, shape: Shape) -> dict[str, tuple[int, int]]:
    """The layers that `model.quantize` turns to 8 bits."""
    if config.model.quantize == "none":
        return {}
    pattern = quantised_layers(family_of(config.model.path), config.model.offload_modulation)
    return {name: size for name, size in shape.linear.items() if re.fullmatch(pattern, name)}


def base_bytes(config: Config, shape: Shape) -> int:
    """The frozen base on the device: 1 byte per weight of a quantised layer, and its scales."""
    layers, size = quantised_sizes(config, shape).values(), weight_bytes(config)
    row = ROW_BYTES.get(config.model.quantize, 0)
    saved = sum((size - 1) * a * b - row * b for a, b in layers)
    return size * shape.parameters - saved - host_bytes(config, shape)


def unpacked_bytes(config: Config, shape: Shape) -> int:
    """Quantised weights in the base's precision, which a block's backward pass needs; modulation
    has no backward pass.
    """
    layers = quantised_sizes(config, shape).items()
    modulation = block_modulation(family_of(config.model.path))
    weights = sum(a * b for name, (a, b) in layers if not re.fullmatch(modulation, name))
    at_once = 1 if config.model.gradient_checkpointing else shape.blocks
    return weight_bytes(config) * weights * at_once // shape.blocks


def memory_bytes(config: Config, shape: Shape) -> dict[str, float]:
    """Estimated peak on one device, by item.

    Base: over the ranks that share it; of a quantised one also the weights of the block at work,
    unpacked, or of every block without checkpointing. Adapters: 20 bytes per weight (fp32 weight,
    gradient, two Adam moments, moving average). Activations per sample: one hidden tensor (tokens x
    width) per block kept by checkpointing plus 23 for the block at work, or 23 for every block
    without checkpointing. GAN: 3 GB for a decoded crop of 512 x 512 pixels with its gradient,
    growing with the area.
    """
    size = weight_bytes(config)
    adapters = {name for stage in config.stages for name in stage.adapters}
    ranks = {
        "student": config.adapter.rank,
        "fake": config.adapter.fake_rank or config.adapter.rank,
    }
    batch = max(stage.batch for stage in config.stages)
    hidden = tokens(config) * shape.width * size * batch
    kept = shape.blocks + BLOCK_TENSORS
    if not config.model.gradient_checkpointing:
        kept = shape.blocks * BLOCK_TENSORS
    items = {
        "frozen base": base_bytes(config, shape) / config.engine.shard,
        **{f"adapter {a}": ADAM_BYTES * lora_parameters(shape, ranks[a]) for a in sorted(adapters)},
        "activations": hidden * kept,
    }
    crops = [stage.gan.crop * stage.gan.crops for stage in config.stages if _decodes(stage)]
    if config.model.quantize != "none":
        items["unpacked weights"] = unpacked_bytes(config, shape)
    if crops:
        pixels = max(crops) * family_of(config.model.path).vae.pixels
        items["GAN: decoded crops"] = 3 * GB * (pixels / 512) ** 2 * batch
    return items


def _decodes(stage: AnyStage) -> bool:
    gan = getattr(stage, "gan", None)
    return hasattr(gan, "crop") and gan.features != "latent"


def forward_flop(config: Config, shape: Shape) -> float:
    """One forward pass of one sample: 2 x 12 width^2 per token and block in linear layers, 4
    tokens^2 width in attention.
    """
    n, d = tokens(config), shape.width
    return shape.blocks * (24 * d * d * n + 4 * n * n * d)


def forwards_per_step(stage: AnyStage, config: Config, recompute: bool) -> float:
    """Transformer forwards that one update costs, backward passes counted as 1.3.

    A guided teacher call is two forwards. DMD2's sampler runs half its steps on average before the
    one that is trained, and all of them for a fresh sample of the fake score.
    """
    guided = 2 if (stage.guidance_scale or config.guidance.scale) > 1 else 1
    train = 1 + BACKWARD + (1 if recompute else 0)
    steps = spec_of(config).steps
    if stage.method == "dmd2":
        sampled = (steps - 1) / 2 if stage.gradient_step == "random" else steps - 1
        fresh = steps if stage.fake_samples == "fresh" else 0
        share = (stage.fake_accumulate or stage.accumulate) / stage.accumulate
        fake = stage.fake_updates * share * (fresh + train)
        return sampled + train + guided + stage.decoupled + 1 + fake
    target = 0 if stage.method == "progressive" else 1
    return stage.solver_steps * guided + target + train


def problems(config: Config) -> Iterator[str]:
    """What a run would stumble over, or a person should know before it."""
    if isinstance(config.data, DataSection):
        if not config.data.cache.is_dir():
            yield f"data.cache: {config.data.cache} is missing; run `turbo-distill prepare`."
        for key in ("prompts", "images"):
            for path in getattr(config.data, key):
                if not path.exists():
                    yield f"data.{key}: {path} does not exist."
    if config.init_from is not None and not config.init_from.exists():
        yield f"init_from: {config.init_from} does not exist."
    for i, lora in enumerate(config.model.loras):
        if not lora.path.exists():
            yield f"model.loras.{i}.path: {lora.path} does not exist."
    methods = [stage.method for stage in config.stages]
    begun = config.init_from is not None
    if not begun and "dmd2" in methods and "pcm" not in methods[: methods.index("dmd2")]:
        yield "stages: dmd2 without a pcm stage before it tends to lose diversity."
    for i, stage in enumerate(config.stages):
        gan = getattr(stage, "gan", None)
        prepared = isinstance(config.data, DataSection)
        if getattr(gan, "real_ratio", 0) and prepared and not config.data.images:
            yield f"stages.{i}.gan.real_ratio: {gan.real_ratio}, but data.images is empty."
    if not config.save_every:
        yield "save_every: 0, so an interrupted run cannot be resumed."
    if config.run_dir.exists():
        yield f"run_dir: {config.run_dir} exists already."


def count(number: int) -> str:
    """20.43 B, 3.86 M"""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def plan_values(config: Config, tflops: float) -> dict[str, Any]:
    """The plan, ready for JSON; `tflops` is the device's assumed real throughput. Times, FLOP and
    bytes are estimates.
    """
    shape, spec = model_shape(config), spec_of(config)
    flop = forward_flop(config, shape)
    stages = []
    for stage in config.stages:
        forwards = forwards_per_step(stage, config, config.model.gradient_checkpointing)
        stages.append(
            {
                "method": stage.label,
                "steps": stage.steps,
                "samples_per_rank": stage.samples,
                "accumulate": stage.accumulate,
                "samples_per_update": stage.samples * (config.engine.world or 1),
                "forwards_per_sample": round(forwards, 3),
                "seconds_per_step": forwards * stage.samples * flop / (tflops * 1e12),
            }
        )
    memory = memory_bytes(config, shape)
    return {
        "base": config.model.path,
        "base_is_assumed": shape.assumed,
        "parameters": shape.parameters,
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "sigmas": list(sigmas_at(spec)),
        "sampler": spec.sampler,
        "rank": config.adapter.rank,
        "adapted_layers": len(shape.lora),
        "adapter_parameters": lora_parameters(shape, config.adapter.rank),
        "tokens": tokens(config),
        "tflop_per_forward": flop / 1e12,
        "tflops": tflops,
        "stages": stages,
        "total_steps": config.total_steps,
        "hours_per_rank": sum(s["seconds_per_step"] * s["steps"] for s in stages) / 3600,
        "memory_bytes": memory,
        "memory_bytes_total": sum(memory.values()),
        "host_memory_bytes": host_bytes(config, shape),
        "to_look_at": list(problems(config)),
    }


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
    assumed = " (no local copy: the published Qwen-Image is assumed)"
    lines = [
        f"base      {plan['base']}: {count(plan['parameters'])} parameters, {plan['dtype']}{blocks}"
        + (assumed if plan["base_is_assumed"] else ""),
        f"sigmas    {', '.join(f'{s:g}' for s in plan['sigmas'])}; {plan['sampler']}; "
        f"{len(plan['sigmas']) - 1} forwards per image",
        f"adapter   rank {plan['rank']} on {plan['adapted_layers']} layers: "
        f"{count(plan['adapter_parameters'])} parameters",
        f"sample    {plan['tokens']} tokens, {plan['tflop_per_forward']:.3g} TFLOP per forward",
        "stages",
    ]
    for stage in plan["stages"]:
        lines.append(
            f"  {stage['method']:<12} {stage['steps']:>6} steps x {stage['samples_per_update']} "
            f"samples{_shares(stage)}, {stage['forwards_per_sample']:.1f} forwards each, "
            f"{stage['seconds_per_step']:.3g} s per step (estimate)"
        )
    lines.append(
        f"  total {plan['total_steps']} steps, {plan['hours_per_rank']:.3g} h per rank at "
        f"{plan['tflops']:g} TFLOP/s (estimate)"
    )
    lines.append("memory per device (estimate)")
    items = {**plan["memory_bytes"], "total": plan["memory_bytes_total"]}
    lines += [f"  {name:<20} {value / GB:>8.2f} GB" for name, value in items.items()]
    if plan["host_memory_bytes"]:
        lines.append("memory of the host per rank (estimate)")
        lines.append(f"  {'modulation':<20} {plan['host_memory_bytes'] / GB:>8.2f} GB")
    found = plan["to_look_at"]
    lines += ["to look at", *(f"  {p}" for p in found)] if found else ["no inconsistency found"]
    return "\n".join(lines) + "\n"
