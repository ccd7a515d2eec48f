"""CONDITIONING on disk: one safetensors file per prompt, bounded, the longest unused go first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..distill.contract.files import written_whole

Conditioning = list[list[Any]]  # [[tensor, {"pooled_output": tensor, ...}], ...]

LIMIT_BYTES = 2**30  # 300 to 900 prompts of Qwen-Image: 256 to 77 tokens of 3584 float32
LAYOUT = "turbo.conditioning"  # header entry: what is not a tensor
SUFFIX, DAMAGED = ".safetensors", ".damaged"
AGAIN = "The prompt is encoded again."
MIB = 2**20
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class PromptCache:
    """A folder of encoded prompts. Trouble with it is logged, never raised: one can encode anew."""

    folder: Path
    limit_bytes: int = LIMIT_BYTES

    def path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def has(self, key: str) -> bool:
        return os.path.isfile(self.path(key))  # False as well where it may not be looked at

    def load(self, key: str) -> Conditioning | None:
        """What was stored under `key`, on the CPU; None where there is nothing or it is damaged.

        A damaged file is set aside under another ending: it may be wanted to see what happened.
        """
        if not self.has(key):
            return None
        path = self.path(key)
        try:
            conditioning = read(path)
        except OSError as error:  # the disk's or its owner's trouble: the entry may be whole
            logging.warning("Turbo Distill: %s cannot be read: %s. %s", path, error, AGAIN)
            return None
        except Exception as error:  # whatever may be in a file, the prompt is to be painted
            logging.warning(
                "Turbo Distill: %s is damaged (%s: %s). It is set aside as %s. %s",
                *(path, type(error).__name__, error, path.with_suffix(DAMAGED).name, AGAIN),
            )
            with _logged(f"{path} could not be set aside"):
                path.replace(path.with_suffix(DAMAGED))
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(path)  # used just now
        return conditioning

    def store(self, key: str, conditioning: Conditioning) -> bool:
        """Keeps it where it can be kept; returns whether."""
        try:
            tensors, layout = flatten(conditioning)
        except (TypeError, ValueError) as error:  # hooks and the like live in this process only
            logging.info("Turbo Distill: this prompt is not kept on disk: %s", error)
            return False
        kept = False
        with _logged(f"the prompt was not kept in {self.folder}"):
            write(self.path(key), tensors, layout)
            kept = True
        with _logged(f"old prompts could not be removed from {self.folder}"):
            self._evict(key)
        return kept

    def _evict(self, newest: str) -> None:
        files = []
        for path in self.folder.iterdir():
            if path.suffix in (SUFFIX, DAMAGED):
                with contextlib.suppress(FileNotFoundError):  # another server evicts here too
                    files.append((path, path.stat()))
        files.sort(key=lambda file: file[1].st_mtime_ns)
        excess = sum(status.st_size for _, status in files) - self.limit_bytes
        for path, status in files:
            if excess <= 0:
                return
            if path != self.path(newest):
                path.unlink(missing_ok=True)
                excess -= status.st_size


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Trouble becomes a line in the log."""
    try:
        yield
    except Exception as error:
        logging.warning("Turbo Distill: %s: %s", what, error)


def flatten(conditioning: Conditioning) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors by name, and as JSON everything else.

    Raises TypeError for what encoders do not produce, ValueError for numbers that are not finite.
    """
    tensors, entries = {}, []
    for index, (cond, options) in enumerate(conditioning):
        entry = {}
        if "" in options:
            raise TypeError("it has an entry without a name")
        for name, value in {"": cond, **options}.items():
            if isinstance(value, torch.Tensor):
                if value.layout != torch.strided or value.is_meta or value.is_quantized:
                    raise TypeError(f"its entry {name!r} is no plain tensor")
                # clone: a view would bring its whole storage along
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            elif _is_plain(value):
                entry[name] = value
            else:
                raise TypeError(f"its entry {name!r} is a {type(value).__name__}")
        entries.append(entry)
    return tensors, json.dumps(entries, allow_nan=False)


def read(path: Path) -> Conditioning:
    """The inverse of `flatten` and `write`: what an encoder produces, and nothing else.

    Raises OSError, ValueError, and what the readers of JSON and safetensors raise.
    """
    with safe_open(path, framework="pt") as file:
        entries = json.loads((file.metadata() or {}).get(LAYOUT, "null"), parse_constant=_refuse)
        _check_entries(entries)
        for name in file.keys():  # noqa: SIM118
            index, key = name.split(".", 1)
            if not index.isdecimal() or int(index) >= len(entries):
                raise ValueError(f"{name} belongs to none of {len(entries)} prompts")
            # clone: no mapping of the file, which others may replace or remove
            entries[int(index)][key] = file.get_tensor(name).clone()
    for entry in entries:
        cond = entry.get("")
        if not isinstance(cond, torch.Tensor) or not cond.is_floating_point() or cond.ndim < 2:
            raise ValueError("a prompt without an embedding")
    return [[entry.pop(""), entry] for entry in entries]


def _check_entries(entries: Any) -> None:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{LAYOUT} in the header is no list of prompts")
    for entry in entries:
        if not isinstance(entry, dict) or not all(map(_is_plain, entry.values())):
            raise ValueError(f"{LAYOUT} in the header holds what no encoder produces")


def _is_plain(value: Any) -> bool:
    """What encoders say beside tensors, such as pooled_output None."""
    return value is None or isinstance(value, bool | int | float | str)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} in the header")


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
