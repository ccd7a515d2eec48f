"""Improved distribution matching (DMD2, Yin et al. 2024) on flow matching.

The student draws its own samples, as the spec's sampler would (backward simulation). Two scores are
asked about them: the guided teacher's, and that of the fake score, which is trained on the
student's samples alone. Their difference is the gradient of KL(student || teacher):

    grad = E [ (x0_fake(x_t) - x0_teacher(x_t)) dx/dtheta ],  x_t = (1 - t) x + t eps      (Eq. 1)

No real image is read; `batch.x0` gives only the shape. `gan` adds the adversarial term.

One step = one update of the student and `fake_updates` of the fake score (the two time-scale update
rule, TTUR; elsewhere the fake score is called critic): those on fresh samples before it, those on
the student's own samples, and the discriminator's, after it, when the student's graph is gone.
Transformer forwards of B samples with n sampler steps, k in 0 .. n-1 being the step with gradient:

    student   k without and 1 with gradient; k_i + 1 without for each fresh sample ("fresh": one per
              fake update but the last, which takes the student's; "reuse": none)
    teacher   1 of 2 B (1 of B without guidance; "decoupled": 1 of B and 1 of 2 B)
    fake      1 without gradient; 1 with for each of its updates
    diversity 1 student step more with gradient, `diversity_steps` of the teacher of 2 B
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..contract.sampling import euler_step, renoise_step, velocity_denoiser
from ..contract.spec import TurboSpec
from ..data.batch import Batch
from ..models import flow
from ..models.roles import FAKE, STUDENT, TEACHER, Roles
from ..stages import DMD2Stage, GANSection
from ..training.engine import Engine
from ..training.optim import AdapterOptimizer
from ..utils.rng import Rng
from .adversarial import add_gradient, square
from .base import LoadVAE, Method, Part, mean_values, parts_of, turn
from .gan import GAN
from .trajectory import Velocity, solve


def per_sample_scale(x: torch.Tensor, x0: torch.Tensor, floor: float = 1e-5) -> torch.Tensor:
    """mean |x - x0| of every sample in float32, at least `floor`.  # [B, 1, ...]"""
    difference = x.float() - x0.float()
    return flow.match(difference.abs().flatten(1).mean(1).clamp_min(floor), difference)


def dmd_gradient(x: torch.Tensor, x0_teacher: torch.Tensor, x0_fake: torch.Tensor) -> torch.Tensor:
    """(x0_fake - x0_teacher) / mean |x - x0_teacher|, Eq. 7 and 8 of DMD.

    As the score is (alpha x0 - x_t) / sigma^2, this is the score difference s_fake - s_teacher
    times a positive number per sample.
    """
    return (x0_fake.float() - x0_teacher.float()) / per_sample_scale(x, x0_teacher)


def decoupled_gradient(
    x: torch.Tensor,
    x0_cond: torch.Tensor,
    x0_fake: torch.Tensor,
    x0_cond_ca: torch.Tensor,
    x0_guided_ca: torch.Tensor,
) -> torch.Tensor:
    """Decoupled-DMD (Z-Image): distribution matching without guidance at one time, and what
    guidance adds (CFG augmentation) at another, each with its own normaliser.
    """
    matching = (x0_fake.float() - x0_cond.float()) / per_sample_scale(x, x0_cond)
    augmentation = x0_cond_ca.float() - x0_guided_ca.float()
    return matching + augmentation / per_sample_scale(x, x0_guided_ca)


