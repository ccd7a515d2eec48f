"""Turbo VAE Decode: Qwen-Image's VAE faster, and with no more memory reserved than it takes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy.model_patcher import CoreModelPatcher
from comfy_api.latest import io
from torch import Tensor, nn

from .image_vae import ImageDecoder
from .latents import check_decodable
from .ui import CATEGORY

if TYPE_CHECKING:
    from comfy.sd import VAE

PIXELS = 64  # per position of the latent
LIVE = 3  # tensors of full size and `width` channels at the peak, in the last residual blocks
MARGIN = 1.5  # for what convolution kernels allocate themselves

_decoders: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # ModelPatchers


def decode(vae: VAE, latent: Tensor) -> Tensor:
    """What core's VAEDecode returns, [B, H, W, C] in [0, 1].

    latent: [B, C, T, h, w] or what else the VAE takes. Anything but single frames of a Qwen-Image
    or Wan 2.1 VAE is left to core.
    """
    if latent.is_nested:
        latent = latent.unbind()[0]
    images = (image_vae(vae) if handles(vae, latent) else vae).decode(latent)
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def handles(vae: VAE, latent: Tensor) -> bool:
    """Whether `image_vae` decodes this: one frame, an unpatched VAE of just this architecture."""
    model = vae.first_stage_model
    known = type(model) is WanVAE and not model.attn_scales and not vae.patcher.patches
    return known and latent.ndim == 5 and latent.shape[2] == 1


def image_vae(vae: VAE) -> VAE:
    """A VAE that decodes like `vae`, which stays as it is; for one frame, see `handles`.

    It shares all but the network with `vae`, so that core's loading, dtypes and its tiles where
    memory runs out work as ever. The network is made once per VAE.
    """
    model = vae.first_stage_model
    if model not in _decoders:
        with torch.inference_mode(False):
            decoder = ImageDecoder(model).to(vae.vae_dtype)
        _decoders[model] = CoreModelPatcher(
            decoder, vae.patcher.load_device, vae.patcher.offload_device
        )
    patcher = _decoders[model]
    clone = copy.copy(vae)
    clone.patcher, clone.first_stage_model = patcher, patcher.model
    clone.size = comfy.model_management.module_size(patcher.model)
    clone.memory_used_decode = lambda shape, dtype: memory_used(model.dim, shape, dtype)
    return clone


def memory_used(width: int, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Bytes to keep free for decoding latents of `shape`, one image at a time.

    width: channels of the last stage, 96 in Qwen-Image. In bf16 and for one picture of 2048 x 2048
    2.4 GB are live at the peak and 3.6 GB are reserved; core reserves 18.5 GB.
    """
    batch, _, _, height, width_latent = shape
    image = 4 * batch  # what is there of all images: the result, of up to 4 channels
    values = (MARGIN * LIVE * width + image) * PIXELS * height * width_latent
    return values * comfy.model_management.dtype_size(dtype)


class TurboDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillDecode",
            display_name="Turbo VAE Decode",
            category=CATEGORY,
            description="Decodes latents as core's VAE Decode does, for the VAE of Qwen-Image: "
            "faster, and reserving a fifth of the memory, so that the diffusion model can stay on "
            "the card. Other VAEs and videos are decoded by core.",
            search_aliases=[
                "vae decode",
                "decode latent",
                "latent to image",
                "fast vae",
                "qwen image vae",
                "low memory vae",
            ],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Vae.Input("vae", tooltip="The VAE; it is not changed."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The decoded images.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: VAE) -> io.NodeOutput:
        vae.throw_exception_if_invalid()
        check_decodable("Turbo VAE Decode", vae, samples)
        return io.NodeOutput(decode(vae, samples["samples"]))
