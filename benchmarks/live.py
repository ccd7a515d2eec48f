"""What is in memory, counted on PyTorch's meta device: nothing is computed, yet every storage that
an operation makes counts from there until it is freed.

What kernels allocate inside (workspaces of convolutions, of attention's backward pass) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
aten = torch.ops.aten
PLAIN = (torch.Tensor, torch.nn.Parameter)


class Live(TorchDispatchMode):
    """Bytes of the storages on a kind of device, by default meta, that operations have made and
    that still exist, and their peak.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self._device = device
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # its own operations come by one after another
        out = func(*args, **(kwargs or {}))
        made = [t for t in tensors_in(out) if self._counts(t)]
        if made:
            given = {key_of(tensor) for tensor in tensors_in((args, kwargs))}
            for tensor in made:
                if key_of(tensor) not in given and key_of(tensor) not in self._known:
                    self._take(tensor.untyped_storage(), key_of(tensor))
        return out

    def _counts(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._device and key_of(tensor) not in self._known

    def _take(self, storage: torch.UntypedStorage, key: int) -> None:
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Answers(TorchDispatchMode):
    """Numbers where a program asks a meta tensor for its values: ones."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        asked = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if asked and func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if asked and func is aten._to_copy.default:
            device = torch.device(kwargs.get("device") or META)
            if device != META:
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.ones(args[0].shape, dtype=dtype, device=device)
        return func(*args, **kwargs)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention of meta tensors by the flash kernel's shapes, as on a GPU; PyTorch itself would
    write out all of softmax(q k). A mask changes no shape and no count.
    """
    plain = F.scaled_dot_product_attention

    def fused(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not query.is_meta or kwargs.get("enable_gqa"):
            return plain(query, key, value, *args, **kwargs)
        scale = kwargs.get("scale")
        return aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain  # type: ignore[assignment]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):  # most results are one
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def key_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
