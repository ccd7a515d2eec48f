"""What the machine reaches: copies, and the matrix products of Qwen-Image's layers by precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.speed.measure import Budget, Clock, Spread
from distill.contract.shown import first_line
from distill.utils.terminal import table

from . import fp8
from .fp8 import FP8

INNER = 8  # calls per repetition
REPETITIONS = 5

Function = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """x [tokens, inputs] times weight [outputs, inputs]."""

    tokens: int
    inputs: int
    outputs: int

    @property
    def operations(self) -> float:
        return 2.0 * self.tokens * self.inputs * self.outputs

    def __str__(self) -> str:
        return f"{self.tokens} x {self.inputs} -> {self.outputs}"


# image and 77 text tokens of 1024 x 1024 and 2048 x 2048: projections, both halves of the MLP
SHAPES = tuple(
    Shape(tokens + 77, inputs, outputs)
    for tokens in (4096, 16384)
    for inputs, outputs in ((3072, 3072), (3072, 12288), (12288, 3072))
)
SMALL_SHAPES = (Shape(64 + 13, 64, 128),)


def seconds_per_call(function: Function, device: torch.device, inner: int = INNER) -> Spread:
    """Of several repetitions of `inner` calls each, after one that does not count."""
    found = []
    for _ in range(1 + REPETITIONS):
        clock = Clock(device)
        with clock("calls"):
            for _ in range(inner):
                function()
        found.append(clock.seconds["calls"] / inner)
    return Spread.of(found[1:])


def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """TFLOP/s of a large bf16 product on random data, TB/s of a copy (bytes read and written)."""
    side, numbers = (256, 1 << 16) if small else (8192, 1 << 31)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_per_call(partial(torch.mm, a, b), device).median
    source = torch.empty(numbers, device=device, dtype=torch.bfloat16).normal_()
    copy = seconds_per_call(partial(torch.empty_like(source).copy_, source), device).median
    return {
        f"bf16 {side}^3, TFLOP/s": 2 * side**3 / product / 1e12,
        "copy, TB/s": 2 * source.nbytes / copy / 1e12,
    }


def variants(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Function]:
    """Every way to x weight^T + bias; "alone": x is in 8 bits already."""
    from comfy_kitchen.tensor import QuantizedTensor

    scale = weight.abs().amax().float() / fp8.FP8_MAX
    w8 = (weight.float() / scale).to(FP8), scale
    row, one = fp8.per_row(x), fp8.per_tensor(x)
    core8 = QuantizedTensor.from_float(weight, "TensorCoreFP8E4M3Layout", scale="recalculate")
    int8 = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", per_channel=True)
    found: dict[str, Function] = {
        "bf16": lambda: linear(x, weight, bias),
        "fp8, one scale, alone": lambda: fp8.product(one, w8, bias, x.dtype),
        "fp8, one scale": lambda: fp8.product(fp8.per_tensor(x), w8, bias, x.dtype),
        "fp8, scale per row, alone": lambda: fp8.product(row, w8, bias, x.dtype),
        "fp8, scale per row": lambda: fp8.product(fp8.per_row(x), w8, bias, x.dtype),
        "fp8 by core": lambda: linear(
            QuantizedTensor.from_float(x, "TensorCoreFP8E4M3Layout", scale=None), core8, bias
        ),
        "fp8, then bf16 (the pack today)": lambda: linear(x, core8.dequantize(), bias),
        "int8 by comfy-kitchen": lambda: linear(x, int8, bias),
    }
    if x.is_cuda:
        x_int, w_int = x.to(torch.int8), int8._qdata.t()
        found["int8, alone"] = lambda: torch._int_mm(x_int, w_int)
    return found


def measured(shape: Shape, device: torch.device, budget: Budget) -> dict[str, dict[str, float]]:
    """TFLOP/s and relative error of every variant; one that fails is noted and left out."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)

    x, bias = normal(shape.tokens, shape.inputs), normal(shape.outputs)
    weight = normal(shape.outputs, shape.inputs) * 0.02
    exact = x.float() @ weight.float().t() + bias.float()
    rows = {}
    for name, function in variants(x, weight, bias).items():
        try:
            y = function()
            spread = seconds_per_call(function, device)
        except (RuntimeError, ValueError, TypeError) as error:  # not for this card, shape, version
            budget.skip(f"{shape}, {name}: {first_line(error)}")
            continue
        rows[name] = {"TFLOP/s": shape.operations / spread.median / 1e12}
        if name != "int8, alone":  # its activations are cut off, not scaled
            rows[name]["error"] = float((y.float() - exact).norm() / exact.norm())
    return rows


def product_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """TFLOP/s by variant and shape, and the error of the first shape."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    first = next(iter(found.values()))
    rows = [
        [
            name,
            *(f"{rows[name]['TFLOP/s']:.0f}" if name in rows else "-" for rows in found.values()),
            f"{first[name]['error']:.2g}" if "error" in first.get(name, {}) else "-",
        ]
        for name in names
    ]
    return table(["TFLOP/s", *found, "error"], rows)


def machine(device: torch.device, small: bool, budget: Budget) -> tuple[dict[str, Any], str]:
    """Values and text of the section."""
    reached = ceilings(device, small)
    shapes = SMALL_SHAPES if small else SHAPES
    found = {str(shape): measured(shape, device, budget) for shape in shapes}
    line = ", ".join(f"{name} {value:.3g}" for name, value in reached.items())
    return {"ceilings": reached, "products": found}, f"{line}\n\n{product_table(found)}"
