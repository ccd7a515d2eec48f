"""A random Qwen-Image of the smallest useful size, and data to train it on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import toy_training
from toy_model import small_transformer
from toy_training import RandomData

from distill.contract.tiny import TINY_DIR

if TYPE_CHECKING:  # neither is there where the nodes are tested alone
    from diffusers import QwenImageTransformer2DModel

    from distill.config import Config


@pytest.fixture
def new_transformer() -> Callable[[], QwenImageTransformer2DModel]:
    """Makes further copies of `transformer`, without adapters."""
    return small_transformer


@pytest.fixture
def transformer() -> QwenImageTransformer2DModel:
    return small_transformer()


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


@pytest.fixture
def small_config(tmp_path: Path, small_model: Path) -> Callable[..., Config]:
    """Makes a configuration of eight PCM steps on that model; keywords replace its keys."""
    return partial(toy_training.small_config, tmp_path / "run", small_model)


@pytest.fixture(scope="module")
def small_config_once(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path
) -> Callable[..., Config]:
    """`small_config` for fixtures that serve a whole module."""
    return partial(toy_training.small_config, tmp_path_factory.mktemp("run") / "run", small_model)
