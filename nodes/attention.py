"""Attention kernels, which of them suits which GPU, and a guard that never trusts one unseen.

A kernel is a function on q, k, v of [B, H, N, D]. `GuardedAttention` makes one of them what
ComfyUI calls in place of its own attention: it takes the calls that the kernel can take, compares
a sample of its first results with exact attention, and leaves everything else to core. Only torch
in here: the nodes decide on which MODEL it goes and who is told of a failure.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..distill.contract.shown import plain

AUTO, CORE = "auto", "core"
OVERRIDE = "optimized_attention_override"  # where core looks for one, among transformer_options
HOPPER = 9  # major compute capability
HALF = (torch.float16, torch.bfloat16)

SAMPLED_ROWS = 16  # queries per head that the guard computes exactly
SAMPLED_HEADS = 4

KernelFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
AttentionOverride = Callable[..., Tensor]


# ---------------------------------------------------------------------------------------- kernels


_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention, and what it can take.

    run: q, k, v [B, H, N, D], mask [B or 1, H or 1, N or 1, N] or None, scale or None -> like q.
    missing: None where it can run, else what to install.
    rounding, tolerance: an honest result is within rounding x |reference| + tolerance x the
    reference's deviation over tokens: rounding covers the values' own format, tolerance the
    softmax weights.
    """

    name: str
    run: KernelFunction
    missing: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] = ("cuda",)
    majors: range = range(8, 100)  # compute capabilities
    dtypes: tuple[torch.dtype, ...] = HALF
    masks: bool = False
    low_precision: bool = False  # 8-bit inside
    rounding: float = 2**-7
    tolerance: float = 0.05


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _flash3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    interface = importlib.import_module("flash_attn_interface")
    out = interface.flash_attn_func(*_tokens_first(q, k, v), softmax_scale=scale)
    out = out[0] if isinstance(out, tuple) else out  # older ones return the log-sum-exp as well
    return out.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    package = importlib.import_module("flash_attn")
    return package.flash_attn_func(*_tokens_first(q, k, v), softmax_scale=scale).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    package = importlib.import_module("sageattention")
    return package.sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]  # [B, N, H, D]


def _needs(module: str, install: str) -> Callable[[], str | None]:
    """A `missing` that asks whether `module` can be imported, once."""

    @functools.cache
    def missing() -> str | None:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
            return f"{install} ({error})"
        return None

    return missing


def _needs_priority() -> str | None:
    if "set_priority" in inspect.signature(sdpa_kernel).parameters:
        return None
    return f"PyTorch 2.7 or newer (found {torch.__version__})"


KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Makes a kernel known under its name."""
    KERNELS[kernel.name] = kernel


register(Kernel("cudnn", _cudnn, _needs_priority, masks=True))
register(
    Kernel(
        "flash3",
        _flash3,
        _needs("flash_attn_interface", "FlashAttention-3, built from hopper/ of its repository"),
        majors=range(HOPPER, HOPPER + 1),
    )
)
register(Kernel("flash", _flash, _needs("flash_attn", "FlashAttention: pip install flash-attn")))
register(
    Kernel(
        "sage",
        _sage,
        _needs("sageattention", "SageAttention: pip install sageattention"),
        low_precision=True,
        rounding=2**-4,
        tolerance=0.2,
    )
)


# --------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Device:
    """kind: "cuda" (NVIDIA only), "rocm", "cpu", "mps" and so on; capability: (major, minor)."""

    kind: str
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, device: torch.device) -> Device:
        if device.type != "cuda":
            return cls(device.type)
        if torch.version.hip is not None:  # AMD counts its capabilities in numbers of its own
            return cls("rocm")
        return cls("cuda", torch.cuda.get_device_capability(device))

    def __str__(self) -> str:
        major, minor = self.capability
        return f"compute capability {major}.{minor}" if self.kind == "cuda" else self.kind


@dataclass(frozen=True)
class Choice:
    """kernel: a name in KERNELS, or None for core's own attention; why: for the report."""

    kernel: str | None
    why: str


