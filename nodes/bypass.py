"""Bypass mode: y = W x + strength alpha/rank B A x, with W left as it is.

Where core has fused layers into one (q, k and v), each module's product goes to its own rows of y.

Merging a LoRA into an 8-bit weight rounds the sum back to 8 bits, and most of a small delta is
lost. Here the low-rank product stays beside the layer, in the precision of the activations.

Core has such a mode (comfy.weight_adapter.bypass), and like core this one replaces
`module.forward`: torch.compile looks there, and not at forward hooks. It differs where core's
cannot stack: what goes on last comes off first. Its factors are a model of their own among the
MODEL's additional models, so that core's memory planner counts, moves and offloads them like any
other weight. Where weights are saved or merged, `saved_bypass` puts the LoRA into them.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any

import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection

from ..distill.contract.lora_forms import LoraFormatError
from ..distill.contract.lora_keys import LoraModule
from .lora_targets import PlacedLora, Target
from .step_strength import StepStrength, follow_no_steps, follow_steps

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "turbo_distill.bypass"
Strength = float | StepStrength


class _Layer(torch.nn.Module):
    """What goes beside one layer of the base model."""

    def __init__(self, update: LoraModule, target: Target, strength: Strength) -> None:
        super().__init__()
        self.scale, self.steps = _scale(update, strength)
        # Core's own Linear: it casts itself to the input's device and dtype, and the memory planner
        # knows how to leave it on the CPU.
        self.down = _linear(update.down)
        self.up = _linear(_changed(update, target))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        return self.up(_times(self.down(x), self.scale, self.steps))  # where it is narrow

    def add(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x [..., in]; output: the base layer's for it, [..., out]."""
        return output + self(x)


