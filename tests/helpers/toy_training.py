"""A run of the trainer on a model of toy size: random data and a short configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from toy_model import SMALL

from distill.data.batch import Batch, Examples
from distill.models.text import Text
from distill.utils.rng import Rng

if TYPE_CHECKING:  # pydantic: not where the nodes are tested alone
    from distill.config import Config

TEXT_WIDTH = SMALL["joint_attention_dim"]


@dataclass(frozen=True)
class RandomData:
    """Latents and prompts that are functions of seed and step."""

    side: int = 4
    tokens: int = 3

    @property
    def negative(self) -> Text:
        generator = torch.Generator().manual_seed(1)
        return Text(torch.randn(1, self.tokens, TEXT_WIDTH, generator=generator))

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        x0 = rng.normal("data/x0", (batch_size, 16, self.side, self.side))
        text = rng.normal("data/text", (batch_size, self.tokens, TEXT_WIDTH))
        return Batch(x0, Text(text))

    def examples(self, count: int) -> Examples:
        prompts = ("a cat", "rain", "the sea")[:count]
        shape = (1, self.tokens, TEXT_WIDTH)
        texts = tuple(
            Text(torch.randn(shape, generator=torch.Generator().manual_seed(len(prompt))))
            for prompt in prompts
        )
        return Examples(prompts, texts, (8 * self.side, 8 * self.side))


def small_config(run_dir: Path, model: Path, /, **keys: Any) -> Config:
    """Eight PCM steps in full precision; keys replace those of the configuration."""
    from distill.config import parse_config

    values = {
        "run_dir": run_dir,
        "model": {"path": str(model), "dtype": "float32", "gradient_checkpointing": False},
        "data": {"cache": "no_cache", "buckets": [[32, 32]]},  # tests hand over `data`
        "adapter": {"rank": 4},
        "stages": [{"method": "pcm", "steps": 8, "batch": 4, "lr": 1e-3, "points": 4}],
        "preview": {"every": 0},
        "save_every": 0,
        "log_every": 2,
    }
    return parse_config({**values, **keys}, "small_config")