def choose(wanted: str, device: Device, missing: Mapping[str, str], core: str) -> Choice:
    """Which kernel a MODEL on `device` gets.

    missing: kernels that cannot run here and what they need. core: the name of core's own
    attention, which a person may have chosen at ComfyUI's start.
    Raises ValueError where a kernel that was asked for cannot run.
    """
    if wanted == CORE:
        return Choice(None, "asked for")
    if wanted != AUTO:
        _check_runs(KERNELS[wanted], device, missing)
        return Choice(wanted, "asked for")
    if device.kind != "cuda" or device.capability[0] != HOPPER:
        return Choice(None, f"on {device} nothing that needs no installing is known to be faster")
    if core != "pytorch":
        return Choice(None, f"ComfyUI was started with {core} attention")
    if "cudnn" in missing:
        return Choice(None, f"cuDNN's would be faster on Hopper; it needs {missing['cudnn']}")
    return Choice("cudnn", "the fastest on Hopper that needs no installing")


def _check_runs(kernel: Kernel, device: Device, missing: Mapping[str, str]) -> None:
    way_out = "Choose auto or core."
    if device.kind not in kernel.devices:
        wanted = " or ".join(kernel.devices)
        raise ValueError(
            f"attention: {kernel.name} runs on {wanted}; this MODEL is on {device}. {way_out}"
        )
    if device.kind == "cuda" and device.capability[0] not in kernel.majors:
        first, last = kernel.majors[0], kernel.majors[-1]
        expected = f"{first}.x" if first == last else f"{first}.0 or newer"
        raise ValueError(
            f"attention: {kernel.name} needs a GPU of compute capability {expected}; found "
            f"{device}. {way_out}"
        )
    if needed := missing.get(kernel.name):
        raise ValueError(
            f"attention: {kernel.name} cannot run here. It needs {needed}. Install it into "
            f"ComfyUI's own Python and restart, or choose auto or core."
        )


# ------------------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class Call:
    """One call of core's attention, its tensors in the kernels' layout."""

    q: Tensor  # [B, H, N, D]
    k: Tensor  # [B, H, M, D]
    v: Tensor  # [B, H, M, D]
    mask: Tensor | None  # [B or 1, H or 1, N or 1, M]
    scale: float | None
    keep_heads: bool  # core's skip_output_reshape

    def shaped(self, out: Tensor) -> Tensor:
        """[B, H, N, D] as core's caller expects it."""
        return out if self.keep_heads else out.transpose(1, 2).flatten(2)  # [B, N, H * D]


