"""Floating-point operations by the precision that they run in."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FORMULAS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm]}  # theirs leave that one out


class FlopsByDtype(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention while it is entered,
    backward passes too, by PyTorch's own formulas, which a CPU's attention kernel does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[torch.dtype, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula:
            result = out[0] if isinstance(out, tuple) else out
            self.flops[result.dtype] += formula(*args, **(kwargs or {}), out_val=out)
        return out
