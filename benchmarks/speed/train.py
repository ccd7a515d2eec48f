"""Speed and memory of the trainer's DMD2 step, each choice against the trainer's own, in turns.

    python -m benchmarks.speed.train --mode cpu --out docs/evidence     under 4 minutes on one core
    python -m benchmarks.speed.train --mode gpu --out docs/evidence     under 10 minutes on an H200

cpu: a model of the tiny one's size and two blocks of Qwen-Image's own width, at 64 x 64 pixels.
gpu: all 60 blocks in bf16 with random weights, 1024 x 1024, batch 1. Prompts are random embeddings,
as a cache hands them over. A step is one update of the fake score and one of the student (1:1).
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from distill.config import AdapterSection, GuidanceSection
from distill.contract.spec import TurboSpec
from distill.data.batch import Batch
from distill.methods.dmd2 import DMD2
from distill.models import flow, qwen_image
from distill.models.roles import FAKE, STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.stages import DMD2Stage
from distill.training.engine import Engine
from distill.training.environment import describe_machine
from distill.utils.rng import Rng

from .core import fill_randomly
from .measure import Budget, Clock, Spread, in_turns
from .report import Report, stage_table
from .targets import Target, target_table, target_values, training_targets
from .world import FULL, SMALL, TINY, Size

GB = 1e9  # as in the targets
STAGE = {"method": "dmd2", "steps": 1, "fake_updates": 1, "fake_warmup": 0, "gradient_step": "last"}


@dataclass(frozen=True)
class Choice:
    """One way to run a step; the defaults are the trainer's."""

    name: str = "as the trainer does it"
    pair: bool = True  # teacher with and without the prompt in one batch
    checkpointing: bool = True
    fused: bool = False  # torch's fused AdamW


CHOICES = (
    Choice(),
    Choice("teacher in two calls", pair=False),
    Choice("no checkpointing", checkpointing=False),
    Choice("fused AdamW", fused=True),
)


