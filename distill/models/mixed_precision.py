"""LoRA beside a base of lower precision: float32 master weights, multiplied in the precision of the
base (mixed precision training, Micikevicius et al. 2018). PEFT's own layer casts its input to
float32 instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn


class LoraLinear(lora.Linear):
    """PEFT's layer for a frozen linear layer, plain or quantised; plain LoRA without dropout or
    bias.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> base(x) + scale B A x, [..., out]

        The masters are cast, so that autograd hands them gradients in their own precision. Where
        that is the one of x, PEFT's own forward.
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or all(self._down(name).dtype == x.dtype for name in active):
            return super().forward(x)
        # Added in place, unless to a view, whose gradient autograd would copy: torchao's int8 layer
        # returns one, a plain layer for more dimensions than rows.
        rows = x.flatten(0, -2)
        result = self.base_layer(rows)
        for name in active:
            low = nn.functional.linear(rows, self._down(name).to(x.dtype))
            up = self.lora_B[name].weight.to(x.dtype).t()
            add = result.addmm_ if result._base is None else result.addmm
            result = add(low, up, alpha=self.scaling[name])
        return result.unflatten(0, x.shape[:-1])

    def _down(self, name: str) -> torch.Tensor:
        return self.lora_A[name].weight


def lora_config(**keys: Any) -> LoraConfig:
    """PEFT's configuration, whose linear layers are `LoraLinear`."""
    config = LoraConfig(**keys)
    config._register_custom_module({nn.Linear: LoraLinear})  # experimental; PEFT's guide has it
    return config


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Products of float32 tensors run in TF32 meanwhile, on a GPU. The switch is the process's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
