"""Matrix products of 8-bit weights in fp8, for layers whose file asks for products in bf16.

Turbo Bake marks its fp8 layers `full_precision_matrix_mult`, so core multiplies them in bf16. Core
without that mark ("core") rounds activations with a fixed scale of 1, cut off at 448, and forgoes
the matrix units' fast accumulation. "tensor" and "row" take the scale from the activations, one for
all of them or one per token, in the same products otherwise (`torch._scaled_mm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
WAYS = ("core", "tensor", "row")
FEW = 512  # tokens; cuBLAS has no product with a scale per row for a prompt's few
_TINY = 1e-12

Quantised = tuple[Tensor, Tensor]  # e4m3 [M, K] and float32 scale, [] or [M, 1]


def per_tensor(x: Tensor) -> Quantised:
    """One scale.  # [M, K] -> [M, K], []"""
    low, high = torch.aminmax(x)
    scale = torch.maximum(-low, high).float().clamp(min=_TINY) / FP8_MAX
    if x.is_cuda:
        import comfy_kitchen

        return comfy_kitchen.quantize_per_tensor_fp8(x, scale, FP8), scale
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def per_row(x: Tensor) -> Quantised:
    """A scale per row; one pass over x on a GPU.  # [M, K] -> [M, K], [M, 1]"""
    if x.is_cuda:
        from .kernels import quantise_rows

        return quantise_rows(x)
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=_TINY) / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def product(x: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x weight^T + bias. A weight's scale is a single number, or one per row of x and of weight.

    # [M, K], [N, K], [N] -> [M, N]
    """
    (a, a_scale), (b, b_scale) = x, weight
    if a.is_cuda:
        if a_scale.ndim == 2:  # both as rows or both as numbers
            b_scale = b_scale.expand(len(b)).reshape(1, -1).contiguous()
        return torch._scaled_mm(
            a, b.t(), a_scale, b_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    exact = (a.float() * a_scale) @ (b.float() * b_scale).t()  # no fp8 units: the same numbers
    return (exact if bias is None else exact + bias.float()).to(dtype)


@contextmanager
def multiplied(net: torch.nn.Module, way: str) -> Iterator[int]:
    """Meanwhile fp8 layers of `net` multiply in fp8, the scale of activations by `way`; their
    number.
    """
    layers = [m for m in net.modules() if getattr(m, "quant_format", None) == "float8_e4m3fn"]
    quantise = {"tensor": per_tensor, "row": per_row}.get(way)
    for layer in layers:
        if quantise is None:
            layer._full_precision_mm = False
        else:
            layer.forward = partial(_forward, layer, quantise)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            if quantise is None:
                layer._full_precision_mm = True
            else:
                del layer.forward


def _forward(layer: Any, quantise: Callable[[Tensor], Quantised], x: Tensor) -> Tensor:
    weight, tokens = (layer.weight._qdata, layer.weight._params.scale), x.reshape(-1, x.shape[-1])
    way = quantise if len(tokens) >= FEW else per_tensor
    y = product(way(tokens), weight, layer.bias, x.dtype)
    return y.reshape(*x.shape[:-1], -1)
