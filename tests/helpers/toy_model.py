"""A Qwen-Image of toy size: the published class with other numbers, and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # diffusers: not where the nodes are tested alone
    from diffusers import QwenImageTransformer2DModel


def toy_shape(
    heads: int = 2,
    text_width: int = 24,
    *,
    layers: int = 2,
    axes: tuple[int, int, int] = (4, 6, 6),
) -> dict[str, Any]:
    """Arguments of `QwenImageTransformer2DModel`; by default the smallest that is useful to train.

    axes: of the rotary embedding, together as wide as a head
    """
    return {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "joint_attention_dim": text_width,
        "axes_dims_rope": axes,
    }


def toy_shape_21(
    heads: int = 2,
    text_width: int = 24,
    *,
    layers: int = 2,
    axes: tuple[int, int, int] = (4, 6, 6),
) -> dict[str, Any]:
    """The same of `QwenImage21Transformer2DModel`."""
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "context_in_dim": text_width,
        "axes_dims_rope": axes,
    }


SMALL = toy_shape()  # what the trainer's tests train
# What the nodes' tests load. Prime factors that differ everywhere, so that a transposed or
# misplaced shape cannot fit.
ODD = toy_shape(heads=3, text_width=64)


def small_transformer(seed: int = 0) -> QwenImageTransformer2DModel:
    """`SMALL` as diffusers initialises it."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(**SMALL).eval()


def save_odd_model(folder: Path) -> None:
    """`ODD` and a VAE: transformer/ and vae/ as diffusers writes them."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(**ODD)
    for parameter in transformer.parameters():  # no zero-initialised layer may hide a mistake
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
    )
    vae.save_pretrained(folder / "vae")
