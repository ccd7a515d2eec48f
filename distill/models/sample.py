"""Sampling during training and evaluation: the same sampler code and sigmas as the ComfyUI node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..contract.sampling import (
    NoiseSampler,
    renoise_noise_sampler,
    sample_euler,
    sampler_function,
    velocity_denoiser,
)
from ..contract.schedule import schedule
from ..contract.spec import TurboSpec
from .roles import STUDENT, Roles
from .text import Text


def teacher_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """The many-step schedule of the undistilled model."""
    return schedule(steps, shift=shift)


def noise_of_seeds(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Initial noise of latents of `shape` [C, h, w], one per seed: what ComfyUI draws for that
    seed.  # [B, C, h, w]
    """
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
    extra, text = {}, text.remembering()
    if spec.sampler == "renoise":
        extra["noise_sampler"] = _renoise(noise, seed)
    model = velocity_denoiser(lambda x, sigma: _velocity(roles, role, x, sigma, text, spec.cfg))
    sigmas = spec.sigmas(roles.tokens(noise))
    return sampler_function(spec)(model, noise * sigmas[0], list(sigmas), **extra)


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
    return roles.velocity_pair(role, x, sigma, text, cfg, rescale=False)[1]


def sample_teacher(
    roles: Roles, sigmas: tuple[float, ...], noise: torch.Tensor, text: Text, guided: bool = True
) -> torch.Tensor:
    """Latents of the teacher along the ODE, with its guidance or without."""
    text = text.remembering()

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
