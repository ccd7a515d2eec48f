"""Images by the teacher, as latents: many guided steps on the base model's own schedule."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import Config
from ..models.family import family_of
from ..models.load import load_transformer
from ..models.roles import Roles
from ..models.sample import noise_of_seeds, sample_teacher
from ..models.sizes import Size
from ..models.text import Text


class Teacher:
    """Draws one image at a time, so that an image does not depend on its neighbours."""

    def __init__(
        self, config: Config, folder: Path, steps: int, negative: torch.Tensor, device: torch.device
    ) -> None:
        model = config.model
        dtype = getattr(torch, model.dtype)
        transformer = load_transformer(
            model.path, dtype, model.quantize, model.offload_modulation, model.loras
        )
        transformer.to(device).eval()
        self.folder, self.steps, self.device = folder, steps, device
        self.sigmas = family_of(model.path).sigmas
        text = Text(negative[None].to(device, dtype))
        self.roles = Roles(transformer, config.adapter, config.guidance, text, 0, adapters=())

    def draw(self, prompt: torch.Tensor, size: Size, seed: int) -> torch.Tensor:
        """prompt [L, D] -> latents [C, H/8, W/8]"""
        noise = noise_of_seeds([seed], self.roles.latent_shape(size)).to(self.device)
        text = Text(prompt[None].to(self.device, self.roles.negative.embeds.dtype))
        sigmas = self.sigmas(self.folder, self.steps, size)
        return sample_teacher(self.roles, sigmas, noise, text)[0]
