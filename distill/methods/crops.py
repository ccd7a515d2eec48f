"""Decoding parts of images with gradient.

A whole 1024x1024 decode that keeps its activations does not fit beside the base model. A crop of 48
latents costs 14 % of it, and with every up-block recomputed in the backward pass a fraction of
that. The decoder's convolutions reach a few latents far: what is cut off again is the `halo`. Its
one attention, in the middle block, is global, so a crop's centre equals the full decode's only
nearly (tests/distill/test_methods_gan.py measures it); real and fake images are cropped alike,
which makes the difference nothing to learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.vae import Autoencoder
from ..utils.rng import Rng


@dataclass(frozen=True)
class Span:
    """Along one side, in latents: decode `length` from `start`, drop `cut` of it, keep `inner`."""

    start: int
    length: int
    cut: int
    inner: int


def span(side: int, crop: int, halo: int, u: float) -> Span:
    """The window of number u in [0, 1). At the image's own border nothing needs a halo, so that
    every pixel has its turn; a side no longer than `crop` is decoded whole.
    """
    if crop >= side:
        return Span(0, side, 0, side)
    inner = crop - 2 * halo
    kept = int(u * (side - inner + 1))
    start = min(max(kept - halo, 0), side - crop)
    return Span(start, crop, kept - start, inner)


def spans(rng: Rng, stream: str, batch_size: int, side: int, crop: int, halo: int) -> list[Span]:
    return [span(side, crop, halo, u) for u in rng.uniform(stream, batch_size).tolist()]


def decode_crops(
    vae: Autoencoder,
    model: nn.Module,
    latents: torch.Tensor,
    vertical: Sequence[Span],
    horizontal: Sequence[Span],
) -> torch.Tensor:
    """One window of every image, decoded by `model`, a `vae.kind`, whose latents are `scale` pixels
    wide: [B, C, h, w] -> [B, 3, scale inner, scale inner], about [-1, 1].
    """
    windows = zip(latents, vertical, horizontal, strict=True)
    parts = [
        z[:, v.start : v.start + v.length, h.start : h.start + h.length] for z, v, h in windows
    ]
    scale, decoded = vae.pixels, vae.decode_with_gradient(model, torch.stack(parts))
    images = zip(decoded, vertical, horizontal, strict=True)
    return torch.stack(
        [
            x[
                :,
                scale * v.cut : scale * (v.cut + v.inner),
                scale * h.cut : scale * (h.cut + h.inner),
            ]
            for x, v, h in images
        ]
    )
