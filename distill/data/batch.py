"""What a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..models.text import Text
from ..utils.rng import Rng

HELD_SHARE = 10  # of so many prompts, or images, at most one is held out of training


@dataclass(frozen=True)
class Batch:
    x0: torch.Tensor  # [B, C, h, w] latents of real images, normalised, float32
    text: Text  # B prompts
    teacher_x0: torch.Tensor | None = None  # [B, C, h, w] latents of the teacher's own images

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """dtype: of the prompts alone; latents keep theirs, for noise is added in float32."""
        teacher_x0 = None if self.teacher_x0 is None else self.teacher_x0.to(device)
        return Batch(self.x0.to(device), self.text.to(device, dtype), teacher_x0)

    def split(self, parts: int) -> list[Batch]:
        """Equal micro-batches, in order. Raises ValueError where the samples do not divide."""
        if parts == 1:
            return [self]
        if len(self.x0) % parts:
            raise ValueError(
                f"accumulate: expected a multiple of {parts} samples, found {len(self.x0)}; a step "
                "takes batch x accumulate of them"
            )
        rows = len(self.x0) // parts
        teacher_x0 = (
            [None] * parts if self.teacher_x0 is None else list(self.teacher_x0.split(rows))
        )
        return [
            Batch(*part)
            for part in zip(self.x0.split(rows), self.text.split(rows), teacher_x0, strict=True)
        ]


@dataclass(frozen=True)
class Examples:
    """Prompts to look at, all images of one size."""

    prompts: tuple[str, ...]
    texts: tuple[Text, ...]  # one row each, unpadded
    size: tuple[int, int]  # width, height in pixels


class Data(Protocol):
    """A source of batches that is a function of its random numbers alone."""

    @property
    def negative(self) -> Text:
        """The unconditional prompt, one row."""
        ...

    def batch(self, rng: Rng, batch_size: int) -> Batch: ...

    def examples(self, count: int) -> Examples:
        """The first `count` prompts, or all where there are fewer."""
        ...


@runtime_checkable
class Divisible(Data, Protocol):
    """Data of which some prompts can be held out of training, to be looked at."""

    def to_hold_out(self, count: int) -> list[str]:
        """`count` prompts, a function of the data's content; none where they would be missed: more
        than one in HELD_SHARE.
        """
        ...

    def without(self, prompts: Sequence[str]) -> Data | None:
        """Less these prompts and their images; None where too little would be left."""
        ...

    def examples_of(self, prompts: Sequence[str]) -> Examples | None:
        """These prompts; None where it does not know one of them."""
        ...