class _Slices(torch.nn.Module):
    """What goes beside rows of one layer, in which the base model has fused several.

    Their `down` halves see the same input and are one matrix. targets: in order, without overlap.
    """

    def __init__(
        self, updates: Sequence[LoraModule], targets: Sequence[Target], strength: Strength
    ) -> None:
        super().__init__()
        self.ranks = [update.rank for update in updates]
        self.scales = [_scale(update, strength)[0] for update in updates]
        self.steps = _scale(updates[0], strength)[1]
        self.spans = [(target.offset[1], sum(target.offset[1:])) for target in targets]
        self.down = _linear(torch.cat([update.down for update in updates]))
        self.ups = torch.nn.ModuleList(
            _linear(_changed(update, target))
            for update, target in zip(updates, targets, strict=True)
        )

    def add(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """As `_Layer.add`, into a new tensor: others may hold `output`."""
        pieces, done = [], 0
        hidden = self.down(x).split(self.ranks, dim=-1)
        for narrow, scale, up, (start, stop) in zip(
            hidden, self.scales, self.ups, self.spans, strict=True
        ):
            pieces += [output[..., done:start], output[..., start:stop]]
            pieces[-1] = pieces[-1] + up(_times(narrow, scale, self.steps))
            done = stop
        return torch.cat([*pieces, output[..., done:]], dim=-1)


def _scale(update: LoraModule, strength: Strength) -> tuple[float, StepStrength | None]:
    """What is always multiplied by, and what else at each step."""
    if isinstance(strength, StepStrength):
        return update.scale, strength
    return update.scale * strength, None


def _times(hidden: torch.Tensor, scale: float, steps: StepStrength | None) -> torch.Tensor:
    return hidden * scale if steps is None else hidden * (scale * steps.now)


class _Beside:
    """The forward of a base layer with a branch beside it; without one it only passes on.

    Its bound `forward` goes on the module: for that, compiled code holds from one run to the next.
    """

    def __init__(self, module: torch.nn.Module, layer: _Layer | _Slices) -> None:
        self.module, self.inner = module, module.forward
        self.layer: _Layer | _Slices | None = layer
        module.forward = self.forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.inner(x, *args, **kwargs)
        return output if self.layer is None else self.layer.add(x, output)

    def take_off(self) -> None:
        """Even from under what others have put on since, which may keep hold of this one."""
        self.layer = None
        outer = forward = self.module.forward
        while isinstance(owner := getattr(forward, "__self__", None), _Beside) and not owner.layer:
            forward = owner.inner
        if forward == MethodType(type(self.module).forward, self.module):
            self.module.__dict__.pop("forward", None)  # as it was, and no module holds itself
        elif forward is not outer:
            self.module.forward = forward


class LowRankBranch(torch.nn.Module):
    """All side branches of one LoRA on one base model."""

    def __init__(self, lora: PlacedLora, strength: Strength) -> None:
        super().__init__()
        self.lora, self.strength = lora, strength
        placed = _layers(lora, strength)
        self.layers = torch.nn.ModuleList(layer for _, layer in placed)
        self.beside = [module for module, _ in placed]  # names in `patcher.model`
        self._on: list[_Beside] = []
        self._owner: weakref.ref[ModelPatcher] | None = None

    def inject(self, patcher: ModelPatcher) -> None:
        """Puts each branch beside its layer of `patcher.model`; again replaces what was."""
        self._remove()
        self._owner = weakref.ref(patcher)
        for name, layer in zip(self.beside, self.layers, strict=True):
            self._on.append(_Beside(patcher.model.get_submodule(name), layer))

    def eject(self, patcher: ModelPatcher) -> None:
        """Takes the branches off, unless another patcher of the same base has put them on since.

        Core ejects from the finaliser of a discarded clone too, at a moment of the garbage
        collector's choosing, and clones inherit `is_injected`.
        """
        owner = self._owner and self._owner()
        if owner is None or owner is patcher:
            self._remove()

    def _remove(self) -> None:
        for beside in self._on:
            beside.take_off()
        self._on.clear()


def check_beside(lora: PlacedLora) -> None:
    """Raises LoraFormatError for a change that only works on the weight itself."""
    for name, target in lora.targets.items():
        columns = target.offset is not None and target.offset[0] != 0
        if columns or not _keeps_columns(lora.lora.modules[name], target):
            raise LoraFormatError(
                f"{lora.source}: {name} ({target.place}) changes more than rows of the output, so "
                f"it cannot stay beside the weights. Choose mode merge."
            )


def _keeps_columns(update: LoraModule, target: Target) -> bool:
    """Whether what core does to a change only moves or scales its rows."""
    if target.function is None:
        return True
    up, down = update.up[:, :1].float(), torch.tensor([[1.0, -2.0, 3.0]])
    return torch.equal(target.function(up @ down), target.function(up) @ down)


def _changed(update: LoraModule, target: Target) -> torch.Tensor:
    return update.up if target.function is None else target.function(update.up)


def _layers(lora: PlacedLora, strength: Strength) -> list[tuple[str, _Layer | _Slices]]:
    """(the base layer's name, what goes beside it); more than one where slices overlap."""
    found: list[tuple[str, _Layer | _Slices]] = []
    slices: dict[str, list[tuple[LoraModule, Target]]] = defaultdict(list)
    for name, update in lora.lora.modules.items():
        target = lora.targets[name]
        if target.offset is None:
            found.append((target.module, _Layer(update, target, strength)))
        else:
            slices[target.module].append((update, target))
    for module, parts in slices.items():
        parts.sort(key=lambda part: part[1].offset)
        spans = [(target.offset[1], sum(target.offset[1:])) for _, target in parts]
        apart = all(stop <= start for (_, stop), (start, _) in pairwise(spans))
        for group in [parts] if apart else [[part] for part in parts]:
            updates, targets = zip(*group, strict=True)
            found.append((module, _Slices(updates, targets, strength)))
    return found


def add_branch(model: ModelPatcher, key: str, lora: PlacedLora, strength: Strength) -> None:
    """Puts a LoRA beside the layers of `model`, in place: callers own a fresh clone.

    key: names this LoRA among the model's injections; two LoRAs need two keys.
    """
    key = f"{KEY}.{key}"
    # Compiled code wants a model that is not loaded dynamically: then the branch is not either.
    plain = not model.is_dynamic()
    branch = _branch_patcher(lora, strength, model.load_device, model.offload_device, plain)
    model.set_additional_models(key, [branch])
    # By the key core tells which models are equally injected. The work is done after all
    # injections: core's own bypass ejects first-in first-out and puts back what it once found, so
    # whoever goes on last and comes off last is in nobody's way.
    model.set_injections(key, [PatcherInjection(inject=_nothing, eject=_nothing)])
    if isinstance(strength, StepStrength):
        follow_steps(model, key, strength)
    for call, function in CALLBACKS.items():
        model.remove_callbacks_with_key(call, KEY)
        model.add_callback_with_key(call, KEY, function)


def branches(model: ModelPatcher) -> list[LowRankBranch]:
    """The LoRAs beside the layers of `model`, in the order in which they were added."""
    # By key, not bound to the callbacks: a copy of the MODEL for a second GPU has its own.
    return [
        patcher.model
        for key in _keys(model)
        for patcher in model.get_additional_models_with_key(key)
    ]


def remove_branches(model: ModelPatcher) -> None:
    """Takes all LoRAs from beside the layers of `model`, in place: callers own a fresh clone."""
    _eject(model)
    for key in _keys(model):
        model.remove_additional_models(key)
        model.remove_injections(key)
    for call in CALLBACKS:
        model.remove_callbacks_with_key(call, KEY)
    follow_no_steps(model)


def _branch_patcher(
    lora: PlacedLora,
    strength: Strength,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    kind = comfy.model_patcher
    patcher = (kind.ModelPatcher if disable_dynamic else kind.CoreModelPatcher)(
        LowRankBranch(lora, strength), load_device, offload_device
    )
    # How core makes a copy for a second GPU.
    arguments = (lora, strength, load_device, offload_device)
    patcher.cached_patcher_init = (_branch_patcher, arguments)
    return patcher


def _inject(model: ModelPatcher) -> None:
    for branch in branches(model):
        branch.inject(model)


def _eject(model: ModelPatcher) -> None:
    for branch in reversed(branches(model)):
        branch.eject(model)


def _after_clone(_: ModelPatcher, clone: ModelPatcher) -> None:
    """A clone for the compiler gives up core's dynamic loading, and so do its branches."""
    if clone.is_dynamic():
        return
    for key in _keys(clone):
        patchers = clone.get_additional_models_with_key(key)
        plain = [p.clone(disable_dynamic=True) if p.is_dynamic() else p for p in patchers]
        clone.set_additional_models(key, plain)


def _keys(model: ModelPatcher) -> list[str]:
    return [key for key in model.additional_models if key.startswith(KEY)]


def _nothing(model: ModelPatcher) -> None:
    pass


CALLBACKS = {
    CallbacksMP.ON_INJECT_MODEL: _inject,
    CallbacksMP.ON_EJECT_MODEL: _eject,
    CallbacksMP.ON_CLONE: _after_clone,
}


def _linear(weight: torch.Tensor) -> torch.nn.Module:
    out_features, in_features = weight.shape
    linear = comfy.ops.manual_cast.Linear(
        in_features, out_features, bias=False, dtype=weight.dtype, device="meta"
    )
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
