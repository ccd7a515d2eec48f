"""Safetensors files, read into memory and never mapped.

A mapped file that is written over or cut short ends the whole process with a bus error, without a
message, and on Windows nobody can replace it while it is held.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import open_regular
from .lora_keys import LoraFormatError, check_key
from .shown import shown

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8  # of the first tensor, as the safetensors library pads
_OTHER = torch.int64  # stands for a dtype that torch or this table lacks; such a key is never read
_WEB_PAGE = "an HTML page; the download saved a web page, perhaps a login or an error"
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_MAX_DIMENSIONS = 64  # torch's
_MAX_BYTES = 2**63  # of a file or tensor; torch counts in 64 bits
_MISTAKEN_FOR = (  # first bytes, in lower case, of what is often saved under the name of a model
    (
        b"version https://git-lfs",
        "a git-lfs pointer; run `git lfs pull`, or download the file itself",
    ),
    (b"<!doctype", _WEB_PAGE),
    (b"<html", _WEB_PAGE),
    (b"<?xml", _WEB_PAGE),
    (b"pk\x03\x04", "a zip archive or PyTorch checkpoint (.pt, .ckpt); convert it to safetensors"),
    (b"\x80\x02", "a Python pickle; convert it to safetensors"),
    (b"gguf", "a GGUF model; choose a LoRA in safetensors format"),
    (b"{", "JSON text, probably a server's error message; download it again"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: start and end are bytes from the beginning of the file."""

    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def itemsize(self) -> float:
        """Bytes of one number, also of a dtype that only newer programs know."""
        if self.dtype in _DTYPES:
            return _DTYPES[self.dtype].itemsize
        return (self.end - self.start) / max(math.prod(self.shape), 1)

    def meta(self) -> Tensor:
        """A meta tensor of this shape and dtype."""
        return torch.empty(self.shape, dtype=_DTYPES.get(self.dtype, _OTHER), device="meta")


