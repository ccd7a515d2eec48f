"""Speed of the nodes against core's own and diffusers on the CPU: side by side in one process.

    python -m benchmarks.speed.nodes --out docs/evidence     under 5 minutes on one core

The tiny model end to end, what can be counted, saving, decoding, loading and node overhead. Medians
(lowest to highest) of several rounds after one that does not count. At the end: what was skipped
and why. What only a GPU can tell: benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from distill.training.environment import describe_machine

from . import counts, loading, stages
from .arms import Arm, Job, arms_of
from .core import Core, start
from .measure import TOTAL, Budget
from .report import Report, ratios, stage_table, value_table
from .world import SMALL, TINY, Size, World, build

ARM_C = "C turbo distill"
WIDE = Size(blocks=2)  # Qwen-Image's own width
NARROW = Size(blocks=1, heads=2, head_dim=32, axes=(8, 12, 12), text_width=64)
MINUTE = 60
# two forwards at 1024 x 1024 on an H100, bf16: 2 x 139 ms (shared table of sglang PR 16299)
FAST_SAMPLING_S = 0.278


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for speed_cpu.json and .md")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=4.5, help="time limit")
    parser.add_argument("--small", action="store_true", help="toy size: to test this script")
    chosen = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)
    run(chosen.small, chosen.rounds, Budget(chosen.minutes * MINUTE), chosen.out)


def run(small: bool, rounds: int, budget: Budget, out: Path | None) -> Report:
    """Everything, printed as it comes in."""
    with tempfile.TemporaryDirectory(prefix="turbo-distill-speed-") as folder:
        core = start(Path(folder), cpu=True)
        machine = describe_machine(1, core.device)
        report = Report("Speed of the nodes, cpu mode", machine, out, "speed_cpu")
        show(report.text[0] + "\n\n" + report.text[1])
        sections(core, small, rounds, budget, report)
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


# --------------------------------------------------------------------------------------- sections


def sections(core: Core, small: bool, rounds: int, budget: Budget, report: Report) -> None:
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


def drawn(
    arms: Mapping[str, Arm], core: Core, job: Job, rounds: int, budget: Budget, report: Report
) -> None:
    found, _ = stages.end_to_end(arms, core.device, job, rounds, budget)
    title = f"Prompt to files, models in memory: {job.count} image(s) of {job.width} x {job.height}"
    show(report.add(title, {"table": found}, stage_table(found), ratios(found, TOTAL, ARM_C)))


if __name__ == "__main__":
    main()
