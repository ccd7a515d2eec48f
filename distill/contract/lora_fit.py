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
    place: str = "model"  # what has the expected size, for people

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.name} (no such layer)"
        return f"{self.name} (LoRA {self.found}, {self.place} {self.expected})"


def misfits(
    lora: NormalisedLora,
    layer_shape: Callable[[str], Sequence[int] | None],
    place: Callable[[str], str] = lambda name: "model",
) -> list[Misfit]:
    """layer_shape: module name -> [out, in] of the model's linear layer, None without one; place:
    module name -> where that is, for people.
    """
    found = []
    for name, module in lora.modules.items():
        size = [module.up.shape[0], module.down.shape[1]]
        shape = layer_shape(name)
        expected = None if shape is None else list(shape)
        if size != expected:
            where = {} if expected is None else {"place": place(name)}
            found.append(Misfit(name, size, expected, **where))
    return found
