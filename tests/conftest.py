"""Fixtures for every test: a real ComfyUI, and our pack loaded the way ComfyUI loads it.

Our repository root must not come before ComfyUI on sys.path: `import nodes` would then find our
folder instead of ComfyUI's nodes.py. The pack is therefore loaded by path, as ComfyUI does it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from distill.utils.comfyui import ComfyUIError, ensure_comfyui

ROOT = Path(__file__).parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # processes of a thread each; those that tests start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def import_from_root(name: str) -> None:
    """Makes one package of the root importable, and no other."""
    spec = importlib.machinery.PathFinder.find_spec(name, [str(ROOT)])
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)


import_from_root("benchmarks")


def pytest_sessionstart(session: pytest.Session) -> None:
    """With -n: ComfyUI is there before the processes are, which would all fetch it at once."""
    if session.config.getoption("numprocesses", None):
        try:
            ensure_comfyui()
        except ComfyUIError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The browser's many short tests last: no long file is left to one process at the end."""
    items.sort(key=lambda item: item.get_closest_marker("browser") is not None)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """Folder of ComfyUI: COMFYUI_PATH, else the pinned one, downloaded on first use."""
    return ensure_comfyui()


@pytest.fixture(scope="session")
def comfyui(comfyui_path: Path) -> Path:
    """ComfyUI importable in this process (`import comfy`), on the CPU."""
    sys.path.insert(0, str(comfyui_path))
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = True  # before anything asks comfy.model_management for a device
    return comfyui_path


@pytest.fixture(scope="session")
def pack(comfyui: Path) -> Callable[[str], ModuleType]:
    """Our pack, loaded under a mangled name like nodes.load_custom_node does.

    Called with a name it returns that module of the pack: pack("nodes.apply_lora").
    """
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

    def module_of_pack(relative: str = "") -> ModuleType:
        return importlib.import_module(f"{name}.{relative}") if relative else module

    return module_of_pack
