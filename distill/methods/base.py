"""What every method is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ..data.batch import Batch
from ..models.roles import STUDENT
from ..training.optim import Optimizer
from ..utils.rng import Rng

LoadVAE = Callable[[], nn.Module]


class Part(NamedTuple):
    """A micro-batch of a step, and the random numbers of its samples."""

    batch: Batch
    rng: Rng


def parts_of(batch: Batch, rng: Rng, count: int) -> list[Part]:
    """A step's batch as `count` micro-batches, which see together what one of all would see."""
    return [Part(*part) for part in zip(batch.split(count), rng.split(count), strict=True)]


def turn(parts: int, count: int | None, number: int) -> range:
    """Which `count` of `parts` micro-batches (None: all) the `number`-th update of a role takes:
    every n-th, others the next time. However many ranks share a step, they are the same.
    """
    stride = parts // (count or parts)
    return range(number % stride, parts, stride)


def mean_values(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """What to log of a step, from what there is to log of its micro-batches."""
    return {key: sum(v[key] for v in values) / len(values) for key in values[0]}


class Method(ABC):
    """One stage's training. Owns its optimisers and changes weights only in `step`."""

    optimizers: dict[str, Optimizer]

    @abstractmethod
    def step(self, batch: Batch, rng: Rng) -> dict[str, float]:
        """One update of the student from one batch, a stage's `samples`; returns what to log."""

    @contextmanager
    def use_ema(self) -> Iterator[None]:
        """The student with the moving average as its weights."""
        self.optimizers[STUDENT].ema.swap()
        try:
            yield
        finally:
            self.optimizers[STUDENT].ema.swap()

    def adopt_ema(self) -> None:
        """Ends the stage: the moving average becomes the student."""
        self.optimizers[STUDENT].ema.adopt()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, besides the adapters and the random numbers."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
