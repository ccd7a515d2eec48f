"""Prompts become embeddings: what a text encoder is, and Qwen2.5-VL and Qwen3-VL through the
pipelines' own templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import ClassVar, Protocol

import torch

PLACES = 7936  # of a prompt in Qwen-Image-2.1: 8192 less those of template and image


class TextEncoder(Protocol):
    def refuses(self, prompt: str) -> str:
        """Why a prompt cannot be embedded; empty if it can."""
        ...

    def cut(self, prompt: str) -> str:
        """What is embedded of a prompt that is too long: its beginning; else empty."""
        ...

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """One embedding per prompt, without padding.  # [L, D] each"""
        ...


class PipelineTextEncoder:
    """diffusers' `encode_prompt`: template, dropped prefix and truncation are the pipeline's."""

    kind: ClassVar[str]  # class in diffusers

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        pipeline = resolve_name(f"diffusers:{self.kind}").from_pretrained(
            folder, transformer=None, vae=None, torch_dtype=dtype
        )
        pipeline.text_encoder.eval().requires_grad_(False)
        self.pipeline = pipeline.to(device)
        self.device = device

    def refuses(self, prompt: str) -> str:
        return ""

    def cut(self, prompt: str) -> str:
        return ""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        if mask is None:  # all are tokens
            return list(embeds)
        return [row[keep.bool()] for row, keep in zip(embeds, mask, strict=True)]


class QwenTextEncoder(PipelineTextEncoder):
    """Qwen2.5-VL of Qwen-Image."""

    kind = "QwenImagePipeline"

    def cut(self, prompt: str) -> str:
        limit = self.pipeline.tokenizer_max_length
        if 3 * len(prompt.encode()) <= limit:  # NFC makes three bytes of one at most
            return ""
        template = self.pipeline.prompt_template_encode
        tokens = self.pipeline.tokenizer(template.format(prompt), return_offsets_mapping=True)
        kept = tokens["offset_mapping"][: limit + self.pipeline.prompt_template_encode_start_idx]
        end = kept[-1][1] - template.index("{}")
        return prompt[:end] if end < len(prompt) else ""


class Qwen3TextEncoder(PipelineTextEncoder):
    """Qwen3-VL of Qwen-Image-2.1, whose pipeline cuts nothing off."""

    kind = "QwenImage21Pipeline"

    def refuses(self, prompt: str) -> str:
        """Its transformer numbers 8192 places; a longer prompt would get those of others."""
        if 3 * len(prompt.encode()) <= PLACES:
            return ""
        count = len(self.pipeline.processor.tokenizer(prompt)["input_ids"])
        if count <= PLACES:
            return ""
        return f"expected a prompt of at most {PLACES:,} tokens, found {count:,}"
