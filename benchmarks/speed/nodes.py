"""Speed of the nodes against core's own and diffusers: side by side in one process, in turns.

    python -m benchmarks.speed.nodes --mode cpu --out docs/evidence     under 5 minutes on one core
    python -m benchmarks.speed.nodes --mode gpu --out docs/evidence     under 10 minutes on an H200

cpu: the tiny model end to end, what can be counted, saving, decoding, loading and node overhead.
gpu: the full model with random weights that are made on the device: 60 blocks, bf16, and baked to
fp8 and int8; a text encoder and a VAE of full size. Nothing is downloaded. Medians (lowest to
highest) of several rounds after one that does not count. At the end: which targets are met, and
what was skipped and why.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.training.environment import describe_machine
from distill.utils.terminal import table

from . import choices, counts, loading, stages
from .arms import Arm, Job, TurboArm, arms_of, weight_bytes
from .core import Core, start
from .kernels import attention_kernels
from .measure import TOTAL, Budget
from .report import Report, memory_table, ratios, stage_table, value_table
from .targets import speed_targets, target_table, target_values
from .world import FULL, SMALL, TINY, Size, World, build

ARM_C = "C turbo distill"
WIDE = Size(blocks=2)  # Qwen-Image's own width
NARROW = Size(blocks=1, heads=2, head_dim=32, axes=(8, 12, 12), text_width=64)
MINUTE = 60
# two forwards at 1024 x 1024 on an H100, bf16: 2 x 139 ms (shared table of sglang PR 16299)
FAST_SAMPLING_S = 0.278

TARGETS = "Targets"
HEADLINE = 4, 2048  # images, side
# compiled code is made for the size that it is measured at
LARGE_TRIAL = Job(stages.PROMPT.format(0), HEADLINE[1], HEADLINE[1])
TRIAL, SMALL_TRIAL = Job("a trial", 512, 512), Job("a trial", 64, 64)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for speed_MODE.json and .md")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="time limit; cpu 4.5, gpu 9.5")
    parser.add_argument(
        "--small",
        action="store_true",
        help="the same code on models of toy size, on the CPU: to test this script",
    )
    chosen = parser.parse_args(arguments)
    limit = chosen.minutes or {"cpu": 4.5, "gpu": 9.5}[chosen.mode]
    run(chosen.mode, chosen.small, chosen.rounds, Budget(limit * MINUTE), chosen.out)


def run(mode: str, small: bool, rounds: int, budget: Budget, out: Path | None) -> Report:
    """Everything that a mode measures, printed as it comes in."""
    on_cpu = mode == "cpu" or small
    if not on_cpu and not torch.cuda.is_available():
        raise SystemExit("--mode gpu needs a CUDA device; found none. Use --mode cpu.")
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="turbo-distill-speed-") as folder:
        core = start(Path(folder), cpu=on_cpu)
        machine = describe_machine(1, core.device)
        title = f"Speed of the nodes, {mode} mode{', toy size' if small else ''}"
        report = Report(title, machine, out, f"speed_{mode}")
        show(report.text[0] + "\n\n" + report.text[1])
        measure = cpu_sections if mode == "cpu" else gpu_sections
        measure(core, small, rounds, budget, report)
        if mode == "cpu":
            show(report.add(TARGETS, *_verdicts({}, {})))
        skipped = "\n".join(f"- {what}" for what in budget.skipped) or "nothing"
        show(report.add("Skipped", budget.skipped, skipped))
        _close()
    return report


def _close() -> None:
    """Lets go of all models while their modules still exist."""
    from comfy.model_management import unload_all_models

    unload_all_models()
    gc.collect()


def show(text: str) -> None:
    sys.stdout.write(text + "\n\n")
    sys.stdout.flush()


# -------------------------------------------------------------------------------------------- cpu


def cpu_sections(core: Core, small: bool, rounds: int, budget: Budget, report: Report) -> None:
    world = build(core, TINY, tiny=True)
    job = Job("a red letter K", 64, 64)
    counted(world, job, report)
    drawn(arms_of(world), core, Job("", 64, 64, 4), rounds, budget, report)
    side = 64 if small else 2048
    if budget.allows("saving", 0 if small else 40):
        saved(core, side, min(rounds, 2), budget, report)
    size, side = (SMALL, 64) if small else (Size(vae_base=96), 128)
    if budget.allows("decoding", 0 if small else 30):
        decoded(core, size, side, min(rounds, 3), budget, report)
    del world
    _close()
    wide = SMALL if small else WIDE
    if budget.allows("node overhead", 0 if small else 45):
        sides = (64, 64) if small else (1024, 128)
        added(core, wide, sides, rounds, budget, report)
    if budget.allows("loading", 0 if small else 45):
        loaded(core, wide, min(rounds, 2), budget, report)
    if budget.allows("loader time by LoRA size", 0 if small else 40):
        fitted(core, wide, 1, budget, report)


def counted(world: World, job: Job, report: Report) -> None:
    plan = loading.bake(world.core, _tiny_base(), world.lora)
    baked = world.core.pack("nodes.baked_model").load_baked(plan)
    forwards = counts.forwards(world, job)
    repeated = counts.repeated_prompt(world, job)
    patched = counts.patches(world, baked, job)
    header = ["for one image", "transformer forwards", "of them negative", "encoder forwards"]
    after = ["weights patched for", "first prompt", "second prompt", "after an eviction"]
    show(
        report.add(
            "Counted",
            {"forwards": forwards, "encoder forwards for X, Y, X": repeated, "patches": patched},
            value_table(header, forwards),
            value_table(["prompts X, Y, X", "encoder forwards"], repeated),
            value_table(after, patched),
        )
    )


def _tiny_base() -> Path:
    from distill.contract.tiny import TINY_DIR

    return TINY_DIR / "transformer"


def saved(core: Core, side: int, rounds: int, budget: Budget, report: Report) -> None:
    found = stages.saving(core, side, 4, rounds, budget)
    title = f"Saving 4 images of {side} x {side}"
    better = "C Turbo Save Image"
    show(report.add(title, found, stage_table(found), ratios(found, "foreground", better)))


def decoded(core: Core, size: Size, side: int, rounds: int, budget: Budget, report: Report) -> None:
    found = stages.decoding(core, size, side, rounds, budget)
    title = f"Decoding one image of {side} x {side}, VAE of base width {size.vae_base}"
    better = "C Turbo VAE Decode"
    show(report.add(title, found, stage_table(found), ratios(found, "decode", better)))


def added(
    core: Core, wide: Size, sides: tuple[int, int], rounds: int, budget: Budget, report: Report
) -> None:
    narrow_side, wide_side = sides
    for size, side in ((NARROW, narrow_side), (wide, wide_side)):
        found = stages.overhead(core, size, side, min(rounds, 2), budget)
        extra = found["ours minus core's, ms"]
        fast = extra / 1000 / FAST_SAMPLING_S
        title = f"Node overhead: {size.blocks} block(s) of width {size.heads * size.head_dim}, "
        text = (
            f"Medians of {stages.EMPTY_ROUNDS} rounds: ours takes {extra:+.2f} ms against core's, "
            f"{100 * found['share of sampling']:+.2f} % of this sampling. It does not grow with "
            f"the model: {extra:+.2f} ms of {1000 * FAST_SAMPLING_S:.0f} ms (two forwards of all "
            f"60 blocks at 1024 x 1024 on an H100) are {100 * fast:+.2f} %. Latents differ by "
            f"{found['relative difference of latents']:.1g} of their size."
        )
        show(report.add(f"{title}{side} x {side}", found, stage_table(found["table"]), text))
    tokens = 64 if wide is SMALL else 1024 + 77
    guard = stages.guard_cost(core, tokens, wide)
    title = f"Numerics guard, {tokens} tokens, {wide.heads} heads of {wide.head_dim}"
    text = (
        f"One look costs {100 * guard['look'] / guard['attention']:.1f} % of the attention that it "
        f"looks at, once per layer; every later call {1e6 * guard['later call']:.0f} microseconds."
    )
    show(report.add(title, guard, text))


def loaded(core: Core, size: Size, rounds: int, budget: Budget, report: Report) -> None:
    found = loading.loading(core, size, rounds, budget)
    title = f"Loading {size.blocks} blocks of width {size.heads * size.head_dim} with a LoRA"
    sizes = {
        name: [found["bytes on disk"][name] / 1e6, found["bytes resident"][name] / 1e6]
        for name in found["bytes on disk"]
    }
    text = (
        f"Baked against base: {found['C/B on disk, without the LoRA']:.3f}x on disk, "
        f"{found['C/B resident']:.3f}x resident."
    )
    table = stage_table(found["table"])
    show(report.add(title, found, table, value_table(["MB", "on disk", "resident"], sizes), text))


def fitted(core: Core, size: Size, rounds: int, budget: Budget, report: Report) -> None:
    found = loading.lora_loader(core, size, rounds, budget)
    line = found["line, s over MB"]
    text = (
        f"{', '.join(f'{mb:.0f}' for mb in found['MB'])} MB: {1000 * line.intercept:.1f} ms + "
        f"{1000 * line.slope:.2f} ms per MB, R2 = {line.r2:.3f}."
    )
    title = "Turbo LoRA Loader by the size of the LoRA"
    show(report.add(title, found, stage_table(found["table"]), text))


# -------------------------------------------------------------------------------------------- gpu


def gpu_sections(core: Core, small: bool, rounds: int, budget: Budget, report: Report) -> None:
    """The headline first: what there is no time for is what matters least."""
    size = SMALL if small else FULL
    kernel = fastest_kernel(core, size, small, rounds, budget, report)
    everything = "everything with a model: all pictures, decoding, saving, node overhead"
    if not budget.allows(everything, 0 if small else 120):
        show(report.add(TARGETS, *_verdicts({}, {})))
        return
    world = build(core, size)
    arms = choices.arms(world, kernel, SMALL_TRIAL if small else TRIAL, budget)
    headline: stages.Table = {}
    # count, side, seconds that it is expected to take, rounds at most
    jobs = [(1, 64, 0, 1)] if small else [(4, 2048, 230, 3), (1, 1024, 30, 5), (1, 1328, 45, 5)]
    for count, side, seconds, most in jobs:
        if budget.allows(f"{count} x {side} x {side}", seconds):
            found = drawn(arms, core, Job("", side, side, count), min(rounds, most), budget, report)
            headline = found if (count, side) == HEADLINE else headline
    headline = headline | compiled(world, arms, headline, small, budget, report)
    _what_ran(world, arms, SMALL_TRIAL if small else TRIAL, report)
    show(report.add(TARGETS, *_verdicts({} if small else headline, arms)))
    _rest(core, world, arms, small, rounds, budget, report)


def fastest_kernel(
    core: Core, size: Size, small: bool, rounds: int, budget: Budget, report: Report
) -> str:
    """Measures attention at all sizes; the last, largest one decides. "auto" without time."""
    fastest = "auto"
    for count in [64] if small else [4096 + 77, 6889 + 77, 16384 + 77]:
        if not budget.allows(f"attention kernels at {count} tokens", 0 if small else 15):
            continue
        found = attention_kernels(core, size, count, rounds, budget)
        fastest = found.fastest
        title = f"Attention kernels, {count} tokens, {size.heads} heads of {size.head_dim}"
        text = f"Fastest that the guard passes: {fastest}."
        reasons = "\n".join(found.reasons)
        show(report.add(title, found.table, stage_table(found.table), text, reasons))
    return fastest


def compiled(
    world: World,
    arms: dict[str, Arm],
    headline: stages.Table,
    small: bool,
    budget: Budget,
    report: Report,
) -> stages.Table:
    """Our fastest arm of the headline with compiled blocks, in turns with itself without. Adds the
    new arm to `arms`.
    """
    best, _ = speed_targets(headline)
    if best is None:
        budget.skip("compiled blocks: on a GPU, after 4 x 2048 x 2048")
        return {}
    if not budget.allows("compiled blocks", 120):
        return {}
    name = f"{best}, compiled"
    arm = choices.tried(name, lambda: choices.compiled_like(world, arms[best]), LARGE_TRIAL, budget)
    if arm is None:
        return {}
    arms[name] = arm
    count, side = HEADLINE
    both = {best: arms[best], name: arm}
    title = "Compiled blocks"
    found = drawn(both, world.core, Job("", side, side, count), 2, budget, report, title)
    return {name: found[name]} if name in found else {}


def _what_ran(world: World, arms: dict[str, Arm], job: Job, report: Report) -> None:
    rows = choices.what_ran(world, arms, job)
    header = ["arm", "weights", "attention", "latents against B"]
    title = f"What ran; latents of one image of {job.width} x {job.height}"
    show(report.add(title, rows, table(header, [[name, *row] for name, row in rows.items()])))


def _rest(
    core: Core,
    world: World,
    arms: dict[str, Arm],
    small: bool,
    rounds: int,
    budget: Budget,
    report: Report,
) -> None:
    side = 64 if small else 2048
    if budget.allows("decoding", 0 if small else 25):
        decoded(core, world.size, side, min(rounds, 3), budget, report)
    if budget.allows("saving", 0 if small else 40):
        saved(core, side, min(rounds, 3), budget, report)
    if not small and budget.allows("4 x 1024 x 1024", 60):
        drawn(arms, core, Job("", 1024, 1024, 4), rounds, budget, report)
    if budget.allows("node overhead", 0 if small else 20):
        sides = (64, 64) if small else (1024, 1024)
        added(core, SMALL if small else WIDE, sides, rounds, budget, report)


# ----------------------------------------------------------------------------------- both of them


def drawn(
    arms: Mapping[str, Arm],
    core: Core,
    job: Job,
    rounds: int,
    budget: Budget,
    report: Report,
    title: str = "",
) -> stages.Table:
    found, peaks = stages.end_to_end(arms, core.device, job, rounds, budget)
    images = f"{job.count} image(s) of {job.width} x {job.height}"
    title = f"{title or 'Prompt to files, models in memory'}: {images}"
    weights = {name: weight_bytes(arm) for name, arm in arms.items()}
    memory = {"weights": weights, "beyond": peaks.added, "with all arms' models": peaks.most}
    better = ARM_C if ARM_C in arms else next(iter(arms))
    show(
        report.add(
            title,
            {"table": found, "bytes": memory},
            stage_table(found),
            ratios(found, TOTAL, better),
            memory_table(weights, peaks),
        )
    )
    return found


def _verdicts(headline: stages.Table, arms: Mapping[str, Arm]) -> tuple[Any, ...]:
    """Values for JSON, and texts; `headline` is empty where it was not measured."""
    best, targets = speed_targets(headline)
    ours = arms.get(best or "")
    text = "Not measured: that takes 4 images of 2048 x 2048 with the full model (--mode gpu)."
    if isinstance(ours, TurboArm):
        text = f"C is {best}, its attention {ours.attention}."
    return {"C": best, "targets": target_values(targets)}, target_table(targets), text


if __name__ == "__main__":
    main()
