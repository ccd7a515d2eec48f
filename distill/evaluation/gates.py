"""What is measured on a preview, whether it passes the gates, and how good it is beside others.

Every figure counts as its ratio to the teacher's on the same prompts and noise: 1 is like the
teacher. Images are [N, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import math

import torch

from ..config import GatesSection
from . import metrics

Metrics = dict[str, float]

# Added to both sides of a ratio, so that figures near zero do not make wild ones. Of the clipped
# values a hundredth: below that nobody sees them.
FLOORS = {"saturation": 0.01}
FLOOR = 1e-6


def measure(images: torch.Tensor, prompt: torch.Tensor) -> Metrics:
    """Figures of one set; `prompt` [N] numbers the prompts.

    saturation  share of channel values at the ends of the range
    chroma      largest minus smallest channel of a pixel: strength of the colours
    contrast    standard deviation of an image's values
    sharpness   energy of the Laplacian
    diversity   distance between two images of a prompt; needs two
    """
    measured = {
        "saturation": metrics.saturation(images),
        "chroma": (images.amax(1) - images.amin(1)).mean().item(),
        "contrast": images.flatten(1).std(1).mean().item(),
        "sharpness": metrics.high_frequency_energy(images),
    }
    if len(prompt.unique()) < len(prompt):
        measured["diversity"] = metrics.intra_distance(images, prompt)
    return measured


def ratios(student: Metrics, teacher: Metrics) -> Metrics:
    """student / teacher, figure by figure."""
    floors = {name: FLOORS.get(name, FLOOR) for name in student}
    return {name: (student[name] + f) / (teacher[name] + f) for name, f in floors.items()}


def failures(ratio: Metrics, gates: GatesSection) -> list[str]:
    """The limits that are not kept, in words. What was not measured has none; what is not a number
    keeps none.
    """
    found = []
    for key, limit in gates.model_dump(exclude={"clip"}).items():
        figure, _, kind = key.rpartition("_")
        if limit is None or figure not in ratio:
            continue
        value = ratio[figure]
        kept = value <= limit if kind == "max" else value >= limit
        if not kept:
            word = "most" if kind == "max" else "least"
            found.append(
                f"{figure} is {value:.2f} times the teacher's, expected at {word} {limit:g} "
                f"(gates.{key})"
            )
    return found


def teacher_distance(ratio: Metrics) -> float:
    """Distance to the teacher: the mean of |log ratio|, 0 at best. Of the prompt score only a loss
    counts.

    Paired distances (PSNR) are no part of it: after distribution matching a student may draw
    another image of the same prompt, and is no worse for that.
    """
    if not all(math.isfinite(value) and value > 0 for value in ratio.values()):
        return math.inf
    logs = {name: math.log(value) for name, value in ratio.items()}
    if "prompt" in logs:
        logs["prompt"] = min(logs["prompt"], 0.0)
    return sum(map(abs, logs.values())) / len(logs)
