"""How long: end to end and per stage, saving and decoding alone, what nodes add to sampling."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .arms import Arm, CoreArm, Job, TurboArm
from .core import Core
from .measure import WARM_UP, Budget, Clock, Peaks, Spread, in_turns
from .world import Size, World, dtype_of, random_transformer, vaes

PROMPT = "a red letter K in front of a small bookshop on a rainy evening, {} windows lit"

EMPTY_ROUNDS = 40

Table = dict[str, dict[str, Spread]]


def end_to_end(
    arms: Mapping[str, Arm], device: torch.device, job: Job, rounds: int, budget: Budget
) -> tuple[Table, Peaks]:
    """All stages of all arms, files on disk; every round of every size has a prompt of its own.

    The round that does not count is of one image. Raises RuntimeError where an arm's transformer or
    text encoder is not on the device when its clock starts.
    """
    drawn: dict[str, int] = defaultdict(int)
    peaks = Peaks(device)

    def run(name: str, clock: Clock) -> None:
        number = drawn[name]  # the same prompt for the arms of a round
        drawn[name] += 1
        prompt = PROMPT.format(job.width + number)  # none that a cache has seen
        own = replace(job, prompt=prompt, seed=job.seed + 100 * number)
        if number < WARM_UP:
            own = replace(own, count=1)
        else:
            make_current(arms[name])
            check_resident(name, arms[name], device)
        with peaks(name):
            arms[name](own, clock)

    turns = {name: partial(run, name) for name in arms}
    return in_turns(turns, device, rounds, budget), peaks


def make_current(arm: Arm) -> None:
    """Tells core that this arm's MODEL is in use, as in a session that has no other: clones of one
    model take each other's place.
    """
    from comfy.model_management import load_models_gpu

    if isinstance(arm, CoreArm | TurboArm):
        load_models_gpu([arm.model], force_full_load=True)


def check_resident(name: str, arm: Arm, device: torch.device) -> None:
    """Raises RuntimeError unless transformer and text encoder are all on `device`."""
    for module in arm.modules()[:2]:
        elsewhere = [key for key, p in module.named_parameters() if p.device.type != device.type]
        if elsewhere:
            raise RuntimeError(
                f"{name}: {len(elsewhere)} weights of {type(module).__name__} are not on {device}, "
                f"such as {elsewhere[0]}, so its time would be that of a transfer."
            )


# -------------------------------------------------------------------------------- saving, decoding


def saving(core: Core, side: int, count: int, rounds: int, budget: Budget) -> Table:
    """Foreground seconds of `count` images, and until they are on disk where that is later."""
    import nodes

    images = picture(side).to(core.device).expand(count, -1, -1, -1)
    ours = core.pack("nodes.save")

    def save_core(clock: Clock) -> None:
        with clock("foreground"):
            nodes.SaveImage().save_images(images, "b")

    def save_turbo(clock: Clock) -> None:
        with clock("foreground"):
            ours.save_images(images, ours.Saving("c"))
        with clock("background"):
            ours.WRITER.flush()

    return in_turns(
        {"B SaveImage": save_core, "C Turbo Save Image": save_turbo}, core.device, rounds, budget
    )


def picture(side: int) -> torch.Tensor:
    """Smooth colours and a little grain, about as hard to compress as a photograph.

    # [1, side, side, 3] in [0, 1]
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 16, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    grain = torch.randn(1, 3, side, side, generator=generator) * 0.01
    return (smooth + grain).clamp(0, 1).permute(0, 2, 3, 1)


def decoding(core: Core, size: Size, side: int, rounds: int, budget: Budget) -> Table:
    """One image through the same VAE in diffusers, core and our node."""
    import nodes

    vae, theirs = vaes(core, size, tiny=False)
    decode = core.pack("nodes.decode").decode
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 1, side // 8, side // 8, generator=generator)

    @torch.no_grad()
    def decode_diffusers(clock: Clock) -> None:
        with clock("decode"):
            theirs.decode(latent.to(core.device, dtype_of(core)), return_dict=False)

    @torch.inference_mode()
    def decode_core(clock: Clock) -> None:
        with clock("decode"):
            nodes.VAEDecode().decode(vae, {"samples": latent})

    @torch.inference_mode()
    def decode_turbo(clock: Clock) -> None:
        with clock("decode"):
            decode(vae, latent)

    arms = {
        "A diffusers": decode_diffusers,
        "B VAEDecode": decode_core,
        "C Turbo VAE Decode": decode_turbo,
    }
    return in_turns(arms, core.device, rounds, budget, total=False)


