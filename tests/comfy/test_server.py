"""The pack in a real ComfyUI server, started as a user starts it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from distill.utils.comfyui import ComfyServer, ComfyUIError


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    info = server.get("/object_info")
    return {name: node for name, node in info.items() if name.startswith("TurboDistill")}


def test_every_node_is_listed(object_info: dict[str, Any]) -> None:
    assert set(object_info) == {
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


def test_every_input_and_output_has_a_tooltip(object_info: dict[str, Any]) -> None:
    for name, node in object_info.items():
        for group in ("required", "optional"):
            for key, (_, options) in node["input"].get(group, {}).items():
                assert options["tooltip"], f"{name}.{key}"
        assert len(node["output_tooltips"]) == len(node["output"])
        assert all(node["output_tooltips"]), name


def test_the_pack_loads_without_a_complaint(server: ComfyServer) -> None:
    assert "IMPORT FAILED" not in server.log
    assert "Error while calling comfy_entrypoint" not in server.log


def test_an_error_reaches_the_user(server: ComfyServer) -> None:
    prompt = {
        "1": {"class_type": "TurboDistillTinyText", "inputs": {"text": "a purple cow"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(
        ComfyUIError, match=r"TurboDistillTinyText.*does not know the word 'purple'"
    ):
        server.queue(prompt)


def test_a_prompt_that_is_not_valid(server: ComfyServer) -> None:
    prompt = {
        "1": {"class_type": "TurboDistillInspect", "inputs": {"lora_name": "none.safetensors"}}
    }
    with pytest.raises(ComfyUIError, match="refused the prompt"):
        server.queue(prompt)


def test_the_tiny_model_paints(
    server: ComfyServer, tiny_prompt: Callable[..., dict[str, Any]]
) -> None:
    images = server.images(server.queue(tiny_prompt()))
    assert len(images) == 2
    for png in images:
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">II", png[16:24]) == (64, 64)
    assert images[0] != images[1]
