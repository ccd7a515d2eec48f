"""DINOv2 and DINOv3 backbones."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from ..config import ConfigError
from ..contract.shown import first_line

DINO_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def load_dino(path: str, dtype: torch.dtype) -> nn.Module:
    """Raises ConfigError."""

    try:
        kind = AutoConfig.from_pretrained(path).model_type  # nosec B615 # the user names it
        if kind not in DINO_TYPES:
            raise ConfigError(
                f"gan.features: {path}: expected a DINO model ({', '.join(DINO_TYPES)}), found "
                f"{kind}."
            )
        model = AutoModel.from_pretrained(path, dtype=dtype)  # nosec B615 # the user names it
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"gan.features: {path}: cannot be loaded ({first_line(error)}). Expected the "
            'folder or hub id of a DINOv2 or DINOv3 model, "latent", or "pixels".'
        ) from error
    return model.eval().requires_grad_(False)
