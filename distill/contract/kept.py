"""What storing a merged weight leaves of an update: in 16 bits most of it, in 8 often little."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ENOUGH = 0.99  # of an update has to survive a merge, and what rounding adds at random has to stay
NOISE_OF_UPDATE = 0.5  # below this part of the update
NOISE_OF_WEIGHTS = 0.01  # and this part of the weights; bf16 adds 0.002, 8 bits 0.01 to 0.05


@dataclass
class Kept:
    """How much of an update D is in the change C = stored(W + D) - stored(W), over some layers.

    share: <C, D> / <D, D>, 1 where all of it is, 0 where it was rounded away. noise: |C - share D|,
    what rounding adds at random. Stochastic rounding keeps a share of 1 on average, and may bury it
    in noise of several times its size.
    """

    layers: int = 0
    products: float = 0.0  # <C, D>
    errors: float = 0.0  # <C - D, C - D>
    updates: float = 0.0  # <D, D>
    weights: float = 0.0  # <W, W>

    def add(self, before: Tensor, after: Tensor, update: Tensor) -> None:
        """One layer: its numbers without and with the update, as stored; float32, of one shape."""
        change = after - before
        self.layers += 1
        error = change - update
        self.products += _dot(change, update)
        self.errors += _dot(error, error)
        self.updates += _dot(update, update)
        self.weights += _dot(before, before)

    @property
    def share(self) -> float:
        """1 where there was nothing to keep."""
        return self.products / self.updates if self.updates else 1.0

    @property
    def noise_of_update(self) -> float:
        """|C - share D| / |D|."""
        return math.sqrt(self._noise / self.updates) if self.updates else 0.0

    @property
    def noise_of_weights(self) -> float:
        """|C - share D| / |W|."""
        return math.sqrt(self._noise / self.weights) if self.weights else 0.0

    @property
    def _noise(self) -> float:
        return max(self.errors - (1 - self.share) ** 2 * self.updates, 0.0)

    @property
    def survives(self) -> bool:
        """Whether a merge is as good as the update beside the weights."""
        quiet = (
            self.noise_of_update <= NOISE_OF_UPDATE and self.noise_of_weights <= NOISE_OF_WEIGHTS
        )
        return self.share >= ENOUGH and quiet

    def to_text(self, layers: int) -> str:
        """One line; layers: how many there are in all."""
        share, noise = min(max(self.share, 0.0), 1.0), self.noise_of_update
        return (
            f"{share:.1%} of the update survives merging, with noise of {noise:.0%} of it, "
            f"{self.noise_of_weights:.1%} of the weights (measured on {self.layers} of {layers} "
            f"layers)"
        )


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))
