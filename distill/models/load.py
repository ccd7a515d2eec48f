"""Opens base models and data by the names that a configuration uses."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

from ..config import TINY, ConfigError, Quantize
from ..contract.tiny import TINY_DIR
from .quantise import keep_modulation_on_host, quantisation
from .vae import fold_single_frame

TRANSFORMER_CLASS, VAE_CLASS = "QwenImageTransformer2DModel", "AutoencoderKLQwenImage"


def _location(path: str) -> str:
    return str(TINY_DIR) if path == TINY else path


def _check_folder(path: str, subfolder: str, expected: str) -> None:
    """A local folder is checked before a weight is read; a hub id is left to diffusers."""
    root = Path(_location(path))
    if not root.is_dir():
        return
    config = root / subfolder / "config.json"
    if not config.is_file():
        raise ConfigError(
            f"model.path: {root} is no model in diffusers layout: {config} is missing. Expected "
            f"a folder with transformer/ and vae/, as `hf download Qwen/Qwen-Image-2512` makes it."
        )
    found = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if found != expected:
        raise ConfigError(f"model.path: {config}: expected a {expected}, found {found}.")


def load_transformer(
    path: str,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    offload_modulation: bool = False,
) -> QwenImageTransformer2DModel:
    """The transformer of a base model, in main memory."""
    _check_folder(path, "transformer", TRANSFORMER_CLASS)
    transformer = QwenImageTransformer2DModel.from_pretrained(
        _location(path),
        subfolder="transformer",
        torch_dtype=dtype,
        quantization_config=quantisation(quantize, offload_modulation),
    )
    if offload_modulation:
        keep_modulation_on_host(transformer)
    return transformer


def load_vae(path: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLQwenImage:
    """The VAE of a base model, frozen, its convolutions folded for single images."""
    _check_folder(path, "vae", VAE_CLASS)
    vae = AutoencoderKLQwenImage.from_pretrained(
        _location(path), subfolder="vae", torch_dtype=dtype
    )
    return fold_single_frame(vae.eval().requires_grad_(False))
