"""Consistency distillation (Song et al. 2023): every point of a teacher trajectory maps to the same
x0. A baseline: its loss weights all patches alike, so at few steps what is small comes out blurred.

One phase of `pcm` that reaches from the first sigma to 0. Its own sampler is "renoise" (multistep
consistency sampling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .trajectory import Trajectory, phase_grid


class Consistency(Trajectory):
    def phases(self, sigmas: Sequence[float]) -> torch.Tensor:
        return phase_grid((sigmas[0], 0.0), self.stage.points)
