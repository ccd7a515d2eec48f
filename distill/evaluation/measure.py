"""The figures of one set of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics
from . import features
from .grid import LATENT, PATCH, grid_energy


@dataclass(frozen=True)
class Judges:
    """Who looks at the images."""

    vision: Mapping[str, features.Vision]  # "clip", "dino"
    reference: Tensor | None = None  # real images, [N, 3, H, W] uint8
    tiny: bool = False


def measure(images: Tensor, prompts: Sequence[str], judges: Judges) -> dict[str, float]:
    """Figures of images, one prompt each.  # [N, 3, H, W] uint8"""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([number[prompt] for prompt in prompts])
    several = len(number) < len(prompts)
    found = plain(images)
    if several:
        small = [F.adaptive_avg_pool2d(as_float(part), 16) for part in images.split(16)]
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
    if judges.tiny:
        found |= tiny_figures(images, prompts)
    return found


def psnr(images: Tensor, reference: Tensor) -> float | None:
    """dB of pairs, [N, 3, H, W] uint8 each; None where they are the same."""
    if torch.equal(images, reference):
        return None
    return metrics.psnr(as_float(images), as_float(reference))


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


def as_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]"""
    return images.float() / 127.5 - 1


def mean_over(images: Tensor, figure: Callable[[Tensor], float]) -> float:
    """Mean of a figure over images, a few at a time."""
    parts = images.split(16)
    return sum(figure(as_float(part)) * len(part) for part in parts) / len(images)


@lru_cache(maxsize=1)
def _tiny_judge() -> Any:
    from ..contract.tiny import TINY_DIR
    from ..tiny import classifier
    from ..tiny.evaluate import Judge

    return Judge(classifier.load(TINY_DIR / "classifier.safetensors"))


def tiny_figures(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """What the tiny model's own classifier reads, where prompts ask for letters or digits."""
    from ..tiny.classifier import FEATURES
    from ..tiny.evaluate import DIGIT_PROMPTS, LETTER_PROMPTS

    judge = _tiny_judge()
    found: dict[str, float] = {}
    letters = [i for i, prompt in enumerate(prompts) if prompt in LETTER_PROMPTS]
    if len(letters) > 1:
        x = as_float(images[letters])
        number = torch.tensor([LETTER_PROMPTS.index(prompts[i]) for i in letters])
        with warnings.catch_warnings():  # a prompt that stands alone has no spread; left out below
            warnings.filterwarnings("ignore", r"std\(\)")
            figures = judge.letters(x, number, x)
        found["letter_accuracy"] = figures.letter_accuracy
        found["colour_accuracy"] = figures.colour_accuracy
        if len(letters) > FEATURES:  # else the covariance has no rank
            found["frechet"] = figures.frechet
        if number.unique(return_counts=True)[1].min() > 1:
            found["background_spread"] = figures.background_spread
    digits = [i for i, prompt in enumerate(prompts) if prompt in DIGIT_PROMPTS]
    if digits:
        digit = torch.tensor([DIGIT_PROMPTS.index(prompts[i]) for i in digits])
        found["digit_accuracy"] = judge.digit_accuracy(as_float(images[digits]), digit)
    return found
