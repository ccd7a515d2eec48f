"""Speed of the trainer's DMD2 step on the CPU, each choice against the trainer's own, in turns.

    python -m benchmarks.speed.train --out docs/evidence     under 4 minutes on one core

A model of the tiny one's size and two blocks of Qwen-Image's own width, at 64 x 64 pixels. Prompts
are random embeddings, as a cache hands them over. A step is one update of the fake score and one of
the student (1:1). The full model: benchmarks.gpu, which has choices of its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from .measure import GB, Budget, Clock, in_turns
from .report import Report, stage_table
from .world import SMALL, TINY, Size

STAGE = {"method": "dmd2", "steps": 1, "fake_updates": 1, "fake_warmup": 0, "gradient_step": "last"}


@dataclass(frozen=True)
class Choice:
    """One way to run a step; the defaults are the trainer's."""

    name: str = "as the trainer does it"
    pair: bool = True  # teacher with and without the prompt in one batch
    checkpointing: bool = True
    fused: bool = False  # torch's fused AdamW
    adapters: torch.dtype = torch.float32  # weights of the LoRAs, their products, their optimiser
    products: str = "highest"  # of float32 products: "high" lets them run in TF32
    cudnn: bool = False  # its attention first, where torch would take flash or a kernel for masks


CHOICES = (
    Choice(),
    Choice("teacher in two calls", pair=False),
    Choice("no checkpointing", checkpointing=False),
    Choice("fused AdamW", fused=True),
)
# what may matter on a GPU alone; the first is the same
GPU_CHOICES = (
    Choice(),
    Choice("adapters in bf16", adapters=torch.bfloat16),
    Choice("adapters' products in TF32", products="high"),
    Choice("cuDNN's attention", cudnn=True),
    Choice("teacher in two calls", pair=False),
    Choice(
        "bf16, cuDNN, two calls, fused AdamW",
        pair=False,
        fused=True,
        adapters=torch.bfloat16,
        cudnn=True,
    ),
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

    def adopt(self, choice: Choice) -> None:
        """Prepares steps of `choice`; optimisers begin anew, as one of another dtype must."""
        for adam in (adam for adams in self.adams.values() for adam in adams.values()):
            adam.state.clear()
        for optimizer in self.method.optimizers.values():
            for parameter in optimizer.parameters:
                parameter.data, parameter.grad = parameter.data.to(choice.adapters), None
            ema = optimizer.ema
            ema.weights = [tensor.to(choice.adapters) for tensor in ema.weights]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
        with clock("iteration"), settings(choice):
            self.method.step(batch, rng)

    def _batch(self, rng: Rng) -> Batch:
        latents = rng.normal("x0", (1, 16, self.side // 8, self.side // 8))
        text = Text(rng.normal("text", (1, 77, self.size.text_width)))
        return Batch(latents, text).to(self.device, self.dtype)


@contextmanager
def settings(choice: Choice) -> Iterator[None]:
    """Torch's own switches, of the whole process, as `choice` has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(choice.products)
    first = [SDPBackend.CUDNN_ATTENTION] if choice.cudnn else []
    order = [*first, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    try:
        with sdpa_kernel(order, set_priority=True) if choice.cudnn else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for speed_train_cpu.json and .md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4, help="time limit")
    parser.add_argument("--small", action="store_true", help="toy size, to test this script")
    chosen = parser.parse_args(arguments)
    run(chosen.small, chosen.rounds, Budget(60 * chosen.minutes), chosen.out)


def plan(small: bool) -> list[tuple[Size, int, int]]:
    """(size, pixels, LoRA rank) of what is measured."""
    return [(SMALL, 32, 4)] if small else [(TINY, 64, 16), (Size(blocks=2), 64, 16)]


def run(small: bool, rounds: int, budget: Budget, out: Path | None) -> Report:
    device = torch.device("cpu")
    machine = describe_machine(1, device)
    report = Report("Speed of the DMD2 step, cpu mode", machine, out, "speed_train_cpu")
    show(report.text[0] + "\n\n" + report.text[1])
    for size, side, rank in plan(small):
        trainee = Trainee(size, side, device, rank)
        runs = {choice.name: partial(trainee.step, choice) for choice in CHOICES}
        table = in_turns(runs, device, rounds, budget, total=False)
        width = size.heads * size.head_dim
        title = f"{size.blocks} blocks of width {width}, {side} x {side}, batch 1, rank {rank}"
        show(report.add(title, {"table": table}, stage_table(table), memory()))
        del trainee
        gc.collect()
    skipped = "\n".join(f"- {what}" for what in budget.skipped) or "nothing"
    show(report.add("Skipped", budget.skipped, skipped))
    return report


def memory() -> str:
    """Peak of the process, all choices in it."""
    unit = 1 if sys.platform == "darwin" else 1024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB
    return f"Peak of the process so far: {whole:.1f} GB"


def show(text: str) -> None:
    sys.stdout.write(text + "\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
