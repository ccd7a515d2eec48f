"""Image files become pixels of a bucket's size.

Only pictures are opened as pictures: Pillow would start Ghostscript for a PostScript file named
a.jpg. Memory is bounded: the header says how large a picture is before it is decoded, and of large
ones (LARGE) only one at a time is.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from posixpath import splitext

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..models.sizes import Size, upscale
from .captions import CAPTION_SUFFIXES

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # by content; of several frames one
# What needs no look inside to be taken for a picture; the first that is there
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp"),
    *(".jpe", ".jfif", ".tif", ".tiff", ".gif", ".avif"),
)
NO_PICTURE = f"no picture of a kind that is read ({', '.join(FORMATS)}); convert it to one of them"
HEAD_BYTES = 16  # by which a format is known
PIXELS = 89_478_485  # of one picture, as Pillow's own limit; 12 bytes each while it is decoded
LARGE = 1 << 24  # pixels
BROKEN_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    MemoryError,
    # What Pillow's readers raise on files that were changed at random
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    Image.DecompressionBombError,
)
_one_large = threading.Lock()
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIXELS is the limit here


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins like this is of a kind that is read."""
    tests = (Image.OPEN[name][1] for name in _formats())
    return any(test is not None and test(head) is True for test in tests)


def shows_picture(name: str, head: Callable[[], bytes]) -> bool:
    """By its name or else by its content, for any name may stand on a picture.

    head: reads the file's first HEAD_BYTES; what it raises comes through.
    """
    suffix = splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES or suffix in CAPTION_SUFFIXES:
        return suffix in IMAGE_SUFFIXES
    return is_picture(head())


def decode_image(data: bytes) -> Image.Image:
    """RGB, turned upright, transparency on white. Raises one of BROKEN_IMAGE."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        raise ValueError(NO_PICTURE) from error
    count = image.width * image.height
    if count > PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} are {count / 1e6:,.0f} megapixels; up to "
            f"{PIXELS // 10**6} are read. Scale it down"
        )
    with _one_large if count > LARGE else contextlib.nullcontext():
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # makes no copy where nothing is to be done
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, bucket: Size) -> torch.Tensor:
    """Scales `image` to cover `bucket` and crops the centre.  # [3, H, W] uint8"""
    scale = upscale(image.size, bucket)
    width, height = bucket[0] / scale, bucket[1] / scale  # of the part that is kept
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (max(left, 0.0), max(top, 0.0), left + width, top + height)
    box = (*box[:2], min(box[2], float(image.width)), min(box[3], float(image.height)))
    pixels = np.asarray(image.resize(bucket, Image.Resampling.LANCZOS, box=box))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
