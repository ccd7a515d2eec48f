"""Differentiable augmentations of what a discriminator sees (Zhao et al. 2020), drawn from `Rng`.

Real and fake images get the same distribution of them. Images are [B, 3, H, W] in [-1, 1]. `colour`
is milder than in the paper, so that over-saturation still shows. `flip` hides whether text is
mirrored: leave it out where images contain any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..models.flow import match
from ..utils.rng import Rng

Uniform = Callable[[str], torch.Tensor]  # name -> numbers in [0, 1)  # [B]


def augment(images: torch.Tensor, names: Sequence[str], rng: Rng, stream: str) -> torch.Tensor:
    """Applies the augmentations `names` in their order."""

    def uniform(name: str) -> torch.Tensor:
        return rng.uniform(f"{stream}/{name}", len(images)).to(images.device)

    for name in names:
        images = AUGMENTATIONS[name](images, uniform)
    return images


def flip(images: torch.Tensor, uniform: Uniform) -> torch.Tensor:
    """Mirrors every second image."""
    mirrored = (uniform("flip") < 0.5).view(-1, 1, 1, 1)
    return torch.where(mirrored, images.flip(-1), images)


def translate(images: torch.Tensor, uniform: Uniform) -> torch.Tensor:
    """Moves by up to an eighth of the side; grey comes in."""
    height, width = images.shape[-2:]
    y, x = height // 8, width // 8
    padded = F.pad(images, (x, x, y, y))
    tops = (uniform("translate/y") * (2 * y + 1)).long().tolist()
    lefts = (uniform("translate/x") * (2 * x + 1)).long().tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, top, left in zip(padded, tops, lefts, strict=True)
        ]
    )


def colour(images: torch.Tensor, uniform: Uniform) -> torch.Tensor:
    """Brightness +-0.25, saturation x 0.5 to 1.5, contrast x 0.75 to 1.25."""
    images = images + match(uniform("colour/brightness") - 0.5, images) / 2
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * match(uniform("colour/saturation") + 0.5, images)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * match(uniform("colour/contrast") / 2 + 0.75, images)


def cutout(images: torch.Tensor, uniform: Uniform) -> torch.Tensor:
    """Greys a square of half the side; its centre may lie anywhere."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device) - (uniform("cutout/y") * height)[:, None]
    x = torch.arange(width, device=images.device) - (uniform("cutout/x") * width)[:, None]
    inside = (y.abs() < height / 4)[:, None, :, None] & (x.abs() < width / 4)[:, None, None, :]
    return images.masked_fill(inside, 0.0)


AUGMENTATIONS: dict[str, Callable[[torch.Tensor, Uniform], torch.Tensor]] = {
    "flip": flip,
    "translate": translate,
    "colour": colour,
    "cutout": cutout,
}
