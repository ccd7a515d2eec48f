"""Where the modules of a LoRA go in a MODEL, by core's own key map.

Core fuses layers (attention.qkv, linear1) and renames them, so a LoRA's module may be some rows of
a weight of another name. What core's LoRA loaders know of that, they know from
`comfy.lora.model_lora_keys_unet`: spelling -> key of a weight, or (key, (dim, start, length)), or
(key, offset, function of the change). Here every spelling of a name finds its way there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.lora
import torch

from ..distill.contract.lora_fit import misfits
from ..distill.contract.lora_forms import LoraFormatError
from ..distill.contract.lora_keys import NormalisedLora, split_prefix
from ..distill.contract.module_names import diffusers_name, flatten

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

PREFIX = "diffusion_model."
WEIGHT = ".weight"

# Of each diffusion model while it lives: 50 ms for the 60 blocks of Qwen-Image.
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[str, Target]] = WeakKeyDictionary()

Offset = tuple[int, int, int]  # dimension, start, length


@dataclass(frozen=True)
class Target:
    """A parameter of the MODEL or, with an offset, a slice of it.

    key: as in the state dict of `patcher.model`; function: what core does to a change before it
    adds it, such as swapping its halves.
    """

    key: str
    offset: Offset | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(cls, to: Any) -> Target:
        """From a value of core's key map."""
        return cls(to) if isinstance(to, str) else cls(*to)

    @property
    def patch_key(self) -> Any:
        """As `ModelPatcher.add_patches` and `comfy.lora.load_lora` take it."""
        if self.function is not None:
            return self.key, self.offset, self.function
        return self.key if self.offset is None else (self.key, self.offset)

    @property
    def module(self) -> str:
        """The layer that has the weight, as a submodule of `patcher.model`."""
        return self.key.rpartition(".")[0]

    @property
    def place(self) -> str:
        """For people."""
        name = self.module.removeprefix(PREFIX)
        if self.offset is None:
            return f"model {name}"
        dim, start, length = self.offset
        return f"model {'columns' if dim else 'rows'} {start}..{start + length - 1} of {name}"

    def is_plain(self, name: str) -> bool:
        """Whether it is a whole layer that the MODEL calls `name` too."""
        return self.offset is None and self.module == f"{PREFIX}{name}"

    def sibling(self, parameter: str) -> Target:
        """The same slice of another parameter of the layer, such as its bias."""
        return Target(f"{self.module}.{parameter}", self.offset, self.function)

    def shape_in(self, shape: list[int]) -> list[int] | None:
        """What of a parameter of `shape` is meant; None where it does not reach that far."""
        if self.offset is None:
            return shape
        dim, start, length = self.offset
        if dim >= len(shape) or start + length > shape[dim]:
            return None
        return [*shape[:dim], length, *shape[dim + 1 :]]


@dataclass(frozen=True, eq=False)
class PlacedLora:
    """A LoRA, and where in a MODEL it goes: each of its modules, and what is added as it is."""

    lora: NormalisedLora
    targets: Mapping[str, Target]
    changes: Mapping[Target, torch.Tensor]
    layers: Mapping[str, torch.nn.Module]  # of the targets' modules, by their names

    @property
    def source(self) -> str:
        """The file's name."""
        return self.lora.source


def targets_of(model: BaseModel) -> Mapping[str, Target]:
    """Every name that a module of a LoRA may have -> its place in the model.

    Names are as `normalise` leaves them: without prefixes, dotted or flattened. The model's own
    names come first, then those of core's key map, then diffusers' which that lacks.
    """
    net = model.diffusion_model
    if net not in _KNOWN:
        _KNOWN[net] = _find_targets(model)
    return _KNOWN[net]


def _find_targets(model: BaseModel) -> dict[str, Target]:
    names = {
        name.removeprefix(PREFIX): Target(f"{name}{WEIGHT}")
        for name, module in model.named_modules()
        if name.startswith(PREFIX) and getattr(module, "weight", None) is not None
    }
    flat: dict[str, Target] = {}
    for spelling, to in comfy.lora.model_lora_keys_unet(model, {}).items():
        prefix, name = split_prefix(spelling)
        (flat if prefix.endswith("_") else names).setdefault(name, Target.of(to))
    for name, target in list(names.items()):
        if (other := diffusers_name(name)) is not None:
            names.setdefault(other, target)
    known = {flatten(name) for name in names}
    return names | {name: to for name, to in flat.items() if name not in known}


