"""Applies a few-step LoRA to a ComfyUI MODEL: all of it or none, and the spec with it."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.quant_ops import QuantizedTensor

from ..distill.contract.bake.fold import is_folded
from ..distill.contract.base_loras import base_hint
from ..distill.contract.checks import SpecError
from ..distill.contract.kept import Kept
from ..distill.contract.lora_forms import LoraFormatError, adapter_kind, is_text_encoder
from ..distill.contract.lora_keys import NormalisedLora, normalise
from ..distill.contract.metadata import read_lora, usage_hint
from ..distill.contract.resolve import Override, Resolved, resolve
from ..distill.contract.shown import shown
from ..distill.contract.spec import TurboSpec
from .baked_model import is_folded_model
from .bypass import Strength, add_branch, check_beside
from .core_adapters import adapter_patches
from .files import fingerprint
from .kept_by_merging import measure
from .lora_targets import PlacedLora, Target, layers_of, place, targets_of
from .saved_bypass import change_patches, lora_patches, save_with_branches
from .spec_attachment import Attached, attach, attached_to
from .step_strength import StepStrength
from .ui import with_warnings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MODES = ("auto", "merge", "bypass")
CACHED_FILES = 2  # a stack of two re-runs without reading; each may hold 1 GB of memory

FULL = "full precision"
PLAIN_FP8 = "plain fp8"
GGUF = "GGUF"
CORE_NAMES = {"z-image": "lumina2", "wan2.2": "wan2.1"}  # family -> core's, where they differ


@dataclass(frozen=True)
class LoraReport:
    """What `apply_lora` did, for a person to read."""

    file: str
    spec: TurboSpec
    spec_source: str
    lora: NormalisedLora
    strength: Strength
    mode: str
    reason: str
    kept: Kept | None = None
    warnings: list[str] = field(default_factory=list)
    merged: int = 0  # weights that core's adapters change, in place of modules
    base: str | None = None  # what its base was beside a published model

    def to_text(self) -> str:
        """A few lines for the node and the log."""
        lines = [
            self.file,
            usage_hint(self.spec),
            f"spec from: {self.spec_source}",
            *([f"base: {self.base}"] if self.base else []),
            *self._matched(),
            f"mode: {self.mode} ({self.reason})",
            *([f"merging: {self.kept.to_text(len(self.lora.modules))}"] if self.kept else []),
            f"applied strength: {_shown_strength(self.strength)}",
        ]
        return with_warnings(lines, self.warnings)

    def _matched(self) -> list[str]:
        if self.merged:
            return [f"matched: {self.merged} of {self.merged} weights", "alpha: as core reads it"]
        count = len(self.lora.modules)
        ranks = ", ".join(
            f"{rank}" if number == count else f"{rank} ({number} modules)"
            for rank, number in self.lora.ranks.items()
        )
        lines = [f"matched: {count} of {count} modules, rank {ranks}"]
        if changes := len(self.lora.changes):
            lines.append(f"and {changes} norms or biases, changed in place")
        return [*lines, f"alpha: {self.lora.alpha_words}"]


def _shown_strength(strength: Strength) -> str:
    return f"{strength:g}" if isinstance(strength, float) else f"{strength} (one per step)"


def apply_lora(
    model: ModelPatcher,
    path: Path,
    strength: float = 1.0,
    mode: str = "auto",
    override: Override | None = None,
) -> tuple[ModelPatcher, LoraReport]:
    """A clone of `model` with the LoRA at `path` on it and its spec attached.

    strength: times the strength that the spec asks for. mode: "merge" patches weights as core does,
    "bypass" leaves them alone and adds the low-rank product to each layer's output, "auto" merges
    where that keeps the LoRA, measured on a few layers, and is not repeated in every forward.
    Raises LoraFormatError (no LoRA, another architecture, partial match) and SpecError (no schedule
    known, or another than that of a Turbo LoRA already on `model`), ValueError (mode, strength).
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}; found {shown(mode)}")
    if not math.isfinite(strength):
        raise ValueError(
            f"strength: expected a finite number, 1 for as trained; found {strength}. Check the "
            "node that computes it."
        )
    override = override or Override()
    tensors, metadata = _read(path)
    if (adapter := adapter_kind(tensors)) is not None:
        return _apply_adapters(model, path, strength, mode, override, adapter)
    known = targets_of(model.model)
    lora = normalise(tensors, metadata, source=path.name, known_modules=known, keep_changes=True)
    if is_folded_model(model.model.diffusion_model):
        _check_unfolded(lora)
    placed = place(lora, model.model, known)
    resolved = resolve(path, metadata, override)
    spec = resolved.spec
    _check_agreement(attached_to(model), spec, path.name, override)

    kinds = Counter(
        _weight_kind(placed.layers[target.module]) for target in placed.targets.values()
    )
    applied = _applied(spec, strength)
    kept = None
    if isinstance(applied, StepStrength):
        chosen, reason = _choose_stepwise(mode, path.name)
    else:
        kept = _measured(mode, placed, applied, kinds)
        chosen, reason = _choose(mode, kinds, kept)
    patched = model.clone()
    if isinstance(applied, float) and placed.changes:
        _add_patches(patched, change_patches(placed), applied, path.name)
    elif placed.changes:
        raise LoraFormatError(
            f"{path.name}: it changes {len(placed.changes)} norms or biases, which are part of the "
            f"weights, and its strength is another at each step. Stamp it with one strength."
        )
    if isinstance(applied, float) and chosen == "merge":
        _add_patches(patched, lora_patches(placed), applied, path.name)
    else:
        check_beside(placed)
        _bypass(patched, placed, applied, path)
    attach(patched, Attached(spec, resolved.source, path.name))
    warnings = _warnings(model, lora, resolved, kinds, applied)
    if chosen == "merge" and _rounds(kinds) and not (kept and kept.survives):
        warnings.append("merging rounds the LoRA to the base's low precision; use mode auto.")
    report = LoraReport(
        path.name, spec, resolved.source, lora, applied, chosen, reason, kept, warnings
    )
    return patched, replace(report, base=base_hint(metadata))


