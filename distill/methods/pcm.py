"""Phased consistency models on flow matching (Wang et al. 2024), the warm start of the recipe.

The phases are the intervals between the spec's sigmas. Within a phase with lower edge e the student
learns one Euler step that lands where the guided teacher's ODE arrives at e, wherever in the phase
it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from .. import flow
from ..batch import Batch
from ..config import PCMStage
from ..contract.spec import TurboSpec
from ..draws import Draws
from ..engine import Engine
from ..optim import AdapterOptimizer
from ..roles import STUDENT, Roles
from .base import Method

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t) -> v


def pseudo_huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    """mean sqrt(d^2 + c^2) - c: squared near zero, absolute far away (Song & Dhariwal 2023)."""
    return ((difference.square() + c * c).sqrt() - c).mean()


def phase_grid(sigmas: tuple[float, ...], points: int) -> torch.Tensor:
    """Times that divide every phase into `points` equal intervals, from its lower edge up.  #
    [phases, points + 1]
    """
    return torch.stack([torch.linspace(low, high, points + 1) for high, low in pairwise(sigmas)])


def solve(
    velocity: Velocity, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, steps: int
) -> torch.Tensor:
    """Follows the ODE from t to s in `steps` equal Euler steps."""
    for i in range(steps):
        here, there = torch.lerp(t, s, i / steps), torch.lerp(t, s, (i + 1) / steps)
        x_t = flow.euler(x_t, velocity(x_t, here), here, there)
    return x_t


def pcm_loss(
    student: Velocity,
    target: Velocity,
    teacher: Velocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    edge: torch.Tensor,
    solver_steps: int,
    huber: float,
) -> torch.Tensor:
    """d( f(x_t, t, e), sg f(x_s, s, e) ) with f(x, t, e) = x + (e - t) v(x, t) and x_s = teacher's
    ODE from x_t.

    t > s >= e are [B] and lie in one phase; f(x, e, e) = x holds by construction.
    """
    with torch.no_grad():
        x_s = solve(teacher, x_t, t, s, solver_steps)
        goal = flow.euler(x_s, target(x_s, s), s, edge)
    return pseudo_huber(flow.euler(x_t, student(x_t, t), t, edge) - goal, huber)


class PCM(Method):
    """Draws phase and grid point per sample, phases equally often."""

    def __init__(self, stage: PCMStage, roles: Roles, spec: TurboSpec, engine: Engine) -> None:
        self.stage, self.roles = stage, roles
        self.grid = phase_grid(spec.sigmas, stage.points).to(engine.device)
        self.optimizers = {STUDENT: AdapterOptimizer(roles, STUDENT, stage, engine)}

    def step(self, batch: Batch, draws: Draws) -> dict[str, float]:
        rows, device = len(batch.x0), batch.x0.device
        phase = draws.integers("pcm/phase", rows, len(self.grid)).to(device)
        point = draws.integers("pcm/point", rows, self.stage.points).to(device) + 1
        t, s, edge = self.grid[phase, point], self.grid[phase, point - 1], self.grid[phase, 0]
        eps = draws.normal("pcm/eps", tuple(batch.x0.shape)).to(device)
        optimizer = self.optimizers[STUDENT]

        def student(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.roles.velocity(STUDENT, x, time, batch.text)

        def averaged(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            with self.averaged():
                return student(x, time)

        loss = pcm_loss(
            student,
            averaged if self.stage.target == "ema" else student,
            lambda x, time: self.roles.teacher(x, time, batch.text),
            flow.add_noise(batch.x0, eps, t),
            t,
            s,
            edge,
            self.stage.solver_steps,
            self.stage.huber,
        )
        return {"loss/pcm": loss.item(), **optimizer.step(loss)}
