"""The pack in a real ComfyUI server, started as a user starts it."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

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


def reports(messages: Any) -> dict[str, list[str]]:
    """What the nodes gave back for the front end to show, by node."""
    outputs = {one["node"]: one["output"] or {} for one in messages["executed"]}
    return {node: output["report"] for node, output in outputs.items() if "report" in output}


def test_reports_are_kept_and_sent_again_for_cached_nodes(
    server: ComfyServer, listen: Any, tiny_prompt: Callable[..., dict[str, Any]]
) -> None:
    first, again = (listen(server, tiny_prompt(seed=11)) for _ in range(2))
    assert {"1", "4"} <= set(again["execution_cached"][0]["nodes"])
    for messages in (first, again):
        (loader,), (sampler,) = (reports(messages)[node] for node in ("1", "4"))
        assert "matched: 48 of 48 modules" in loader
        assert sampler == "2 step(s) at 1, 0.7155, 0; euler; CFG 1"
        job = messages["execution_success"][0]["prompt_id"]
        assert server.get(f"/history/{job}")[job]["outputs"]["4"]["report"] == [sampler]


def test_a_report_is_there_before_the_node_is_done(
    server: ComfyServer, listen: Any, tiny_prompt: Callable[..., dict[str, Any]]
) -> None:
    messages = listen(server, tiny_prompt(seed=12))
    early = {one["node"]: one["report"] for one in messages["turbo_distill.report"]}
    assert early["4"] == "2 step(s) at 1, 0.7155, 0; euler; CFG 1"


def test_an_error_is_named_without_a_path_of_this_machine(
    server: ComfyServer, listen: Any, tiny_prompt: Callable[..., dict[str, Any]]
) -> None:
    """ComfyUI shows the exception's module, which for us would be the path in custom_nodes."""
    broken = {"format": "pt"}
    save_file(
        {"x.lora_A.weight": torch.zeros(1)}, server.folder("loras") / "odd.safetensors", broken
    )
    loader = {"lora_name": "odd.safetensors", "model": ["1", 0], "strength": 1.0, "mode": "auto"}
    prompt = tiny_prompt(
        {"9": {"class_type": "TurboDistillLoraLoader", "inputs": loader}}, model="9"
    )
    (error,) = listen(server, prompt, "execution_error")["execution_error"]
    assert error["exception_type"] == "turbo_distill.LoraFormatError"
    assert "custom_nodes" not in error["exception_message"]


def test_every_exception_of_the_pack_has_a_short_name(pack: Any) -> None:
    nodes = pack("nodes")
    for name in ("nodes.png_writer", "distill.contract.resolve", "distill.contract.lora_keys"):
        pack(name)
    nodes.name_errors()
    modules = [sys.modules[name] for name in sys.modules if name.startswith(f"{nodes.PACKAGE}.")]
    errors = {
        member.__name__: member.__module__
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Exception)
    }
    for name in ("SpecError", "UnknownSchedule", "LoraFormatError", "SaveError"):
        assert errors[name] == "turbo_distill"
    assert not [name for name, module in errors.items() if nodes.PACKAGE in module]
