"""LoRAs of a style or a task that become part of the frozen base: W + sum of strength * delta."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import BaseLora
from ..contract.lora_fit import misfits
from ..contract.lora_keys import LoraFormatError, NormalisedLora, delta, normalise
from ..contract.metadata import read_lora
from ..contract.peft_folder import lora_file
from ..contract.shown import shown

log = logging.getLogger(__name__)


def read_base_lora(path: Path) -> NormalisedLora:
    """A LoRA file of any spelling, or a folder as PEFT writes it; what was assumed is logged.

    Raises OSError, LoraFormatError.
    """
    file = lora_file(path)
    lora = normalise(*read_lora(file), source=path.name)
    for warning in lora.warnings:
        log.warning("%s: %s", path.name, warning)
    if lora.other_keys:
        raise LoraFormatError(
            f"{path.name}: {len(lora.other_keys)} keys belong to no layer of the diffusion model, "
            f"such as {shown(lora.other_keys[0])}; expected a LoRA that the base can take whole. "
            "`turbo-distill export` writes the part that it can."
        )
    return lora


@torch.no_grad()
def merge(transformer: nn.Module, loras: Sequence[tuple[NormalisedLora, float]]) -> None:
    """Adds LoRAs at their strengths to the weights, in place: the sum in float32, rounded once to
    the weight's precision. Raises LoraFormatError where one does not fit.
    """
    for lora, _ in loras:
        check_fit(transformer, lora)
    for name in dict.fromkeys(name for lora, _ in loras for name in lora.modules):
        weight = transformer.get_submodule(name).weight
        merged = weight.float()
        for lora, strength in loras:
            if name in lora.modules:
                merged = merged + strength * delta(lora.modules[name]).to(weight.device)
        weight.copy_(merged)


def check_fit(transformer: nn.Module, lora: NormalisedLora) -> None:
    """Raises LoraFormatError unless every module of the LoRA has its linear layer in the base."""
    layers = dict(transformer.named_modules())

    def shape(name: str) -> list[int] | None:
        layer = layers.get(name)
        linear = hasattr(layer, "in_features") and hasattr(layer, "out_features")
        return [layer.out_features, layer.in_features] if linear else None

    for odd in misfits(lora, shape)[:1]:
        if odd.expected is None:
            raise LoraFormatError(
                f"{lora.source}: the base has no linear layer {shown(odd.name)}. Was the LoRA "
                "made for another model? Name its base with --model."
            )
        raise LoraFormatError(
            f"{lora.source}: {odd.name}: expected a LoRA for a weight {odd.expected}, found "
            f"{odd.found}. It was made for a model of another size; name its base with --model."
        )


def records(loras: Sequence[BaseLora]) -> list[dict[str, Any]]:
    """What a header says of them: name, strength, and `content` to know them again."""
    return [
        {
            "name": lora.path.name,
            "strength": lora.strength,
            "content": content(read_base_lora(lora.path)),
        }
        for lora in loras
    ]


def content(lora: NormalisedLora) -> str:
    """A hash of what a LoRA does to its layers, the same in every spelling and in any file."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in sorted(lora.modules.items()):
        for tensor in (module.down, module.up):
            digest.update(f"{name} {list(tensor.shape)} {module.alpha!r} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
