"""A random Qwen-Image of the smallest useful size, and data to train it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from distill.batch import Batch
from distill.draws import Draws
from distill.models import Text

SMALL = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def small_transformer(seed: int = 0) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(**SMALL).eval()


@pytest.fixture
def new_transformer() -> Callable[[], QwenImageTransformer2DModel]:
    """Makes further copies of `transformer`, without adapters."""
    return small_transformer


@pytest.fixture
def transformer() -> QwenImageTransformer2DModel:
    return small_transformer()


@dataclass(frozen=True)
class RandomData:
    """Latents and prompts that are functions of the draws."""

    side: int = 4
    tokens: int = 3

    @property
    def negative(self) -> Text:
        generator = torch.Generator().manual_seed(1)
        return Text(torch.randn(1, self.tokens, SMALL["joint_attention_dim"], generator=generator))

    def batch(self, draws: Draws, rows: int) -> Batch:
        x0 = draws.normal("data/x0", (rows, 16, self.side, self.side))
        text = draws.normal("data/text", (rows, self.tokens, SMALL["joint_attention_dim"]))
        return Batch(x0, Text(text))


@pytest.fixture
def data() -> RandomData:
    return RandomData()
