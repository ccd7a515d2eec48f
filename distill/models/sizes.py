"""Image sizes of the base model: buckets, tokens and latents per side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..contract.known import QWEN_SIZES

Size = tuple[int, int]  # width, height in pixels
TOKEN = 16  # pixels per side of one transformer token
SQUARE = 1328
LATENT = 8  # pixels per latent and side


def qwen_buckets(resolution: int) -> tuple[Size, ...]:
    """The model's sizes scaled so that the square one has side `resolution`, in whole tokens."""

    def side(pixels: int) -> int:
        return max(TOKEN, math.floor(pixels * resolution / SQUARE / TOKEN + 0.5) * TOKEN)

    return tuple(dict.fromkeys((side(width), side(height)) for width, height in QWEN_SIZES))


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is closest, measured as a factor."""
    return min(buckets, key=lambda b: abs(math.log(size[0] * b[1]) - math.log(size[1] * b[0])))


def upscale(size: Size, bucket: Size) -> float:
    """By how much an image of `size` grows to cover `bucket`; below 1 it shrinks."""
    return max(bucket[0] / size[0], bucket[1] / size[1])
