"""Speed of the trainer's DMD2 step on the CPU, each choice against the trainer's own, in turns.

    python -m benchmarks.speed.train --out docs/evidence     under 8 minutes on one core

A model of the tiny one's size in float32, and two blocks of Qwen-Image's own width in bf16, whose
operations are counted by precision. Prompts are random embeddings, as a cache hands them over. A
step is one update of the fake score and one of the student (1:1). The full model: benchmarks.gpu,
which has choices of its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from diffusers import QwenImageTransformer2DModel
from peft.tuners import lora
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.config import AdapterSection, GuidanceSection
from distill.contract.spec import TurboSpec
from distill.data.batch import Batch
from distill.methods.dmd2 import DMD2
from distill.models import flow, qwen_image
from distill.models.mixed_precision import LoraLinear, tf32
from distill.models.quantise import HostModule, keep_modulation_on_host
from distill.models.roles import FAKE, STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.stages import DMD2Stage
from distill.training.adam import AdamW
from distill.training.engine import Engine
from distill.training.environment import describe_machine
from distill.utils.rng import Rng

from .core import fill_randomly
from .flops import FlopsByDtype
from .measure import GB, Budget, Clock, in_turns
from .report import Report, stage_table, value_table
from .world import SMALL, TINY, Size

PROCESSOR = "of a processor"  # what other programs do does not count

STAGE = {"method": "dmd2", "steps": 1, "fake_updates": 1, "fake_warmup": 0, "gradient_step": "last"}


@dataclass(frozen=True)
class Choice:
    """One way to run a step; the defaults are the trainer's."""

    name: str = "as the trainer does it"
    pair: bool = True  # teacher with and without the prompt in one batch
    checkpointing: bool = True
    fused: bool = False  # torch's fused AdamW
    optimizer: str = "adamw"
    peft: bool = False  # products of the LoRAs as PEFT makes them, in float32
    tf32: bool = True  # on a GPU, of float32 products
    cudnn: bool = False  # its attention first, where torch would take flash or a kernel for masks
    samples: int = 1  # of a step
    accumulate: int = 1  # micro-batches that they come in
    host: bool = False  # modulation in main memory


