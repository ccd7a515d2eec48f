"""The tiny Qwen-Image as a model family."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..contract.tiny import embed_prompt

TINY_ENCODER = "tiny words 1"  # its fingerprint


class TinyTextEncoder:
    """Eight word vectors per prompt, all of them tokens."""

    def refuses(self, prompt: str) -> str:
        try:
            embed_prompt(prompt)
        except ValueError as error:
            return str(error)
        return ""

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        return [embed_prompt(prompt) for prompt in prompts]
