"""Base + few-step LoRA -> one smaller model: merged from 16 bits, its modulation folded, rounded.

`plan_bake` reads headers and checks everything; `bake` then goes through the weights one tensor at
a time, so that the largest layer, not the model, is what has to fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..metadata import architecture_of, usage_hint
from ..spec import HEADER_KEY
from ..tensor_file import is_finite
from . import fold
from .plan import TIMESTEP_ZERO, BakePlan, is_rounded, module_of, parameters
from .rounding import Losses
from .weights import stream_to

BAKED_KEY = "turbo.baked"
QUANTISATION_KEY = "_quantization_metadata"  # read by ComfyUI's convert_old_quants

_PROBED_LAYERS = 24  # how many layers the losses are measured on,
_PROBED_NUMBERS = 1 << 20  # and how many numbers of each


@dataclass(frozen=True)
class BakeReport:
    """What a bake did, for a person to read."""

    plan: BakePlan
    losses: Losses
    file_bytes: int

    def to_text(self) -> str:
        """A few lines for the node, the terminal and the log."""
        plan, lora = self.plan, self.plan.lora.lora
        before = sum(stored.meta.numel() for stored in plan.base.tensors.values())
        after = parameters(plan.tensors)
        folded = sum(fold.is_folded(name) for name in lora.modules) if plan.folded else 0
        lines = [
            f"{plan.out.name}: {self.file_bytes / 1e9:.2f} GB, {plan.dtype}",
            f"parameters: {before / 1e9:.3f} B -> {after / 1e9:.3f} B ({after / before:.3f}x)",
            f"base: {plan.base.source.name}; LoRA: {lora.source}, "
            f"strength {plan.spec.strength_text}",
            f"LoRA modules: {len(lora.modules) - folded} merged, {folded} folded",
            f"LoRA alpha: {lora.alpha_words}",
            f"{_folding(plan)}: {usage_hint(plan.spec)}",
            self.losses.to_text(),
        ]
        lines += [f"Warning: {warning}" for warning in lora.warnings]
        if lora.other_keys:
            lines.append(
                f"Warning: {len(lora.other_keys)} keys of the LoRA belong to no layer of the "
                f"diffusion model and were not merged, for example {lora.other_keys[0]}."
            )
        return "\n".join(lines)


def _folding(plan: BakePlan) -> str:
    if plan.folded is None:
        return f"not folded ({plan.unfolded})"
    return f"folded for sigma {', '.join(f'{sigma:g}' for sigma in plan.folded.sigmas)}"


def bake(
    plan: BakePlan, progress: Callable[[int, int], None] = lambda done, total: None
) -> BakeReport:
    """Writes the model, tensor by tensor; the file appears whole or not at all.

    progress: called with numbers of tensors, done and in all. Raises OSError, and RuntimeError
    where a number of the new model is NaN or infinite; then too nothing is left.
    """
    losses = Losses()
    probed = set(_probed(plan))
    with torch.inference_mode(), stream_to(plan.out, plan.tensors, header(plan)) as out:
        for done, (name, tensor) in enumerate(baked(plan), 1):
            _check_finite(plan, name, tensor)
            out.write(name, tensor)
            module = module_of(name)
            if module in probed and name.endswith(".weight"):
                _probe(plan, module, losses)
            progress(done, len(plan.tensors))
        if not losses.finite():
            raise RuntimeError(
                f"{plan.out.name}: the figures of the bake are not finite, so the model would be "
                f"broken; nothing was written. Check {plan.base.source.name} and the LoRA's alpha."
            )
    return BakeReport(plan, losses, plan.out.stat().st_size)


def baked(plan: BakePlan) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `plan.tensors` with its name, computed one layer at a time.

    They are where `plan.base` has its weights, a file's in main memory.
    """
    hidden = None
    if plan.folded is not None:
        hidden = fold.embed_sigmas(plan.folded.sigmas, lambda name, x: _apply(plan, name, x))
    for name in plan.tensors:
        module = module_of(name)
        if hidden is not None and fold.becomes_table(module):
            yield name, _apply(plan, module, hidden)
        elif name == TIMESTEP_ZERO:
            yield name, torch.empty(0)
        elif not name.endswith(".weight_scale"):
            yield from _merge_and_round(plan, name)


