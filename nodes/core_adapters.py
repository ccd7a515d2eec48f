"""What core's weight adapters can merge and no branch beside a layer can do: LoKr, LoHa, DoRA, OFT.

Such a file is merged by core's own arithmetic, and only where core has a use for every key of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import comfy.lora
import torch

from ..distill.contract.lora_forms import LoraFormatError, is_text_encoder
from ..distill.contract.lora_keys import split_prefix
from ..distill.contract.module_names import flat_index, flatten
from ..distill.contract.shown import shown
from .lora_targets import Target, layers_of, weight_shape

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

_STEM = re.compile(
    r"(.+?)(\.(lora|hada|lokr|oft|boft)_\w+|[._]lora\.(up|down)|\.dora_scale|\.alpha|\.diff(_b)?"
    r"|\.[wb]_norm|\.set_weight|\.reshape_weight|\.rescale)(\..*)?"
)


class _Noted(dict[str, torch.Tensor]):
    """A LoRA's tensors, and which of them were read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def adapter_patches(
    tensors: Mapping[str, torch.Tensor], model: BaseModel, known: Mapping[str, Target], source: str
) -> dict[Any, Any]:
    """Patches for `add_patches`, by core's own reading of the file.

    Raises LoraFormatError: keys that core has no use for, or a size that does not fit.
    """
    noted = _Noted(tensors)
    patches = comfy.lora.load_lora(noted, dict(_stems(tensors, known)), log_missing=False)
    left = [key for key in tensors if key not in noted.read and not is_text_encoder(key)]
    if left or not patches:
        examples = ", ".join(shown(key) for key in (left or list(tensors))[:3])
        raise LoraFormatError(
            f"{source}: core, which merges this kind of file, has no use for {len(left)} of its "
            f"{len(tensors)} keys in this MODEL ({type(model).__name__}), for example {examples}. "
            f"Applied in part it would not give the trained result: choose the file for this very "
            f"model, or one with plain low-rank pairs (lora_A / lora_B)."
        )
    layers = layers_of(model)
    for to, patch in patches.items():
        _check_size(patch, Target.of(to), layers, source)
    return patches


def _stems(
    tensors: Mapping[str, torch.Tensor], known: Mapping[str, Target]
) -> Iterator[tuple[str, Any]]:
    """What stands before the adapter's own part of each key -> core's key of the weight."""
    index = flat_index(known)
    for key in tensors:
        if (match := _STEM.fullmatch(key)) is None or is_text_encoder(key):
            continue
        prefix, name = split_prefix(match[1])
        if prefix.endswith("_") or name not in known:
            name = index.get(flatten(name.lstrip("_")), name)
        if name in known:
            yield match[1], known[name].patch_key


def _check_size(
    patch: Any, target: Target, layers: Mapping[str, torch.nn.Module], source: str
) -> None:
    """Core would only log an error, and leave the weight as it is."""
    found, expected = _size(patch), weight_shape(layers, target)
    if found is None or expected is None or len(expected) < 2:
        return
    rows, columns = expected[0], int(torch.tensor(expected[1:]).prod())
    if found[0] != rows or found[1] not in (None, columns):
        raise LoraFormatError(
            f"{source}: {target.place} is [{rows}, {columns}]; the file's change of it is "
            f"{list(found)}. Choose the file for this very model (size, pruning, version)."
        )


def _size(patch: Any) -> tuple[int, int | None] | None:
    """(out, in) of an adapter; None where its factors do not tell."""
    weights = getattr(patch, "weights", None)
    match getattr(patch, "name", ""):
        case "lora":
            up, down, _, mid = weights[:4]
            kernel = 1 if mid is None else mid.shape[2:].numel()
            return up.shape[0], down.flatten(1).shape[1] * kernel
        case "loha" if weights[5] is None:
            return weights[0].shape[0], weights[1].shape[1]
        case "lokr" if weights[7] is None:
            one, two, _, one_a, one_b, two_a, two_b = weights[:7]
            first = one.shape if one is not None else (one_a.shape[0], one_b.shape[1])
            second = two.shape if two is not None else (two_a.shape[0], two_b.flatten(1).shape[1])
            columns = torch.Size(second[1:]).numel()
            return first[0] * second[0], first[1] * columns
        case "oft" | "boft":
            return weights[0].shape[-3] * weights[0].shape[-1], None
    return None
