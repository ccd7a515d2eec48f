"""Images by the teacher, as latents: many guided steps on the base model's own schedule."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import Config
from ..models.load import load_transformer
from ..models.qwen_image import Text
from ..models.roles import Roles
from ..models.sample import noise_of_seeds, pipeline_sigmas, sample_teacher
from ..models.sizes import Size


class Teacher:
    """Draws one image at a time, so that an image does not depend on its neighbours."""

    def __init__(
        self, config: Config, folder: Path, steps: int, negative: torch.Tensor, device: torch.device
    ) -> None:
        model = config.model
        dtype = getattr(torch, model.dtype)
        transformer = load_transformer(model.path, dtype, model.quantize, model.offload_modulation)
        transformer.to(device).eval()
        self.channels = transformer.config.in_channels // 4
        self.folder, self.steps, self.device = folder, steps, device
        text = Text(negative[None].to(device, dtype))
        self.roles = Roles(transformer, config.adapter, config.guidance, text, 0, adapters=())

    def draw(self, prompt: torch.Tensor, size: Size, seed: int) -> torch.Tensor:
        """prompt [L, D] -> latents [C, H/8, W/8]"""
        noise = noise_of_seeds([seed], self.channels, size).to(self.device)
        text = Text(prompt[None].to(self.device, self.roles.negative.embeds.dtype))
        sigmas = pipeline_sigmas(self.folder, self.steps, size)
        return sample_teacher(self.roles, sigmas, noise, text)[0]
