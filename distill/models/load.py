"""Opens base models by the names that a configuration uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from ..config import BaseLora, ConfigError, Quantize
from .base_lora import merge, read_base_lora
from .family import class_name, family_of
from .quantise import keep_modulation_on_host, quantisation, quantise


def _check_folder(root: Path, subfolder: str, expected: str) -> None:
    """A local folder is checked before a weight is read; a hub id is left to diffusers."""
    if not root.is_dir():
        return
    config = root / subfolder / "config.json"
    if not config.is_file():
        raise ConfigError(
            f"model.path: {root} is no model in diffusers layout: {config} is missing. Expected "
            f"a folder with transformer/ and vae/, as `hf download Qwen/Qwen-Image-2512` makes it."
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.path: {config}: expected the configuration of a {expected}, found none that "
            f"can be read ({error!r}). Download the folder again."
        ) from error
    if found != expected:
        raise ConfigError(f"model.path: {config}: expected a {expected}, found {found}.")


def load_transformer(
    path: str,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    offload_modulation: bool = False,
    loras: Sequence[BaseLora] = (),
) -> Any:
    """The transformer of a base model, in main memory. `loras` are merged into its weights before
    these are quantised; it is then read whole, not layer by layer.

    Raises ConfigError, and LoraFormatError for a LoRA that does not fit.
    """
    family = family_of(path)
    location = family.locate(path)
    _check_folder(Path(location), "transformer", class_name(family.transformer))
    config = quantisation(family, quantize, offload_modulation)
    transformer = resolve_name(family.transformer).from_pretrained(
        location,
        subfolder="transformer",
        torch_dtype=dtype,
        quantization_config=None if loras else config,
    )
    if loras:
        merge(transformer, [(read_base_lora(lora.path), lora.strength) for lora in loras])
        quantise(family, transformer, quantize, offload_modulation)
    if offload_modulation:
        keep_modulation_on_host(family, transformer)
    return transformer


def check_vae(path: str) -> None:
    """Raises ConfigError where a local folder has no VAE of its family."""
    family = family_of(path)
    _check_folder(Path(family.locate(path)), "vae", class_name(family.vae.kind))


def load_vae(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The VAE of a base model, frozen, in main memory."""
    check_vae(path)
    family = family_of(path)
    location = family.locate(path)
    vae = resolve_name(family.vae.kind).from_pretrained(
        location, subfolder="vae", torch_dtype=dtype
    )
    return family.vae.prepare(vae.eval().requires_grad_(False))
