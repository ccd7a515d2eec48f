"""Does a LoRA fit a model? All of its modules need a linear layer of their size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .lora_keys import NormalisedLora


@dataclass(frozen=True)
class Misfit:
    """A module without its layer; sizes as [out, in]."""

    name: str
    found: list[int]
    expected: list[int] | None  # None: there is no such linear layer

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.name} (no such layer)"
        return f"{self.name} (LoRA {self.found}, model {self.expected})"


def misfits(
    lora: NormalisedLora, layer_shape: Callable[[str], Sequence[int] | None]
) -> list[Misfit]:
    """layer_shape: module name -> [out, in] of the model's linear layer, None without one."""
    found = []
    for name, module in lora.modules.items():
        size = [module.up.shape[0], module.down.shape[1]]
        shape = layer_shape(name)
        expected = None if shape is None else list(shape)
        if size != expected:
            found.append(Misfit(name, size, expected))
    return found
