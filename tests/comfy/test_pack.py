"""What ComfyUI sees when it loads the pack: described nodes, quickly, and no training code."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
NODES = {
    "TurboDistillLoraLoader",
    "TurboDistillSampler",
    "TurboDistillSigmas",
    "TurboDistillSamplerSelect",
    "TurboDistillAccelerate",
    "TurboDistillInspect",
    "TurboDistillBake",
    "TurboDistillBakedLoader",
    "TurboDistillCompare",
    "TurboDistillImages",
    "TurboDistillPrompt",
    "TurboDistillDecode",
    "TurboDistillSaveImage",
    "TurboDistillTinyLoader",
    "TurboDistillTinyText",
}
TRAINING = ("diffusers", "peft", "accelerate", "transformers")

# Loads the pack as ComfyUI does, after what ComfyUI itself imports before any custom node.
LOAD = """
import asyncio, importlib.util, json, sys, time
sys.path.insert(0, sys.argv[1])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes, server, comfy_api.latest
before = set(sys.modules)
start = time.process_time()
name = sys.argv[2].replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, sys.argv[2] + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def test_loading_is_quick_and_imports_no_training_code(comfyui_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(comfyui_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=True,
        cwd=comfyui_path,
    )
    seconds, imported = json.loads(done.stdout.splitlines()[-1])
    heavy = [name for name in imported if name.split(".")[0] in TRAINING]
    assert heavy == []
    assert seconds < 0.3  # of this process alone, so that a busy machine does not fail it


@pytest.fixture
def node_list(pack: Any) -> list[Any]:
    extension = asyncio.run(pack("").comfy_entrypoint())
    return asyncio.run(extension.get_node_list())


def test_ids(node_list: list[Any]) -> None:
    assert {node.GET_SCHEMA().node_id for node in node_list} == NODES


def test_everything_is_described(node_list: list[Any]) -> None:
    for node in node_list:
        schema = node.GET_SCHEMA()
        assert schema.category == "Turbo Distill"
        assert schema.display_name.startswith("Turbo ")
        assert len(schema.description) > 40
        assert schema.search_aliases
        for port in (*schema.inputs, *schema.outputs):
            assert port.tooltip, f"{schema.node_id}.{port.id or port.display_name} has no tooltip"
            assert port.tooltip.endswith(".")
        assert all(output.display_name for output in schema.outputs)


def test_no_v1_mappings(pack: Any) -> None:
    """With NODE_CLASS_MAPPINGS beside it, core would never look at comfy_entrypoint."""
    assert not hasattr(pack(""), "NODE_CLASS_MAPPINGS")
