"""Who saves or merges a MODEL asks for its weights: a LoRA beside them becomes patches there.

Core's merge nodes take `get_key_patches` of one MODEL and `add_patches` to a clone of the other;
ModelSave and CheckpointSave take `state_dict_for_saving`; LoraSave takes `model_state_dict` of a
subtraction. A ModelPatcher with a LoRA in mode bypass, and every clone of it, answers them as one
with the LoRA merged. Sampling stays as it is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_management
from comfy.patcher_extension import CallbacksMP

from ..distill.contract.lora_keys import to_comfy
from .bypass import LowRankBranch, branches, remove_branches
from .lora_targets import PREFIX, PlacedLora, Target
from .step_strength import StepStrength

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

KEY = "turbo_distill.saved_bypass"


def lora_patches(placed: PlacedLora) -> dict[Any, Any]:
    """Weight patches with core's own LoRA arithmetic, for `add_patches`."""
    key_map = {f"{PREFIX}{name}": to.patch_key for name, to in placed.targets.items()}
    return comfy.lora.load_lora(to_comfy(placed.lora), key_map)


def change_patches(placed: PlacedLora) -> dict[Any, Any]:
    """Weight patches for what is added as it is: norms, biases."""
    return {to.patch_key: ("diff", (change,)) for to, change in placed.changes.items()}


def save_with_branches(model: ModelPatcher) -> None:
    """Lets `model` and its clones answer as if their branches were in the weights, in place."""
    owner = weakref.ref(model)  # core wants patchers to end with their last user
    for name, function in INSTEAD.items():
        setattr(model, name, partial(function, owner))
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _after_clone)


def merge_branches(model: ModelPatcher) -> None:
    """From beside the weights into them, in place: callers own a fresh clone."""
    loras = branches(model)
    for branch in loras:
        _one_strength(branch)
    remove_branches(model)
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    for name in INSTEAD:
        delattr(model, name)
    for branch in loras:
        logging.warning(
            "Turbo Distill: %s is in mode bypass; what is saved or merged has it in its weights, "
            "which round it where they have 8 bits or fewer.",
            branch.lora.source,
        )
        model.add_patches(lora_patches(branch.lora), _one_strength(branch))


def _one_strength(branch: LowRankBranch) -> float:
    """Raises ValueError where each step has its own, which no weight can say."""
    if isinstance(branch.strength, StepStrength):
        raise ValueError(
            f"{branch.lora.source} has another strength at each step ({branch.strength}), so it "
            f"cannot be part of weights that are saved, merged or patched by hooks. Take its Turbo "
            f"LoRA Loader out of that branch of the workflow."
        )
    return branch.strength


def _after_clone(_: ModelPatcher, clone: ModelPatcher) -> None:
    save_with_branches(clone)


def _get_key_patches(
    owner: weakref.ref[ModelPatcher], filter_prefix: str | None = None
) -> dict[str, list[Any]]:
    model = owner()
    found = type(model).get_key_patches(model, filter_prefix)
    for branch in branches(model):
        for to, patch in lora_patches(branch.lora).items():
            target = Target.of(to)
            if target.key in found:
                patches = found[target.key]
                patches.append((_one_strength(branch), patch, 1.0, target.offset, target.function))
    return found


def _add_patches(
    owner: weakref.ref[ModelPatcher],
    patches: Mapping[Any, Any],
    strength_patch: float = 1.0,
    strength_model: float = 1.0,
) -> list[Any]:
    """A LoRA is added to the weights and may stay beside others; weights of another model, or what
    scales those that are there, are a merge, and that means the LoRA too.
    """
    model = owner()
    if strength_model != 1.0 or any(isinstance(patch, list) for patch in patches.values()):
        merge_branches(model)
    return type(model).add_patches(model, patches, strength_patch, strength_model)


def _state_dict_for_saving(
    owner: weakref.ref[ModelPatcher], *args: Any, **kwargs: Any
) -> dict[str, torch.Tensor]:
    merged = owner().clone()
    merge_branches(merged)
    comfy.model_management.load_models_gpu([merged])
    return merged.state_dict_for_saving(*args, **kwargs)


def _model_state_dict(
    owner: weakref.ref[ModelPatcher], filter_prefix: str | None = None
) -> dict[str, torch.Tensor]:
    """Raises ValueError for a part of the weights, which only who writes them asks for (LoraSave),
    and which are then read one by one.
    """
    model = owner()
    if filter_prefix is not None:
        names = ", ".join(branch.lora.source for branch in branches(model))
        raise ValueError(
            f"{names} is beside the weights of this MODEL (mode bypass) and would be missing in "
            f"what is extracted from them. Choose mode merge in the Turbo LoRA Loader, or put "
            f"Model Merge Subtract behind it, which merges it."
        )
    return type(model).model_state_dict(model)


INSTEAD = {
    "get_key_patches": _get_key_patches,
    "add_patches": _add_patches,
    "state_dict_for_saving": _state_dict_for_saving,
    "model_state_dict": _model_state_dict,
}
