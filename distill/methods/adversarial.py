"""GAN losses (hinge, softplus, approximate R1), the update of the discriminator, and its gradient
for the student.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..models.text import concatenate
from ..stages import DiscriminatorSection
from ..training.engine import Engine
from ..training.optim import Optimizer
from ..utils.rng import Rng
from .augment import augment
from .balance import Balance
from .base import mean_values
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


def square(gradient: torch.Tensor) -> float:
    """Its squared norm."""
    return gradient.double().square().sum().item()


def add_gradient(loss: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss of the same value whose gradient at x has `gradient` added."""
    carrier = (x * gradient.detach()).sum()
    return loss + carrier - carrier.detach()


class Exhibit(NamedTuple):
    """A micro-batch as a discriminator is shown it."""

    fake: View
    real: dict[str, tuple[float, View]]  # source -> (share, view); the shares sum to 1
    rng: Rng


class Adversary:
    """A discriminator in training, and the gradient that it has for the student."""

    def __init__(
        self,
        module: Discriminator,
        section: DiscriminatorSection,
        engine: Engine,
        augmentations: Sequence[str] = (),
    ) -> None:
        self.module, self.section = module, section
        self.augmentations = augmentations
        self.optimizer = Optimizer("discriminator", module.parameters(), section, engine)
        self.balance = Balance(engine)

    def _augment(self, view: View, rng: Rng, stream: str) -> View:
        return replace(view, x=augment(view.x, self.augmentations, rng, f"{stream}/augment"))

    def update(self, shown: Sequence[Exhibit], stream: str = "critic") -> dict[str, float]:
        """One update of the discriminator from all micro-batches `shown`. Logs the accuracy on
        every source.

        stream: of the noise; its name is its seed, so runs keep "critic".
        """
        values = mean_values([self._backward(*exhibit, stream, len(shown)) for exhibit in shown])
        values |= self.optimizer.update()
        if math.isfinite(values["grad_norm/discriminator"]):
            shares = {name: share for name, (share, _) in shown[0].real.items()}
            right = sum(share * values[f"gan/accuracy_{name}"] for name, share in shares.items())
            self.balance.accuracy((values["gan/accuracy_fake"] + right) / 2)
        return values

    def _backward(
        self, fake: View, real: dict[str, tuple[float, View]], rng: Rng, stream: str, parts: int
    ) -> dict[str, float]:
        """All views of one micro-batch in one pass of the frozen features."""
        kind, batch_size = self.section.loss, len(fake.x)
        penalised = self.section.r1_lambda > 0
        sources = {"fake": fake} | {name: view for name, (_, view) in real.items()}
        with torch.no_grad():
            views = {k: self._augment(v, rng, f"{stream}/{k}") for k, v in sources.items()}
            if penalised:
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
        if penalised:
            r1 = sum(
                w * approximate_r1(logits[name], logits[f"{name}/r1"]) for name, w in shares.items()
            )
            loss = loss + self.section.r1_lambda * r1
            values["gan/r1"] = r1.item()
        for name in sources:
            mean = logits[name].detach().mean(1)
            right = mean < 0 if name == "fake" else mean > 0
            values[f"gan/accuracy_{name}"] = right.float().mean().item()
        self.optimizer.backward(loss, parts)
        return values

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

    def weight(self, updates: int) -> float:
        """Weight of the adversarial gradient beside the main loss's, at the student's `updates`-th
        update. From what was seen before it: no micro-batch waits for another's norms.
        """
        ramp = min(1.0, (updates + 1) / self.section.ramp)
        if self.section.weight is not None:
            return ramp * self.section.weight
        return ramp * self.balance.weight(self.section.ratio, self.section.by_accuracy)

    def weighed(self, squares: Sequence[tuple[float, float]], weight: float) -> dict[str, float]:
        """Takes the squared norms of main and adversarial gradient in every micro-batch, which got
        `weight`; returns what to log.
        """
        main, adversarial = (sum(numbers) / len(numbers) for numbers in zip(*squares, strict=True))
        return {
            "gan/weight": weight,
            "gan/gradient_ratio": weight * self.balance.squares(main, adversarial),
            "gan/edge": self.balance.edge,
        }

    def state_dict(self) -> dict[str, Any]:
        """Beside the optimiser's."""
        return self.balance.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.balance.load_state_dict(state)
