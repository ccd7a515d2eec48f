"""A LoRA's picture in its own header, for model browsers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping

import torch
from PIL import Image

from ..utils.images import to_uint8

SIDE = 256  # pixels, as ModelSpec recommends
THUMBNAIL, COVERS = "modelspec.thumbnail", "ssmd_cover_images"


def thumbnail_fields(images: torch.Tensor) -> dict[str, str]:
    """Header entries with up to four images as one square JPEG: `modelspec.thumbnail`, which
    ComfyUI's front end shows, and `ssmd_cover_images`, which its server and others look for.

    images: [N, 3, H, W] in [-1, 1]
    """
    count = 4 if len(images) >= 4 else 1
    side = SIDE // int(count**0.5)
    sheet = Image.new("RGB", (SIDE, SIDE))
    for i, pixels in enumerate(to_uint8(images[:count])):
        tile = Image.fromarray(pixels)
        square = min(tile.size)
        left, top = (tile.width - square) // 2, (tile.height - square) // 2
        tile = tile.crop((left, top, left + square, top + square))
        tile = tile.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % 2 * side, i // 2 * side))
    buffer = io.BytesIO()
    sheet.save(buffer, format="JPEG", quality=85, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {THUMBNAIL: f"data:image/jpeg;base64,{data}", COVERS: json.dumps([data])}


def thumbnail_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same entries of another file's header."""
    return {key: metadata[key] for key in (THUMBNAIL, COVERS) if key in metadata}
