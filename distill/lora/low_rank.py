"""LoRA modules of lower rank, and how far two of them are apart; the full matrix is never formed.

A change of a weight is W = s B A with B [out, r], A [r, in]. With B = Q R and A^T = P T (QR), the
singular values of W are those of the r x r core s R T^T. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..contract.lora_keys import LoraModule


def truncate(module: LoraModule, rank: int) -> LoraModule:
    """The best approximation of a module's change by one of `rank` (Eckart & Young 1936).

    The scale goes into the factors, sqrt(singular value) to each of them, so both stay in range of
    half precision; alpha becomes the rank. A module of no higher rank comes back as it is.
    """
    if module.rank <= rank:
        return module
    left, right, core = _factor(module.scale * module.up.double(), module.down.double())
    u, s, vh = torch.linalg.svd(core)
    root = s[:rank].sqrt()
    up = left @ u[:, : len(root)] * root  # [out, rank]
    down = root[:, None] * (vh[: len(root)] @ right.mT)  # [rank, in]
    return replace(
        module, up=up.float(), down=down.float(), alpha=float(len(root)), alpha_source="tensor"
    )


@dataclass(frozen=True)
class Deviation:
    """How far one change of a weight is from another: squared Frobenius norms."""

    difference: float
    reference: float

    def __add__(self, other: Deviation) -> Deviation:
        """Of two modules taken together."""
        return Deviation(self.difference + other.difference, self.reference + other.reference)

    @property
    def relative(self) -> float:
        """|new - old| / |old|; 0 where both are 0."""
        if self.difference == 0:
            return 0.0
        return math.sqrt(self.difference / self.reference) if self.reference else math.inf


def deviation(new: LoraModule, old: LoraModule) -> Deviation:
    """Of `new` from `old`, rounding of the stored weights included. Two modules of one layer."""
    if _same(new, old):
        return Deviation(0.0, _square(old))
    up = torch.cat([new.scale * new.up.double(), -old.scale * old.up.double()], dim=1)
    down = torch.cat([new.down.double(), old.down.double()])
    return Deviation(_factor(up, down)[2].square().sum().item(), _square(old))


def _factor(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal left and right factors and the small core of up @ down = left core right^T."""
    left, r = torch.linalg.qr(up)
    right, t = torch.linalg.qr(down.mT)
    return left, right, r @ t.mT


def _square(module: LoraModule) -> float:
    core = _factor(module.scale * module.up.double(), module.down.double())[2]
    return core.square().sum().item()


def _same(a: LoraModule, b: LoraModule) -> bool:
    return a.scale == b.scale and torch.equal(a.up, b.up) and torch.equal(a.down, b.down)
