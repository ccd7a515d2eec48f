"""The folder that PEFT's `save_pretrained` writes: weights and an adapter_config.json."""

from __future__ import annotations

import os
from pathlib import Path

from .lora_alpha import ADAPTER_CONFIG
from .lora_keys import LoraFormatError

ADAPTER_MODEL = "adapter_model.safetensors"
_MAX_CONFIG = 1_000_000  # bytes; PEFT's own are of a few thousand


def lora_file(path: str | os.PathLike[str]) -> Path:
    """The LoRA that a path stands for: the file itself, or PEFT's file in a folder.

    Raises LoraFormatError for a folder without one. A path that does not exist comes back.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / ADAPTER_MODEL).is_file():
        return path / ADAPTER_MODEL
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        hint = f"it holds {len(files)} .safetensors files: name one of them, such as {files[0]}"
    elif (path / ADAPTER_MODEL).with_suffix(".bin").is_file():
        hint = "adapter_model.bin is a Python pickle: save the LoRA again as safetensors"
    elif deeper := sorted((*path.glob(f"*/{ADAPTER_MODEL}"), *path.glob("lora/*.safetensors"))):
        hint = f"name {deeper[0]}"
    else:
        hint = "it holds no .safetensors file"
    raise LoraFormatError(f"{path}: expected a LoRA file or a folder with {ADAPTER_MODEL}; {hint}.")


def config_beside(path: Path) -> dict[str, str]:
    """The text of adapter_config.json beside a LoRA under that name, empty without one.

    Whether it says anything about this LoRA is for `lora_alpha` to decide. Raises OSError.
    """
    config = path.with_name(ADAPTER_CONFIG)
    if not config.is_file():
        return {}
    with config.open("rb") as file:
        return {ADAPTER_CONFIG: file.read(_MAX_CONFIG).decode("utf-8-sig", "replace")}
