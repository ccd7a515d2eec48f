"""Triton kernels that PyTorch has no equal of: rounding to fp8 by rows, and attention in fp8.

Imported on a GPU only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _quantise_rows(x, out, scales, columns, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / FP8_MAX
    values = tl.minimum(tl.maximum(values / scale, -FP8_MAX), FP8_MAX)
    tl.store(out + row * columns + at, values.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest e4m3 of every row over its largest number.  # [M, K] -> [M, K], [M, 1]"""
    x = x.contiguous()
    rows, columns = x.shape
    out = torch.empty_like(x, dtype=FP8)
    scales = torch.empty(rows, 1, device=x.device, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    _quantise_rows[(rows,)](x, out, scales, columns, block=block, num_warps=8)
    return out, scales


@triton.jit
def _attention(
    q, k, v, out, scales, v_scales, tokens, padded,
    rows: tl.constexpr, keys: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    columns, channels = tl.arange(0, keys), tl.arange(0, width)
    inside = at < tokens
    start = head * tokens * width
    here = start + at[:, None] * width + channels[None, :]
    queries = tl.load(q + here, mask=inside[:, None], other=0.0)
    scale = tl.load(scales + head * tokens + at, mask=inside, other=0.0)
    most = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mean = tl.zeros([rows, width], tl.float32)
    for first in range(0, tokens, keys):
        seen = first + columns < tokens
        where = start + (first + columns)[None, :] * width + channels[:, None]
        some_keys = tl.load(k + where, mask=seen[None, :], other=0.0)
        weights = tl.dot(queries, some_keys) * scale[:, None]
        weights = tl.where(seen[None, :], weights, float("-inf"))
        larger = tl.maximum(most, tl.max(weights, 1))
        weights = tl.exp2(weights - larger[:, None] + 8.0)  # up to 256 of e4m3's 448
        kept = tl.exp2(most - larger)
        total = total * kept + tl.sum(weights, 1)
        # values lie with their tokens side by side: the units take fp8 in that order alone
        where = head * width * padded + channels[None, :] * padded + (first + columns)[:, None]
        values = tl.load(v + where)
        mean = tl.dot(weights.to(tl.float8e4nv), values, mean * kept[:, None])
        most = larger
    mean = mean / total[:, None] * tl.load(v_scales + head)
    tl.store(out + here, mean.to(tl.bfloat16), mask=inside[:, None])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: int = 128,
    keys: int = 128,
    warps: int = 8,
    stages: int = 3,
) -> Tensor:
    """Attention in e4m3 with softmax in float32: a scale per query, one per head of k and of v.

    # [B, H, N, D] x 3 -> [B, H, N, D]; no mask. Raises RuntimeError: not for this card.
    """
    batch, heads, tokens, width = q.shape
    scale = width**-0.5 if scale is None else scale
    q8, q_scale = quantise_rows(q.reshape(-1, width))
    k8, k_scale = _quantise_heads(k)
    v8, v_scale = _quantise_heads(v)
    padded = triton.cdiv(tokens, keys) * keys
    flat = torch.zeros(batch, heads, width, padded, device=v.device, dtype=FP8)
    flat[..., :tokens].copy_(v8.transpose(2, 3))
    scales = q_scale.view(batch, heads, tokens) * (k_scale * (scale * 1.4426950408889634))
    out = torch.empty(q.shape, device=q.device, dtype=torch.bfloat16)
    grid = (triton.cdiv(tokens, rows), batch * heads)
    try:
        _attention[grid](
            q8, k8, flat, out, scales, v_scale, tokens, padded,
            rows=rows, keys=keys, width=width, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    except TritonError as error:
        raise RuntimeError(str(error)) from error
    return out


def _quantise_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] -> e4m3, contiguous, and [B, H, 1]"""
    scale = x.abs().amax(dim=(2, 3), keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x / scale).to(FP8).contiguous(), scale.squeeze(-1).contiguous()
