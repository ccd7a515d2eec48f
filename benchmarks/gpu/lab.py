"""What sections share: the device, ComfyUI, and one set of models at a time."""

from __future__ import annotations

import gc
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.speed.arms import Job
from benchmarks.speed.core import Core, start
from benchmarks.speed.measure import GB, HIGH_WATER, Budget
from benchmarks.speed.world import FULL, SMALL, Size

from . import pictures
from .pictures import Cast


class Lab:
    """shards: of T2, or None. fp8_attention: the benchmark's own kernel, if it is the fastest."""

    def __init__(
        self, small: bool, rounds: int, budget: Budget, folder: Path, shards: Path | None = None
    ) -> None:
        self.small, self.rounds, self.budget, self.folder = small, rounds, budget, folder
        self.shards, self.fp8_attention = shards, ""
        self.device = torch.device("cpu" if small else "cuda")
        self.size: Size = SMALL if small else FULL
        self._cast: tuple[str, Cast] | None = None
        self._reference: torch.Tensor | None = None

    @cached_property
    def core(self) -> Core:
        return start(self.folder, cpu=self.small)

    @property
    def trial(self) -> Job:
        """A picture that says whether an arm runs, and how far its latents are off."""
        side = 64 if self.small else 1024
        return Job("a trial", side, side)

    def jobs(self, *sides: int, count: int = 1) -> list[Job]:
        if self.small:
            return [Job("", 64, 64, 2)]
        return [Job("", side, side, count) for side in sides]

    def cast(self, name: str) -> Cast:
        """Arms of "bf16", "8 bits" or "beside"; the others leave the memory first."""
        if self._cast is None or self._cast[0] != name:
            self.free()
            self._cast = name, self._new_cast(name)
        return self._cast[1]

    def _new_cast(self, name: str) -> Cast:
        if name == "bf16":
            return pictures.bf16_cast(self.core, self.size)
        if name == "beside":
            return pictures.beside_cast(self.core, self.size, self.trial, self.budget)
        return pictures.eight_bit_cast(
            self.core, self.size, self.trial, self.budget, self.fp8_attention
        )

    def reference(self) -> torch.Tensor:
        """Core's latents of the trial, in bf16."""
        if self._reference is None:
            found = pictures.latents(self.cast("bf16"), self.trial)
            self._reference = found[pictures.CORE]
        return self._reference

    def free(self) -> None:
        """Drops all models at once: core's own unloading would copy them to main memory first."""
        self._cast = None
        if "core" in self.__dict__:
            import comfy.model_management as management

            for loaded in management.current_loaded_models:
                if loaded.model_finalizer is not None:
                    loaded.model_finalizer.detach()
            management.current_loaded_models.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_gb(self) -> float | None:
        """Since HIGH_WATER was told to forget; None without a GPU to ask."""
        return HIGH_WATER.so_far(self.device) / GB if self.device.type == "cuda" else None
