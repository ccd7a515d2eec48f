"""Images as tensors and bytes, thumbnails, labelled grids as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import replace_file

THUMBNAIL, ENLARGE_TO = 256, 128  # pixels
BACKGROUND, INK = (24, 24, 27), (235, 235, 235)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def from_unit(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, any shape; what lies outside is clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8"""
    return from_unit(images).permute(0, 2, 3, 1).cpu().numpy()


@lru_cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), pixels
    )


def labelled_grid(
    rows: Sequence[tuple[str, torch.Tensor]],
    columns: Sequence[str] = (),
    scale: int = 1,
    label_width: int = 190,
) -> Image.Image:
    """One row of images per (label, [N, 3, H, W]), a caption over every column; labels may hold
    line breaks.
    """
    height, width = (side * scale for side in rows[0][1].shape[-2:])
    gap, caption = 4, 22 if columns else 0
    count = max(len(images) for _, images in rows)
    sheet = Image.new(
        "RGB",
        (label_width + count * (width + gap) + gap, caption + len(rows) * (height + gap) + gap),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(columns):
        center = label_width + i * (width + gap) + width // 2
        draw.text((center, caption // 2 + 2), text, INK, font=_font(11), anchor="mm")
    for j, (label, images) in enumerate(rows):
        top = caption + j * (height + gap) + gap
        draw.multiline_text(
            (10, top + height // 2), label, INK, font=_font(13), anchor="lm", spacing=5
        )
        for i, pixels in enumerate(to_uint8(images)):
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (label_width + i * (width + gap), top))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    replace_file(path, lambda p: image.save(p, format="PNG"))


def thumbnail(image: Tensor) -> Tensor:
    """[3, H, W] uint8 -> float in [-1, 1], at most THUMBNAIL pixels high and wide."""
    x = to_unit(image)[None]
    scale = THUMBNAIL / max(image.shape[-2:])
    if scale < 1:
        x = F.interpolate(x, scale_factor=scale, mode="area")
    return x[0]
