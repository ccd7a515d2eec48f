"""Few-step samplers as free functions, shared by training previews, evaluation and ComfyUI node.

The convention is k-diffusion's, as ComfyUI's KSAMPLER calls it: `model(x, sigma, **extra_args)`
returns `denoised`, the estimate of x0; `sigma` has shape [B]. Flow matching:
x_t = (1 - t) x0 + t eps, v = eps - x0, x0 = x_t - t v.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import SpecError
from .shown import shown
from .spec import SAMPLERS, TurboSpec, near_miss

Denoiser = Callable[..., Tensor]
NoiseSampler = Callable[[Any, Any], Tensor]
Callback = Callable[[dict[str, Any]], object]


def velocity_denoiser(velocity: Callable[..., Tensor]) -> Denoiser:
    """Wrap a flow model `velocity(x, sigma, **extra_args)` into a denoiser: x0 = x - sigma v."""

    def denoised(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        v = velocity(x, sigma, **extra_args)
        return x - v * sigma.reshape(-1, *[1] * (x.ndim - 1))  # sigma [B] -> [B, 1, ...]

    return denoised


def euler_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = (x - denoised) / sigma; 0-d sigmas. Differentiable."""
    # sigma gets x's dimensions, as in k-diffusion: so it takes part in dtype promotion, and
    # half-precision latents are divided in float32 there and here alike.
    d = (x - denoised) / sigma.reshape([1] * x.ndim)
    dt = sigma_next - sigma
    return x + d * dt


def renoise_step(denoised: Tensor, noise: Tensor, sigma_next: Tensor) -> Tensor:
    """Put x0 back on the path with fresh noise: sigma' eps + (1 - sigma') x0. Differentiable."""
    return sigma_next * noise + (1.0 - sigma_next) * denoised


@torch.no_grad()
def sample_euler(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Algorithm 2 of Karras et al. (2022) without churn: the deterministic ODE.

    x: noise at sigmas[0], [B, ...]. `callback` receives x, i, sigma, sigma_hat and denoised of each
    step. `disable` (a progress bar) is accepted for ComfyUI's sake; progress is the callback's job.
    """
    levels = _levels(sigmas, x)
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(levels) - 1):
        denoised = model(x, levels[i] * s_in, **(extra_args or {}))
        _report(callback, x, i, levels[i], denoised)
        x = euler_step(x, denoised, levels[i], levels[i + 1])
    return x


@torch.no_grad()
def sample_renoise(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Multistep consistency sampling (Algorithm 1 of Song et al. 2023) on the flow-matching path.

    Each step jumps to x0 and re-noises it to the next sigma; the last returns x0 (ComfyUI's `lcm`
    on a flow model). Without `noise_sampler`, `renoise_noise_sampler` draws from the seed in
    `extra_args`, which ComfyUI sets. Raises ValueError if there is neither: no image would repeat.
    """
    if noise_sampler is None:
        seed = (extra_args or {}).get("seed")
        if seed is None:
            raise ValueError(
                "sample_renoise: expected noise_sampler or extra_args['seed']; found neither"
            )
        noise_sampler = renoise_noise_sampler(x, seed)
    levels = _levels(sigmas, x)
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(levels) - 1):
        denoised = model(x, levels[i] * s_in, **(extra_args or {}))
        _report(callback, x, i, levels[i], denoised)
        x = denoised
        if levels[i + 1] > 0:
            x = renoise_step(denoised, noise_sampler(levels[i], levels[i + 1]), levels[i + 1])
    return x


def renoise_noise_sampler(
    x: Tensor, seed: int, batch_index: Sequence[int] | None = None
) -> NoiseSampler:
    """A `noise_sampler(sigma, sigma_next)` whose n-th call draws the noise of re-noising step n.

    Drawn on the CPU in float32, then moved to x's device and dtype: one seed is one image on every
    machine. Every item has its own stream from (seed, item, step), so item k of a batch equals the
    same item made alone with `batch_index=[k]`. Items default to 0 .. B-1. Raises ValueError if
    batch_index does not have one entry per item of x.
    """
    items = list(range(x.shape[0])) if batch_index is None else [int(k) for k in batch_index]
    if len(items) != x.shape[0]:
        raise ValueError(
            f"batch_index: expected {x.shape[0]} entries, one per latent; found {len(items)}"
        )
    shape, device, dtype = x.shape[1:], x.device, x.dtype
    step = -1

    def noise_sampler(sigma: object, sigma_next: object) -> Tensor:
        nonlocal step
        step += 1
        noise = [torch.randn(shape, generator=_stream(seed, item, step)) for item in items]
        return torch.stack(noise).to(device=device, dtype=dtype)

    return noise_sampler


def sampler_function(spec: TurboSpec | str) -> Callable[..., Tensor]:
    """The sampler that a spec, or a name, asks for. Raises SpecError for an unknown name."""
    name = spec.sampler if isinstance(spec, TurboSpec) else spec
    if name not in _FUNCTIONS:
        raise SpecError(
            f"sampler: expected one of {', '.join(SAMPLERS)}; found {shown(name)}"
            + near_miss(name, SAMPLERS)
        )
    return _FUNCTIONS[name]


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"euler": sample_euler, "renoise": sample_renoise}


def _levels(sigmas: Tensor | Sequence[float], x: Tensor) -> Tensor:
    if isinstance(sigmas, Tensor):
        return sigmas
    return torch.tensor(sigmas, dtype=torch.float32, device=x.device)


def _report(callback: Callback | None, x: Tensor, i: int, sigma: Tensor, denoised: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


def _stream(seed: int, item: int, step: int) -> torch.Generator:
    # Hashed, so that neighbouring seeds do not share streams and none equals the initial noise,
    # which ComfyUI draws from a generator seeded with `seed` itself.
    digest = hashlib.blake2b(f"turbo.renoise/{seed}/{item}/{step}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
