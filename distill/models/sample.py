"""Sampling during training and evaluation: the same sampler code and sigmas as the ComfyUI node."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from ..contract.sampling import (
    NoiseSampler,
    renoise_noise_sampler,
    sample_euler,
    sampler_function,
    velocity_denoiser,
)
from ..contract.schedule import schedule
from ..contract.spec import TurboSpec
from .qwen_image import Text, guided_velocity
from .roles import STUDENT, Roles
from .sizes import LATENT, TOKEN, Size


def teacher_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """The many-step schedule of the undistilled model."""
    return schedule(steps, shift=shift)


def noise_of_seeds(seeds: Sequence[int], channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Initial noise of images of `size` (width, height in pixels), one per seed: what ComfyUI draws
    for that seed.  # [B, C, H/8, W/8]
    """
    shape = (channels, size[1] // LATENT, size[0] // LATENT)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def sample_student(
    roles: Roles,
    spec: TurboSpec,
    noise: torch.Tensor,
    text: Text,
    seed: int | Sequence[int] = 0,
    role: str = STUDENT,
) -> torch.Tensor:
    """Latents of the student as its spec says; noise [B, C, h, w] -> [B, C, h, w]

    seed: of what "renoise" draws on the way; one per image makes an image independent of its batch.
    """
    extra = {}
    if spec.sampler == "renoise":
        extra["noise_sampler"] = _renoise(noise, seed)
    model = velocity_denoiser(lambda x, sigma: _velocity(roles, role, x, sigma, text, spec.cfg))
    return sampler_function(spec)(model, noise * spec.sigmas[0], list(spec.sigmas), **extra)


def _renoise(noise: torch.Tensor, seed: int | Sequence[int]) -> NoiseSampler:
    if isinstance(seed, int):
        return renoise_noise_sampler(noise, seed)
    each = [renoise_noise_sampler(x[None], s) for x, s in zip(noise, seed, strict=True)]
    return lambda sigma, sigma_next: torch.cat([draw(sigma, sigma_next) for draw in each])


def _velocity(
    roles: Roles, role: str, x: torch.Tensor, sigma: torch.Tensor, text: Text, cfg: float
) -> torch.Tensor:
    if cfg == 1:
        return roles.velocity(role, x, sigma, text)
    with roles.use_role(role) as transformer:
        return guided_velocity(transformer, x, sigma, text, roles.negative, cfg, rescale=False)


def sample_teacher(
    roles: Roles, sigmas: tuple[float, ...], noise: torch.Tensor, text: Text, guided: bool = True
) -> torch.Tensor:
    """Latents of the teacher along the ODE, with its guidance or without."""

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (
            roles.teacher(x, sigma, text) if guided else roles.velocity("teacher", x, sigma, text)
        )

    return sample_euler(velocity_denoiser(velocity), noise * sigmas[0], list(sigmas))


def in_chunks(
    draw: Callable[[torch.Tensor, Text], torch.Tensor],
    noise: torch.Tensor,
    text: Text,
    batch_size: int,
) -> torch.Tensor:
    """Runs `draw` over at most `batch_size` samples at a time."""
    parts = []
    for start in range(0, len(noise), batch_size):
        chunk = slice(start, start + batch_size)
        mask = None if text.mask is None else text.mask[chunk]
        parts.append(draw(noise[chunk], Text(text.embeds[chunk], mask)))
    return torch.cat(parts)


def pipeline_sigmas(folder: Path, steps: int, size: Size) -> tuple[float, ...]:
    """The sigmas that diffusers' pipeline takes for images of `size`, by the model's scheduler
    file; without one (the tiny model) a static shift.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        from ..contract.tiny import SHIFT

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
