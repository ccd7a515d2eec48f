"""Weights of a model read and written one tensor at a time, so that no model has to fit in memory.

Reads a safetensors file, a diffusers folder (sharded or not) or a `*.safetensors.index.json`.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..files import written_whole
from ..tensor_file import header_of, read_layout, read_tensor

INDEX = ".safetensors.index.json"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of all-in-one checkpoints


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and a meta tensor of its shape and dtype."""

    file: Path
    key: str
    meta: Tensor


@dataclass(frozen=True)
class Weights:
    """A model's tensors by name, none of them in memory.

    config: the config.json beside them, empty without one.
    """

    source: Path
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def meta(self, name: str) -> Tensor:
        """A meta tensor of its shape and dtype."""
        return self.tensors[name].meta

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        stored = self.tensors[name]
        return read_tensor(stored.file, stored.key)


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Headers of a model's files. A whole diffusers pipeline stands for its transformer.

    Raises OSError where files are missing, ValueError where they are no safetensors.
    """
    source = Path(path)
    inner = source / "transformer"
    files = _files(inner if inner.is_dir() else source)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        layout = read_layout(file)
        metadata = layout.metadata
        tensors |= {key: Stored(file, key, entry.meta()) for key, entry in layout.entries.items()}
    config = files[0].with_name("config.json")
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return Weights(source, _without_prefix(tensors), values, metadata)


def _files(path: Path) -> list[Path]:
    """The safetensors files behind a file, an index or a folder."""
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX}"))
        files = sorted(path.glob("*.safetensors"))
        if not indices and len(files) == 1:
            return files
        if len(indices) != 1:
            raise FileNotFoundError(
                f"{path}: expected one model, a .safetensors file or shards with one *{INDEX}; "
                f"found {len(files)} .safetensors files and {len(indices)} indices. Name the file "
                f"or the index itself."
            )
        path = indices[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Expected a .safetensors file, a diffusers folder, or a "
            f"*{INDEX}."
        )
    if path.name.endswith(INDEX):
        return _shards(path)
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(
            f"{path}: expected a .safetensors file, a diffusers folder or a *{INDEX}; found "
            f"{path.suffix or 'no extension'}. Take the model in safetensors format."
        )
    return [path]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"{index}: expected a JSON object with a weight_map of tensor names to files."
        ) from None
    files = [index.with_name(Path(name).name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{index}: {len(missing)} of its {len(files)} shards are missing, such as "
            f"{missing[0]}. Download them into {index.parent}."
        )
    return files


def _without_prefix(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The diffusion model alone, where a checkpoint also holds a text encoder and a VAE."""
    for prefix in _PREFIXES:
        inside = {key: stored for key, stored in tensors.items() if key.startswith(prefix)}
        if inside:
            return {key.removeprefix(prefix): stored for key, stored in inside.items()}
    return tensors


# ---------------------------------------------------------------------------------------- writing


class StreamWriter:
    """A safetensors file whose tensors come one at a time, in any order."""

    def __init__(self, file: BinaryIO, shapes: Mapping[str, Tensor], metadata: Mapping[str, str]):
        header, self._starts = header_of(shapes, metadata)
        self._file = file
        self._shapes = dict(shapes)
        file.write(header)
        file.truncate(len(header) + sum(meta.nbytes for meta in shapes.values()))

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor in its place. Raises ValueError where it is not the announced one."""
        expected = self._shapes.pop(name)
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ValueError(
                f"{name}: announced {list(expected.shape)} {expected.dtype}; found "
                f"{list(tensor.shape)} {tensor.dtype}"
            )
        tensor = tensor.contiguous()
        self._file.seek(self._starts[name])
        if tensor.nbytes:
            self._file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))

    def finish(self) -> None:
        """Flushes to disk. Raises ValueError where an announced tensor never came."""
        if self._shapes:
            raise ValueError(f"{len(self._shapes)} tensors were not written: {min(self._shapes)}")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def stream_to(
    path: Path, shapes: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[StreamWriter]:
    """A StreamWriter whose file appears under `path` whole or not at all. Folders are made.

    shapes: meta tensors. Raises NoRoomError, and FileExistsError where another file has appeared
    under `path` meanwhile.
    """
    size = sum(meta.nbytes for meta in shapes.values())
    with written_whole(path, replace=False, size=size) as partial, partial.open("wb") as file:
        writer = StreamWriter(file, shapes, metadata)
        yield writer
        writer.finish()