def _apply_adapters(
    model: ModelPatcher, path: Path, strength: float, mode: str, override: Override, kind: str
) -> tuple[ModelPatcher, LoraReport]:
    """What only a merge can do, merged by core; raises as `apply_lora`."""
    if mode == "bypass":
        raise LoraFormatError(
            f"{path.name}: it holds {kind}, which cannot stay beside the weights. Choose mode auto "
            f"or merge."
        )
    tensors, metadata = _read(path)
    known = targets_of(model.model)
    patches = adapter_patches(tensors, model.model, known, path.name)
    resolved = resolve(path, metadata, override)
    spec = resolved.spec
    _check_agreement(attached_to(model), spec, path.name, override)
    applied = spec.only_strength(kind) * strength
    lora = NormalisedLora(path.name, {}, other_keys=tuple(filter(is_text_encoder, tensors)))
    patched = model.clone()
    _add_patches(patched, patches, applied, path.name)
    attach(patched, Attached(spec, resolved.source, path.name))
    named = layers_of(model.model)
    layers = [named[Target.of(to).module] for to in patches]
    kinds = Counter(_weight_kind(layer) for layer in layers if hasattr(layer, "weight"))
    warnings = _warnings(model, lora, resolved, kinds, applied)
    if _rounds(kinds):
        warnings.append("merging rounds it to the base's low precision; use a bf16 base.")
    reason = f"{kind} can only be merged, which core does"
    report = LoraReport(
        path.name, spec, resolved.source, lora, applied, "merge", reason, None, warnings
    )
    return patched, replace(report, merged=len(patches), base=base_hint(metadata))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return _read_version(path, fingerprint(path))


