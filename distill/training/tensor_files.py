"""Files of a checkpoint: safetensors of a bounded size, and checksums that are checked when read.

FOLDER/00000.safetensors ...  SHA256SUMS   (`sha256sum -c SHA256SUMS` checks them as well)
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from ..contract.lora_keys import LoraFormatError
from ..contract.metadata import read_header, tensor_sha256
from ..contract.tensor_file import header_of

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
FILE_BYTES = 1 << 29  # of tensors per file, which the ranks share out


class DamagedFile(ValueError):
    """Bytes that are not those that were written; the message names the file."""


def divided(
    tensors: Mapping[str, torch.Tensor], limit: int = FILE_BYTES
) -> dict[str, dict[str, torch.Tensor]]:
    """`tensors` by the file that they go to. How many ranks there are has no say in it."""
    files: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if files[-1] and held + tensor.nbytes > limit:
            files.append({})
            held = 0
        files[-1][name] = tensor
        held += tensor.nbytes
    return {f"{i:05}.safetensors": file for i, file in enumerate(files)}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """A safetensors file; one tensor is copied at a time. Returns the SHA-256 of what was to be
    written. Raises OSError.
    """
    header, starts = header_of(tensors)
    return _write(path, header, *(tensors[name] for name in starts))


def write_bytes(path: Path, data: bytes) -> str:
    """The same for any content."""
    return _write(path, data)


def _write(path: Path, *parts: bytes | torch.Tensor) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            data = part if isinstance(part, bytes) else _memory_of(part)
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sha256_of(tensor: torch.Tensor) -> str:
    """Of its bytes."""
    return hashlib.sha256(_memory_of(tensor)).hexdigest()


def _memory_of(tensor: torch.Tensor) -> memoryview:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(data.numpy())


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    write_bytes(folder / SUMS, _sums_text(sums))


def _sums_text(sums: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def read_sums(folder: Path) -> dict[str, str]:
    """Checksums by file name. Raises DamagedFile, OSError."""
    data = (folder / SUMS).read_bytes()
    lines = (line.partition("  ") for line in data.decode(errors="replace").splitlines())
    sums = {name: digest for digest, _, name in lines}
    if _sums_text(sums) != data or any(Path(name).name != name for name in sums):
        raise DamagedFile(f"{SUMS} is damaged: expected a checksum and a file name in every line")
    return sums


def read_checked(folder: Path, name: str, sums: Mapping[str, str]) -> bytes:
    """A file's bytes, which are those that were written. Raises DamagedFile, OSError."""
    data = (folder / name).read_bytes()
    _require_sum(name, hashlib.sha256(data).hexdigest(), sums)
    return data


def read_tensors(
    folder: Path, sums: Mapping[str, str], mapped: bool = False
) -> dict[str, torch.Tensor]:
    """All tensors of a folder, in main memory. Raises as `read_checked`.

    mapped: they stay in the files, which all processes of a machine then share. For what is copied
    at once, out of a folder that nobody changes meanwhile.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in sums:
        if not name.endswith(".safetensors"):
            continue
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        _require_sum(name, digest.hexdigest(), sums)
        with safe_open(folder / name, framework="pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tensors |= held if mapped else {key: tensor.clone() for key, tensor in held.items()}
    return tensors


def _require_sum(name: str, found: str, sums: Mapping[str, str]) -> None:
    if found != sums.get(name):
        raise DamagedFile(
            f"{name} is damaged: {SUMS} says {sums.get(name, 'nothing')}, its SHA-256 is {found}"
        )


def check_lora(path: Path) -> None:
    """Compares a LoRA's weights with the hash in its header, where there is one.

    Raises DamagedFile, LoraFormatError, OSError.
    """
    expected = read_header(path).get("modelspec.hash_sha256", "").removeprefix("0x")
    if expected and expected != tensor_sha256(path):
        raise DamagedFile(f"{path}: its weights are damaged, for their SHA-256 is not the header's")


def is_intact(path: Path, otherwise: str) -> bool:
    """Whether a LoRA is there and undamaged; if not, says why and what follows from it."""
    try:
        check_lora(path)
    except FileNotFoundError:
        log.warning("%s is missing; %s", path, otherwise)
    except (DamagedFile, LoraFormatError) as error:
        log.warning("%s; %s", str(error).rstrip("."), otherwise)
    else:
        return True
    return False
