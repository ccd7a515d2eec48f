"""Do images show what their prompts say? Judged by CLIP, or as the model family does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ..config import Config
from ..models.family import family_of
from ..utils.images import to_uint8
from .features import Clip, clip_similarity


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
    own = family_of(config.model.path).prompt_score
    return own() if own else None


class ClipScore:
    """100 times the cosine of image and prompt (Hessel et al. 2021), the mean over the images.

    Raises ConfigError where `path` is no CLIP model.
    """

    def __init__(self, path: str) -> None:
        self.clip = Clip(path, torch.device("cpu"), "gates.clip")
        self.network = self.clip.model

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        pixels = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
        return clip_similarity(self.clip.images(pixels), self.clip.texts(prompts))
