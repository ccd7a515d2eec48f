"""A real ComfyUI with its real front end in a headless Chromium (tests/helpers/chromium.py).

UPDATE_PICTURES=1 pytest -m browser   writes the workflows' thumbnails and the help pages' pictures
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser_server
import pytest
from chromium import start_chromium
from front_end import FrontEnd
from PIL import Image

from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
SIZE = {"width": 1600, "height": 1000}
EMPTY = {"nodes": [], "links": [], "groups": [], "version": 0.4}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a browser and ComfyUI."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")
            item.add_marker("comfy")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running headless Chromium."""
    with start_chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def server(chromium: Any, comfyui_path: Path) -> Iterator[ComfyServer]:
    """A ComfyUI that has a file of every name that the workflows use."""
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        browser_server.fill(server)
        yield server


@pytest.fixture(scope="session")
def tab(chromium: Any, server: ComfyServer) -> Iterator[FrontEnd]:
    """One tab for all tests: opening the front end takes seconds, loading a graph does not."""
    page = chromium.new_page(viewport=SIZE)
    front_end = FrontEnd(page, server.url)
    front_end.open()
    yield front_end
    page.close()


@pytest.fixture
def front_end(tab: FrontEnd) -> FrontEnd:
    """The tab with an empty graph, at its usual size, without complaints."""
    tab.page.set_viewport_size(SIZE)
    tab.load(EMPTY)
    tab.complaints.clear()
    return tab


@pytest.fixture(scope="session")
def keep() -> Callable[[bytes, Path, int], None]:
    """Writes a picture as JPEG if UPDATE_PICTURES is set: (png, file, largest width)."""

    def write(png: bytes, file: Path, width: int) -> None:
        if not os.environ.get("UPDATE_PICTURES"):
            return
        with Image.open(io.BytesIO(png)) as picture:
            picture = picture.convert("RGB")
            picture.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
            picture.save(file, quality=88, optimize=True)

    return write