def place(lora: NormalisedLora, model: BaseModel, known: Mapping[str, Target]) -> PlacedLora:
    """Raises LoraFormatError unless every module of the file has its place, of the right size."""
    targets = {name: known[name] for name in lora.modules if name in known}
    layers = layers_of(model)
    _check_fit(lora, type(model).__name__, layers, targets)
    first: dict[Any, str] = {}
    for name, target in targets.items():
        if (other := first.setdefault((target.key, target.offset), name)) != name:
            raise LoraFormatError(
                f"{lora.source}: {other} and {name} are the same layer ({target.place}). Expected "
                f"one spelling of each; save only the adapter you want."
            )
    changes = _place_changes(lora, type(model).__name__, layers, known)
    used = {to.module: layers[to.module] for to in targets.values()}
    return PlacedLora(lora, targets, changes, used)


def layers_of(model: BaseModel) -> dict[str, torch.nn.Module]:
    """All modules by name; `get_submodule` for each of a LoRA's takes ten times as long."""
    return dict(model.named_modules())


def _place_changes(
    lora: NormalisedLora,
    model_name: str,
    layers: Mapping[str, torch.nn.Module],
    known: Mapping[str, Target],
) -> dict[Target, torch.Tensor]:
    """Raises LoraFormatError unless each is of its parameter's size."""
    placed = {}
    for (name, parameter), change in lora.changes.items():
        target = known.get(name)
        if target is not None and parameter != "weight":
            target = target.sibling(parameter)
        shape = None if target is None else _parameter_shape(layers, target)
        if target is None or shape != list(change.shape):
            found = "no such parameter" if shape is None else f"model {shape}"
            raise LoraFormatError(
                f"{lora.source}: its change of {name}'s {parameter} does not fit this MODEL "
                f"({model_name}): LoRA {list(change.shape)}, {found}. Applied in part it "
                f"would not give the trained result: choose the LoRA for this very model."
            )
        placed[target] = change
    return placed


def _parameter_shape(layers: Mapping[str, torch.nn.Module], target: Target) -> list[int] | None:
    """Of the target's part of a parameter; None where this model has none."""
    if target.key.endswith(WEIGHT):
        return weight_shape(layers, target)
    parameter = getattr(layers.get(target.module), target.key.rpartition(".")[2], None)
    return None if parameter is None else target.shape_in(list(parameter.shape))


def _check_fit(
    lora: NormalisedLora,
    model_name: str,
    layers: Mapping[str, torch.nn.Module],
    targets: Mapping[str, Target],
) -> None:
    odd = misfits(
        lora,
        lambda name: weight_shape(layers, targets[name]) if name in targets else None,
        lambda name: "model" if targets[name].is_plain(name) else targets[name].place,
    )
    if not odd:
        return
    total = len(lora.modules)
    matched = total - len(odd)
    shown = "; ".join(map(str, odd[:3]))
    if matched == 0:
        raise LoraFormatError(
            f"{lora.source}: none of its {total} modules fits this MODEL ({model_name}), such as "
            f"{shown}. The LoRA was made for another architecture: choose the LoRA for this "
            f"model, or load the model that the LoRA was made for."
        )
    raise LoraFormatError(
        f"{lora.source}: only {matched} of its {total} modules fit this MODEL ({model_name}); not "
        f"{shown}. Applied in part it would not give the trained result: choose the LoRA for this "
        f"very model (size, pruning, version), or apply it with core's Load LoRA (Model) and wire "
        f"SIGMAS into the Turbo Sampler."
    )


def weight_shape(layers: Mapping[str, torch.nn.Module], target: Target) -> list[int] | None:
    """[out, in] of the target; None where the map names what this model does not have."""
    layer = layers.get(target.module)
    if not target.key.endswith(WEIGHT) or getattr(layer, "weight", None) is None:
        return None
    return target.shape_in(_layer_shape(layer))


def _layer_shape(layer: torch.nn.Module) -> list[int]:
    """[out, in]. Quantised weights may be packed, so a layer's own numbers come first."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return [layer.out_features, layer.in_features]
    return list(layer.weight.shape)
