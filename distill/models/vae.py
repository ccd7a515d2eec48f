"""AutoencoderKLQwenImage and AutoencoderKLQwenImage21 for single images: latents in the model's own
scale, and a faster exact convolution.

Latents are always the normalised ones that the transformer sees: (mode - latents_mean) /
latents_std, [B, 16, H/8, W/8], of 2.1 [B, 64, H/16, W/16].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
        QwenImageCausalConv3d,
        QwenImageRMS_norm,
    )

NORM_EPS = 1e-12  # F.normalize's


@dataclass(frozen=True)
class Published:
    """The published VAE of a kind, for `--dry-run`; tests/distill/test_vae.py counts it."""

    width: tuple[str, int]  # of its decoder's layers: key in config.json, value
    parameters: int
    flop: float  # of decoding, per latent
    numbers: float  # kept at most for the gradient of decoding, per latent


@dataclass(frozen=True)
class Autoencoder:
    """A kind of VAE and how it is called; functions take the model first."""

    kind: str  # "module:class", as in Family
    prepare: Callable[[Any], Any]  # after loading
    encode: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    decode: Callable[..., torch.Tensor]
    decode_with_gradient: Callable[..., torch.Tensor]
    pixels: int  # per latent and side
    channels: int  # of latents
    published: Published


def _single_frame_conv(
    conv: QwenImageCausalConv3d, x: torch.Tensor, cache_x: object = None
) -> torch.Tensor:
    if x.shape[2] != 1 or cache_x is not None:
        return type(conv).forward(conv, x, cache_x)
    left, _, top, _, _, _ = conv._padding
    y = F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left))
    return y[:, :, None]


def _channel_norm(norm: QwenImageRMS_norm, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32 or not norm.channel_first:  # halves would round the squares
        return type(norm).forward(norm, x)
    squares = x.square().sum(1, keepdim=True)
    return x * squares.clamp_min(NORM_EPS**2).rsqrt() * (norm.scale * norm.gamma) + norm.bias


def fold_single_frame(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Computes every causal 3-D convolution over one frame as the 2-D convolution that it is, and
    the length in the norm over channels as a plain sum.

    With one frame all but the last temporal tap meet causal zero padding. Same numbers to float
    rounding, a third of the time. Changes `vae` in place and returns it.
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
        QwenImageCausalConv3d,
        QwenImageRMS_norm,
    )

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = MethodType(_single_frame_conv, module)
        elif isinstance(module, QwenImageRMS_norm):
            module.forward = MethodType(_channel_norm, module)
    return vae


def _statistics(
    vae: AutoencoderKLQwenImage, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=like.device, dtype=like.dtype).view(shape)
    std = torch.tensor(vae.config.latents_std, device=like.device, dtype=like.dtype).view(shape)
    return mean, std


def encode(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior in the transformer's scale.

    images: [B, 3, H, W] in [-1, 1] -> two of [B, 16, H/8, W/8]
    """
    posterior = vae.encode(images[:, :, None]).latent_dist
    mean, std = _statistics(vae, images)
    return (posterior.mean[:, :, 0] - mean) / std, posterior.std[:, :, 0] / std


def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Images of normalised latents: [B, 16, h, w] -> [B, 3, 8h, 8w] in [-1, 1]."""
    mean, std = _statistics(vae, latents)
    return vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0].clamp(
        -1, 1
    )


def decode_with_gradient(
    vae: AutoencoderKLQwenImage, latents: torch.Tensor, **up: Any
) -> torch.Tensor:
    """`vae.decode` of one frame without its caches and without the final clamp, which would hide
    saturated pixels from the gradient; the middle and every up-block are checkpointed.  [B, C, h,
    w] -> [B, 3, 8h, 8w]

    up: what the up-blocks are told.
    """
    mean, std = _statistics(vae, latents)
    decoder = vae.decoder
    x = (latents * std + mean)[:, :, None].to(decoder.conv_in.weight.dtype)
    x = decoder.conv_in(vae.post_quant_conv(x))
    for block in (decoder.mid_block, *(partial(block, **up) for block in decoder.up_blocks)):
        x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))[:, :, 0].to(latents.dtype)


QWEN_VAE = Autoencoder(
    kind="diffusers:AutoencoderKLQwenImage",
    prepare=fold_single_frame,
    encode=encode,
    decode=decode,
    decode_with_gradient=decode_with_gradient,
    pixels=8,
    channels=16,
    published=Published(("base_dim", 96), 126_892_531, 0.263e9, 215_500),
)


# Qwen-Image-2.1: red, green, blue and alpha


def encode_rgba(
    vae: AutoencoderKLQwenImage21, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode` of images without alpha as opaque ones.  [B, 3, H, W] -> two of [B, 64, H/16,
    W/16]
    """
    return encode(vae, torch.cat([images, torch.ones_like(images[:, :1])], 1))


def over_white(images: torch.Tensor) -> torch.Tensor:
    """Images with alpha on white, as Qwen-Image-2.1's own text encoder is shown them.  [B, 4, H, W]
    -> [B, 3, H, W]
    """
    colour, alpha = images[:, :3], (images[:, 3:] + 1) / 2
    return colour * alpha + (1 - alpha)


def decode_rgba(vae: AutoencoderKLQwenImage21, latents: torch.Tensor) -> torch.Tensor:
    """`decode`, on white: [B, 64, h, w] -> [B, 3, 16h, 16w] in [-1, 1]."""
    return over_white(decode(vae, latents))


def decode_rgba_with_gradient(vae: AutoencoderKLQwenImage21, latents: torch.Tensor) -> torch.Tensor:
    """`decode_with_gradient`, on white; the one frame is the first of a film."""
    return over_white(decode_with_gradient(vae, latents, first_chunk=True))


QWEN_VAE_21 = Autoencoder(
    kind="diffusers:AutoencoderKLQwenImage21",
    prepare=lambda vae: vae,  # its convolutions are 2-D
    encode=encode_rgba,
    decode=decode_rgba,
    decode_with_gradient=decode_rgba_with_gradient,
    pixels=16,
    channels=64,
    published=Published(("decoder_base_dim", 144), 337_740_404, 4.14e9, 1_583_000),
)
