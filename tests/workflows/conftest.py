"""One server for every test of this folder, and the workflow files as data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def server(comfyui_path: Path) -> Iterator[ComfyServer]:
    """A ComfyUI with our pack and with no model file at all."""
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        yield server


@pytest.fixture(scope="session")
def object_info(server: ComfyServer) -> dict[str, Any]:
    """What the server tells the front end about every node."""
    return server.get("/object_info")


@pytest.fixture(scope="session")
def our_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    return {name: node for name, node in object_info.items() if name.startswith("TurboDistill")}
