"""Images by the teacher, as latents: many guided steps on the base model's own schedule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from ..config import Config
from ..load import load_transformer
from ..models import Text
from ..roles import Roles
from ..sample import noise_of_seeds, sample_teacher, teacher_sigmas
from .buckets import TOKEN, Size


def pipeline_sigmas(folder: Path, steps: int, size: Size) -> tuple[float, ...]:
    """The sigmas that diffusers' pipeline takes for images of `size`, by the model's scheduler
    file; without one (the tiny model) a static shift.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        from ..tiny.quality import SHIFT

        return teacher_sigmas(steps, SHIFT)
    values = json.loads(path.read_text(encoding="utf-8"))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(values)
    config = scheduler.config
    mu = calculate_shift(
        (size[0] // TOKEN) * (size[1] // TOKEN),
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return tuple(scheduler.sigmas.tolist())


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
