"""A labelled grid of pictures, drawn with PIL: a panel per model, the same batch in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, TITLE, SUBTITLE = (24, 24, 27), (244, 244, 245), (161, 161, 170)
SHARP_FROM = 2.0  # enlarged by this much or more, a picture keeps its pixels


@dataclass(frozen=True)
class Panel:
    """One model's pictures and the two lines above them."""

    title: str
    subtitle: str
    images: torch.Tensor  # [B, H, W, 3] in [0, 1], the same B, H, W in every panel


def draw_grid(panels: Sequence[Panel], cell_size: int = 0) -> torch.Tensor:
    """The panels as columns, or as rows where the batch is larger than their number.

    cell_size: longest side of a picture in pixels; 0 leaves the pictures as they are.
    Returns [1, height, width, 3] in [0, 1] on the CPU.
    """
    wide = len(panels[0].images) > len(panels)
    drawn = [_draw_panel(panel, cell_size, wide) for panel in panels]
    width, height = drawn[0].size
    columns, rows = (1, len(drawn)) if wide else (len(drawn), 1)
    grid = Image.new("RGB", (columns * width, rows * height), BACKGROUND)
    for index, panel in enumerate(drawn):
        grid.paste(panel, (0, index * height) if wide else (index * width, 0))
    return torch.from_numpy(np.asarray(grid, dtype=np.float32) / 255)[None]


def _draw_panel(panel: Panel, cell_size: int, wide: bool) -> Image.Image:
    """Label over a row (`wide`) or a column of pictures, half a gap around each of them."""
    pictures = [_picture(image, cell_size) for image in panel.images]
    width, height = pictures[0].size
    gap = max(4, width // 64)
    cell_width, cell_height = width + gap, height + gap
    columns, rows = (len(pictures), 1) if wide else (1, len(pictures))
    font_size = min(48, max(12, columns * width // (40 if wide else 24)))
    label = round(2.9 * font_size)  # two lines of text
    size = (columns * cell_width, label + rows * cell_height)
    drawn = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(font_size)
    left, room = gap // 2, size[0] - gap
    draw.text((left, gap), shorten(panel.title, font, room), TITLE, font)
    below = (left, gap + round(1.3 * font_size))
    draw.text(below, shorten(panel.subtitle, font, room), SUBTITLE, font)
    for index, picture in enumerate(pictures):
        x, y = (index * cell_width, 0) if wide else (0, index * cell_height)
        drawn.paste(picture, (left + x, label + gap // 2 + y))
    return drawn


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, or its two ends around dots where it is wider than `width` pixels.

    The end of a file's name tells steps and version, so it stays.
    """
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
        if font.getlength(short) <= width:
            return short
    return ""


def _picture(image: torch.Tensor, cell_size: int) -> Image.Image:
    pixels = image[..., :3].clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    factor = cell_size / max(picture.size) if cell_size else 1
    if factor == 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    sharp = factor >= SHARP_FROM
    return picture.resize(size, Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)