@functools.lru_cache(maxsize=CACHED_FILES)
def _read_version(path: Path, version: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return read_lora(path)


# ------------------------------------------------------------------------------------ which layers


def _check_unfolded(lora: NormalisedLora) -> None:
    """Raises LoraFormatError where a LoRA changes layers that a baked model no longer has."""
    if folded := [name for name in lora.modules if is_folded(name)]:
        raise LoraFormatError(
            f"{lora.source}: {len(folded)} of its {len(lora.modules)} modules change the timestep "
            f"modulation, such as {folded[0]}. In this baked MODEL those layers are folded into a "
            f"table, so they can no longer be changed: apply this LoRA to the model that it was "
            f"baked from, or bake with this LoRA instead."
        )


def _weight_kind(layer: torch.nn.Module) -> str:
    weight = layer.weight
    if gguf := getattr(weight, "tensor_type", None):
        name = getattr(gguf, "name", str(gguf))
        return FULL if name in ("F32", "F16", "BF16") else f"{GGUF} {name}"
    if isinstance(weight, QuantizedTensor):
        return f"quantised {getattr(layer, 'quant_format', '')}".strip()
    if weight.dtype.is_floating_point and weight.dtype.itemsize >= 2:
        return FULL
    if weight.dtype.is_floating_point:
        return "scaled fp8" if hasattr(layer, "scale_weight") else PLAIN_FP8
    return f"quantised {weight.dtype}".replace("torch.", "")


# -------------------------------------------------------------------------------------- which spec


def _check_agreement(
    previous: Attached | None, spec: TurboSpec, file: str, override: Override
) -> None:
    """Two Turbo LoRAs on one MODEL must want the same sampling, or a person must decide."""
    if previous is None or override.sigmas is not None:
        return
    if _sampling(previous.spec) != _sampling(spec):
        raise SpecError(
            f"{file} wants {usage_hint(spec)}, but {previous.file}, which is on this MODEL "
            f"already, wants {usage_hint(previous.spec)}. One image can follow one schedule only: "
            f"remove one of the two, or decide with `sigmas_override` on this, the later loader."
        )


def _sampling(spec: TurboSpec) -> tuple[object, ...]:
    """All that one image can follow once only."""
    schedule = (spec.nodes, spec.shift, spec.terminal) if spec.by_size else spec.sigmas()
    return schedule, spec.sampler, spec.cfg, spec.guidance


# --------------------------------------------------------------------------------------- applying


def _measured(mode: str, placed: PlacedLora, strength: float, kinds: Counter[str]) -> Kept | None:
    """What merging keeps, where it may be merged and rounding may matter."""
    if mode == "bypass" or any(kind.startswith(GGUF) for kind in kinds):
        return None
    dtypes = {layer.weight.dtype for layer in placed.layers.values()}
    if set(kinds) == {FULL} and dtypes == {torch.float32}:
        return None
    kept = measure(placed, strength)
    return kept if kept.layers else None


def _choose(mode: str, kinds: Counter[str], kept: Kept | None) -> tuple[str, str]:
    """merge or bypass, and why."""
    weights = ", ".join(kind for kind, _ in kinds.most_common())
    if mode != "auto":
        return mode, f"chosen by hand; the base weights are {weights}"
    if kept is None and _rounds(kinds):
        return "bypass", f"auto: the base weights are {weights}; merging would round the LoRA away"
    if kept is not None and not kept.survives:
        which = "the LoRA" if _rounds(kinds) else "so small a LoRA"
        return "bypass", f"auto: the base weights are {weights}; merging would round {which} away"
    if set(kinds) == {FULL}:
        return "merge", "auto: the base weights are in full precision"
    if kept is not None:
        return "merge", f"auto: the base weights are {weights}, and the LoRA survives in them"
    return (
        "bypass",
        f"auto: the base weights are {weights}; merging would be done anew in every forward",
    )


def _applied(spec: TurboSpec, strength: float) -> Strength:
    """What the updates are multiplied by: a number, or one per step."""
    if isinstance(spec.strength, tuple):
        return StepStrength([one * strength for one in spec.strength])
    return spec.strength * strength


def _choose_stepwise(mode: str, file: str) -> tuple[str, str]:
    """Weights cannot change between two steps, what is beside them can. Raises ValueError."""
    if mode == "merge":
        raise ValueError(
            f"{file}: mode merge puts the LoRA into the weights with one strength, and this LoRA "
            f"has another at each step. Choose mode auto or bypass."
        )
    return "bypass", f"{mode if mode == 'auto' else 'chosen by hand'}: one strength per step"


def _is_family(image_model: str, family: str) -> bool:
    """Whether core's name of a model is that of a spec's family."""
    names = (image_model, CORE_NAMES.get(family, family))
    one, other = (re.sub("[^a-z0-9]", "", name.lower()) for name in names)
    return one == other


def _rounds(kinds: Counter[str]) -> bool:
    """Whether a merged LoRA is rounded. In GGUF it is not: that adds it to what it dequantises."""
    return any(kind != FULL and not kind.startswith(GGUF) for kind in kinds)


def _add_patches(
    model: ModelPatcher, patches: dict[Any, Any], strength: float, source: str
) -> None:
    """Ordinary weight patches with core's own LoRA arithmetic."""
    added = model.add_patches(patches, strength)
    if len(added) != len(patches):
        raise RuntimeError(
            f"{source}: core took {len(added)} of {len(patches)} patches. Use mode bypass, and "
            f"please report which model loader this MODEL came from."
        )


def _bypass(model: ModelPatcher, lora: PlacedLora, strength: Strength, path: Path) -> None:
    # The key tells what is injected: core takes models with equal keys for equally patched.
    position = len(model.injections)
    key = f"{position}.{path.name}.{fingerprint(path)}.{strength}"
    add_branch(model, key, lora, strength)
    save_with_branches(model)


def _warnings(
    model: ModelPatcher,
    lora: NormalisedLora,
    resolved: Resolved,
    kinds: Counter[str],
    strength: Strength,
) -> list[str]:
    warnings = list(lora.warnings)
    if PLAIN_FP8 in kinds:
        warnings.append(
            "the base model's weights are cast to fp8 without scales. A LoRA trained on bf16 tends "
            "to show a grid pattern on such a base; use bf16, a scaled fp8 file, or GGUF Q8."
        )
    image_model = model.model.model_config.unet_config.get("image_model")
    family = resolved.spec.family
    if image_model and resolved.known and not _is_family(image_model, family):
        warnings.append(f"the LoRA's spec is for {family}, this MODEL is {image_model}.")
    if lora.other_keys:
        warnings.append(
            f"{len(lora.other_keys)} keys of the file belong to no layer of the diffusion model "
            f"and were not applied, for example {lora.other_keys[0]}."
        )
    if not any(strength.strengths if isinstance(strength, StepStrength) else [strength]):
        warnings.append("strength 0 switches the LoRA off, but the Turbo Sampler obeys its spec.")
    return warnings
