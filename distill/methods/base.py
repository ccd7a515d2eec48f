"""What every method is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from ..batch import Batch
from ..draws import Draws
from ..optim import AdapterOptimizer
from ..roles import STUDENT


class Method(ABC):
    """One stage's training. Owns its optimisers and changes weights only in `step`."""

    optimizers: dict[str, AdapterOptimizer]

    @abstractmethod
    def step(self, batch: Batch, draws: Draws) -> dict[str, float]:
        """One update from one batch; returns what to log."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with the moving average as its weights."""
        self.optimizers[STUDENT].swap_average()
        try:
            yield
        finally:
            self.optimizers[STUDENT].swap_average()

    def adopt_average(self) -> None:
        """Ends the stage: the moving average becomes the student."""
        self.optimizers[STUDENT].adopt_average()
