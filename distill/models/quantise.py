"""A frozen base that takes less of the device's memory: the big linear layers of its blocks in 8
bits, its timestep modulation in main memory.

Only weights are quantised (torchao). A layer computes in the base's precision with the values that
its 8 bits stand for, on any device; adapters' weights beside it stay float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import TorchAoConfig
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

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


KEPT_INPUTS = 8  # whose outputs stay: 4.4 MB each per sample of Qwen-Image


@dataclass(frozen=True, eq=False)
class HostInput:
    """What modules in main memory are asked for, and what they have answered."""

    host: torch.Tensor
    device: torch.device  # where it came from and where the outputs are
    outputs: dict[nn.Module, torch.Tensor] = field(default_factory=dict)

    def is_same(self, other: HostInput) -> bool:
        a, b = self.host, other.host
        return self.device == other.device and a.dtype == b.dtype and torch.equal(a, b)


class HostInputs:
    """A tensor is sent once however many modules it goes to, and known again as long as it lives: a
    checkpointed block runs again with the very tensor of its first time. The latest few are known
    by their numbers too: the student's own times, the schedule's nodes, come again and again.
    """

    def __init__(self) -> None:
        self._alive = WeakTensorKeyDictionary()
        self._latest: list[HostInput] = []

    def of(self, x: torch.Tensor) -> HostInput:
        if x not in self._alive:
            # a copy on a CPU as well, for x would keep itself alive
            sent = HostInput(x.to("cpu", copy=True), x.device)
            known = next((old for old in self._latest if old.is_same(sent)), sent)
            others = (old for old in self._latest if old is not known)
            self._latest = [known, *others][:KEPT_INPUTS]
            self._alive[x] = known
        return self._alive[x]


class HostModule(nn.Module):
    """A frozen module that stays and computes where it is, wherever its model goes; its input
    needs no gradient.
    """

    def __init__(self, module: nn.Module, inputs: HostInputs) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs

    def _apply(self, fn: object, recurse: bool = True) -> HostModule:
        return self  # .to(), .cuda() and their like all come through here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        known = self.inputs.of(x)
        if self not in known.outputs:
            known.outputs[self] = self.module(known.host).to(x.device, non_blocking=True)
        return known.outputs[self]


def keep_modulation_on_host(family: Family, transformer: nn.Module) -> None:
    """Leaves the blocks' modulation, a third of Qwen-Image, in main memory. It is applied to one
    vector per sample, so only that and [B, 6 * width] of every block travel.

    What stands before it in an nn.Sequential, its activation, goes along: what comes in is then the
    embedding of the time that all blocks share.
    """
    inputs, pattern = HostInputs(), re.compile(block_modulation(family))
    for name in [name for name, _ in transformer.named_modules() if pattern.fullmatch(name)]:
        above = name.rpartition(".")[0]
        whole = above if isinstance(transformer.get_submodule(above), nn.Sequential) else name
        transformer.set_submodule(whole, HostModule(transformer.get_submodule(whole), inputs))
