"""Image files become pixels of a bucket's size."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..models.sizes import Size, upscale

BROKEN_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(data: bytes) -> Image.Image:
    """RGB, turned upright, transparency on white. Raises one of BROKEN_IMAGE."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image: Image.Image = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError("no image format that Pillow knows") from error
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(image: Image.Image, bucket: Size) -> torch.Tensor:
    """Scales `image` to cover `bucket` and crops the centre.  # [3, H, W] uint8"""
    scale = upscale(image.size, bucket)
    width, height = bucket[0] / scale, bucket[1] / scale  # of the part that is kept
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (max(left, 0.0), max(top, 0.0), left + width, top + height)
    box = (*box[:2], min(box[2], float(image.width)), min(box[3], float(image.height)))
    pixels = np.asarray(image.resize(bucket, Image.Resampling.LANCZOS, box=box))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
