"""Consistency distillation (Song et al. 2023): every point of a teacher trajectory maps to the same
x0. A baseline: its loss weights all patches alike, so at few steps what is small comes out blurred.

One phase of `pcm` that reaches from the first sigma to 0. Its own sampler is "renoise" (multistep
consistency sampling).
"""

from __future__ import annotations

from ..contract.spec import TurboSpec
from ..models.roles import Roles
from ..stages import ConsistencyStage
from ..training.engine import Engine
from .base import LoadVAE
from .trajectory import Trajectory, phase_grid


class Consistency(Trajectory):
    def __init__(
        self,
        stage: ConsistencyStage,
        roles: Roles,
        spec: TurboSpec,
        engine: Engine,
        load_vae: LoadVAE | None = None,
    ) -> None:
        grid = phase_grid((spec.sigmas[0], 0.0), stage.points)
        super().__init__(stage, roles, engine, grid, None if stage.points == 1 else stage.target)
