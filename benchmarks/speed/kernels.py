"""Every attention kernel that runs on this device, on the same tensors, checked by the guard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .core import Core
from .measure import Budget, Clock, Spread, in_turns
from .world import Size, dtype_of

CALL = "call"
INNER = 10  # calls per repetition: one is too short for a clock


@dataclass(frozen=True)
class Kernels:
    """Seconds per call of core's own attention ("core") and of each kernel that runs here.

    reasons: why others are left out, and what the guard says; wrong: those that it refuses.
    """

    table: dict[str, dict[str, Spread]]
    reasons: list[str]
    wrong: tuple[str, ...] = ()


def attention_kernels(core: Core, size: Size, tokens: int, rounds: int, budget: Budget) -> Kernels:
    """One forward's attention over `tokens` tokens, batch 1."""
    from comfy.ldm.modules.attention import optimized_attention

    attention = core.pack("nodes.attention")
    shape = (1, size.heads, tokens, size.head_dim)
    q, k, v = (torch.randn(shape, device=core.device, dtype=dtype_of(core)) for _ in range(3))
    arms: dict[str, Any] = {
        "core": lambda: optimized_attention(q, k, v, size.heads, skip_reshape=True)
    }
    reasons, wrong = [], []
    device = attention.Device.of(core.device)
    for name, kernel in attention.KERNELS.items():
        missing = {name: why} if (why := kernel.missing()) else {}
        try:
            attention.choose(name, device, missing, "pytorch")
            call = attention.read_call(kernel, q, k, v, size.heads, skip_reshape=True)
            fault = attention.fault_of(kernel.run(q, k, v, None, None), call, kernel)
        except (ValueError, RuntimeError) as error:
            reasons.append(f"- {name}: {error}")
            continue
        if fault:
            reasons.append(f"- {name}: {fault}")
            wrong.append(name)
        arms[name] = partial(kernel.run, q, k, v, None, None)

    def run(function: Any, clock: Clock) -> None:
        with clock(CALL):
            for _ in range(INNER):
                function()
        clock.seconds[CALL] /= INNER

    turns = {name: partial(run, function) for name, function in arms.items()}
    table = in_turns(turns, core.device, rounds, budget, total=False)
    return Kernels(table, reasons, tuple(wrong))
