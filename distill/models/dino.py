"""DINOv2 and DINOv3 backbones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from ..config import ConfigError
from ..contract.shown import first_line

DINO_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def load_dino(path: str, dtype: torch.dtype) -> nn.Module:
    """Raises ConfigError."""
    check_dino(path)
    with _told(path):
        model = AutoModel.from_pretrained(path, dtype=dtype)  # nosec B615 # the user names it
    return model.eval().requires_grad_(False)


def check_dino(path: str) -> int:
    """The pixels per side of its patches; no weight is read. Raises ConfigError."""
    with _told(path):
        config = AutoConfig.from_pretrained(path)  # nosec B615 # the user names it
    if config.model_type not in DINO_TYPES:
        raise ConfigError(
            f"gan.features: {path}: expected a DINO model ({', '.join(DINO_TYPES)}), found "
            f"{config.model_type}."
        )
    return int(config.patch_size)


@contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"gan.features: {path}: cannot be loaded ({first_line(error)}). Expected the "
            'folder or hub id of a DINOv2 or DINOv3 model, "latent", or "pixels".'
        ) from error
