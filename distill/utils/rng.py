"""Randomness as a function of (seed, step, stream, sample): a run repeats, resumes and changes its
number of ranks without changing what is drawn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rng:
    """The random numbers of one training step.

    Every rank draws the numbers of the whole batch and keeps its own rows; two ranks with B samples
    each therefore see what one rank sees with 2 B.
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1

    def generator(self, stream: str) -> torch.Generator:
        key = f"{self.seed}/{self.step}/{stream}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        return torch.Generator().manual_seed(seed)

    def _mine(self, whole: torch.Tensor, batch_size: int) -> torch.Tensor:
        return whole[self.rank * batch_size : (self.rank + 1) * batch_size]

    def normal(self, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers of `shape`, the first axis being this rank's samples."""
        whole = torch.randn(
            shape[0] * self.world_size, *shape[1:], generator=self.generator(stream)
        )
        return self._mine(whole, shape[0])

    def uniform(self, stream: str, batch_size: int) -> torch.Tensor:
        """Numbers in [0, 1), one per sample of this rank."""
        return self._mine(
            torch.rand(batch_size * self.world_size, generator=self.generator(stream)), batch_size
        )

    def integers(self, stream: str, batch_size: int, high: int) -> torch.Tensor:
        """Integers in [0, high), one per sample of this rank."""
        whole = torch.randint(
            high, (batch_size * self.world_size,), generator=self.generator(stream)
        )
        return self._mine(whole, batch_size)
