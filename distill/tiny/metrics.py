"""How good are the tiny model's images? Figures of a set of letters against the teacher's many-step
images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..contract.tiny import COLOURS, DIGITS, LETTERS, PARITIES, TINY_DIR, embed_prompt
from ..evaluation import metrics
from ..models.text import Text
from ..utils.images import to_unit
from . import classifier
from .classifier import FEATURES, Classifier
from .data import PROMPTS
from .images import letters

LETTER_PROMPTS = PROMPTS[1 : 1 + len(LETTERS) * len(COLOURS)]
DIGIT_PROMPTS = PROMPTS[1 + len(LETTER_PROMPTS) : 1 + len(LETTER_PROMPTS) + len(DIGITS)]


@dataclass(frozen=True)
class LetterMetrics:
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
        self.real = classifier.features(to_unit(letters(1000, seed).images))

    @torch.no_grad()
    def letters(
        self, images: torch.Tensor, number: torch.Tensor, reference: torch.Tensor
    ) -> LetterMetrics:
        """images, reference [N, 3, 64, 64] in [-1, 1]; number [N] of the prompt."""
        features = self.classifier.features(images)
        symbol, colour = self.classifier.heads(features)
        same = torch.equal(images, reference)
        return LetterMetrics(
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


def gates(student: LetterMetrics, teacher: LetterMetrics) -> dict[str, Gate]:
    """The gates of the demo, by figure."""
    measured, reference = asdict(student), asdict(teacher)
    ratios = {
        name: Gate(measured[name] / reference[name], limit, at_least)
        for name, (limit, at_least) in RATIO_LIMITS.items()
    }
    return ratios | {"psnr": Gate(student.psnr, MIN_PSNR, True)}


class TinyScore:
    """Share of what the prompts name, symbol and colour, that the shipped classifier reads."""

    def __init__(self) -> None:
        self.network = classifier.load(TINY_DIR / "classifier.safetensors")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        features = self.network.features(images.to(self.network.features_head.weight.device))
        symbols, colours = (logits.argmax(1).tolist() for logits in self.network.heads(features))
        right = [
            found in wanted
            for prompt, symbol, colour in zip(prompts, symbols, colours, strict=True)
            for found, wanted in zip((symbol, colour), expected(prompt), strict=True)
            if wanted
        ]
        return sum(right) / len(right) if right else math.nan


def expected(prompt: str) -> tuple[set[int], set[int]]:
    """The classifier's numbers of the symbols, and of the colours, that a prompt of the tiny model
    allows; empty where it says nothing.
    """
    words = prompt.replace(",", " ").replace(".", " ").split()
    lower = [word.lower() for word in words]
    symbols = {LETTERS.index(word.upper()) for word in words if word.upper() in LETTERS}
    symbols |= {len(LETTERS) + DIGITS.index(word) for word in lower if word in DIGITS}
    for word in set(lower) & set(PARITIES):
        symbols |= {len(LETTERS) + d for d in range(len(DIGITS)) if PARITIES[d % 2] == word}
    return symbols, {COLOURS.index(word) for word in lower if word in COLOURS}


@lru_cache(maxsize=1)
def _tiny_judge() -> Any:
    return Judge(classifier.load(TINY_DIR / "classifier.safetensors"))


def tiny_metrics(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """What the tiny model's own classifier reads, where prompts ask for letters or digits."""

    judge = _tiny_judge()
    found: dict[str, float] = {}
    letters = [i for i, prompt in enumerate(prompts) if prompt in LETTER_PROMPTS]
    if len(letters) > 1:
        x = to_unit(images[letters])
        number = torch.tensor([LETTER_PROMPTS.index(prompts[i]) for i in letters])
        with warnings.catch_warnings():  # a prompt that stands alone has no spread; left out below
            warnings.filterwarnings("ignore", r"std\(\)")
            metrics = judge.letters(x, number, x)
        found["letter_accuracy"] = metrics.letter_accuracy
        found["colour_accuracy"] = metrics.colour_accuracy
        if len(letters) > FEATURES:  # else the covariance has no rank
            found["frechet"] = metrics.frechet
        if number.unique(return_counts=True)[1].min() > 1:
            found["background_spread"] = metrics.background_spread
    digits = [i for i, prompt in enumerate(prompts) if prompt in DIGIT_PROMPTS]
    if digits:
        digit = torch.tensor([DIGIT_PROMPTS.index(prompts[i]) for i in digits])
        found["digit_accuracy"] = judge.digit_accuracy(to_unit(images[digits]), digit)
    return found
