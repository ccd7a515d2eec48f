"""Randomness as a function of (seed, step, stream, sample): a run repeats, resumes and changes its
number of ranks or micro-batches without changing what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

KEPT = 16  # streams that the parts of one step share: what a part asks for, the next one will too


@dataclass(frozen=True)
class Rng:
    """The random numbers of one training step.

    Every rank draws the numbers of the whole batch and keeps its own rows; two ranks with B samples
    each therefore see what one rank sees with 2 B, and so do the two parts of `split(2)`.
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1
    part: int = 0  # of `parts` equal ones of this rank's samples
    parts: int = 1
    _drawn: dict[tuple[object, ...], torch.Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    def split(self, parts: int) -> list[Rng]:
        """One for each of `parts` equal micro-batches of this rank's samples, in their order."""
        if parts == 1:
            return [self]
        drawn: dict[tuple[object, ...], torch.Tensor] = {}
        return [replace(self, part=i, parts=parts, _drawn=drawn) for i in range(parts)]

    def generator(self, stream: str) -> torch.Generator:
        key = f"{self.seed}/{self.step}/{stream}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        return torch.Generator().manual_seed(seed)

    def _mine(
        self,
        kind: tuple[object, ...],
        stream: str,
        batch_size: int,
        draw: Callable[[int, torch.Generator], torch.Tensor],
    ) -> torch.Tensor:
        """This part's rows of what `draw` makes for all parts of all ranks."""
        rows = batch_size * self.parts
        key = (stream, batch_size, *kind)
        if key not in self._drawn:
            whole = draw(rows * self.world_size, self.generator(stream))
            mine = whole[self.rank * rows : (self.rank + 1) * rows]
            if self.parts == 1:
                return mine
            if len(self._drawn) == KEPT:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[key] = mine.clone()  # not the rows of the other ranks
        return self._drawn[key][self.part * batch_size : (self.part + 1) * batch_size]

    def normal(self, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers of `shape`, the first axis being this rank's samples."""
        size = shape[1:]
        return self._mine(
            ("normal", size), stream, shape[0], lambda n, g: torch.randn(n, *size, generator=g)
        )

    def uniform(self, stream: str, batch_size: int) -> torch.Tensor:
        """Numbers in [0, 1), one per sample of this rank."""
        return self._mine(("uniform",), stream, batch_size, lambda n, g: torch.rand(n, generator=g))

    def integers(self, stream: str, batch_size: int, high: int) -> torch.Tensor:
        """Integers in [0, high), one per sample of this rank."""
        return self._mine(
            ("integers", high),
            stream,
            batch_size,
            lambda n, g: torch.randint(high, (n,), generator=g),
        )
