"""Base models as ComfyUI users hold them, to see what a LoRA becomes on each.

bf16        unquantised, LoRA beside the weights
fp8_naive   every weight cast to e4m3 without scales, the LoRA merged and rounded again: what core's
            loaders do with a plain fp8 file
fp8_scaled  the blocks' weights in e4m3 with a scale per row (models/quantise.py), LoRA beside them:
            what Turbo LoRA Loader does on a scaled fp8 file

All compute in the base's usual precision; what differs is the rounding of weights.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import nn

from ..contract.bake.rounding import stochastic_fp8
from ..contract.lora_keys import NormalisedLora, delta
from ..models.base_lora import check_fit

BaseKind = Literal["bf16", "fp8_naive", "fp8_scaled"]
BASES: tuple[BaseKind, ...] = ("bf16", "fp8_naive", "fp8_scaled")

FP8 = torch.float8_e4m3fn


@torch.no_grad()
def cast_to_fp8(model: nn.Module) -> None:
    """Every parameter to e4m3 and back, in place: ComfyUI's weight_dtype fp8_e4m3fn."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(FP8).to(parameter.dtype))


@torch.no_grad()
def merge_into_fp8(model: nn.Module, lora: NormalisedLora) -> None:
    """Adds a LoRA to weights that are e4m3 and rounds the sum to e4m3 again, up or down at random,
    as core does. Raises LoraFormatError where it does not fit.
    """
    check_fit(model, lora)
    for name, module in lora.modules.items():
        weight = model.get_submodule(name).weight
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        generator = torch.Generator(device=weight.device).manual_seed(seed)
        change = delta(module).to(weight.device)
        weight.copy_(stochastic_fp8(weight.float() + change, generator))
