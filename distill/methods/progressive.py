"""Progressive distillation (Salimans & Ho 2022) in one round: from every sigma of the spec, one
student step must land where `solver_steps` guided teacher steps land at the next. A baseline.

`pcm` with one point per phase: only the sampler's own steps are trained, and the target is
the teacher's point itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .trajectory import Trajectory, phase_grid


class Progressive(Trajectory):
    def phases(self, sigmas: Sequence[float]) -> torch.Tensor:
        return phase_grid(sigmas, 1)
