"""Flow matching, stated once.

    x_t = (1 - t) x0 + t eps        v = eps - x0        x0 = x_t - t v

t = 0 is data, t = 1 is noise; in samplers t is called sigma. Times are [B] tensors, broadcast over
the rest.
"""

from __future__ import annotations

from typing import TypeVar

import torch

Time = TypeVar("Time", torch.Tensor, float)


def match(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ..., 1], so that it multiplies x [B, ...]."""
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def add_noise(x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The point x_t on the straight line from data x0 to noise eps."""
    t = match(t, x0)
    return (1 - t) * x0 + t * eps


def to_x0(x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The data that velocity v points at."""
    return x_t - match(t, x_t) * v


def euler(x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """One Euler step of the probability-flow ODE from time t to time s."""
    return x_t + match(s - t, x_t) * v


def guide(
    v_cond: torch.Tensor, v_uncond: torch.Tensor, scale: float, rescale: bool
) -> torch.Tensor:
    """Classifier-free guidance v_u + scale (v_c - v_u); `rescale` gives every token the norm of its
    conditional velocity, as diffusers' Qwen-Image pipeline does. Velocities are token sequences [B,
    tokens, channels].
    """
    v = v_uncond + scale * (v_cond - v_uncond)
    if not rescale:
        return v
    norm = v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return v * (v_cond.norm(dim=-1, keepdim=True) / norm)


def shift(t: Time, factor: float) -> Time:
    """Moves times towards noise: factor t / (1 + (factor - 1) t)."""
    return factor * t / (1 + (factor - 1) * t)


def unshift(t: Time, factor: float) -> Time:
    """Inverse of `shift`."""
    return shift(t, 1 / factor)


def renoise_within(
    x_e: torch.Tensor, e: torch.Tensor, s: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The forward process from level e up to level s >= e: a sample of p(x_s | x_e).

    x_s = a x_e + sqrt(s^2 - (a e)^2) noise with a = (1 - s) / (1 - e), so that x_e = (1 - e) x0 +
    e eps becomes (1 - s) x0 + noise of standard deviation s. PCM's published code has (s - e) / (1
    - e) for the root, too little as soon as e > 0.
    """
    s, e = match(s, x_e), match(e, x_e)
    a = (1 - s) / (1 - e)
    return a * x_e + (s * s - (a * e).square()).clamp_min(0).sqrt() * noise
