"""What every method is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..data.batch import Batch
from ..models.roles import STUDENT
from ..training.optim import Optimizer
from ..utils.rng import Rng

LoadVAE = Callable[[], nn.Module]


class Method(ABC):
    """One stage's training. Owns its optimisers and changes weights only in `step`."""

    optimizers: dict[str, Optimizer]

    @abstractmethod
    def step(self, batch: Batch, rng: Rng) -> dict[str, float]:
        """One update from one batch; returns what to log."""

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