def read_call(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    low_precision_attention: bool = True,
    transformer_options: object = None,
    _inside_attn_wrapper: bool = False,
    **others: Any,
) -> Call | None:
    """The arguments of core's attention functions, or None where `kernel` cannot take the call:
    grouped queries, a mask, a dtype, upcasting, or anything that is not known here.
    """
    if not skip_reshape:
        split = (heads, q.shape[-1] // heads)
        if any(tensor.shape[-1] != q.shape[-1] for tensor in (k, v)):
            return None
        q, k, v = (tensor.unflatten(-1, split).transpose(1, 2) for tensor in (q, k, v))
    fits = (
        q.shape[1] == k.shape[1] == v.shape[1] == heads
        and q.shape[-1] == v.shape[-1]
        and q.dtype == k.dtype == v.dtype
        and q.dtype in kernel.dtypes
        and q.device.type in kernel.devices
        and attn_precision in (None, q.dtype)
        and (mask is None or kernel.masks)
        and (low_precision_attention or not kernel.low_precision)
        and not any(value is not None and value is not False for value in others.values())
    )
    if not fits:
        return None
    if mask is not None:  # as core's attention_pytorch reads them
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    return Call(q, k, v, mask, scale, skip_output_reshape)


# ------------------------------------------------------------------------------------------- guard


def fault_of(out: Tensor, call: Call, kernel: Kernel, layer: int = 0) -> str | None:
    """What is wrong with a kernel's result, or None.

    All of it must be finite, and a sample of queries must agree with exact attention in float32.
    The sample's batch item and heads go round with `layer`, so a forward covers all of them; its
    queries are spread over all tokens and end with the last. Waits for the device once.
    """
    if out.shape != call.q.shape or out.dtype != call.q.dtype:
        return f"gave {list(out.shape)} {out.dtype} for {list(call.q.shape)} {call.q.dtype}"
    batch, heads, tokens, _ = out.shape
    item = layer % batch
    stride = max(1, heads // SAMPLED_HEADS)
    some_heads = slice(layer % stride, None, stride)
    step = max(1, tokens // SAMPLED_ROWS)
    rows = slice((tokens - 1) % step, None, step)

    k, v = (tensor[item, some_heads].float() for tensor in (call.k, call.v))
    mask = None if call.mask is None else call.mask.expand(batch, heads, tokens, -1)
    if mask is not None:
        mask = mask[item, some_heads, rows]
        mask = mask if mask.dtype == torch.bool else mask.float()
    q = call.q[item, some_heads, rows].float()
    reference = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
    found = out[item, some_heads, rows].float()
    figures = (
        reference.isfinite().all().float(),
        out.isfinite().all().float(),
        (found - reference).norm(),
        reference.norm(),
        (reference - reference.mean(1, keepdim=True)).norm(),
    )
    sound, finite, error, size, spread = torch.stack(figures).tolist()
    if not sound:
        return None  # what came in was not finite already
    if not finite:
        return "gave values that are not finite"
    limit = kernel.rounding * size + kernel.tolerance * spread
    if error > limit:
        return (
            f"differs from exact attention by {error / max(size, 1e-30):.2g} of its size "
            f"(allowed {limit / max(size, 1e-30):.2g})"
        )
    return None


class GuardedAttention:
    """A kernel as an override of core's attention, until it fails.

    Every layer's first result per kind of input is checked; later calls are not, and do not wait
    for the device. After a failure this and every further call goes to `previous`, an override
    that was there before, else to core's own attention. One object may serve several clones.
    """

    def __init__(
        self,
        kernel: Kernel,
        previous: AttentionOverride | None = None,
        on_failure: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.kernel = kernel
        self.previous = previous
        self.on_failure = on_failure
        self.failed: str | None = None
        self.calls = 0  # answered by the kernel
        self._checked: set[Hashable] = set()

    # A compiler would trace the guard's one-time branch: it calls this from outside its graphs.
    @torch.compiler.disable
    def __call__(self, core: AttentionOverride, *args: Any, **kwargs: Any) -> Tensor:
        call = read_call(self.kernel, *args, **kwargs) if self.failed is None else None
        out = None if call is None else self._answer(call, kwargs.get("transformer_options") or {})
        if call is not None and out is not None:
            self.calls += 1
            return call.shaped(out)
        if self.previous is not None:
            return self.previous(core, *args, **kwargs)
        return core(*args, **kwargs)

    def fail(self, why: str) -> None:
        """Drops the kernel for good, and says so once."""
        if self.failed is None:
            self.failed = why
            self.on_failure(why)

    def _answer(self, call: Call, options: Mapping[str, Any]) -> Tensor | None:
        try:
            out = self.kernel.run(call.q, call.k, call.v, call.mask, call.scale)
        except torch.OutOfMemoryError:
            raise  # core knows what to do
        except Exception as error:  # whatever a package of someone else raises
            self.fail(f"stopped with {type(error).__name__}: {plain(str(error))}")
            return None
        layer = options.get("block_index") or 0
        kind = (layer, options.get("block_type"), *_family(call))
        if kind in self._checked:
            return out
        if why := fault_of(out, call, self.kernel, layer):
            self.fail(why)
            return None
        self._checked.add(kind)
        return out


def outside_graphs(override: AttentionOverride | None) -> AttentionOverride:
    """`override`, or core's own attention, where torch.compile does not look into it."""

    @torch.compiler.disable
    def attention(core: AttentionOverride, *args: Any, **kwargs: Any) -> Tensor:
        return core(*args, **kwargs) if override is None else override(core, *args, **kwargs)

    return attention


def _family(call: Call) -> tuple[Hashable, ...]:
    """Calls that a kernel treats alike: prompts of nearly the same length are one family."""
    batch, heads, tokens, width = call.q.shape
    lengths = (tokens.bit_length(), call.k.shape[2].bit_length())
    return (batch, heads, width, *lengths, call.q.dtype, call.q.device, call.mask is None)
