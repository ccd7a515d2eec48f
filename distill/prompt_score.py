"""Do images show what their prompts say? Judged by the tiny model's classifier, or by CLIP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from .config import TINY, Config, ConfigError
from .contract.tiny import COLOURS, DIGITS, LETTERS, PARITIES, TINY_DIR
from .figures import to_uint8


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

    torchmetrics' own takes a handful of published names only. Raises ConfigError where `path` is no
    model that embeds images and text alike.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoModel, AutoProcessor

        try:
            self.network = AutoModel.from_pretrained(path).eval().requires_grad_(False)
            self.processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"gates.clip: {path}: cannot be loaded ({str(error).splitlines()[0]}). Expected "
                "the folder or hub id of a CLIP model, e.g. openai/clip-vit-base-patch32."
            ) from error
        if not hasattr(self.network, "get_text_features"):
            raise ConfigError(
                f"gates.clip: {path}: expected a CLIP model, found {type(self.network).__name__}."
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        cosines = []
        for picture, prompt in zip(to_uint8(images), prompts, strict=True):
            inputs = self.processor(
                text=[prompt],
                images=[picture],
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).to(self.network.device)
            found = self.network(**inputs)
            cosines.append(torch.cosine_similarity(found.image_embeds, found.text_embeds).item())
        return 100 * sum(cosines) / len(cosines)
