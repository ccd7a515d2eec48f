"""A frozen base that takes less of the device's memory: the big linear layers of its blocks in 8
bits, its timestep modulation in main memory.

Only weights are quantised (torchao). A layer computes in the base's precision with the values that
its 8 bits stand for, on any device; adapters beside it stay float32.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import TorchAoConfig
from torch import nn

from ..config import ConfigError, Quantize
from .family import Family

# Bytes that a layer keeps for each of its outputs: a float32 scale, with int8 a zero point too
ROW_BYTES = {"fp8": 4, "int8": 5}


def block_modulation(family: Family) -> str:
    """Pattern of the layers of the blocks that see the timestep alone."""
    return rf"{family.blocks}\.\d+\.(" + "|".join(map(re.escape, family.modulation)) + ")"


def quantised_layers(family: Family, offload_modulation: bool) -> str:
    """Pattern of the linear layers that are held in 8 bits. Modulation in main memory is not: it is
    not short of bytes there, and unpacking them would take a CPU longer than computing.
    """
    blocks = rf"{family.blocks}\.\d+\..+"
    return rf"(?!{block_modulation(family)}){blocks}" if offload_modulation else blocks


def quantisation(
    family: Family, quantize: Quantize, offload_modulation: bool
) -> TorchAoConfig | None:
    """What diffusers' `from_pretrained` needs to quantise every layer as it is read, so that a bf16
    copy of one layer is all that is ever made. One scale per output; e4m3 or symmetric int8.

    Raises ConfigError where torchao is missing.
    """
    if quantize == "none":
        return None
    to_8_bits = _to_8_bits(quantize)
    from torchao.quantization import FqnToConfig

    layers = quantised_layers(family, offload_modulation)
    return TorchAoConfig(FqnToConfig({f"re:{layers}": to_8_bits}))


def quantise(
    family: Family, transformer: nn.Module, quantize: Quantize, offload_modulation: bool
) -> None:
    """The same for a model that was read whole, layer by layer, in place."""
    if quantize == "none":
        return
    to_8_bits = _to_8_bits(quantize)
    from torchao.quantization import quantize_

    layers = re.compile(quantised_layers(family, offload_modulation))
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and layers.fullmatch(name):
            quantize_(layer, to_8_bits)


def _to_8_bits(quantize: Quantize) -> Any:
    """torchao's configuration for a layer. Raises ConfigError where torchao is missing."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ConfigError(
            f"model.quantize: {quantize} needs torchao, which cannot be imported ({error}). "
            "Install it with `pip install turbo-distill[train]`, or set model.quantize=none."
        ) from error

    kind = {"fp8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}[quantize]
    return kind(set_inductor_config=False)  # those settings are the whole process's


class HostLinear(nn.Module):
    """A frozen linear layer that stays and computes where it is, wherever its model goes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def _apply(self, fn: object, recurse: bool = True) -> HostLinear:
        return self  # .to(), .cuda() and their like all come through here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.to(self.linear.weight.device)).to(x.device)


def keep_modulation_on_host(family: Family, transformer: nn.Module) -> None:
    """Leaves the blocks' modulation, a third of Qwen-Image, in main memory. It is applied to one
    vector per sample, so only that and [B, 6 * width] travel.
    """
    for name, layer in list(transformer.named_modules()):
        if re.fullmatch(block_modulation(family), name):
            transformer.set_submodule(name, HostLinear(layer))