# --------------------------------------------------------------------------------------- overhead


def overhead(core: Core, size: Size, side: int, rounds: int, budget: Budget) -> dict[str, Any]:
    """Seconds of sampling outside of the transformer's forwards: core's KSampler, and ours.

    Turbo Sampler's plan and Turbo Accelerate's wrappers are in; loading, encoding and decoding are
    not. Measured with forwards that return at once, for a real one's own spread is larger than all
    of this; it does not depend on depth or width of the model.
    """
    model = random_transformer(core, size)
    world = World(core, size, model, model, core.models("loras") / "none", None, None, None)
    prompt = [[torch.randn(1, 20, size.text_width), {}]]
    job = Job("", side, side)
    arms: dict[str, Any] = {"B core nodes": CoreArm(world), "C turbo distill": TurboArm(world)}
    latents = {}

    @torch.inference_mode()
    def run(name: str, stage: str, clock: Clock) -> None:
        with clock(stage):
            latents[name] = arms[name].sample(prompt, job, 0)["samples"]

    def turns(stage: str, rounds: int) -> Table:
        functions = {name: partial(run, name, stage) for name in arms}
        return in_turns(functions, core.device, rounds, budget, total=False)

    real = turns("sampling", rounds)
    first, second = latents.values()
    with empty_forwards(model.model.diffusion_model):
        empty = turns("outside of the forwards", EMPTY_ROUNDS)
    theirs, ours = (empty[name]["outside of the forwards"].median for name in arms)
    return {
        "table": {name: {**real[name], **empty[name]} for name in arms},
        "ours minus core's, ms": 1000 * (ours - theirs),
        "share of sampling": (ours - theirs) / real["B core nodes"]["sampling"].median,
        "relative difference of latents": ((first - second).norm() / first.norm()).item(),
    }


@contextmanager
def empty_forwards(module: torch.nn.Module) -> Iterator[None]:
    """Lets calls of `module` return their first argument."""
    module.forward = lambda x, *args, **kwargs: x
    try:
        yield
    finally:
        del module.forward


def guard_cost(core: Core, tokens: int, size: Size) -> dict[str, float]:
    """Seconds of the numerics guard's one look at a layer, of the attention it looks at, and of a
    later call beyond the kernel's own time.
    """
    attention = core.pack("nodes.attention")
    shape = (1, size.heads, tokens, size.head_dim)
    q, k, v = (torch.randn(shape, device=core.device, dtype=dtype_of(core)) for _ in range(3))
    kernel = attention.Kernel(
        "sdpa",
        lambda q, k, v, mask, scale: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        devices=(core.device.type,),
        dtypes=(q.dtype,),
    )
    call = attention.read_call(kernel, q, k, v, size.heads, skip_reshape=True)
    small = [torch.randn(1, 1, 8, 8, device=core.device, dtype=q.dtype) for _ in range(3)]
    guarded = attention.GuardedAttention(kernel)
    options = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": {}}
    return {
        "attention": timed(lambda: kernel.run(q, k, v, None, None), core.device, 3),
        "look": timed(lambda: attention.fault_of(q, call, kernel), core.device, 5),
        "later call": timed(lambda: guarded(None, *small, 1, **options), core.device, 200)
        - timed(lambda: kernel.run(*small, None, None), core.device, 200),
    }


def timed(function: Any, device: torch.device, repetitions: int) -> float:
    """Median seconds of one call, after one that does not count."""
    function()
    seconds = []
    for _ in range(repetitions):
        clock = Clock(device)
        start = time.perf_counter()
        with clock("call"):
            function()
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds).median