def header(plan: BakePlan) -> dict[str, str]:
    """Everything that a loader, or a person, has to know of the file."""
    base, lora = plan.base.source.name, plan.lora.lora.source
    architecture, implementation = architecture_of(plan.spec.family)
    metadata = {
        "format": "pt",
        HEADER_KEY: plan.spec.to_json(),
        **({} if plan.folded is None else {fold.HEADER_KEY: plan.folded.to_json()}),
        BAKED_KEY: json.dumps({"base": base, "lora": lora, "dtype": plan.dtype}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": plan.out.stem,
        "modelspec.date": datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
        "modelspec.prediction_type": "flow",
        "modelspec.usage_hint": f"Turbo Baked Loader; {usage_hint(plan.spec)}",
        "modelspec.merged_from": f"{base}, {lora}",
    }
    if plan.format.config is not None:
        layers = {
            module_of(name): plan.format.config
            for name, meta in plan.tensors.items()
            if is_rounded(name, meta)
        }
        metadata[QUANTISATION_KEY] = json.dumps({"format_version": "1.0", "layers": layers})
    return metadata


def _apply(plan: BakePlan, name: str, x: Tensor) -> Tensor:
    """A layer of base + LoRA in float32, its weight never merged.  # [rows, in] -> [rows, out]"""
    weight, bias = (plan.base.read(f"{name}.{part}").float() for part in ("weight", "bias"))
    x = x.to(weight.device)
    y = linear(x, weight, bias)
    if name in plan.lora.lora.modules:
        down, up, scale = plan.lora.factors(name)
        y += scale * linear(linear(x, down), up)
    return y


def _merge_and_round(plan: BakePlan, name: str) -> Iterator[tuple[str, Tensor]]:
    """Merges in float32 and rounds once: a tensor, and its scale where it has one."""
    tensor, module = plan.base.read(name).float(), module_of(name)
    if name.endswith(".weight") and module in plan.lora.lora.modules:
        down, up, scale = plan.lora.factors(module)
        tensor.addmm_(up, down, alpha=scale)
    if not is_rounded(name, plan.base.meta(name)):
        yield name, tensor.bfloat16()
        return
    weight, scales = plan.format.quantise(tensor)
    yield name, weight
    if scales is not None:
        yield f"{name}_scale", scales


def _check_finite(plan: BakePlan, name: str, tensor: Tensor) -> None:
    """8-bit weights are as finite as their scale, which is checked as well."""
    if tensor.element_size() > 1 and not is_finite(tensor):
        raise RuntimeError(
            f"{plan.out.name}: {name} came out with NaN or infinite numbers, which would turn "
            f"every picture black; nothing was written. {plan.base.source.name} holds them, or the "
            f"LoRA's change is too large (alpha {plan.lora.lora.alpha_words}): take another base "
            "or LoRA."
        )


def _probed(plan: BakePlan) -> list[str]:
    """Some of the merged layers of the blocks, evenly spaced, to measure losses on."""
    layers = [
        name
        for name in plan.lora.lora.modules
        if is_rounded(f"{name}.weight", plan.base.meta(f"{name}.weight"))
    ]
    return layers[:: -(-len(layers) // _PROBED_LAYERS) or 1]


def _probe(plan: BakePlan, name: str, losses: Losses) -> None:
    weight = plan.base.read(f"{name}.weight")
    rows = max(1, _PROBED_NUMBERS // weight.shape[1])
    down, up, scale = plan.lora.factors(name)
    losses.add(weight[:rows].float(), down, up[:rows], scale, seed=losses.layers)
