"""One adapter's optimiser: backward in its role, average over ranks, clip, step, moving average."""

from __future__ import annotations

from typing import Any

import torch

from .config import Stage
from .engine import Engine
from .roles import Roles


class AdapterOptimizer:
    """AdamW on the weights of one role, with an optional exponential moving average of them."""

    def __init__(self, roles: Roles, role: str, stage: Stage, engine: Engine) -> None:
        self.roles, self.role, self.stage, self.engine = roles, role, stage, engine
        self.parameters = roles.parameters(role)
        self.adam = torch.optim.AdamW(
            self.parameters, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.updates = 0

    def step(self, loss: torch.Tensor) -> dict[str, float]:
        """One update; returns the gradient's norm before clipping."""
        self.adam.zero_grad(set_to_none=True)
        with self.roles.playing(self.role):  # checkpointed blocks run their forward again
            loss.backward()
        self.engine.average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.stage.clip)
        factor = min(1.0, (self.updates + 1) / self.stage.warmup) if self.stage.warmup else 1.0
        for group in self.adam.param_groups:
            group["lr"] = self.stage.lr * factor
        self.adam.step()
        self.updates += 1
        self._average()
        return {f"grad_norm/{self.role}": norm.item()}

    @torch.no_grad()
    def _average(self) -> None:
        # A short memory at first, so that the starting weights do not linger.
        decay = min(self.stage.ema, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchanges weights and their moving average; calling it twice changes nothing."""
        for average, parameter in zip(self.average, self.parameters, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    @torch.no_grad()
    def adopt_average(self) -> None:
        """Makes the moving average the weights."""
        for average, parameter in zip(self.average, self.parameters, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
        self.updates = state["updates"]
