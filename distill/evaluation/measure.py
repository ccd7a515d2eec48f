"""The figures of one set of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.images import to_unit
from . import features, metrics
from .grid_artifacts import LATENT, PATCH, grid_energy


@dataclass(frozen=True)
class Judges:
    """Who looks at the images."""

    vision: Mapping[str, features.Vision]  # "clip", "dino"
    reference: Tensor | None = None  # real images, [N, 3, H, W] uint8
    own: Callable[[Tensor, Sequence[str]], dict[str, float]] | None = None  # the model family's


def measure(images: Tensor, prompts: Sequence[str], judges: Judges) -> dict[str, float]:
    """Figures of images, one prompt each.  # [N, 3, H, W] uint8"""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([number[prompt] for prompt in prompts])
    several = len(number) < len(prompts)
    found = plain(images)
    if several:
        small = [F.adaptive_avg_pool2d(to_unit(part), 16) for part in images.split(16)]
        found["diversity_pixels"] = metrics.intra_distance(torch.cat(small), groups)
    for name, vision in judges.vision.items():
        seen = vision.images(images)
        if several:
            found[f"diversity_{name}"] = features.feature_diversity(seen, groups)
        if isinstance(vision, features.Clip):
            found["clip_score"] = features.clip_score(seen, vision.texts(prompts))
        if judges.reference is not None:
            real = vision.images(judges.reference)
            found[f"fid_{name}"] = features.fid(seen, real)
            found[f"kid_{name}"] = features.kid(seen, real)
    if judges.own:
        found |= judges.own(images, prompts)
    return found


def psnr(images: Tensor, reference: Tensor) -> float | None:
    """dB of pairs, [N, 3, H, W] uint8 each; None where they are the same."""
    if torch.equal(images, reference):
        return None
    return metrics.psnr(to_unit(images), to_unit(reference))


def plain(images: Tensor) -> dict[str, float]:
    """What needs no model."""
    found = {
        "sharpness": mean_over(images, metrics.high_frequency_energy),
        "saturation": mean_over(images, metrics.saturation),
    }
    if min(images.shape[-2:]) >= 4 * PATCH:
        found["grid_16"] = grid_energy(images, PATCH)
        found["grid_8"] = grid_energy(images, LATENT)
    return found


def mean_over(images: Tensor, figure: Callable[[Tensor], float]) -> float:
    """Mean of a figure over images, a few at a time."""
    parts = images.split(16)
    return sum(figure(to_unit(part)) * len(part) for part in parts) / len(images)
