"""Qwen-Image's VAE (Wan 2.1's) as a decoder of single images: 2-D, channels last, in little memory.

A causal 3-D convolution over one frame multiplies padding but for the last slice of its kernel in
time, so each becomes a 2-D one: core does the same, in 3-D. What goes further here:
channels last; RMS norm and SiLU in place; no enlarged copy before the convolution behind a nearest
upsampling, which is four 2 x 2 convolutions of the small image instead (4/9 of the multiplications,
Shi et al. 2016's sub-pixel convolution).
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.model import vae_attention
from comfy.ldm.wan.vae import AttentionBlock, Resample, ResidualBlock, RMS_norm, WanVAE
from torch import Tensor, nn
from torch.nn.functional import silu

EPSILON = 1e-12  # of torch.nn.functional.normalize, which core uses
CHANNELS_LAST = torch.channels_last


class Norm(nn.Module):
    """RMS norm over the channels of [B, C, H, W]; its gain is core's gamma times sqrt(C)."""

    def __init__(self, source: RMS_norm) -> None:
        super().__init__()
        gain = source.gamma.detach().float() * source.scale
        self.gain = _parameter(gain.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_(min=EPSILON)
        x = x.div_(length) if in_place else x / length
        return x.mul_(self.gain.to(x))


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, source: ResidualBlock) -> None:
        super().__init__()
        norm1, _, conv1, norm2, _, _, conv2 = source.residual
        self.norm1, self.conv1 = Norm(norm1), image_conv(conv1)
        self.norm2, self.conv2 = Norm(norm2), image_conv(conv2)
        identity = isinstance(source.shortcut, nn.Identity)
        self.shortcut = source.shortcut if identity else image_conv(source.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x), inplace=True))
        h = self.conv2(silu(self.norm2(h, in_place=True), inplace=True))
        return h.add_(self.shortcut(x))


class Attention(nn.Module):
    """Self-attention of all pixels with one head, through the kernel that core's VAEs use."""

    def __init__(self, source: AttentionBlock) -> None:
        super().__init__()
        self.norm = Norm(source.norm)
        self.to_qkv, self.proj = image_conv(source.to_qkv), image_conv(source.proj)
        self.attention = vae_attention()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        h = self.attention(q, k, v).contiguous(memory_format=CHANNELS_LAST)
        return self.proj(h).add_(x)


class Upsample(nn.Module):
    """Nearest upsampling by 2 and a 3 x 3 convolution, as one 2 x 2 convolution per output phase.

    An even row of the enlarged image sees rows i-1, i, i of the small one, an odd row i, i, i+1.
    """

    def __init__(self, source: Resample) -> None:
        super().__init__()
        _, conv = source.resample
        weight = conv.weight.detach().float()
        rows = phases(weight, dim=2)
        self.convs = nn.ModuleList(
            make_conv(phase, conv.bias, padding=1) for row in rows for phase in phases(row, dim=3)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        shape = (batch, self.convs[0].out_channels, 2 * height, 2 * width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
        for index, conv in enumerate(self.convs):
            i, j = divmod(index, 2)
            out[:, :, i::2, j::2] = conv(x)[:, :, i : i + height, j : j + width]
        return out


class ImageDecoder(nn.Module):
    """Takes the place of a `WanVAE` where single images are decoded. Copies its weights."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        decoder = vae.decoder
        head_norm, _, head_conv = decoder.head
        stages = [vae.conv2, decoder.conv1, *decoder.middle, *decoder.upsamples]
        self.stages = nn.Sequential(*map(_image_layer, stages))
        self.head_norm, self.head_conv = Norm(head_norm), image_conv(head_conv)

    def decode(self, z: Tensor) -> Tensor:
        """[B, 16, 1, h, w] -> [B, C, 1, 8 h, 8 w]; one image after another, for their memory."""
        return torch.cat([self.forward(image) for image in z[:, :, 0].split(1)])[:, :, None]

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages(image.contiguous(memory_format=CHANNELS_LAST))
        x = silu(self.head_norm(x, in_place=True), inplace=True)
        return self.head_conv(x)


def phases(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A kernel's 3 taps along `dim` as the 2 taps of the even and of the odd positions."""
    first, second, third = weight.unbind(dim)
    return torch.stack((first, second + third), dim), torch.stack((first + second, third), dim)


def image_conv(source: nn.Conv2d | nn.Conv3d) -> nn.Conv2d:
    """A convolution over one frame: that of the last slice in time, where there is a time."""
    weight = source.weight.detach()
    if weight.ndim == 5:
        weight = weight[:, :, -1]
    return make_conv(weight, source.bias, padding=weight.shape[-1] // 2)


def make_conv(weight: Tensor, bias: Tensor, padding: int) -> nn.Conv2d:
    """Core's kind of Conv2d, which its model management can keep in main memory."""
    out_channels, in_channels, size, _ = weight.shape
    conv = comfy.ops.disable_weight_init.Conv2d(
        in_channels, out_channels, size, padding=padding, device="meta"
    )
    conv.weight = _parameter(weight)
    conv.bias = _parameter(bias.detach())
    return conv


def _image_layer(source: nn.Module) -> nn.Module:
    makers = {ResidualBlock: Residual, AttentionBlock: Attention, Resample: Upsample}
    return makers.get(type(source), image_conv)(source)


def _parameter(value: Tensor) -> nn.Parameter:
    # plain strides: core's dynamic memory copies weights as flat bytes
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format).cpu(), False)
