"""A safetensors file once more, with another header and a few tensors more; the bytes of its own
tensors are copied, never computed with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .files import open_regular, written_whole
from .lora_keys import LoraFormatError
from .tensor_file import Entry, Layout, entry_of, header_of_entries, read_layout

_BLOCK = 1 << 20  # bytes that are held at a time
NO_DIGEST = "0" * 64  # as long as any SHA-256 in hexadecimal digits


def rewrite(
    source: Path,
    out: Path,
    layout: Layout,
    added: Mapping[str, Tensor],
    metadata: Callable[[str], Mapping[str, str]],
) -> None:
    """Writes `source` to a new file `out`, which appears whole or not at all. Folders are made.

    layout: what `read_layout` said of source; added: small tensors on the CPU under new names;
    metadata: the new file's, a function of the SHA-256 of the bytes behind its header, whose length
    must not depend on it. Raises LoraFormatError if source has changed since, FileExistsError if
    `out` exists, NoRoomError, OSError.
    """
    entries = layout.entries | {name: entry_of(tensor) for name, tensor in added.items()}
    header, starts = header_of_entries(entries, metadata(NO_DIGEST))
    size = len(header) + sum(entry.end - entry.start for entry in entries.values())
    with (
        written_whole(out, replace=False, size=size) as partial,
        open_regular(source) as old,
        partial.open("wb") as new,
    ):
        before = os.fstat(old.fileno()).st_mtime_ns
        if read_layout(source) != layout:
            raise _changed(source)
        digest = hashlib.sha256()
        new.write(header)
        for name in starts:
            for block in _bytes_of(name, layout.entries, added, old):
                digest.update(block)
                new.write(block)
        if new.tell() != size or os.fstat(old.fileno()).st_mtime_ns != before:
            raise _changed(source)
        header, _ = header_of_entries(entries, metadata(digest.hexdigest()))
        new.seek(0)
        new.write(header)
        new.flush()
        os.fsync(new.fileno())


def _bytes_of(
    name: str, entries: Mapping[str, Entry], added: Mapping[str, Tensor], file: BinaryIO
) -> Iterator[bytes]:
    """A tensor's bytes, a block at a time."""
    if name in added:
        yield added[name].contiguous().numpy().tobytes()
        return
    entry = entries[name]
    file.seek(entry.start)
    left = entry.end - entry.start
    while left and (block := file.read(min(left, _BLOCK))):
        left -= len(block)
        yield block


def _changed(source: Path) -> LoraFormatError:
    return LoraFormatError(
        f"{source.name}: was written to while it was read. Wait until it is whole, and run again."
    )
