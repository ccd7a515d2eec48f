"""Randomness as a function of (seed, step, stream, sample): a run repeats, resumes and changes its
number of ranks without changing what is drawn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step.

    Every rank draws the numbers of the whole batch and keeps its own rows; two ranks with B samples
    each therefore see what one rank sees with 2 B.
    """

    seed: int
    step: int
    rank: int = 0
    world: int = 1

    def generator(self, stream: str) -> torch.Generator:
        key = f"{self.seed}/{self.step}/{stream}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        return torch.Generator().manual_seed(seed)

    def _rows(self, whole: torch.Tensor, rows: int) -> torch.Tensor:
        return whole[self.rank * rows : (self.rank + 1) * rows]

    def normal(self, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers of `shape`, the first axis being this rank's samples."""
        whole = torch.randn(shape[0] * self.world, *shape[1:], generator=self.generator(stream))
        return self._rows(whole, shape[0])

    def uniform(self, stream: str, rows: int) -> torch.Tensor:
        """Numbers in [0, 1), one per sample of this rank."""
        return self._rows(torch.rand(rows * self.world, generator=self.generator(stream)), rows)

    def integers(self, stream: str, rows: int, high: int) -> torch.Tensor:
        """Integers in [0, high), one per sample of this rank."""
        whole = torch.randint(high, (rows * self.world,), generator=self.generator(stream))
        return self._rows(whole, rows)
