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

import torch

from ..contract.spec import TurboSpec
from ..data.batch import Batch
from ..models import flow
from ..models.roles import STUDENT, Roles
from ..stages import PCMStage
from ..training.engine import Engine
from ..utils.rng import Rng
from .adversarial import Adversary, add_gradient, size_ratio
from .base import LoadVAE
from .discriminator import View, latent_discriminator
from .trajectory import Trajectory


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
        self,
        loss: torch.Tensor,
        prediction: torch.Tensor,
        target: torch.Tensor,
        phase: torch.Tensor,
        batch: Batch,
        rng: Rng,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        if self.adversary is None:
            return loss, {}
        grid = self.grid(target)
        edge, top = grid[phase, 0], grid[phase, -1]
        s = torch.lerp(edge, top, rng.uniform("pcm/level", len(target)).to(target.device))
        noise = rng.normal("pcm/noise", tuple(target.shape)).to(target.device)

        def view(x_e: torch.Tensor) -> View:
            return View(flow.renoise_within(x_e, edge, s, noise), s, batch.text)

        values = self.adversary.update(
            view(prediction.detach()), {"target": (1.0, view(target))}, rng
        )
        leaf = prediction.detach().requires_grad_()
        (main,) = torch.autograd.grad(self.distance(leaf - target), leaf)
        gradient, more = self.adversary.gradient(view(leaf), leaf, rng)
        weight = self.adversary.weight(main, gradient, self.optimizers[STUDENT].updates)
        more |= {"gan/weight": weight, "gan/gradient_ratio": size_ratio(weight * gradient, main)}
        return add_gradient(loss, prediction, weight * gradient), values | more
