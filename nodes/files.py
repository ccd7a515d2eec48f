"""Files behind the entries of ComfyUI's lists."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..distill.contract.lora_alpha import ADAPTER_CONFIG
from ..distill.contract.others import MODEL_INDEX, sidecar
from ..distill.contract.shown import shown

LORAS = "loras"


def fingerprint(path: Path) -> str:
    """Changes when the file on disk does, or one beside it that tells of it."""
    beside = (path.with_name(ADAPTER_CONFIG), path.with_name(MODEL_INDEX), sidecar(path))
    states = [path.stat(), *(file.stat() for file in beside if file.is_file())]
    return "-".join(f"{state.st_mtime_ns}-{state.st_size}" for state in states)


def list_fingerprint(folder: str, *names: Any) -> str:
    """Changes when a file behind these entries of a list does: for a node's `fingerprint_inputs`.

    A name that comes by a wire is None there: core asks before anything has run. It may become any
    of the list, so then all of its files count. Never raises, which core would note as NaN, in the
    PNG too; a file that is gone is for `execute` to tell.
    """
    if all(isinstance(name, str) for name in names):
        return " ".join(_fingerprint(folder, name) for name in names)
    files = sorted(folder_paths.get_filename_list(folder))
    found = "\n".join(f"{name} {_fingerprint(folder, name)}" for name in files)
    return hashlib.sha256(found.encode(errors="surrogateescape")).hexdigest()


def _fingerprint(folder: str, name: str) -> str:
    path = folder_paths.get_full_path(folder, name)
    try:
        return "" if path is None else fingerprint(Path(path))
    except OSError:  # removed since, or a link to nowhere
        return ""


def checked_name(folder: str, name: Any) -> str:
    """`name`, which a wire may have brought. Raises ValueError for what is no name at all."""
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"expected the name of a file in models/{folder}; a wire brought {shown(name)}. Wire a "
            f"text: a name as it stands in the list."
        )
    return name


def listed_path(folder: str, name: Any) -> Path:
    """The file behind an entry of a list. Raises FileNotFoundError if it is gone, and as
    `checked_name`.
    """
    return Path(folder_paths.get_full_path_or_raise(folder, checked_name(folder, name)))


def lora_path(lora_name: Any) -> Path:
    """The file behind an entry of models/loras; raises as `listed_path`."""
    return listed_path(LORAS, lora_name)


def lora_input(tooltip: str) -> io.Combo.Input:
    """The list of models/loras as the widget `lora_name`."""
    files = folder_paths.get_filename_list(LORAS)
    return io.Combo.Input("lora_name", options=files, tooltip=tooltip)