def dmd_loss(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """0.5 |x - sg(x - g)|^2, mean over all elements: its gradient at x is g / numel."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def fake_score_loss(
    fake: Velocity, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Flow matching on the student's samples, |v(x_t, t) - (eps - x0)|^2; no guidance."""
    return F.mse_loss(fake(flow.add_noise(x0, eps, t), t), eps - x0)


def backward_simulation(
    student: Velocity,
    x: torch.Tensor,
    sigmas: Sequence[float],
    sampler: str,
    last: int,
    noise: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """x0 as the student sees it at sampler step `last`, from x at sigmas[0]; only that step keeps a
    graph.

    "euler" follows the ODE; "renoise" puts x0 back with fresh noise(i) of step i, as the samplers
    of `contract.sampling` do.
    """
    levels = torch.tensor(sigmas, dtype=torch.float32, device=x.device)
    ones = x.new_ones(len(x))
    denoised = velocity_denoiser(student)
    with torch.no_grad():
        for i in range(last):
            x0 = denoised(x, levels[i] * ones)
            if sampler == "euler":
                x = euler_step(x, x0, levels[i], levels[i + 1])
            else:
                x = renoise_step(x0, noise(i), levels[i + 1])
    return denoised(x, levels[last] * ones)


class DMD2(Method):
    """Student and fake score in turn."""

    def __init__(
        self,
        stage: DMD2Stage,
        roles: Roles,
        spec: TurboSpec,
        engine: Engine,
        load_vae: LoadVAE | None = None,
    ) -> None:
        self.stage, self.roles, self.spec = stage, roles, spec
        self.begun = False  # a step was made, whether or not its updates were finite
        self.optimizers = {
            STUDENT: AdapterOptimizer(roles, STUDENT, stage, engine),
            FAKE: AdapterOptimizer(roles, FAKE, stage.fake, engine),
        }
        self.gan = None
        if stage.gan:
            self.gan = self.make_gan(stage.gan, engine, load_vae)
            self.optimizers["discriminator"] = self.gan.adversary.optimizer

    def make_gan(self, section: GANSection, engine: Engine, load_vae: LoadVAE | None) -> GAN:
        return GAN(section, self.roles, engine, load_vae)

    def step(self, batch: Batch, rng: Rng) -> dict[str, float]:
        stage, student = self.stage, self.optimizers[STUDENT]
        if not self.begun:
            self._start_fake()
            self.begun = True
        parts = parts_of(batch, rng, stage.accumulate)
        warm = student.updates < stage.fake_warmup
        updates = stage.fake_warmup_updates if warm else stage.fake_updates
        fresh = updates - 1 if stage.fake_samples == "fresh" else 0
        values: dict[str, float] = {}

        # Fake score, on samples of its own
        for number in range(fresh):
            values |= self._update_fake(
                parts, number, lambda i, stream=f"dmd2/fresh{number}": self._fresh(parts[i], stream)
            )

        # Student
        weight = self.gan.adversary.weight(student.updates) if self.gan else 0.0
        samples: list[torch.Tensor] = []
        squares: list[tuple[float, float]] = []  # of main and adversarial gradient
        logged = []
        for part in parts:
            x, k = self._sample(*part, "dmd2/student")
            loss, more = self._student_loss(x, k, part, weight, squares)
            student.backward(loss, len(parts))
            samples.append(x.detach())
            logged.append(more)
        values |= mean_values(logged) | statistics(torch.cat(samples)) | student.update()
        del x, loss

        # Fake score and discriminator, on the student's samples
        for number in range(fresh, updates):
            values |= self._update_fake(parts, number, samples.__getitem__)
        if self.gan and squares:
            values |= self.gan.adversary.weighed(squares, weight)
            values |= self.gan.train(samples, parts)
        if stage.ida is not None:
            self.roles.blend_adapter(STUDENT, FAKE, stage.ida)
        return values

    def _student_loss(
        self,
        x: torch.Tensor,
        k: int,
        part: Part,
        weight: float,
        squares: list[tuple[float, float]],
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Of the samples x of one micro-batch; `weight`: of the adversarial gradient, whose size
        goes to `squares` where it is asked for.
        """
        gradient = self._gradient(x.detach(), k, part.batch, part.rng)
        loss = dmd_loss(x, gradient)
        values = {"loss/dmd": loss.item()}
        if self.gan and (k == self.spec.steps - 1 or not self.gan.section.last_step_only):
            adversarial, more = self.gan.gradient(x, part)
            squares.append((square(gradient / gradient.numel()), square(adversarial)))
            loss, values = add_gradient(loss, x, weight * adversarial), values | more
        if self._keeps_diversity:
            diversity = self._diversity_loss(part.batch, part.rng)
            loss = loss + self.stage.diversity * diversity
            values["loss/diversity"] = diversity.item()
        return loss, values

    def state_dict(self) -> dict[str, Any]:
        gan = {"gan": self.gan.adversary.state_dict()} if self.gan else {}
        return super().state_dict() | {"begun": self.begun} | gan

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also of checkpoints without `begun`, which were written after a step only."""
        super().load_state_dict(state)
        self.begun = state.get("begun", True)
        if self.gan and "gan" in state:
            self.gan.adversary.load_state_dict(state["gan"])

    def _start_fake(self) -> None:
        # Before the first update rather than in __init__, which a resumed run calls too.
        if self.stage.fake_init == "student":
            self.roles.copy_adapter(STUDENT, FAKE)
        elif self.stage.fake_init == "base":
            self.roles.reset_adapter(FAKE)

    @property
    def _keeps_diversity(self) -> bool:
        return self.stage.diversity > 0 and self.spec.steps > 1

    def _sigmas(self, batch: Batch) -> tuple[float, ...]:
        """What the sampler does at the size of this batch."""
        return self.spec.sigmas(self.roles.tokens(batch.x0))

    def _noise(self, batch: Batch, rng: Rng, stream: str) -> torch.Tensor:
        return rng.normal(stream, tuple(batch.x0.shape)).to(batch.x0.device)

    def _times(
        self, batch: Batch, rng: Rng, stream: str, shift: float, low: float, high: float
    ) -> torch.Tensor:
        """Times between `low` and `high`, uniform before the shift.  # [B]"""
        u = rng.uniform(stream, len(batch.x0)).to(batch.x0.device)
        low, high = (flow.unshift(level, shift) for level in (low, high))
        return flow.shift(low + (high - low) * u, shift)

    def _student(self, batch: Batch) -> Velocity:
        return lambda x, t: self.roles.velocity(STUDENT, x, t, batch.text)

    def _sample(self, batch: Batch, rng: Rng, stream: str) -> tuple[torch.Tensor, int]:
        """The student's x0 at a sampler step that is drawn for the whole batch of all ranks, and
        that step.
        """
        first, last = 1 if self._keeps_diversity else 0, self.spec.steps - 1
        k = last
        if self.stage.gradient_step == "random":
            k = int(torch.randint(first, last + 1, (), generator=rng.generator(f"{stream}/step")))
        sigmas = self._sigmas(batch)
        x = self._noise(batch, rng, f"{stream}/noise") * sigmas[0]
        x0 = backward_simulation(
            self._student(batch),
            x,
            sigmas,
            self.spec.sampler,
            k,
            lambda i: self._noise(batch, rng, f"{stream}/renoise{i}"),
        )
        return x0, k

    @torch.no_grad()
    def _fresh(self, part: Part, stream: str) -> torch.Tensor:
        """Samples for the fake score alone."""
        return self._sample(*part, stream)[0]

    def _update_fake(
        self, parts: Sequence[Part], number: int, sample: Callable[[int], torch.Tensor]
    ) -> dict[str, float]:
        """sample: what the student drew for a micro-batch."""
        chosen, logged = turn(len(parts), self.stage.fake_accumulate, number), []
        for i in chosen:
            loss = self._fake_loss(sample(i), *parts[i], f"dmd2/fake{number}")
            self.optimizers[FAKE].backward(loss, len(chosen))
            logged.append({"loss/fake": loss.item()})
        return mean_values(logged) | self.optimizers[FAKE].update()

    def _fake_loss(self, x0: torch.Tensor, batch: Batch, rng: Rng, stream: str) -> torch.Tensor:
        t = self._times(batch, rng, f"{stream}/t", self.stage.fake_shift, 0.0, 1.0)
        eps = self._noise(batch, rng, f"{stream}/eps")
        return fake_score_loss(lambda x, t: self.roles.velocity(FAKE, x, t, batch.text), x0, eps, t)

    @torch.no_grad()
    def _gradient(self, x: torch.Tensor, k: int, batch: Batch, rng: Rng) -> torch.Tensor:
        stage, text = self.stage, batch.text
        t = self._times(batch, rng, "dmd2/t", stage.shift, stage.t_min, stage.t_max)
        x_t = flow.add_noise(x, self._noise(batch, rng, "dmd2/eps"), t)
        x0_fake = flow.to_x0(x_t, self.roles.velocity(FAKE, x_t, t, text), t)
        if not stage.decoupled:
            v = self.roles.teacher(x_t, t, text, stage.guidance_scale)
            return dmd_gradient(x, flow.to_x0(x_t, v, t), x0_fake)
        x0_cond = flow.to_x0(x_t, self.roles.velocity(TEACHER, x_t, t, text), t)
        # The guidance part looks at less noise than the student's own step began with
        s = self._times(batch, rng, "dmd2/s", stage.shift, 0.0, self._sigmas(batch)[k])
        x_s = flow.add_noise(x, self._noise(batch, rng, "dmd2/eps_s"), s)
        pair = self.roles.teacher_pair(x_s, s, text, stage.guidance_scale)
        return decoupled_gradient(x, x0_cond, x0_fake, *(flow.to_x0(x_s, v, s) for v in pair))

    def _diversity_loss(self, batch: Batch, rng: Rng) -> torch.Tensor:
        """The student's first step lands where the guided teacher's ODE does (DP-DMD): composition
        from the teacher, detail from the later steps' distribution matching.
        """
        first, second = self._sigmas(batch)[:2]
        noise = self._noise(batch, rng, "dmd2/student/noise") * first
        t, s = (noise.new_full((len(noise),), sigma) for sigma in (first, second))
        with torch.no_grad():
            target = solve(
                lambda x, time: self.roles.teacher(x, time, batch.text, self.stage.guidance_scale),
                noise,
                t,
                s,
                self.stage.diversity_steps,
            )
        v = (target - noise) / flow.match(s - t, noise)
        return F.mse_loss(self._student(batch)(noise, t), v)


@torch.no_grad()
def statistics(x0: torch.Tensor) -> dict[str, float]:
    """Cheap signs of over-saturation (growing std) and of collapse (shrinking spread over the
    batch).
    """
    values = {"student/std": x0.std().item()}
    if len(x0) > 1:
        values["student/spread"] = x0.std(0).mean().item()
    return values