@dataclass(frozen=True)
class Layout:
    """A file's header: its metadata, and where its tensors lie."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def entry_of(tensor: Tensor) -> Entry:
    """What a header says of a tensor that lies nowhere yet. Raises KeyError for a dtype that this
    format has no name for.
    """
    return Entry(_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)


def header_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """How a file of these tensors begins, and where each of them starts, in the file's order.

    tensors: meta tensors will do. Raises KeyError as `entry_of`.
    """
    return header_of_entries({name: entry_of(tensors[name]) for name in sorted(tensors)}, metadata)


def header_of_entries(
    entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """`header_of` of what is known of tensors; of entries as wide as each other the order stays."""
    # Wide types first, as the safetensors library has it: so every tensor is aligned.
    order = sorted(entries, key=lambda name: -entries[name].itemsize)
    values: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name in order:
        entry = entries[name]
        starts[name], end = end, end + entry.end - entry.start
        values[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def read_layout(path: Path) -> Layout:
    """The header alone.

    Raises OSError if the file cannot be opened, LoraFormatError if it is no whole safetensors file.
    """
    with open_regular(path) as file:
        return _layout(file, path)


def read_tensors(
    path: Path, wanted: Callable[[str, Entry], bool] = lambda key, entry: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, those that are not wanted on "meta", and the metadata.

    Tensors that lie side by side in the file are read and checked at once and share their memory:
    a LoRA has thousands of small ones. Raises as `read_layout` does, and LoraFormatError for NaN
    and infinity, or if the file is written to meanwhile.
    """
    with open_regular(path) as file:
        before = _version(file)
        layout = _layout(file, path)
        tensors = {key: entry.meta() for key, entry in layout.entries.items()}
        order = sorted(layout.entries.items(), key=_place)
        for (_, chosen), group in groupby(order, lambda i: (i[1].dtype, wanted(*i))):
            if chosen:
                tensors |= _read_run(file, dict(group), path.name)
        if _version(file) != before:
            raise _changed(path.name)
    return tensors, layout.metadata


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor, on the CPU, its numbers unchecked. Raises as `read_layout` does, LoraFormatError
    if the file was cut, KeyError without such a key.
    """
    with open_regular(path) as file:
        entry = _layout_of_version(path, *_version(file)).entries[key]
        numbers = _read(file, entry.start, entry.end, _dtype(key, entry, path.name), path.name)
        return numbers.reshape(entry.shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass: several times faster than `isfinite`."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # fp8 has no comparison
    return all(math.isfinite(extreme) for extreme in torch.aminmax(wide))  # NaN comes through


def check_finite(key: str, tensor: Tensor, source: str) -> None:
    """Raises LoraFormatError for a tensor that would turn every picture black."""
    if not is_finite(tensor):
        bad = int(tensor.numel() - tensor.double().isfinite().sum())
        raise LoraFormatError(
            f"{source}: key {shown(key)}: expected finite numbers; found {bad:,} of "
            f"{tensor.numel():,} that are NaN or infinite, which would turn every picture black. "
            "The training diverged or the file is damaged: take an earlier checkpoint, or download "
            "it again."
        )


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=64)  # a bake reads thousands of tensors out of a few files
def _layout_of_version(path: Path, mtime_ns: int, size: int) -> Layout:
    return read_layout(path)


def _read_run(file: BinaryIO, entries: dict[str, Entry], source: str) -> dict[str, Tensor]:
    """Tensors of one dtype that follow each other in the file."""
    places = list(entries.values())
    start, end = places[0].start, places[-1].end
    numbers = _read(file, start, end, _dtype(next(iter(entries)), places[0], source), source)
    size = numbers.element_size()
    tensors = {
        key: numbers[(entry.start - start) // size : (entry.end - start) // size].view(entry.shape)
        for key, entry in entries.items()
    }
    if not is_finite(numbers):
        for key, tensor in tensors.items():
            check_finite(key, tensor, source)
    return tensors


def _read(file: BinaryIO, start: int, end: int, dtype: torch.dtype, source: str) -> Tensor:
    """The bytes from start to end as numbers.  # [(end - start) / itemsize]"""
    numbers = torch.empty((end - start) // dtype.itemsize, dtype=dtype, device="cpu")
    if numbers.nbytes:
        file.seek(start)
        memory = (ctypes.c_char * numbers.nbytes).from_address(numbers.data_ptr())
        if file.readinto(memory) != numbers.nbytes:  # type: ignore[attr-defined]
            raise _changed(source)
    return numbers


def _dtype(key: str, entry: Entry, source: str) -> torch.dtype:
    if entry.dtype not in _DTYPES:
        raise LoraFormatError(
            f"{source}: key {shown(key)}: expected a dtype among {', '.join(_DTYPES)}; found "
            f"{shown(entry.dtype)}"
        )
    return _DTYPES[entry.dtype]


def _place(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].start, item[1].end


def _changed(source: str) -> LoraFormatError:
    return LoraFormatError(
        f"{source}: was written to while it was read. Wait until it is whole, and run again."
    )


def _layout(file: BinaryIO, path: Path) -> Layout:
    """Parse and check the header: 8 bytes of length, JSON, tensors up to the end of the file."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    length = int.from_bytes(start[:8], "little")
    file.seek(8)
    text = file.read(length) if length <= min(size - 8, _MAX_HEADER) else b""
    try:
        header = json.loads(text)
        metadata = {str(k): str(v) for k, v in dict(header.pop("__metadata__", {}) or {}).items()}
        entries = {
            check_key(key, path.name): _entry(key, values, 8 + length, path.name)
            for key, values in header.items()
        }
    except LoraFormatError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        raise LoraFormatError(
            f"{path.name}: expected a safetensors file; found {_what(start, size)}"
        ) from None
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end != size:
        raise LoraFormatError(
            f"{path.name}: expected {end:,} bytes as its header says; found {size:,}. The file is "
            "truncated or damaged; download or copy it again."
        )
    _check_places(entries, 8 + length, path.name)
    return Layout(metadata, entries)


def _entry(key: str, values: Any, offset: int, source: str) -> Entry:
    (start, end), shape = values["data_offsets"], tuple(values["shape"])
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError("expected whole numbers")
    if (
        len(shape) > _MAX_DIMENSIONS
        or max(end, *shape, 0) >= _MAX_BYTES  # before numbers of any length are multiplied
        or math.prod(max(size, 1) for size in shape) * _OTHER.itemsize >= _MAX_BYTES
    ):
        raise LoraFormatError(
            f"{source}: not a valid safetensors file: key {shown(key)}: expected at most "
            f"{_MAX_DIMENSIONS} dimensions and sizes that fit in 64 bits; found {shown(shape)} at "
            f"{shown([start, end])}. The file is damaged; download or copy it again."
        )
    return Entry(str(values["dtype"]), shape, offset + start, offset + end)


def _check_places(entries: dict[str, Entry], start: int, source: str) -> None:
    """Raises LoraFormatError unless tensors lie one behind another and are as long as they say."""
    for key, entry in sorted(entries.items(), key=_place):
        dtype = _DTYPES.get(entry.dtype)
        length = entry.end - entry.start
        if entry.start != start or (dtype and math.prod(entry.shape) * dtype.itemsize != length):
            raise LoraFormatError(
                f"{source}: not a valid safetensors file: key {shown(key)}: {length:,} bytes "
                f"at {entry.start:,} cannot be {shown(entry.dtype)} {list(entry.shape)}. The file "
                "is damaged; download or copy it again."
            )
        start = entry.end


def _what(start: bytes, size: int) -> str:
    if size == 0:
        return "an empty file; download it again"
    if not start.strip(b"\0"):
        return f"{size:,} bytes that begin with zeros, an unfinished download"
    for magic, what in _MISTAKEN_FOR:
        if start.lstrip().lower().startswith(magic):
            return what
    if start[4:9] == b"\0\0\0\0{":
        return f"a header cut short or damaged ({size:,} bytes in all); download the file again"
    return f"{size:,} bytes that begin with {start[:8]!r}, another format"
