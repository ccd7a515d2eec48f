"""Files behind the entries of ComfyUI's lists."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..distill.contract.lora_alpha import ADAPTER_CONFIG


def fingerprint(path: Path) -> str:
    """Changes when the file on disk does, or the adapter_config.json that tells of it."""
    config = path.with_name(ADAPTER_CONFIG)
    states = [file.stat() for file in (path, config) if file is path or config.is_file()]
    return "-".join(f"{state.st_mtime_ns}-{state.st_size}" for state in states)


def lora_path(lora_name: str) -> Path:
    """The file behind an entry of the list. Raises FileNotFoundError if it is gone."""
    return Path(folder_paths.get_full_path_or_raise("loras", lora_name))


def lora_input(tooltip: str) -> io.Combo.Input:
    """The list of models/loras as the widget `lora_name`."""
    files = folder_paths.get_filename_list("loras")
    return io.Combo.Input("lora_name", options=files, tooltip=tooltip)
