"""The images that are measured: LoRA and teacher, and the LoRA on other forms of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import GuidanceSection, Quantize
from ..contract.lora_keys import NormalisedLora
from ..contract.spec import TurboSpec
from ..models.pipeline import Base, Pipeline, scaled
from ..models.sizes import Size
from ..utils.progress import progress
from .base_variants import cast_to_fp8, merge_into_fp8

LORA, TEACHER = "lora", "teacher"

Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Job:
    """One image per prompt, from seed, seed + 1, ...; the same for every arm."""

    lora: NormalisedLora
    spec: TurboSpec
    base: Base
    size: Size
    texts: dict[str, Tensor]  # embeddings
    prompts: list[str]
    seed: int
    teacher_steps: int
    guidance: GuidanceSection
    batch: int
    device: torch.device
    quantize: Quantize = "none"

    def pair(self) -> dict[str, Tensor]:
        """Images of the LoRA and of its teacher.  # [N, 3, H, W] uint8 each"""
        pipeline = self._pipeline(quantize=self.quantize)
        arms: dict[str, Draw] = {
            LORA: lambda p, s: pipeline.student(LORA, self.spec, p, s, self.size),
            TEACHER: lambda p, s: pipeline.teacher(self.teacher_steps, p, s, self.size),
        }
        return {arm: self._all(draw, arm) for arm, draw in arms.items()}

    def on(self, kind: str) -> Tensor:
        """Images of the LoRA on a base of `base_variants.BASES`.  # [N, 3, H, W] uint8"""
        if kind == "fp8_naive":
            pipeline = self._pipeline(merged=True)
        else:
            pipeline = self._pipeline(quantize="fp8")
        name = None if kind == "fp8_naive" else LORA
        spec = self.spec
        return self._all(lambda p, s: pipeline.student(name, spec, p, s, self.size), kind)

    def _pipeline(self, *, quantize: Quantize = "none", merged: bool = False) -> Pipeline:
        lora = scaled(self.lora, self.spec.only_strength("this command"))

        def merge(model: nn.Module) -> None:
            cast_to_fp8(model)
            merge_into_fp8(model, lora)

        return Pipeline(
            self.base,
            {} if merged else {LORA: lora},
            self.guidance,
            self.texts,
            self.device,
            quantize=quantize,
            prepare=merge if merged else None,
        )

    def _all(self, draw: Draw, label: str) -> Tensor:
        images = []
        with progress(total=len(self.prompts), what=label, unit="image") as bar:
            for start in range(0, len(self.prompts), self.batch):
                prompts = self.prompts[start : start + self.batch]
                seeds = range(self.seed + start, self.seed + start + len(prompts))
                images.append(draw(prompts, seeds))
                bar.update(len(prompts))
        return torch.cat(images)
