"""Latents of another kind than a MODEL or a VAE takes, told before tensors of wrong shapes meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.sample
import torch
from comfy.ldm.wan.vae import WanVAE

from ..distill.contract.latent_grid import GRIDS

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

IMAGE_LATENT = "Wire in an empty latent (EmptySD3LatentImage), or an image through VAE Encode"


def tokens_of(model: ModelPatcher, shape: Sequence[int], family: str) -> int:
    """Tokens of each latent of a batch [B, C, (T,) h, w] in the MODEL's transformer.

    family: of the spec, which tells where the model does not say how large its patches are (that
    of Qwen-Image-2.1 has none). Raises ValueError where neither is known.
    """
    net = model.model.diffusion_model
    patch = getattr(net, "patch_size", None)
    if patch is None and family in GRIDS:
        patch = GRIDS[family].patch
    if patch is None:
        raise ValueError(
            f"{type(net).__name__} does not say how many latents a token has, and this LoRA's "
            f"sigmas depend on that. Give them by hand: `sigmas_override` on Turbo LoRA Loader."
        )
    sides = (1, *patch) if isinstance(patch, Sequence) else (1, patch, patch)
    latents = (1, *shape[2:]) if len(shape) == 4 else tuple(shape[2:])
    return math.prod(
        -(-length // side) for length, side in zip(latents, sides[-len(latents) :], strict=True)
    )


def latent_tokens(model: ModelPatcher, latent: dict[str, Any], family: str) -> int:
    """`tokens_of` what core will sample in place of an empty latent of another kind."""
    ratios = (latent.get(f"downscale_ratio_{kind}") for kind in ("spacial", "temporal"))
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
    shape = (samples.unbind()[0] if samples.is_nested else samples).shape
    return tokens_of(model, shape, family)


def size_tokens(model: ModelPatcher, size: tuple[int, int], family: str) -> int:
    """Tokens of an image of `size` (width, height in pixels); raises as `tokens_of`."""
    ratio = model.get_model_object("latent_format").spacial_downscale_ratio
    return tokens_of(model, (1, 1, -(-size[1] // ratio), -(-size[0] // ratio)), family)


def check_latent(node: str, model: ModelPatcher, latent: dict[str, Any]) -> None:
    """Raises ValueError where `model` cannot sample this: audio, video, another VAE's channels."""
    samples = latent["samples"]
    expected = model.get_model_object("latent_format")
    name = type(model.model).__name__
    if samples.is_nested:
        if not type(expected).__name__.endswith("AV"):
            raise ValueError(
                f"{node}: this is a latent of video and audio in one, and {name} takes neither. "
                f"{IMAGE_LATENT}."
            )
        return
    shape = list(samples.shape)
    if _is_audio(latent, expected.latent_dimensions) and "Audio" not in type(expected).__name__:
        raise ValueError(
            f"{node}: this is an audio latent {shape}, and {name} makes no audio. {IMAGE_LATENT}."
        )
    if samples.ndim == 5 and shape[2] > 1 and _makes_single_frames(model):
        raise ValueError(
            f"{node}: this is a video latent of {shape[2]} frames {shape}, and {name} makes "
            f"images. {IMAGE_LATENT}."
        )
    if shape[1] != expected.latent_channels and torch.count_nonzero(samples):
        raise ValueError(  # core gives an empty one the right channels
            f"{node}: this latent has {shape[1]} channels {shape}, and {name} takes "
            f"{expected.latent_channels}. Encode the image with the VAE of this model."
        )


def check_decodable(node: str, vae: VAE, latent: dict[str, Any]) -> None:
    """Raises ValueError where `vae` cannot make images of this."""
    samples = latent["samples"]
    if samples.is_nested:
        return  # core decodes the first of them
    shape = list(samples.shape)
    if _is_audio(latent):
        raise ValueError(f"{node}: this is an audio latent {shape}. Use core's VAE Decode Audio.")
    if isinstance(vae.first_stage_model, WanVAE) and shape[1] != vae.latent_channels:
        raise ValueError(
            f"{node}: this latent has {shape[1]} channels {shape}, and the VAE takes "
            f"{vae.latent_channels}. Use the VAE of the model that the latent is from."
        )


def _is_audio(latent: dict[str, Any], dimensions: int = 2) -> bool:
    """Whether core marks it as such, or it is [B, C, length] where more dimensions are expected."""
    return latent.get("type") == "audio" or (latent["samples"].ndim == 3 and dimensions > 1)


def _makes_single_frames(model: ModelPatcher) -> bool:
    """Whether it takes one frame alone. Qwen-Image-Layered takes its layers for frames."""
    if isinstance(model.model, comfy.model_base.QwenImage):
        return not model.model.diffusion_model.time_text_embed.use_additional_t_cond
    return model.get_model_object("latent_format").latent_dimensions == 2
