"""Bypass mode: y = W x + strength alpha/rank B A x, with W left as it is.

Merging a LoRA into an 8-bit weight rounds the sum back to 8 bits, and most of a small delta is
lost. Here the low-rank product stays beside the layer, in the precision of the activations.

Core has such a mode (comfy.weight_adapter.bypass). This one differs where that one cannot stack: it
uses torch's forward hooks, which come off in any order, where core replaces `module.forward` and
ejects first-in first-out, so that a second LoRA on the same layer leaves a dangling wrapper. Its
factors are a model of their own among the MODEL's additional models, so that core's memory planner
counts, moves and offloads them like any other weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import PatcherInjection

from ..distill.contract.lora_keys import LoraModule

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class _Layer(torch.nn.Module):
    def __init__(self, update: LoraModule, strength: float) -> None:
        super().__init__()
        self.scale = update.scale * strength
        # Core's own Linear: it casts itself to the input's device and dtype, and the memory planner
        # knows how to leave it on the CPU.
        self.down = _linear(update.down)
        self.up = _linear(update.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        return self.up(self.down(x) * self.scale)  # scaled where it is narrow


class LowRankBranch(torch.nn.Module):
    """All side branches of one LoRA on one base model, and the hooks that tie them to layers."""

    def __init__(self, updates: Mapping[str, LoraModule], strength: float) -> None:
        super().__init__()
        self.names = list(updates)
        self.layers = torch.nn.ModuleList(_Layer(update, strength) for update in updates.values())
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._owner: weakref.ref[ModelPatcher] | None = None

    def inject(self, patcher: ModelPatcher) -> None:
        """Adds each branch to its layer of `patcher.model`. A second time replaces the first."""
        self._remove()
        self._owner = weakref.ref(patcher)
        for name, layer in zip(self.names, self.layers, strict=True):
            hook = partial(_add_branch, layer)
            self._hooks.append(patcher.model.get_submodule(name).register_forward_hook(hook))

    def eject(self, patcher: ModelPatcher) -> None:
        """Takes the branches off, unless another patcher of the same base has put them on since.

        Core ejects from the finaliser of a discarded clone too, at a moment of the garbage
        collector's choosing, and clones inherit `is_injected`.
        """
        owner = self._owner and self._owner()
        if owner is None or owner is patcher:
            self._remove()

    def _remove(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()


def add_branch(
    model: ModelPatcher, key: str, updates: Mapping[str, LoraModule], strength: float
) -> None:
    """Puts a LoRA beside the layers of `model`, in place: callers own a fresh clone.

    key: names this LoRA among the model's injections; two LoRAs need two keys.
    updates: module path below `model.model` -> its low-rank update.
    """
    branch = _branch_patcher(updates, strength, model.load_device, model.offload_device)
    model.set_additional_models(key, [branch])
    injection = PatcherInjection(inject=partial(_inject, key), eject=partial(_eject, key))
    model.set_injections(key, [injection])


def _branch_patcher(
    updates: Mapping[str, LoraModule],
    strength: float,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    kind = comfy.model_patcher
    patcher = (kind.ModelPatcher if disable_dynamic else kind.CoreModelPatcher)(
        LowRankBranch(updates, strength), load_device, offload_device
    )
    # How core makes a copy for a second GPU.
    arguments = (updates, strength, load_device, offload_device)
    patcher.cached_patcher_init = (_branch_patcher, arguments)
    return patcher


# The branch is looked up by key, not bound: a copy of the MODEL for a second GPU has its own.
def _inject(key: str, patcher: ModelPatcher) -> None:
    for branch in patcher.get_additional_models_with_key(key):
        branch.model.inject(patcher)


def _eject(key: str, patcher: ModelPatcher) -> None:
    for branch in patcher.get_additional_models_with_key(key):
        branch.model.eject(patcher)


def _add_branch(
    layer: _Layer, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    return output + layer(inputs[0])


def _linear(weight: torch.Tensor) -> torch.nn.Module:
    out_features, in_features = weight.shape
    linear = comfy.ops.manual_cast.Linear(
        in_features, out_features, bias=False, dtype=weight.dtype, device="meta"
    )
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
