"""Do images show what their prompts say? Judged by the tiny model's classifier, or by CLIP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from .config import TINY, Config
from .contract.tiny import COLOURS, DIGITS, LETTERS, PARITIES, TINY_DIR
from .utils.images import to_uint8


class PromptScore(Protocol):
    network: nn.Module  # lies in main memory between uses

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        """One number for images [N, 3, H, W] in [-1, 1] with a prompt each; larger is better. Runs
        where `network` lies.
        """
        ...


def prompt_score(config: Config) -> PromptScore | None:
    """The judge that a configuration names, or None. Raises ConfigError."""
    if config.gates.clip is not None:
        return ClipScore(config.gates.clip)
    return TinyScore() if config.model.path == TINY else None


class TinyScore:
    """Share of what the prompts name, symbol and colour, that the shipped classifier reads."""

    def __init__(self) -> None:
        from .tiny import classifier

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


class ClipScore:
    """100 times the cosine of image and prompt (Hessel et al. 2021), the mean over the images.

    Raises ConfigError where `path` is no CLIP model.
    """

    def __init__(self, path: str) -> None:
        from .evaluation.features import Clip

        self.clip = Clip(path, torch.device("cpu"), "gates.clip")
        self.network = self.clip.model

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        pixels = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
        cosines = torch.cosine_similarity(self.clip.images(pixels), self.clip.texts(prompts))
        return 100 * cosines.mean().item()
