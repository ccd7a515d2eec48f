"""GAN losses (hinge, softplus, approximate R1), the update of the discriminator, and its gradient
for the student.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F

from ..models.text import concatenate
from ..stages import DiscriminatorSection
from ..training.engine import Engine
from ..training.optim import Optimizer
from ..utils.rng import Rng
from .augment import augment
from .discriminator import Discriminator, View


def stack(views: Sequence[View]) -> View:
    """One batch of several."""
    x = torch.cat([view.x for view in views])
    if views[0].t is None:
        return View(x)
    text = reduce(concatenate, [view.text for view in views])
    return View(x, torch.cat([view.t for view in views]), text)


# Losses on logits: those of one source, [B, places]


def real_loss(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """hinge: max(0, 1 - D); softplus: log(1 + exp(-D)), the non-saturating GAN."""
    return F.relu(1 - logits).mean() if kind == "hinge" else F.softplus(-logits).mean()


def fake_loss(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """hinge: max(0, 1 + D); softplus: log(1 + exp(D))."""
    return F.relu(1 + logits).mean() if kind == "hinge" else F.softplus(logits).mean()


def generator_loss(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """hinge: -D; softplus: log(1 + exp(-D))."""
    return -logits.mean() if kind == "hinge" else F.softplus(-logits).mean()


def approximate_r1(logits: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """|D(x) - D(x + sigma noise)|^2, about sigma^2 |grad D|^2, without a second derivative (APT,
    Lin et al. 2025). x is what D really sees: cropped, augmented, or noised.
    """
    return (logits - perturbed).square().mean()


def balanced_weight(
    main: torch.Tensor, adversarial: torch.Tensor, ratio: float, engine: Engine
) -> float:
    """The weight that makes |weight * adversarial| = ratio |main| over the whole batch of all
    ranks; both are gradients at the same point.
    """
    squares = {"main": main, "adversarial": adversarial}
    means = engine.mean({k: g.double().square().sum().item() for k, g in squares.items()})
    if means["adversarial"] == 0:
        return 0.0
    return ratio * math.sqrt(means["main"] / means["adversarial"])


def size_ratio(adversarial: torch.Tensor, main: torch.Tensor) -> float:
    """|adversarial| / |main| on this rank."""
    return (adversarial.double().norm() / main.double().norm()).item()


def add_gradient(loss: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss of the same value whose gradient at x has `gradient` added."""
    carrier = (x * gradient.detach()).sum()
    return loss + carrier - carrier.detach()


class Adversary:
    """A discriminator in training, and the gradient that it has for the student."""

    def __init__(
        self,
        module: Discriminator,
        section: DiscriminatorSection,
        engine: Engine,
        augmentations: Sequence[str] = (),
    ) -> None:
        self.module, self.section, self.engine = module, section, engine
        self.augmentations = augmentations
        self.optimizer = Optimizer("discriminator", module.parameters(), section, engine)

    def _augment(self, view: View, rng: Rng, stream: str) -> View:
        return replace(view, x=augment(view.x, self.augmentations, rng, f"{stream}/augment"))

    def update(
        self, fake: View, real: dict[str, tuple[float, View]], rng: Rng, stream: str = "critic"
    ) -> dict[str, float]:
        """One update of the discriminator, all views in one pass of the frozen features.

        real: source -> (share, view); the shares sum to 1. Logs the accuracy on every source.
        stream: of the noise; its name is its seed, so runs keep "critic".
        """
        kind, batch_size = self.section.loss, len(fake.x)
        sources = {"fake": fake} | {name: view for name, (_, view) in real.items()}
        with torch.no_grad():
            views = {k: self._augment(v, rng, f"{stream}/{k}") for k, v in sources.items()}
            if self.section.r1_weight:
                views |= {
                    f"{name}/r1": self._perturbed(views[name], rng, f"{stream}/{name}")
                    for name in real
                }
            features = self.module.extract(stack(list(views.values())))
        logits = dict(zip(views, self.module(features).split(batch_size), strict=True))
        shares = {name: share for name, (share, _) in real.items()}
        loss = fake_loss(logits["fake"], kind)
        loss = loss + sum(w * real_loss(logits[name], kind) for name, w in shares.items())
        values = {"loss/discriminator": loss.item()}
        if self.section.r1_weight:
            r1 = sum(
                w * approximate_r1(logits[name], logits[f"{name}/r1"]) for name, w in shares.items()
            )
            loss = loss + self.section.r1_weight * r1
            values["gan/r1"] = r1.item()
        for name in sources:
            mean = logits[name].detach().mean(1)
            right = mean < 0 if name == "fake" else mean > 0
            values[f"gan/accuracy_{name}"] = right.float().mean().item()
        return values | self.optimizer.step(loss)

    def _perturbed(self, view: View, rng: Rng, stream: str) -> View:
        noise = rng.normal(f"{stream}/r1", tuple(view.x.shape)).to(view.x.device)
        return replace(view, x=view.x + self.section.r1_sigma * noise)

    def gradient(
        self, fake: View, at: torch.Tensor, rng: Rng, stream: str = "generator"
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Gradient of the generator's loss at the leaf `at` that `fake` was made from; nothing else
        gets one.
        """
        with self.module.role_context():
            view = self._augment(fake, rng, stream)
            logits = self.module(self.module.extract(view))
            loss = generator_loss(logits, self.section.loss)
            (gradient,) = torch.autograd.grad(loss, at)
        return gradient, {"loss/generator": loss.item()}

    def weight(self, main: torch.Tensor, adversarial: torch.Tensor, updates: int) -> float:
        """Weight of the adversarial gradient beside the main loss's, at the student's `updates`-th
        update.
        """
        ramp = min(1.0, (updates + 1) / self.section.ramp)
        if self.section.weight is not None:
            return ramp * self.section.weight
        return ramp * balanced_weight(main, adversarial, self.section.ratio, self.engine)
