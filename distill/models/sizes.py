"""Image sizes: aspect-ratio buckets, and the bucket that an image goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]  # width, height in pixels


def buckets(sizes: Sequence[Size], resolution: int, token: int) -> tuple[Size, ...]:
    """`sizes`, the square one first, scaled so that its side is `resolution`; in whole tokens of
    `token` pixels.
    """
    square = sizes[0][0]

    def side(pixels: int) -> int:
        return max(token, math.floor(pixels * resolution / square / token + 0.5) * token)

    return tuple(dict.fromkeys((side(width), side(height)) for width, height in sizes))


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is closest, measured as a factor."""
    return min(buckets, key=lambda b: abs(math.log(size[0] * b[1]) - math.log(size[1] * b[0])))


def upscale(size: Size, bucket: Size) -> float:
    """By how much an image of `size` grows to cover `bucket`; below 1 it shrinks."""
    return max(bucket[0] / size[0], bucket[1] / size[1])
