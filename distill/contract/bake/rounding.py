"""8-bit weights as ComfyUI's mixed-precision loader reads them, and what rounding costs a LoRA.

fp8 is ComfyUI's `float8_e4m3fn`, one scale per layer: its CUDA kernels take no other. int8 is
`int8_tensorwise`, one scale per output row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kept import Kept

FP8_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = 127.0
_TINY = 1e-30  # a row of zeros has a scale too


@dataclass(frozen=True)
class Format:
    """How linear layers are stored.

    dtype: of the weight; scale_shape: of `weight_scale` for [out, in], None without; quantise:
    float32 weight -> values and scale; config: what ComfyUI's loader must know of such a layer.
    """

    dtype: torch.dtype
    quantise: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    scale_shape: Callable[[int], tuple[int, ...]] | None = None
    config: dict[str, object] | None = None


def to_bf16(weight: Tensor) -> tuple[Tensor, None]:
    """Rounded to nearest; no scale."""
    return weight.bfloat16(), None


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and their scale, a power of two: so the product is exact in bf16 again.

    A power of two costs a floating-point format no precision.  # [out, in] -> [out, in], []
    """
    scale = torch.exp2(torch.ceil(torch.log2(_core_scale(weight))))
    return (weight / scale).to(torch.float8_e4m3fn), scale


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and a scale per row.  # [out, in] -> [out, in], [out, 1]"""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / INT8_MAX
    return (weight / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


# full_precision_matrix_mult: otherwise ComfyUI also rounds activations to fp8, cut off at 448,
# which a student without later steps cannot make good.
FORMATS = {
    "bf16": Format(torch.bfloat16, to_bf16),
    "fp8": Format(
        torch.float8_e4m3fn,
        to_fp8,
        lambda rows: (),
        {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    ),
    "int8": Format(torch.int8, to_int8, lambda rows: (rows, 1), {"format": "int8_tensorwise"}),
}


def value(quantised: tuple[Tensor, Tensor | None]) -> Tensor:
    """The numbers that stored values and their scale stand for, float32."""
    weight, scale = quantised
    return weight.float() if scale is None else weight.float() * scale


def core_fp8(weight: Tensor) -> Tensor:
    """`weight` as a scaled fp8 checkpoint has it: nearest e4m3, scale amax / 448. float32."""
    scale = _core_scale(weight)
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def core_merged_fp8(weight: Tensor, generator: torch.Generator) -> Tensor:
    """`weight` as ComfyUI rounds what it merges into scaled fp8: e4m3, up or down by chance.

    The scale is recalculated, as in `requantize_from_float(scale="recalculate")`. float32.
    """
    scale = _core_scale(weight)
    return stochastic_fp8(weight / scale, generator) * scale


def stochastic_fp8(x: Tensor, generator: torch.Generator) -> Tensor:
    """Values of e4m3 around x, the nearer one more often, so that their mean is x; as
    `comfy.float.stochastic_rounding` does. float32.
    """
    exponent = torch.frexp(x).exponent.clamp(min=-5) - 1  # of the leading bit; -6 is subnormal
    step = torch.exp2(exponent.float() - 3)  # 3 bits of mantissa
    chance = torch.rand(x.shape, generator=generator, device=x.device)
    return (torch.floor(x / step + chance) * step).clamp(-FP8_MAX, FP8_MAX)


def _core_scale(weight: Tensor) -> Tensor:
    """The scale that brings the largest number to e4m3's largest.  # []"""
    return weight.abs().amax().clamp(min=_TINY) / FP8_MAX


# ------------------------------------------------------------------------------------ what it costs

BF16_MERGE = "merged in bf16"
FP8_AFTER = "merged, then fp8"
INT8_AFTER = "merged, then int8"
FP8_CORE = "merged into fp8 (core)"
FP8_BRANCH = "beside fp8 (side branch)"
WAYS = (BF16_MERGE, FP8_AFTER, INT8_AFTER, FP8_CORE, FP8_BRANCH)


@dataclass
class Losses:
    """What rounding does to a LoRA, over the layers it was shown: sums of squares."""

    delta_squares: float = 0.0
    weight_squares: float = 0.0
    layers: int = 0
    delta_errors: dict[str, float] = field(default_factory=dict)
    weight_errors: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=lambda: {way: Kept() for way in WAYS})

    def add(self, base: Tensor, down: Tensor, up: Tensor, scale: float, seed: int = 0) -> None:
        """Tries every way on one layer. base [out, in], delta = scale * up @ down; float32."""
        delta = scale * (up @ down)
        self.layers += 1
        self.delta_squares += _square(delta)
        self.weight_squares += _square(base + delta)
        branch = scale * (up.bfloat16().float() @ down.bfloat16().float())
        in_fp8, in_int8, core = value(to_fp8(base)), value(to_int8(base)), core_fp8(base)
        generator = torch.Generator().manual_seed(seed)
        self._count(BF16_MERGE, base, delta, base, value(to_bf16(base + delta)))
        self._count(FP8_AFTER, base, delta, in_fp8, value(to_fp8(base + delta)))
        self._count(INT8_AFTER, base, delta, in_int8, value(to_int8(base + delta)))
        self._count(FP8_CORE, base, delta, core, core_merged_fp8(core + delta, generator))
        self._count(FP8_BRANCH, base, delta, core, core + branch)

    def delta(self, way: str) -> float:
        """|what the LoRA changed - its delta| / |its delta|."""
        return math.sqrt(self.delta_errors[way] / self.delta_squares)

    def weight(self, way: str) -> float:
        """|the result - (bf16 base + delta)| / |bf16 base + delta|."""
        return math.sqrt(self.weight_errors[way] / self.weight_squares)

    def finite(self) -> bool:
        """Whether every figure is a number."""
        figures = (self.delta_squares, self.weight_squares)
        errors = (*self.delta_errors.values(), *self.weight_errors.values())
        return all(map(math.isfinite, (*figures, *errors)))

    def to_text(self) -> str:
        """A table, a line per way."""
        if not self.delta_squares:
            return "The LoRA changes nothing in the layers that stay."
        width = max(map(len, WAYS))
        size = math.sqrt(self.delta_squares / self.weight_squares)
        lines = [
            f"LoRA delta / weight: {size:.2%}, over {self.layers} layers. Relative error of",
            f"{'':<{width}}    delta   weight, of which the delta keeps",
            *(
                f"{way:<{width}} {self.delta(way):8.4f} {self.weight(way):8.4f} "
                f"{self.kept[way].share:8.1%}"
                for way in WAYS
            ),
        ]
        return "\n".join(lines)

    def _count(self, way: str, base: Tensor, delta: Tensor, before: Tensor, after: Tensor) -> None:
        """before, after: the weight without and with the LoRA, both as that way stores them."""
        self.kept[way].add(before, after, delta)
        delta_error, weight_error = _square(after - before - delta), _square(after - base - delta)
        self.delta_errors[way] = self.delta_errors.get(way, 0.0) + delta_error
        self.weight_errors[way] = self.weight_errors.get(way, 0.0) + weight_error


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
