"""Randomness as a function of (seed, step, stream, sample): a run repeats, resumes and changes its
number of ranks or micro-batches without changing what is drawn.

Every sample has numbers of its own, at a place in the sequence of a counter-based generator
(Philox; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") whose key is the hash of
seed, step and stream. So a rank draws its rows and no others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Rng:
    """The random numbers of one training step.

    Two ranks with B samples each see what one rank sees with 2 B, and so do the two parts of
    `split(2)`.
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1
    part: int = 0  # of `parts` equal ones of this rank's samples
    parts: int = 1

    def split(self, parts: int) -> list[Rng]:
        """One for each of `parts` equal micro-batches of this rank's samples, in their order."""
        return [self] if parts == 1 else [replace(self, part=i, parts=parts) for i in range(parts)]

    def generator(self, stream: str) -> torch.Generator:
        """For what all samples of a step have in common."""
        seed = int.from_bytes(self._digest(stream, 8), "big") >> 1
        return torch.Generator().manual_seed(seed)

    def _digest(self, stream: str, size: int) -> bytes:
        key = f"{self.seed}/{self.step}/{stream}".encode()
        return hashlib.blake2b(key, digest_size=size).digest()

    def _first(self, batch_size: int) -> int:
        """The number of this part's first sample among those of all ranks."""
        return (self.rank * self.parts + self.part) * batch_size

    def _philox(self, stream: str, low: int, high: int) -> np.random.Philox:
        """At a place of the stream; places of another `high` are never reached from there."""
        key = np.frombuffer(self._digest(stream, 16), np.uint64)
        return np.random.Philox(counter=[low, 0, 0, high], key=key)

    def normal(self, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers of `shape`, the first axis being this rank's samples."""
        numbers = np.empty(shape, np.float32)
        for sample, row in enumerate(numbers.reshape(shape[0], -1), self._first(shape[0]) + 1):
            generator = np.random.Generator(self._philox(stream, 0, sample))
            generator.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(numbers)

    def _bits(self, stream: str, batch_size: int) -> np.ndarray:
        """64 random bits per sample, of which a counter yields four times as many."""
        return self._philox(stream, self._first(batch_size), 0).random_raw(4 * batch_size)[::4]

    def uniform(self, stream: str, batch_size: int) -> torch.Tensor:
        """Numbers in [0, 1), one per sample of this rank."""
        whole = self._bits(stream, batch_size) >> np.uint64(40)  # what float32 tells apart
        return torch.from_numpy(whole.astype(np.float32) * np.float32(2**-24))

    def integers(self, stream: str, batch_size: int, high: int) -> torch.Tensor:
        """Integers in [0, high), one per sample of this rank; high < 2**31."""
        half = self._bits(stream, batch_size) >> np.uint64(33)
        return torch.from_numpy(((half * np.uint64(high)) >> np.uint64(31)).astype(np.int64))
