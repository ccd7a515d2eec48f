"""The workflow that is written beside a LoRA, on a real server: every node exists, and it runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill.contract.spec import TurboSpec
from distill.contract.tiny import BASE_NAME
from distill.lora.workflow import WORKFLOWS, workflow_for
from distill.utils.comfyui import ComfyServer

pytestmark = pytest.mark.comfy

LORA = "tiny_turbo_2_steps.safetensors"  # lies in the server's models/loras


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    """What the tests of the shipped workflows check with."""
    path = Path(__file__).with_name("test_workflows.py")
    spec = importlib.util.spec_from_file_location("checks_of_workflows", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("base", ["Qwen/Qwen-Image-2512", "Qwen/Qwen-Image", BASE_NAME])
def test_nodes_sockets_and_values_are_the_servers(
    base: str, checks: ModuleType, object_info: dict[str, Any]
) -> None:
    graph = workflow_for(TurboSpec((1.0, 0.7155, 0.0), base=base), LORA)
    checks.check_nodes(graph, object_info)
    checks.check_values(graph, object_info)


def test_a_users_own_tiny_lora_runs(
    server: ComfyServer, checks: ModuleType, object_info: dict[str, Any]
) -> None:
    graph = workflow_for(TurboSpec((1.0, 0.7155, 0.0), base=BASE_NAME), LORA)
    shipped = json.loads((WORKFLOWS / "tiny_demo.json").read_text(encoding="utf-8"))
    mine, theirs = (
        checks.run(server, checks.to_api(workflow, object_info)) for workflow in (graph, shipped)
    )
    assert (mine - theirs).abs().max() <= 2 / 127.5  # the same LoRA, by the other road
