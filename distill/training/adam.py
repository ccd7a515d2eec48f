"""AdamW: torch's own, or torchao's with states of 8 bits; neither keeps a first moment that is
only the gradient (beta1 = 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import ConfigError
from ..stages import INSTALL_TORCHAO, OptimizerSection


class Momentless:
    """With beta1 = 0 the first moment is the gradient: it borrows the gradient's memory for the
    length of a step, which changes no bit of the result.
    """

    def new_moment(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """An empty "exp_avg" or "exp_avg_sq", as the state holds it."""
        return torch.zeros_like(parameter)

    def _without_momentum(self: Any) -> list[torch.Tensor]:
        groups = [group for group in self.param_groups if group["betas"][0] == 0]
        return [p for group in groups for p in group["params"]]

    @torch.no_grad()
    def step(self: Any) -> None:
        bare = [p for p in self._without_momentum() if p.grad is not None]
        for parameter in bare:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg_sq"] = self.new_moment(parameter, "exp_avg_sq")
            state["exp_avg"] = parameter.grad
        super().step()  # type: ignore[misc]
        for parameter in bare:
            del self.state[parameter]["exp_avg"]

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        super().load_state_dict(state)  # type: ignore[misc]
        for parameter in self._without_momentum():
            self.state.get(parameter, {}).pop("exp_avg", None)  # of a checkpoint that kept it


class AdamW(Momentless, torch.optim.AdamW):
    """torch's."""


def make_adam(
    parameters: Sequence[torch.nn.Parameter], settings: OptimizerSection
) -> torch.optim.Optimizer:
    """Raises ConfigError where `optimizer` wants what is not installed."""
    keys = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return AdamW(parameters, **keys)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer: {settings.optimizer} needs torchao.optim ({error}). {INSTALL_TORCHAO}"
        ) from error

    class EightBit(Momentless, AdamW8bit):
        """torchao's: a byte and 1/256 of a scale per weight and moment (Dettmers et al. 2022);
        tensors of fewer than 4096 weights stay whole. Its step is compiled.
        """

        def new_moment(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
            return self._new_buffer(parameter, signed=name == "exp_avg")

    return EightBit(parameters, **keys)


def set_lr(adam: torch.optim.Optimizer, lr: float) -> None:
    for group in adam.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # a compiled step has it as a tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def plain_state(adam: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict` in plain tensors: one of 8 bits becomes the mapping of its parts."""

    def plain(value: Any) -> Any:
        if type(value) is torch.Tensor or not isinstance(value, torch.Tensor):
            return value
        names, _ = value.__tensor_flatten__()
        return {name: getattr(value, name) for name in names}

    saved = adam.state_dict()
    states = saved["state"].items()
    return {
        **saved,
        "state": {i: {k: plain(v) for k, v in state.items()} for i, state in states},
    }


@torch.no_grad()
def load_plain_state(adam: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Inverse of `plain_state`. Raises what `load_state_dict` does where it is another's."""
    parameters = [p for group in adam.param_groups for p in group["params"]]

    def whole(value: Any, parameter: torch.Tensor, name: str) -> Any:
        if not isinstance(value, dict):
            return value
        buffer = adam.new_moment(parameter, name)  # type: ignore[attr-defined]
        for part, tensor in value.items():
            getattr(buffer, part).copy_(tensor)
        return buffer

    states = {
        i: {name: whole(value, parameters[int(i)], name) for name, value in state.items()}
        for i, state in saved["state"].items()
    }
    adam.load_state_dict({**saved, "state": states})


@torch.no_grad()
def go_on_with(adam: torch.optim.Optimizer, settings: OptimizerSection) -> None:
    """A run that goes on may have other betas and weight decay than its state was saved with; a
    first moment that was not kept (beta1 was 0) begins at 0.
    """
    for group in adam.param_groups:
        group["betas"], group["weight_decay"] = settings.betas, settings.weight_decay
        for parameter in group["params"]:
            state = adam.state.get(parameter, {})
            if settings.betas[0] > 0 and state and "exp_avg" not in state:
                state["exp_avg"] = adam.new_moment(parameter, "exp_avg")  # type: ignore[attr-defined]
