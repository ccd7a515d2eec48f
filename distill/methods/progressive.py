"""Progressive distillation (Salimans & Ho 2022) in one round: from every sigma of the spec, one
student step must land where `solver_steps` guided teacher steps land at the next. A baseline.

`pcm` with one point per phase: only the sampler's own steps are trained, and the goal is the
teacher's point itself.
"""

from __future__ import annotations

from ..contract.spec import TurboSpec
from ..models.roles import Roles
from ..stages import ProgressiveStage
from ..training.engine import Engine
from .base import LoadVAE
from .trajectory import Trajectory, phase_grid


class Progressive(Trajectory):
    def __init__(
        self,
        stage: ProgressiveStage,
        roles: Roles,
        spec: TurboSpec,
        engine: Engine,
        load_vae: LoadVAE | None = None,
    ) -> None:
        super().__init__(stage, roles, engine, phase_grid(spec.sigmas, 1), target_model=None)
