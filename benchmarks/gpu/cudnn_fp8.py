"""cuDNN's attention in fp8, which PyTorch does not offer: by NVIDIA's front end for Python.

pip install nvidia-cudnn-frontend
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import fp8

WEIGHTS = 256.0  # softmax weights are at most 1, e4m3 ends at 448
OUTPUT = 0.5  # a mean of values is no larger than the largest of them; half leaves room to round
SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


@dataclass(frozen=True)
class Plan:
    """A graph that cuDNN has built for one shape, and its tensors by name."""

    graph: Any
    handle: Any
    tensors: dict[str, Any]
    workspace: Tensor


@functools.cache
def missing() -> str | None:
    """None where it can run, else what to install."""
    try:
        importlib.import_module("cudnn")
    except (ImportError, OSError, RuntimeError) as error:
        return f"NVIDIA's front end of cuDNN: pip install nvidia-cudnn-frontend ({error})"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention in e4m3, one scale each for q, k and v; the result is rounded to e4m3 as well.

    # [B, H, N, D] x 3 -> [B, H, N, D]; no mask. Raises RuntimeError: cuDNN has no plan for it.
    """
    import comfy_kitchen
    import cudnn

    plan = _plan(tuple(q.shape), scale or q.shape[-1] ** -0.5, q.device)
    # tokens before heads, as they come from the layers: mostly no copy
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (
        fp8.per_tensor(x.transpose(1, 2).contiguous()) for x in (q, k, v)
    )
    out = torch.empty_like(q8)
    out_scale = OUTPUT / v_scale
    weights = torch.full((), WEIGHTS, device=q.device)
    numbers = (q_scale, k_scale, v_scale, 1 / weights, weights, out_scale)
    values = {
        "q": q8,
        "k": k8,
        "v": v8,
        "o": out,
        **{name: x.reshape(1, 1, 1, 1) for name, x in zip(SCALES, numbers, strict=True)},
        "amax_s": torch.empty(1, 1, 1, 1, device=q.device),
        "amax_o": torch.empty(1, 1, 1, 1, device=q.device),
    }
    cudnn.set_stream(handle=plan.handle, stream=torch.cuda.current_stream().cuda_stream)
    pack = {plan.tensors[name]: value for name, value in values.items()}
    plan.graph.execute(pack, plan.workspace, handle=plan.handle)
    return comfy_kitchen.dequantize_per_tensor_fp8(out, 1 / out_scale, q.dtype).transpose(1, 2)


@functools.cache
def _plan(shape: tuple[int, ...], scale: float, device: torch.device) -> Plan:
    import cudnn

    _, heads, tokens, width = shape
    strides = (tokens * heads * width, width, heads * width, 1)
    e4m3, real = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=e4m3, intermediate_data_type=real, compute_data_type=real, handle=handle
    )
    tensors = {
        name: graph.tensor(name=name, dim=shape, stride=strides, data_type=e4m3) for name in "qkv"
    } | {
        name: graph.tensor(name=name, dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=real)
        for name in SCALES
    }
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        **tensors, generate_stats=False, attn_scale=scale, name="attention"
    )
    out.set_output(True).set_dim(shape).set_stride(strides).set_data_type(e4m3)
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1)).set_data_type(real)
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except Exception as error:  # of the front end's own kinds
        raise RuntimeError(f"cuDNN's attention in fp8: {error}") from error
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
    named = {"o": out, "amax_s": amax_s, "amax_o": amax_o}
    return Plan(graph, handle, tensors | named, workspace)
