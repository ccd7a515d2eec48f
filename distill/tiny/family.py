"""The tiny Qwen-Image as a model family: Qwen-Image of other width and depth, with word vectors for
a text encoder, data of its own and a classifier as judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config import TINY, GuidanceSection
from ..contract.schedule import schedule
from ..contract.tiny import (
    BASE_NAME,
    GUIDANCE,
    IMAGE_SIZE,
    SHIFT,
    TEXT_TOKENS,
    TINY_DIR,
    embed_prompt,
)
from ..models import qwen_image
from ..models.family import Embedded
from .data import TinyData, embedded_data
from .metrics import DIGIT_PROMPTS, LETTER_PROMPTS, TinyScore, tiny_metrics


class TinyTextEncoder:
    """Eight word vectors per prompt, all of them tokens."""

    def refuses(self, prompt: str) -> str:
        try:
            embed_prompt(prompt)
        except ValueError as error:
            return str(error)
        return ""

    def cut(self, prompt: str) -> str:
        return ""  # one that is too long is refused

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        return [embed_prompt(prompt) for prompt in prompts]


def data_of(seed: int) -> TinyData:
    from ..models.load import load_vae

    return embedded_data(load_vae(TINY), seed)


FAMILY = replace(
    qwen_image.FAMILY,
    embedded=Embedded(
        folder=TINY_DIR,
        base=BASE_NAME,
        title="Turbo Distill's tiny Qwen-Image",
        data=data_of,
        text_encoder="tiny words 1",
    ),
    text_encoder=lambda folder, device, dtype: TinyTextEncoder(),
    negative="",
    size=(IMAGE_SIZE, IMAGE_SIZE),
    sigmas=lambda folder, steps, size: schedule(steps, shift=SHIFT),
    guidance=GuidanceSection(scale=GUIDANCE, rescale=False),
    gpu_dtype=torch.float32,
    text_tokens=TEXT_TOKENS,
    tflops=0.05,  # two CPU cores
    workflows={"tiny": "tiny_your_own_lora.json"},
    prompts=(*LETTER_PROMPTS, *DIGIT_PROMPTS),
    eval_batch=50,
    prompt_score=TinyScore,
    metrics=tiny_metrics,
)
