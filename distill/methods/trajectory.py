"""Trajectory distillation: the losses and the step that PCM, consistency and progressive
distillation share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..contract.spec import TurboSpec
from ..data.batch import Batch
from ..models import flow
from ..models.roles import STUDENT, Roles
from ..stages import TrajectoryStage
from ..training.engine import Engine
from ..training.optim import AdapterOptimizer
from ..utils.rng import Rng
from .base import LoadVAE, Method, Part, mean_values, parts_of

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


@torch.no_grad()
def pcm_target(
    target_model: Velocity | None,
    teacher: Velocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    edge: torch.Tensor,
    solver_steps: int,
) -> torch.Tensor:
    """sg f(x_s, s, e) with f(x, t, e) = x + (e - t) v(x, t) and x_s = teacher's ODE from x_t.

    t > s >= e are [B] and lie in one phase; f(x, e, e) = x holds by construction. Without
    `target_model` all s are e, and the target is the teacher's point itself.
    """
    x_s = solve(teacher, x_t, t, s, solver_steps)
    return x_s if target_model is None else flow.euler(x_s, target_model(x_s, s), s, edge)


def pcm_pair(
    student: Velocity,
    target_model: Velocity | None,
    teacher: Velocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    edge: torch.Tensor,
    solver_steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """f(x_t, t, e) and sg f(x_s, s, e), whose distance is PCM's consistency loss."""
    target = pcm_target(target_model, teacher, x_t, t, s, edge, solver_steps)
    return flow.euler(x_t, student(x_t, t), t, edge), target


@dataclass(frozen=True)
class Landing:
    """Where a micro-batch's student steps landed and where they should have, without a graph."""

    prediction: torch.Tensor
    target: torch.Tensor
    phase: torch.Tensor  # [B]
    part: Part


class Trajectory(Method):
    """Draws phase and grid point per sample, phases equally often."""

    def __init__(
        self,
        stage: TrajectoryStage,
        roles: Roles,
        spec: TurboSpec,
        engine: Engine,
        load_vae: LoadVAE | None = None,
    ) -> None:
        self.stage, self.roles, self.spec, self.engine = stage, roles, spec, engine
        self._grids: dict[int, torch.Tensor] = {}  # by tokens
        self.optimizers = {STUDENT: AdapterOptimizer(roles, STUDENT, stage, engine)}

    def phases(self, sigmas: Sequence[float]) -> torch.Tensor:
        """The times that are trained.  # [phases, points + 1]"""
        return phase_grid(sigmas, self.stage.points)

    def grid(self, x0: torch.Tensor) -> torch.Tensor:
        """`phases` at the size of these latents, on their device."""
        tokens = self.roles.tokens(x0)
        if tokens not in self._grids:
            self._grids[tokens] = self.phases(self.spec.sigmas(tokens)).to(self.engine.device)
        return self._grids[tokens]

    def step(self, batch: Batch, rng: Rng) -> dict[str, float]:
        parts = parts_of(batch, rng, self.stage.accumulate)
        self.begin()
        landings, logged = [], []
        for part in parts:
            prediction, landing = self._pair(part)
            loss = self.distance(prediction - landing.target)
            values = {f"loss/{self.stage.method}": loss.item()}
            loss, more = self.adversarial(loss, prediction, landing)
            self.optimizers[STUDENT].backward(loss, len(parts))
            landings.append(landing)
            logged.append(values | more)
        values = mean_values(logged) | self.optimizers[STUDENT].update()
        return values | self.finish(landings)

    def _pair(self, part: Part) -> tuple[torch.Tensor, Landing]:
        """Where the student lands, with its graph, and all there is to know about it."""
        (batch, rng), x0 = part, part.batch.x0
        batch_size, device = len(x0), x0.device
        grid = self.grid(x0)
        phase = rng.integers("pcm/phase", batch_size, len(grid)).to(device)
        point = rng.integers("pcm/point", batch_size, grid.shape[1] - 1).to(device) + 1
        t, s, edge = grid[phase, point], grid[phase, point - 1], grid[phase, 0]
        x_t = flow.add_noise(x0, rng.normal("pcm/eps", tuple(x0.shape)).to(device), t)

        def student(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.roles.velocity(STUDENT, x, time, batch.text)

        def ema(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            with self.use_ema():
                return student(x, time)

        # one point per phase: the teacher's own step ends on the edge
        models = {"student": student, "ema": ema}
        prediction, target = pcm_pair(
            student,
            None if grid.shape[1] == 2 else models[self.stage.target],
            lambda x, time: self.roles.teacher(x, time, batch.text, self.stage.guidance_scale),
            x_t,
            t,
            s,
            edge,
            self.stage.solver_steps,
        )
        return prediction, Landing(prediction.detach(), target, phase, part)

    def distance(self, difference: torch.Tensor) -> torch.Tensor:
        if self.stage.distance == "squared":
            return difference.square().mean()
        return pseudo_huber(difference, self.stage.huber)

    def begin(self) -> None:
        """Before the micro-batches of a step."""

    def adversarial(
        self, loss: torch.Tensor, prediction: torch.Tensor, landing: Landing
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """What a method adds to its loss, and what it logs of that."""
        return loss, {}

    def finish(self, landings: Sequence[Landing]) -> dict[str, float]:
        """After the student's update; what it logs."""
        return {}
