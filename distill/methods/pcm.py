"""Phased consistency models on flow matching (Wang et al. 2024), the warm start of the recipe.

The phases are the intervals between the spec's sigmas. Within a phase with lower edge e the student
learns one Euler step that lands where the guided teacher's ODE arrives at e, wherever in the phase
it starts. `consistency` and `progressive` are the same step on other grids.

Transformer forwards of one update of B samples, none of them avoidable: teacher `solver_steps` of 2
B, target 1 of B without gradient (none where the teacher's step ends on the edge for all samples),
student 1 of B with gradient. With `gan` two of the teacher as feature extractor: 3 B (2 B without
R1), and 1 of B with gradient to the student's landing point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..contract.spec import TurboSpec
from ..models import flow
from ..models.roles import STUDENT, Roles
from ..stages import PCMStage
from ..training.engine import Engine
from .adversarial import Adversary, Exhibit, add_gradient, square
from .base import LoadVAE, turn
from .discriminator import View, latent_discriminator
from .trajectory import Landing, Trajectory


class PCM(Trajectory):
    """The phases of the spec, with an optional adversarial term: student's and target's landing
    points, moved up within the phase to a level that both could have come from, have to look alike
    to a discriminator on the teacher's features.
    """

    def __init__(
        self,
        stage: PCMStage,
        roles: Roles,
        spec: TurboSpec,
        engine: Engine,
        load_vae: LoadVAE | None = None,
    ) -> None:
        super().__init__(stage, roles, spec, engine)
        self.adversary = None
        if stage.gan:
            self.adversary = Adversary(latent_discriminator(stage.gan, roles), stage.gan, engine)
            self.optimizers["discriminator"] = self.adversary.optimizer

    def adversarial(
        self, loss: torch.Tensor, prediction: torch.Tensor, landing: Landing
    ) -> tuple[torch.Tensor, dict[str, float]]:
        if self.adversary is None:
            return loss, {}
        leaf = prediction.detach().requires_grad_()
        (main,) = torch.autograd.grad(self.distance(leaf - landing.target), leaf)
        view, rng = self._view(leaf, landing), landing.part.rng
        gradient, values = self.adversary.gradient(view, leaf, rng)
        self._squares.append((square(main), square(gradient)))
        return add_gradient(loss, prediction, self._weight * gradient), values

    def _view(self, x_e: torch.Tensor, landing: Landing) -> View:
        """A landing point, moved up within its phase."""
        rng, grid = landing.part.rng, self.grid(x_e)
        edge, top = grid[landing.phase, 0], grid[landing.phase, -1]
        s = torch.lerp(edge, top, rng.uniform("pcm/level", len(x_e)).to(x_e.device))
        noise = rng.normal("pcm/noise", tuple(x_e.shape)).to(x_e.device)
        return View(flow.renoise_within(x_e, edge, s, noise), s, landing.part.batch.text)

    def begin(self) -> None:
        if self.adversary is not None:
            self._squares: list[tuple[float, float]] = []
            self._weight = self.adversary.weight(self.optimizers[STUDENT].updates)

    def finish(self, landings: Sequence[Landing]) -> dict[str, float]:
        if self.adversary is None:
            return {}
        values = self.adversary.weighed(self._squares, self._weight)
        shown = [
            Exhibit(
                self._view(landing.prediction, landing),
                {"target": (1.0, self._view(landing.target, landing))},
                landing.part.rng,
            )
            for landing in (
                landings[i] for i in turn(len(landings), self.adversary.section.accumulate, 0)
            )
        ]
        return values | self.adversary.update(shown)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"gan": self.adversary.state_dict()} if self.adversary else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.adversary and "gan" in state:  # absent where weights were not averaged yet
            self.adversary.load_state_dict(state["gan"])
