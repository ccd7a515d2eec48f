"""How much a discriminator's word counts beside the main loss."""

from __future__ import annotations

import math
from typing import Any

from ..training.engine import Engine

DECAY = 0.98  # of the averages: about the last 50 updates


class Average:
    """Exponential moving average without a bias towards its start; empty it is 0."""

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0

    def add(self, value: float) -> None:
        self.total = DECAY * self.total + (1 - DECAY) * value
        self.weight = DECAY * self.weight + (1 - DECAY)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0


class Balance:
    """The weight that makes |weight * adversarial| = ratio |main|; on request that times what the
    discriminator tells apart, so that one that guesses has no say.

    Both norms, of gradients at the same points, are averaged over updates: one batch's are noise.
    So is `edge`, 2 accuracy - 1, before what is below 0 is cut off: a coin's average is 0, while
    its positive parts' is not. All three are means over the ranks; what is not finite is left out.
    Until its gradient was seen once, it has no say.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.averages = {"main": Average(), "adversarial": Average(), "edge": Average()}

    def _add(self, values: dict[str, float]) -> None:
        if all(math.isfinite(value) for value in values.values()):
            for name, value in values.items():
                self.averages[name].add(value)

    def squares(self, main: float, adversarial: float) -> float:
        """Takes this rank's squared norms of the gradients; returns |adversarial| / |main|."""
        means = self.engine.mean({"main": main, "adversarial": adversarial})
        norms = {name: math.sqrt(value) for name, value in means.items()}
        self._add(norms)
        return norms["adversarial"] / norms["main"] if norms["main"] else 0.0

    def accuracy(self, value: float) -> None:
        """Takes that of this rank's samples, the discriminator's two sides counting alike."""
        self._add(self.engine.mean({"edge": 2 * value - 1}))

    @property
    def edge(self) -> float:
        return max(0.0, self.averages["edge"].value)

    def weight(self, ratio: float, by_accuracy: bool) -> float:
        main, adversarial = (self.averages[name].value for name in ("main", "adversarial"))
        if not adversarial:
            return 0.0
        return (self.edge if by_accuracy else 1.0) * ratio * main / adversarial

    def state_dict(self) -> dict[str, Any]:
        return {name: [a.total, a.weight] for name, a in self.averages.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, (total, weight) in state.items():
            average = self.averages[name]
            average.total, average.weight = total, weight
