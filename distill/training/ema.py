"""The exponential moving average (EMA) of a list of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class EMA:
    """Averages beside their weights; `decay` 0 keeps none."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters if decay else [], decay
        self.weights = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After the `updates`-th update. A short memory at first, so that the starting weights do
        not linger.
        """
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for average, parameter in zip(self.weights, self.parameters, strict=True):
            average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges weights and averages; calling it twice changes nothing."""
        for average, parameter in zip(self.weights, self.parameters, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    @torch.no_grad()
    def adopt(self) -> None:
        """Makes the averages the weights."""
        for average, parameter in zip(self.weights, self.parameters, strict=True):
            parameter.copy_(average)

    @torch.no_grad()
    def load(self, saved: Sequence[torch.Tensor]) -> None:
        """Without any saved the average begins at the weights as they are; one that is no longer
        kept is left alone.
        """
        if not self.weights or not saved:
            return
        for average, tensor in zip(self.weights, saved, strict=True):
            average.copy_(tensor)