CHOICES = (
    Choice(),
    Choice("teacher in two calls", pair=False),
    Choice("no checkpointing", checkpointing=False),
    Choice("fused AdamW", fused=True),
)
BF16_CHOICES = (
    Choice(),
    Choice("PEFT's products in float32", peft=True),
    Choice("no checkpointing", checkpointing=False),
    Choice("AdamW in 8 bits", optimizer="adamw8bit"),
    Choice("modulation in main memory", host=True),
    Choice("a batch of 2", samples=2),
    Choice("2 micro-batches", samples=2, accumulate=2),
)
# what may matter on a GPU alone; the first is the same
GPU_CHOICES = (
    Choice(),
    Choice("PEFT's products in float32", peft=True, tf32=False),
    Choice("PEFT's products in TF32", peft=True),
    Choice("cuDNN's attention", cudnn=True),
    Choice("teacher in two calls", pair=False),
    Choice("cuDNN, two calls, fused AdamW", pair=False, fused=True, cudnn=True),
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

    def __init__(
        self,
        size: Size,
        side: int,
        device: torch.device,
        rank: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """dtype: of the base; None is bf16, on a CPU float32."""
        self.device, self.size, self.side = device, size, side
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
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
        self.two_calls = copy.copy(self.roles)  # the same weights and switches
        self.two_calls.__class__ = TwoCalls
        self.hosts: dict[str, HostModule] = {}
        self.steps = 0
        self.methods: dict[Choice, DMD2] = {}  # with optimisers of their own

    def adopt(self, choice: Choice) -> DMD2:
        """Prepares steps of `choice`, and frees what other choices hold."""
        self.methods.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.method(choice)

    def method(self, choice: Choice) -> DMD2:
        if choice not in self.methods:
            self.methods[choice] = self._method(choice)
        return self.methods[choice]

    def _method(self, choice: Choice) -> DMD2:
        batch = choice.samples // choice.accumulate
        keys = {"optimizer": choice.optimizer, "batch": batch, "accumulate": choice.accumulate}
        stage = DMD2Stage.model_validate(STAGE | keys)
        roles = self.roles if choice.pair else self.two_calls
        method = DMD2(stage, roles, TurboSpec((1.0, 0.75, 0.0)), Engine(0, 1, self.device))
        for optimizer in method.optimizers.values() if choice.fused else ():
            kept = {key: optimizer.adam.defaults[key] for key in ("lr", "betas", "weight_decay")}
            optimizer.adam = AdamW(optimizer.parameters, fused=True, **kept)
        return method

    def step(self, choice: Choice, clock: Clock) -> dict[str, float]:
        """One update of the fake score and of the student; what the trainer would log."""
        method = self.method(choice)
        if choice.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()
        self._place_modulation(choice.host)
        rng = Rng(0, self.steps)
        batch = self._batch(rng, choice.samples)
        self.steps += 1
        before = time.process_time()
        with clock("iteration"), settings(choice, self.device):
            values = method.step(batch, rng)
        clock.seconds[PROCESSOR] += time.process_time() - before
        return values

    def _place_modulation(self, host: bool) -> None:
        if host and not self.hosts:
            keep_modulation_on_host(self.roles.family, self.transformer)
            modules = self.transformer.named_modules()
            self.hosts = {name: m for name, m in modules if isinstance(m, HostModule)}
        for name, module in self.hosts.items():
            self.transformer.set_submodule(name, module if host else module.module)

    def _batch(self, rng: Rng, samples: int) -> Batch:
        latents = rng.normal("x0", (samples, 16, self.side // 8, self.side // 8))
        text = Text(rng.normal("text", (samples, 77, self.size.text_width)))
        return Batch(latents, text).to(self.device, self.dtype)


@contextmanager
def settings(choice: Choice, device: torch.device) -> Iterator[None]:
    """Switches of the whole process, as `choice` has them."""
    first = [SDPBackend.CUDNN_ATTENTION] if choice.cudnn else []
    order = [*first, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with (
        tf32(choice.tf32 and device.type == "cuda"),
        mock.patch.object(LoraLinear, "forward", lora.Linear.forward)
        if choice.peft
        else nullcontext(),
        sdpa_kernel(order, set_priority=True) if choice.cudnn else nullcontext(),
    ):
        yield


def counts(trainee: Trainee, choice: Choice) -> dict[str, float]:
    """Of one step: operations by precision, and how often a block's modulation is computed."""
    if choice.host:
        trainee.step(choice, Clock(trainee.device))  # the schedule's own times
    computed: list[Any] = []
    block = trainee.roles.family.blocks_of(trainee.transformer)[0]
    layers = [m for n, m in block.named_modules() if n.endswith(("img_mod.1", "img_mod.module.1"))]
    hook = layers[0].register_forward_hook(lambda *args: computed.append(None))
    with FlopsByDtype() as counted:
        trainee.step(choice, Clock(trainee.device))
    hook.remove()
    flops = {
        f"GFLOP in {str(dtype).removeprefix('torch.')}": counted.flops[dtype] / 1e9
        for dtype in (torch.bfloat16, torch.float32)
    }
    return {**flops, "modulation computed, times": len(computed)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for speed_train_cpu.json and .md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8, help="time limit")
    parser.add_argument("--small", action="store_true", help="toy size, to test this script")
    chosen = parser.parse_args(arguments)
    run(chosen.small, chosen.rounds, Budget(60 * chosen.minutes), chosen.out)


class Bench(NamedTuple):
    size: Size
    side: int  # pixels
    rank: int
    dtype: torch.dtype
    choices: tuple[Choice, ...]


def plan(small: bool) -> list[Bench]:
    """What is measured."""
    if small:
        return [
            Bench(SMALL, 32, 4, torch.float32, CHOICES),
            Bench(SMALL, 32, 4, torch.bfloat16, BF16_CHOICES),
        ]
    return [
        Bench(TINY, 64, 16, torch.float32, CHOICES),
        Bench(Size(blocks=2), 64, 64, torch.bfloat16, BF16_CHOICES),
    ]


def run(small: bool, rounds: int, budget: Budget, out: Path | None) -> Report:
    device = torch.device("cpu")
    machine = describe_machine(1, device) | {"load": f"{os.getloadavg()[0]:.1f}"}
    report = Report("Speed of the DMD2 step, cpu mode", machine, out, "speed_train_cpu")
    show(report.text[0] + "\n\n" + report.text[1])
    for size, side, rank, dtype, choices in plan(small):
        trainee = Trainee(size, side, device, rank, dtype)
        width, name = size.heads * size.head_dim, str(dtype).removeprefix("torch.")
        blocks = f"{size.blocks} blocks of width {width} in {name}"
        title = f"{blocks}, {side} x {side}, batch 1, rank {rank}"
        values: dict[str, Any] = {}
        parts = []
        if dtype == torch.bfloat16:
            counted = [c for c in choices if c == Choice() or c.peft or c.host]
            values["counts"] = {choice.name: counts(trainee, choice) for choice in counted}
            header = ["one step", *next(iter(values["counts"].values()))]
            parts.append(value_table(header, values["counts"]))
        runs = {choice.name: partial(trainee.step, choice) for choice in choices}
        values["table"] = in_turns(runs, device, rounds, budget, total=False)
        show(report.add(title, values, *parts, stage_table(values["table"]), memory()))
        del trainee, runs
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
