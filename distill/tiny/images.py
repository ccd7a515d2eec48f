"""What the tiny model learns to draw: coloured letters from matplotlib's fonts and real handwritten
digits.

Letters leave font, place, size, tilt and background open; the prompt fixes letter and colour only.
Digits are the 1,797 scans of scikit-learn (8x8 grey levels), enlarged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..contract.tiny import COLOURS, IMAGE_SIZE, LETTERS, digit_prompt, letter_prompt, parity_prompt

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneralBol.ttf",
)
RGB = {
    "red": (230, 30, 30),
    "green": (30, 210, 50),
    "blue": (50, 90, 255),
    "yellow": (245, 225, 30),
    "white": (245, 245, 245),
}
DIGIT_SPLITS = {
    "train": slice(0, 1000),
    "classifier": slice(1000, 1400),
    "held_out": slice(1400, None),
}


@dataclass(frozen=True)
class ImageSet:
    """Images with what they show; `colour` is -1 for digits."""

    images: torch.Tensor  # [N, 3, 64, 64] uint8
    symbol: torch.Tensor  # [N] int64: 0-9 letters, 10-19 digits
    colour: torch.Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.images)

    def prompts(self, generator: torch.Generator | None = None) -> list[str]:
        """One prompt per image; with a generator every second digit is asked for by its parity
        only.
        """
        by_parity = (
            torch.rand(len(self), generator=generator) < 0.5
            if generator is not None
            else torch.zeros(len(self), dtype=torch.bool)
        )
        return [
            letter_prompt(COLOURS[c], LETTERS[s])
            if s < len(LETTERS)
            else (parity_prompt if by_parity[i] else digit_prompt)(s - len(LETTERS))
            for i, (s, c) in enumerate(zip(self.symbol.tolist(), self.colour.tolist(), strict=True))
        ]


@lru_cache(maxsize=256)
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), pixels
    )


def render_letter(rng: np.random.Generator, letter: str, colour: str) -> np.ndarray:
    """One letter on a plain dark background, everything else drawn at random.

    Returns [64, 64, 3] uint8.
    """
    scale = 2  # drawn at twice the size, then reduced: smooth edges
    side = IMAGE_SIZE * scale
    font = _font(FONTS[rng.integers(len(FONTS))], int(side * rng.uniform(0.68, 0.95)))
    background = rng.integers(0, 131, 3)
    ink = np.clip(np.array(RGB[colour]) + rng.integers(-15, 16, 3), 0, 255)

    left, top, right, bottom = font.getbbox(letter)
    mask = Image.new("L", (side, side))
    at = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(mask).text(at, letter, fill=255, font=font)
    room = max(0, (side - max(right - left, bottom - top)) // 2 - 8 * scale)
    mask = mask.rotate(
        rng.uniform(-12, 12),
        resample=Image.Resampling.BICUBIC,
        translate=(int(rng.integers(-room, room + 1)), int(rng.integers(-room, room + 1))),
    ).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)

    alpha = np.asarray(mask, dtype=np.float32)[..., None] / 255
    return np.round(alpha * ink + (1 - alpha) * background).astype(np.uint8)


def letters(count: int, seed: int) -> ImageSet:
    """`count` letters; all pairs of letter and colour equally often."""
    rng = np.random.default_rng(seed)
    pair = rng.permutation(np.arange(count) % (len(LETTERS) * len(COLOURS)))
    symbol, colour = pair // len(COLOURS), pair % len(COLOURS)
    images = np.stack(
        [render_letter(rng, LETTERS[s], COLOURS[c]) for s, c in zip(symbol, colour, strict=True)]
    )
    return ImageSet(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(symbol),
        torch.from_numpy(colour),
    )


def digits(split: str) -> ImageSet:
    """Handwritten digits in disjoint splits: "train" (1,000), "classifier" (400), "held_out"."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.default_rng(0).permutation(len(scans.images))
    chosen = order[DIGIT_SPLITS[split]]
    small = torch.from_numpy(scans.images[chosen]).float()[:, None] / 16
    large = torch.nn.functional.interpolate(
        small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False
    )
    images = (large.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return ImageSet(
        images,
        torch.from_numpy(scans.target[chosen]).long() + len(LETTERS),
        torch.full((len(chosen),), -1, dtype=torch.long),
    )


def join(*sets: ImageSet) -> ImageSet:
    return ImageSet(
        torch.cat([s.images for s in sets]),
        torch.cat([s.symbol for s in sets]),
        torch.cat([s.colour for s in sets]),
    )
