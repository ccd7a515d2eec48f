"""How good are the tiny model's images? Figures of a set of letters against the teacher's many-step
images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from .. import metrics
from ..contract.tiny import COLOURS, DIGITS, LETTERS, embed_prompt
from ..models import Text
from .classifier import Classifier
from .data import PROMPTS
from .images import letters

LETTER_PROMPTS = PROMPTS[1 : 1 + len(LETTERS) * len(COLOURS)]
DIGIT_PROMPTS = PROMPTS[1 + len(LETTER_PROMPTS) : 1 + len(LETTER_PROMPTS) + len(DIGITS)]


@dataclass(frozen=True)
class Figures:
    """Measured on one set of letters, several per prompt."""

    letter_accuracy: float  # share that the classifier reads as the prompt's letter
    colour_accuracy: float  # share in the prompt's colour
    frechet: float  # Frechet distance to real letters in the classifier's features
    background_spread: float  # standard deviation of the background's colour within a prompt
    intra_distance: float  # pixel distance of two images of one prompt
    edge_energy: float
    saturation: float
    psnr: float  # dB, against the reference images of the same noise


def letter_batch(per_prompt: int) -> tuple[Text, torch.Tensor]:
    """Every letter prompt `per_prompt` times, with its number.  # Text of [50 n, 8, 64], [50 n]"""
    number = torch.arange(len(LETTER_PROMPTS)).repeat(per_prompt)
    table = torch.stack([embed_prompt(p) for p in LETTER_PROMPTS])
    return Text(table[number]), number


def digit_batch(per_prompt: int) -> tuple[Text, torch.Tensor]:
    """Every digit prompt `per_prompt` times, with the digit."""
    number = torch.arange(len(DIGIT_PROMPTS)).repeat(per_prompt)
    table = torch.stack([embed_prompt(p) for p in DIGIT_PROMPTS])
    return Text(table[number]), number


class Judge:
    """Measures sets of letters against 1,000 real ones that no training saw."""

    def __init__(self, classifier: Classifier, seed: int = 2000) -> None:
        self.classifier = classifier
        self.real = classifier.features(letters(1000, seed).images.float() / 127.5 - 1)

    @torch.no_grad()
    def letters(
        self, images: torch.Tensor, number: torch.Tensor, reference: torch.Tensor
    ) -> Figures:
        """images, reference [N, 3, 64, 64] in [-1, 1]; number [N] of the prompt."""
        features = self.classifier.features(images)
        symbol, colour = self.classifier.heads(features)
        same = torch.equal(images, reference)
        return Figures(
            letter_accuracy=(symbol.argmax(1) == number // len(COLOURS)).float().mean().item(),
            colour_accuracy=(colour.argmax(1) == number % len(COLOURS)).float().mean().item(),
            frechet=metrics.frechet_distance(features, self.real),
            background_spread=metrics.background_spread(images, number),
            intra_distance=metrics.intra_distance(images, number),
            edge_energy=metrics.edge_energy(images),
            saturation=metrics.saturation(images),
            psnr=float("inf") if same else metrics.psnr(images, reference),
        )

    @torch.no_grad()
    def digit_accuracy(self, images: torch.Tensor, digit: torch.Tensor) -> float:
        symbol, _ = self.classifier.heads(self.classifier.features(images))
        return (symbol.argmax(1) - len(LETTERS) == digit).float().mean().item()


@dataclass(frozen=True)
class Gate:
    value: float  # ratio to the teacher at 50 guided steps, or dB
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def rule(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


# What a 2-step student has to reach, and the undistilled model at 2 steps must not.
RATIO_LIMITS = {  # figure -> (limit of its ratio to the teacher's, at least)
    "colour_accuracy": (0.97, True),
    "background_spread": (0.85, True),
    "intra_distance": (0.90, True),
    "frechet": (1.40, False),
}
MIN_PSNR = 20.0  # dB


def gates(student: Figures, teacher: Figures) -> dict[str, Gate]:
    """The gates of the demo, by figure."""
    measured, reference = asdict(student), asdict(teacher)
    ratios = {
        name: Gate(measured[name] / reference[name], limit, at_least)
        for name, (limit, at_least) in RATIO_LIMITS.items()
    }
    return ratios | {"psnr": Gate(student.psnr, MIN_PSNR, True)}
