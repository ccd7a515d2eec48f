"""CONDITIONING on disk: one safetensors file per prompt, bounded, the longest unused go first."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..distill.contract.files import written_whole

Conditioning = list[list[Any]]  # [[tensor, {"pooled_output": tensor, ...}], ...]

LIMIT_BYTES = 2**30  # 300 to 900 prompts of Qwen-Image: 256 to 77 tokens of 3584 float32
LAYOUT = "turbo.conditioning"  # header entry: what is not a tensor
MIB = 2**20
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class PromptCache:
    """A folder of encoded prompts. Trouble with it is logged, never raised: one can encode anew."""

    folder: Path
    limit_bytes: int = LIMIT_BYTES

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).is_file()

    def load(self, key: str) -> Conditioning | None:
        """What was stored under `key`, on the CPU; None where there is nothing or it is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            conditioning = read(path)
            os.utime(path)  # used just now
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            logging.warning(
                "Turbo Distill: %s cannot be read (%s); the prompt is encoded again.", path, error
            )
            path.unlink(missing_ok=True)
            return None
        return conditioning

    def store(self, key: str, conditioning: Conditioning) -> bool:
        """Keeps it where it can be kept; returns whether."""
        try:
            tensors, layout = flatten(conditioning)
        except TypeError as error:  # hooks and the like live in this process only
            logging.info("Turbo Distill: this prompt is not kept on disk: %s", error)
            return False
        try:
            write(self.path(key), tensors, layout)
            self._evict(key)
        except OSError as error:
            logging.warning("Turbo Distill: the prompt was not kept in %s: %s", self.folder, error)
            return False
        return True

    def _evict(self, newest: str) -> None:
        files = [(path, path.stat()) for path in self.folder.glob("*.safetensors")]
        files.sort(key=lambda file: file[1].st_mtime_ns)
        excess = sum(status.st_size for _, status in files) - self.limit_bytes
        for path, status in files:
            if excess <= 0 or path == self.path(newest):
                return
            path.unlink(missing_ok=True)
            excess -= status.st_size


def flatten(conditioning: Conditioning) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors by name, and as JSON everything else. Raises TypeError where that cannot be."""
    tensors, entries = {}, []
    for index, (cond, options) in enumerate(conditioning):
        entry = {}
        for name, value in {"": cond, **options}.items():
            if isinstance(value, torch.Tensor):
                # clone: a view would bring its whole storage along
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            elif value is None or isinstance(value, bool | int | float | str):
                entry[name] = value
            else:
                raise TypeError(f"its entry {name!r} is a {type(value).__name__}")
        entries.append(entry)
    return tensors, json.dumps(entries)


def read(path: Path) -> Conditioning:
    """The inverse of `flatten` and `write`."""
    with safe_open(path, framework="pt") as file:
        entries = json.loads(file.metadata()[LAYOUT])
        for name in file.keys():  # noqa: SIM118
            index, key = name.split(".", 1)
            entries[int(index)][key] = file.get_tensor(name)
    return [[entry.pop(""), entry] for entry in entries]


def write(path: Path, tensors: Mapping[str, torch.Tensor], layout: str) -> None:
    """To a temporary name first: a reader sees all of a file or nothing."""
    with written_whole(path) as temporary:
        save_file(dict(tensors), temporary, {LAYOUT: layout})


def digest(value: Any) -> str:
    """A name for anything that JSON can write."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_identity(path: Path) -> str:
    """Changes when a file's size, time, first MiB (header and names) or samples of it change.

    Reads 1.3 MB: the whole of an encoder has 8 to 16 GB.
    """
    status = path.stat()
    found = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        found.update(file.read(MIB))
        for sample in range(SAMPLES):
            file.seek(max(0, status.st_size - SAMPLE_BYTES) * (sample + 1) // SAMPLES)
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()
