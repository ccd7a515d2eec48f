"""The cache's files: safetensors shards that are written once, under names made from their content.

    CACHE/real/HASH.safetensors     KEY.mean, KEY.std: posterior of a real image's latents
    CACHE/text/HASH.safetensors     KEY: embedding of a prompt, without padding
    CACHE/teacher/HASH.safetensors  KEY.x0: latents of an image that the teacher made

Every shard holds the results of one chunk of work and, in its header, a record of that work. A
shard that exists is complete; nothing is ever changed in place. So a killed run loses at most the
chunk it was at, ranks cannot collide, and no file depends on how many ranks there were.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..config import ConfigError
from ..utils.files import replace_file

KINDS = REAL, TEXT, TEACHER = "real", "text", "teacher"
RECORD = "turbo.shard"  # header key
LEFTOVER_S = 3600  # age from which a temporary file belongs to nobody

Record = dict[str, Any]


def hash_of(*parts: Any) -> str:
    """A name for content: bytes, or anything that JSON can hold."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def shard_path(cache: Path, kind: str, name: str) -> Path:
    return cache / kind / f"{name}.safetensors"


def write_shard(path: Path, tensors: dict[str, torch.Tensor], record: Record) -> None:
    """Raises OSError with advice where the disk is full; then nothing of the shard is left."""
    data = save(
        {name: tensor.contiguous() for name, tensor in sorted(tensors.items())},
        {RECORD: json.dumps(record, sort_keys=True)},
    )
    write_bytes(path, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Atomically and durably."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    try:
        replace_file(path, write)
    except OSError as error:
        raise OSError(
            f"{path}: {len(data) / 2**20:.1f} MiB could not be written: {error.strerror}. What was "
            "finished before is complete; make room and run the same command again, it continues."
        ) from error


def read_record(path: Path) -> Record:
    """The record in a shard's header; reads no tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()[RECORD]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: is no shard of `turbo-distill prepare` ({error}). Delete this file and run "
            "the command again; it makes the file anew."
        ) from error


def foreign_items(cache: Path, kind: str, plan: str) -> dict[str, tuple[Path, Record]]:
    """By key: the results of earlier, other plans, so that they need not be made again.

    Shards of the same plan do not count: their content must not depend on the order of work.
    """
    found: dict[str, tuple[Path, Record]] = {}
    for path in sorted((cache / kind).glob("*.safetensors")):
        record = read_record(path)
        if record["plan"] != plan:
            found |= {item["key"]: (path, item) for item in record["items"] if item["here"]}
    return found


def remove_leftovers(cache: Path) -> None:
    """Temporary files of killed runs: old ones, for another rank may be writing at this moment."""
    for path in cache.rglob(".*.tmp"):
        if time.time() - path.stat().st_mtime > LEFTOVER_S:
            path.unlink(missing_ok=True)


def json_lines(values: list[dict[str, Any]]) -> bytes:
    """Bytes of names that are not UTF-8 become JSON's own escapes, such as \\udcff."""
    lines = "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values)
    return lines.encode("utf-8", "backslashreplace")


def batched(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
