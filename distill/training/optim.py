"""One role's optimiser (AdamW): backward of every micro-batch, average over ranks, clip, warm-up,
step, and the exponential moving average (EMA) of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..models.roles import Roles
from ..stages import OptimizerSection
from .adam import go_on_with, load_plain_state, make_adam, plain_state, set_lr
from .ema import EMA
from .engine import Engine


class Optimizer:
    """AdamW on a list of weights, with an optional exponential moving average of them.

    An update is any number of `backward` and one `update`, after which no gradient is kept.

    `role_context` is entered for the backward pass. An update whose loss or gradient is not finite,
    on whichever rank, is left out on all of them; its norm is returned all the same. Weights that
    nobody else saves, those of a discriminator, are part of the state (`own`).
    """

    def __init__(
        self,
        name: str,
        parameters: Iterable[torch.nn.Parameter],
        settings: OptimizerSection,
        engine: Engine,
        *,
        ema: float = 0.0,
        role_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        own: bool = True,
    ) -> None:
        self.name, self.settings, self.engine = name, settings, engine
        self.role_context, self.own = role_context, own
        self.parameters = list(parameters)
        self.adam = make_adam(self.parameters, settings)
        self.ema = EMA(self.parameters, ema)
        self.updates = 0
        self.skipped = 0  # updates left out since the trainer last looked (guard.NanGuard)

    def backward(self, loss: torch.Tensor, parts: int = 1) -> None:
        """Adds the gradient of one of `parts` micro-batches, whose losses are means of their own.

        No loss of one micro-batch waits for another: its graph is free when this returns.
        """
        with self.role_context():  # checkpointed blocks run their forward again
            (loss / parts).backward()
        taint_gradient(self.parameters, loss)

    def update(self) -> dict[str, float]:
        """One update from the gradients gathered so far, which are freed; returns their norm before
        clipping.
        """
        self.engine.average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip).item()
        if math.isfinite(norm):
            self._update()
        else:
            self.skipped += 1
        self.adam.zero_grad(set_to_none=True)
        return {f"grad_norm/{self.name}": norm}

    def step(self, loss: torch.Tensor) -> dict[str, float]:
        """One update from one batch."""
        self.backward(loss)
        return self.update()

    def _update(self) -> None:
        warmup = self.settings.warmup
        factor = min(1.0, (self.updates + 1) / warmup) if warmup else 1.0
        set_lr(self.adam, self.settings.lr * factor)
        self.adam.step()
        self.updates += 1
        self.ema.update(self.updates)

    def state_dict(self) -> dict[str, Any]:
        return {
            "adam": plain_state(self.adam),
            "average": self.ema.weights,
            "updates": self.updates,
            "weights": [p.detach() for p in self.parameters] if self.own else [],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_plain_state(self.adam, state["adam"])
        go_on_with(self.adam, self.settings)
        self.ema.load(state["average"])
        if self.own:
            for parameter, saved in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(saved)
        self.updates = state["updates"]


class AdapterOptimizer(Optimizer):
    """The weights of one role, which are saved with the adapters, and the moving average that the
    stage asks for.
    """

    def __init__(self, roles: Roles, role: str, settings: OptimizerSection, engine: Engine) -> None:
        super().__init__(
            role,
            roles.parameters(role),
            settings,
            engine,
            ema=getattr(settings, "ema", 0.0),
            role_context=lambda: roles.use_role(role),
            own=False,
        )


@torch.no_grad()
def taint_gradient(parameters: Iterable[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Makes the gradient nan where the loss is not finite, and leaves it alone where it is: so the
    average over the ranks tells all of them.
    """
    gradient = next(p.grad for p in parameters if p.grad is not None)
    gradient.add_(0 * loss.detach())  # 0 * inf = nan
