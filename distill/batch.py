"""What a training step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .draws import Draws
from .models import Text


@dataclass(frozen=True)
class Batch:
    x0: torch.Tensor  # [B, C, h, w] latents of real images, normalised
    text: Text  # B prompts

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        return Batch(self.x0.to(device, dtype), self.text.to(device, dtype))


class Data(Protocol):
    """A source of batches that is a function of the draws alone."""

    @property
    def negative(self) -> Text:
        """The unconditional prompt, one row."""
        ...

    def batch(self, draws: Draws, rows: int) -> Batch: ...
