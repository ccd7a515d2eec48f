"""One server for every test of this folder, and the workflow files as data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from workflow_files import FILES, Workflow, read

from distill.contract.tiny import TINY_DIR
from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
BAKED = "qwen_image_turbo_baked.safetensors"


@pytest.fixture(scope="session")
def server(comfyui_path: Path) -> Iterator[ComfyServer]:
    """A ComfyUI with our pack, the tiny LoRA, the one picture that every ComfyUI has, and an empty
    file where a person would have baked a model.
    """
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        for file in (TINY_DIR / "lora").glob("*.safetensors"):
            shutil.copy(file, server.folder("loras"))
        (server.folder("diffusion_models") / BAKED).touch()
        Image.new("RGB", (64, 64), "teal").save(server.base / "input" / "example.png")
        yield server


@pytest.fixture(scope="session")
def object_info(server: ComfyServer) -> dict[str, Any]:
    """What the server tells the front end about every node."""
    return server.get("/object_info")


@pytest.fixture(scope="session")
def our_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    return {name: node for name, node in object_info.items() if name.startswith("TurboDistill")}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    """A shipped workflow."""
    return request.param


@pytest.fixture
def workflow(file: Path) -> Workflow:
    return read(file)
