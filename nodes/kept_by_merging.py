"""How much of a LoRA a merge into a MODEL's weights would keep, measured on a few of its layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import comfy.float
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ..distill.contract.kept import Kept
from .lora_targets import PlacedLora, Target

LAYERS = 6
NUMBERS = 1 << 17  # of each layer
SEED = 0


def measure(placed: PlacedLora, strength: float) -> Kept:
    """What merging keeps; `layers` is 0 where no layer's storage can be told."""
    kept = Kept()
    for name in sample(list(placed.targets), lambda name: _size(placed, name)):
        add_layer(kept, placed, name, strength, NUMBERS)
    return kept


def sample(names: Sequence[str], size: Callable[[str], int], count: int = LAYERS) -> list[str]:
    """The smallest, the middle and the largest, and others at random, the same ones each time."""
    names = sorted(names, key=lambda name: (size(name), name))
    if len(names) <= count:
        return names
    chosen = {0, len(names) // 2, len(names) - 1}
    rest = [index for index in range(len(names)) if index not in chosen]
    chosen.update(random.Random(SEED).sample(rest, count - len(chosen)))
    return [names[index] for index in sorted(chosen)]


def add_layer(
    kept: Kept,
    placed: PlacedLora,
    name: str,
    strength: float,
    numbers: int | None = None,
) -> None:
    """Adds one module to `kept`: all of it, or as many rows as have so many numbers."""
    target, update = placed.targets[name], placed.lora.modules[name]
    weight = placed.layers[target.module].weight
    store = _storage(weight, target)
    if store is None:
        return
    device = weight.device
    rows = _rows(update.up.shape[0], update.down.shape[1], numbers)
    up = update.up if target.function is None else target.function(update.up)
    up = up[rows].to(device, torch.float32)
    delta = (update.scale * strength) * (up @ update.down.to(device, torch.float32))
    before = _part(weight, target, rows)
    kept.add(before, store(before + delta), delta)


def _storage(weight: torch.Tensor, target: Target) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """float32 -> the numbers that core's merge leaves of them; None: not known."""
    if weight.is_meta or hasattr(weight, "tensor_type"):
        return None
    seed = comfy.utils.string_to_seed(target.key)
    if isinstance(weight, QuantizedTensor):
        return (
            lambda merged: weight.requantize_from_float(
                merged, scale="recalculate", stochastic_rounding=seed
            )
            .dequantize()
            .float()
        )
    if not weight.dtype.is_floating_point:
        return None
    return lambda merged: comfy.float.stochastic_rounding(merged, weight.dtype, seed).float()


def _part(weight: torch.Tensor, target: Target, rows: slice) -> torch.Tensor:
    """[rows, in] of the target, float32."""
    values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    return (values if target.offset is None else values.narrow(*target.offset))[rows].float()


def _rows(rows: int, columns: int, numbers: int | None) -> slice:
    """Evenly spaced ones, as many as have `numbers` numbers."""
    return slice(None, None, 1 if numbers is None else -(-rows * columns // numbers) or 1)


def _size(placed: PlacedLora, name: str) -> int:
    update = placed.lora.modules[name]
    return update.up.shape[0] * update.down.shape[1]
