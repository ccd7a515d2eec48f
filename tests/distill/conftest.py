"""A random Qwen-Image of the smallest useful size, and data to train it on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from distill.config import Config, parse_config
from distill.contract.tiny import TINY_DIR
from distill.data.batch import Batch, Examples
from distill.models.text import Text
from distill.utils.rng import Rng

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

    def batch(self, rng: Rng, rows: int) -> Batch:
        x0 = rng.normal("data/x0", (rows, 16, self.side, self.side))
        text = rng.normal("data/text", (rows, self.tokens, SMALL["joint_attention_dim"]))
        return Batch(x0, Text(text))

    def examples(self, count: int) -> Examples:
        prompts = ("a cat", "rain", "the sea")[:count]
        shape = (1, self.tokens, SMALL["joint_attention_dim"])
        texts = tuple(
            Text(torch.randn(shape, generator=torch.Generator().manual_seed(len(prompt))))
            for prompt in prompts
        )
        return Examples(prompts, texts, (8 * self.side, 8 * self.side))


@pytest.fixture(scope="session")
def data() -> RandomData:
    return RandomData()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Qwen-Image as a folder in diffusers layout, with the tiny VAE."""
    folder = tmp_path_factory.mktemp("small_model")
    small_transformer().save_pretrained(folder / "transformer")
    shutil.copytree(TINY_DIR / "vae", folder / "vae")
    return folder


def _config_maker(run_dir: Path, model: Path) -> Callable[..., Config]:
    def make(**keys: Any) -> Config:
        values = {
            "run_dir": run_dir,
            "model": {"path": str(model), "dtype": "float32", "gradient_checkpointing": False},
            "data": {"cache": "no_cache"},  # tests hand over `data`
            "adapter": {"rank": 4},
            "stages": [{"method": "pcm", "steps": 8, "batch": 4, "lr": 1e-3, "points": 4}],
            "preview": {"every": 0},
            "save_every": 0,
            "log_every": 2,
        }
        return parse_config({**values, **keys}, "small_config")

    return make


@pytest.fixture
def small_config(tmp_path: Path, small_model: Path) -> Callable[..., Config]:
    """Makes a configuration of eight PCM steps on that model; keywords replace its keys."""
    return _config_maker(tmp_path / "run", small_model)


@pytest.fixture(scope="module")
def small_config_once(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path
) -> Callable[..., Config]:
    """`small_config` for fixtures that serve a whole module."""
    return _config_maker(tmp_path_factory.mktemp("run") / "run", small_model)
