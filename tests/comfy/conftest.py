"""A Qwen-Image of toy size with random weights, LoRAs for it, and short ways to run nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import as_core
import pytest
import server_prompts
import torch
import toy_lora
from as_core import Inputs
from server_prompts import Messages, Prompt
from torch import Tensor
from toy_lora import Update
from toy_model import save_odd_model

from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
Pack = Callable[[str], ModuleType]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs ComfyUI."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("comfy")


@pytest.fixture(autouse=True)
def _as_core_runs_nodes() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def server(comfyui_path: Path) -> Iterator[ComfyServer]:
    """One ComfyUI with our pack for every test that asks for it."""
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_prompt() -> Callable[..., Prompt]:
    """The tiny demo's API prompt: (nodes, model, count, seed) -> prompt."""
    return server_prompts.tiny_prompt


@pytest.fixture(scope="session")
def listen() -> Callable[..., Messages]:
    """Queues a prompt and returns its messages by type: (server, prompt, *until) -> messages."""
    return server_prompts.listen


@pytest.fixture
def output(comfyui: Path, tmp_path: Path) -> Iterator[Path]:
    """ComfyUI's output folder, empty."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    yield tmp_path / "output"
    folder_paths.set_output_directory(before)


# ------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformer/ and vae/ as diffusers writes them, with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    save_odd_model(folder)
    return folder


@pytest.fixture
def model(pack: Pack, tiny_folder: Path) -> Any:
    """A fresh ModelPatcher of the toy transformer, in float32 on the CPU."""
    return pack("nodes.tiny").load_transformer(tiny_folder / "transformer")


@pytest.fixture(scope="session")
def base_weights(tiny_folder: Path) -> dict[str, Tensor]:
    """The toy transformer's weights by module name (without ".weight")."""
    return toy_lora.linear_weights(tiny_folder / "transformer")


# -------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture(scope="session")
def make_updates(base_weights: dict[str, Tensor]) -> Callable[..., dict[str, Update]]:
    """Random updates of all linear layers of the toy model: (seed, ranks, alpha) -> updates."""
    return partial(toy_lora.make_updates, base_weights)


@pytest.fixture
def write_lora(tmp_path: Path, pack: Pack) -> Callable[..., Path]:
    """Writes updates in ComfyUI's spelling, and a spec: (updates, name, **spec) -> path."""
    return partial(toy_lora.write_lora, tmp_path, pack("distill.contract.spec").TurboSpec)


@pytest.fixture
def turbo_model(
    pack: Pack, model: Any, make_updates: Callable[..., Any], write_lora: Callable[..., Path]
) -> Callable[..., Any]:
    """The toy model with a random Turbo LoRA: (**spec) -> ModelPatcher."""

    def build(**spec: Any) -> Any:
        path = write_lora(make_updates(), **spec)
        return pack("nodes.apply_lora").apply_lora(model, path)[0]

    return build


# ------------------------------------------------------------------------------------------ running


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    """Arguments of one forward of the toy model."""
    return as_core.make_inputs()


@pytest.fixture(scope="session")
def prompt() -> list[list[Any]]:
    """CONDITIONING of the toy model's text width."""
    return as_core.make_prompt()


@pytest.fixture(scope="session")
def forward(comfyui: Path, inputs: Inputs) -> Callable[[Any], Tensor]:
    """Loads a MODEL as core does before sampling and runs its diffusion model once."""
    return partial(as_core.forward, inputs)


@pytest.fixture
def forward_with(
    pack: Pack, tiny_folder: Path, inputs: Inputs
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The toy model's output after adding deltas to its weights, with no LoRA code at all."""
    load = partial(pack("nodes.tiny").load_transformer, tiny_folder / "transformer")
    return partial(as_core.forward_with, inputs, load)


@pytest.fixture(scope="session")
def sample(pack: Pack) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """What the Turbo Sampler node does: (model, prompt, latent, seed, ...) -> latent, warnings."""
    return partial(as_core.sample, pack("nodes.sampling"))


@pytest.fixture(scope="session")
def run_node(comfyui: Path) -> Callable[..., tuple[Any, ...]]:
    """Executes a V3 node class as core does and returns its outputs."""
    return as_core.run_node


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What other tests compiled is forgotten, and so is what this one does."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def count_forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """Counts the transformer's calls on a MODEL: the list that comes back grows by batch sizes."""
    return partial(as_core.count_forwards, monkeypatch)