class TwoCalls(Roles):
    """Guidance by two forwards of B in place of one of 2 B."""

    @torch.no_grad()
    def teacher_pair(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, scale: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.guidance.scale if scale is None else scale
        with self.use_role(TEACHER) as transformer:
            cond = qwen_image.predict_tokens(transformer, x_t, t, text)
            uncond = qwen_image.predict_tokens(transformer, x_t, t, self.negative)
        guided = flow.guide(cond, uncond, scale, self.guidance.rescale)
        cond, guided = (qwen_image.unpack(v, *x_t.shape[-2:]) for v in (cond, guided))
        return cond, guided


class Trainee:
    """A model of `size` on `device` with student and fake score, and data to step on."""

    def __init__(self, size: Size, side: int, device: torch.device, rank: int) -> None:
        self.device, self.size, self.side = device, size, side
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with device:
                self.transformer = QwenImageTransformer2DModel(**size.transformer())
        finally:
            torch.set_default_dtype(before)
        fill_randomly(self.transformer)
        negative = Rng(0, 0).normal("negative", (1, 20, size.text_width))
        text = Text(negative).to(device, self.dtype)
        self.roles = Roles(
            self.transformer,
            AdapterSection(rank=rank),
            GuidanceSection(),
            text,
            0,
            (STUDENT, FAKE),
        )
        spec = TurboSpec((1.0, 0.75, 0.0))
        stage = DMD2Stage.model_validate(STAGE)
        self.method = DMD2(stage, self.roles, spec, Engine(0, 1, device))
        self.adams = {
            fused: {
                role: torch.optim.AdamW(
                    optimizer.parameters, lr=optimizer.settings.lr, fused=fused or None
                )
                for role, optimizer in self.method.optimizers.items()
            }
            for fused in (False, True)
        }
        self.two_calls = copy.copy(self.roles)  # the same weights and switches
        self.two_calls.__class__ = TwoCalls
        self.steps = 0

    def step(self, choice: Choice, clock: Clock) -> None:
        """One update of the fake score and of the student."""
        self.method.roles = self.roles if choice.pair else self.two_calls
        for role, optimizer in self.method.optimizers.items():
            optimizer.adam = self.adams[choice.fused][role]
        if choice.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()
        rng = Rng(0, self.steps)
        batch = self._batch(rng)
        self.steps += 1
        with clock("iteration"):
            self.method.step(batch, rng)

    def peak(self, choice: Choice) -> float:
        """GB on the GPU at most, with no other choice's optimiser there."""
        for adam in (adam for adams in self.adams.values() for adam in adams.values()):
            adam.state.clear()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step(choice, Clock(self.device))
        return torch.cuda.max_memory_allocated(self.device) / GB

    def _batch(self, rng: Rng) -> Batch:
        latents = rng.normal("x0", (1, 16, self.side // 8, self.side // 8))
        text = Text(rng.normal("text", (1, 77, self.size.text_width)))
        return Batch(latents, text).to(self.device, self.dtype)


def measure(
    trainee: Trainee, rounds: int, budget: Budget
) -> tuple[dict[str, dict[str, Spread]], dict[str, float]]:
    """Seconds per iteration of every choice, and its peak of memory in GB (GPU only)."""
    peaks, fitting = {}, list(CHOICES)
    if trainee.device.type == "cuda":
        for choice in CHOICES:
            try:
                peaks[choice.name] = trainee.peak(choice)
            except torch.OutOfMemoryError as error:
                fitting.remove(choice)
                budget.skip(f"{choice.name}: {str(error).splitlines()[0]}")
    runs = {choice.name: partial(trainee.step, choice) for choice in fitting}
    return in_turns(runs, trainee.device, rounds, budget, total=False), peaks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for speed_train_MODE.json and .md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="time limit; cpu 4, gpu 9.5")
    parser.add_argument("--small", action="store_true", help="toy size, to test this script")
    chosen = parser.parse_args(arguments)
    limit = chosen.minutes or {"cpu": 4, "gpu": 9.5}[chosen.mode]
    run(chosen.mode, chosen.small, chosen.rounds, Budget(60 * limit), chosen.out)


def plan(mode: str, small: bool) -> list[tuple[Size, int, int]]:
    """(size, pixels, LoRA rank) of what a mode measures."""
    if small:
        return [(SMALL, 32, 4)]
    if mode == "gpu":
        return [(FULL, 1024, 64)]
    return [(TINY, 64, 16), (Size(blocks=2), 64, 16)]


def run(mode: str, small: bool, rounds: int, budget: Budget, out: Path | None) -> Report:
    device = torch.device("cpu" if mode == "cpu" or small else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--mode gpu needs a CUDA device; found none. Use --mode cpu.")
    machine = describe_machine(1, device)
    report = Report(f"Speed of the DMD2 step, {mode} mode", machine, out, f"speed_train_{mode}")
    show(report.text[0] + "\n\n" + report.text[1])
    verdicts = targets_of({}, {})  # not measured
    for size, side, rank in plan(mode, small):
        trainee = Trainee(size, side, device, rank)
        table, peaks = measure(trainee, rounds, budget)
        width = size.heads * size.head_dim
        title = f"{size.blocks} blocks of width {width}, {side} x {side}, batch 1, rank {rank}"
        values = {"table": table, "peak GB": peaks}
        show(report.add(title, values, stage_table(table), memory(peaks)))
        if device.type == "cuda":
            verdicts = targets_of(table, peaks)
        del trainee
        gc.collect()
    show(report.add("Targets", target_values(verdicts), target_table(verdicts)))
    skipped = "\n".join(f"- {what}" for what in budget.skipped) or "nothing"
    show(report.add("Skipped", budget.skipped, skipped))
    return report


def targets_of(
    table: Mapping[str, Mapping[str, Spread]], peaks: Mapping[str, float]
) -> list[Target]:
    """Of the trainer's own choice, in one and the same setting: seconds and GB."""
    name = CHOICES[0].name
    seconds = table[name]["iteration"].median if name in table else None
    return training_targets(seconds, peaks.get(name))


def memory(peaks: Mapping[str, float]) -> str:
    """Peaks of every choice, or that of the process where there is no GPU to ask."""
    if peaks:
        return "Peak: " + ", ".join(f"{name} {peak:.1f} GB" for name, peak in peaks.items())
    unit = 1 if sys.platform == "darwin" else 1024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB
    return f"Peak of the process so far: {whole:.1f} GB (per choice only on a GPU)"


def show(text: str) -> None:
    sys.stdout.write(text + "\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
