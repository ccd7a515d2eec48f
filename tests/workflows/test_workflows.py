"""The shipped workflows are valid for a real server, and the tiny ones are executed.

The UI files themselves are checked and run; `to_api` does what the front end does on Run.
"""

from __future__ import annotations

import copy
import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from workflow_files import FILES, Workflow, shipped

from distill.contract.tiny import DIGITS, LETTERS, TINY_DIR
from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
NOTES = ("MarkdownNote", "Note")  # drawn by the front end, unknown to the server
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
CONTROL = ("fixed", "increment", "decrement", "randomize")
AUTOGROW = "COMFY_AUTOGROW_V3"  # sockets that grow in number: one more than are wired
TINY_LORA = "tiny_turbo_2_steps.safetensors"  # made by the user, so without an address

Node = dict[str, Any]


# ------------------------------------------------------------------------ what the front end knows


def inputs_of(definition: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, type, options) of a node's inputs, required before optional, in their order."""
    for group in ("required", "optional"):
        for name, spec in definition["input"].get(group, {}).items():
            yield name, spec[0], spec[1] if len(spec) > 1 else {}


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    """Whether an input is a field on the node rather than a socket only."""
    combo = isinstance(kind, list)  # the old way to write COMBO
    return (combo or kind in WIDGET_TYPES) and not options.get("forceInput")


def widgets_of(node: Node, definition: dict[str, Any]) -> dict[str, Any]:
    """`widgets_values` by name, without "control after generate" and the upload button.

    Raises AssertionError where count or order cannot be those of the node.
    """
    values = list(node["widgets_values"])
    named = {}
    for name, kind, options in inputs_of(definition):
        if not is_widget(kind, options):
            continue
        assert values, f"{node['type']}: no value for {name}"
        named[name] = values.pop(0)
        if options.get("control_after_generate"):
            assert values, f"{node['type']}: no control after {name}"
            assert values.pop(0) in CONTROL
        if options.get("image_upload"):
            assert values.pop(0) == "image"
    assert values == [], f"{node['type']}: more values than widgets"
    return named


def sockets_of(node: Node, definition: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, type) of the inputs that are no widgets, as the front end lists them on this node."""
    sockets = []
    for name, kind, options in inputs_of(definition):
        if kind == AUTOGROW:
            template = options["template"]
            ((inner, _),) = ((spec[0], spec) for spec in template["input"]["required"].values())
            wired = [
                slot
                for slot in node["inputs"]
                if slot["name"].startswith(f"{name}.") and slot["link"] is not None
            ]
            count = min(max(template["min"], len(wired) + 1), template["max"])
            sockets += [(f"{name}.{template['prefix']}{i}", inner) for i in range(count)]
        elif not is_widget(kind, options):
            sockets.append((name, kind))
    return sockets


def to_api(workflow: Workflow, object_info: dict[str, Any]) -> dict[str, Any]:
    """The API form that the front end sends when a person presses Run."""
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = widgets_of(node, object_info[node["type"]])
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = origin[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


# -------------------------------------------------------------------------- against a real server


@pytest.mark.comfy
def test_nodes_and_sockets_exist(workflow: Workflow, object_info: dict[str, Any]) -> None:
    check_nodes(workflow, object_info)


def check_nodes(workflow: Workflow, object_info: dict[str, Any]) -> None:
    """Raises AssertionError where a node, an input or an output is not what the server has."""
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["type"] in object_info, f"there is no node {node['type']}"
        assert node["properties"]["Node name for S&R"] == node["type"]
        definition = object_info[node["type"]]
        plain = [slot for slot in node["inputs"] if "widget" not in slot]
        sockets = sockets_of(node, definition)
        assert [(slot["name"], slot["type"]) for slot in plain] == sockets, node["type"]
        required = definition["input"].get("required", {})
        for slot in plain:
            assert slot["link"] is not None or slot["name"] not in required
        outputs = zip(definition["output_name"], definition["output"], strict=True)
        saved = [(output["name"], output["type"]) for output in node["outputs"]]
        assert saved == list(outputs), node["type"]


@pytest.mark.comfy
def test_widget_values_are_allowed(workflow: Workflow, object_info: dict[str, Any]) -> None:
    check_values(workflow, object_info)


def check_values(workflow: Workflow, object_info: dict[str, Any]) -> None:
    """Raises AssertionError where a value is not one that the server would take."""
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        definition = object_info[node["type"]]
        downloads = {model["name"] for model in node["properties"].get("models", ())}
        values = widgets_of(node, definition)
        for name, kind, options in inputs_of(definition):
            if name in values:
                check_value(f"{node['type']}.{name}", values[name], kind, options, downloads)


def check_value(
    where: str, value: Any, kind: Any, options: dict[str, Any], downloads: set[str]
) -> None:
    if kind == "COMBO" or isinstance(kind, list):
        choices = kind if isinstance(kind, list) else options["options"]
        assert value in choices or value in downloads, f"{where}: {value!r} is no choice"
        return
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    assert isinstance(value, types[kind]), f"{where}: {value!r} is no {kind}"
    if kind in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value), where


@pytest.mark.comfy
def test_the_template_browser_finds_them(server: ComfyServer, file: Path) -> None:
    names = {path.stem for path in FILES}
    assert set(server.get("/workflow_templates")["turbo-distill"]) == names
    for suffix in (".json", ".jpg"):
        url = f"{server.url}/api/workflow_templates/turbo-distill/{file.stem}{suffix}"
        with urllib.request.urlopen(url, timeout=60) as response:
            assert response.read() == file.with_suffix(suffix).read_bytes()


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("node", "change", "complaint"),
    [
        ("TurboDistillSampler", {"type": "TurboDistillRenamed"}, "no node TurboDistillRenamed"),
        ("TurboDistillSampler", {"inputs": []}, "TurboDistillSampler"),
        ("VAEDecode", {"outputs": [{"name": "picture", "type": "IMAGE"}]}, "VAEDecode"),
        ("TurboDistillTinyLoader", {"widgets_values": ["no LoRA"]}, "'no LoRA' is no choice"),
        ("TurboDistillSampler", {"widgets_values": [1, "fixed"]}, "no value for start_step"),
        ("TurboDistillSampler", {"widgets_values": [1, "fixed", -1]}, "start_step"),
        ("EmptySD3LatentImage", {"widgets_values": [64, 64, 4, 1]}, "more values than widgets"),
        ("EmptySD3LatentImage", {"widgets_values": ["64", 64, 4]}, "'64' is no INT"),
    ],
)
def test_a_wrong_workflow_is_noticed(
    object_info: dict[str, Any], node: str, change: dict[str, Any], complaint: str
) -> None:
    wrong = copy.deepcopy(shipped("tiny_demo"))
    next(n for n in wrong["nodes"] if n["type"] == node).update(change)
    check = check_values if "widgets_values" in change else check_nodes
    with pytest.raises(AssertionError, match=complaint):
        check(wrong, object_info)


# --------------------------------------------------------------------------------------- execution


def api_node(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    """Inputs of the one node of that type."""
    (node,) = (node for node in prompt.values() if node["class_type"] == class_type)
    return node["inputs"]


@pytest.mark.comfy
def test_conversion_to_api_form(object_info: dict[str, Any]) -> None:
    expected = json.loads((ROOT / "tests" / "data" / "tiny_demo_api.json").read_text())
    assert to_api(shipped("tiny_demo"), object_info) == expected


@pytest.mark.comfy
def test_tiny_demo_runs_as_shipped(server: ComfyServer, object_info: dict[str, Any]) -> None:
    images = run(server, to_api(shipped("tiny_demo"), object_info))
    assert images.shape == (4, 3, 64, 64)
    assert images.std() > 0.1
    assert not torch.equal(images[0], images[1])


@pytest.mark.comfy
def test_tiny_demo_paints_a_readable_seven(
    server: ComfyServer, object_info: dict[str, Any]
) -> None:
    from distill.tiny import classifier

    prompt = to_api(shipped("tiny_demo"), object_info)
    api_node(prompt, "TurboDistillTinyText")["text"] = "a handwritten seven"
    images = run(server, prompt)
    judge = classifier.load(TINY_DIR / "classifier.safetensors")
    symbol, _ = judge.heads(judge.features(images))
    seven = len(LETTERS) + DIGITS.index("seven")
    read = symbol.argmax(1).tolist()
    assert read.count(seven) >= 3, f"the classifier reads {read}, a seven is {seven}"


@pytest.mark.comfy
def test_tiny_compare_runs(server: ComfyServer, object_info: dict[str, Any]) -> None:
    prompt = to_api(shipped("tiny_compare"), object_info)
    api_node(prompt, "TurboDistillCompare").update(teacher_steps=3, lora_2=TINY_LORA)
    (grid,) = run(server, prompt)
    assert grid.shape[2] == 4 * (256 + 4), "four noises side by side"
    assert grid.shape[1] > 3 * 256, "three models below each other"
    height = grid.shape[1] // 3
    by_name, wired = grid[:, -2 * height : -height], grid[:, -height:]
    assert torch.equal(by_name[:, -256:], wired[:, -256:]), "one LoRA, by name and wired"


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["tiny_your_own_lora", "tiny_sampler_custom_advanced"])
def test_they_paint_what_tiny_demo_paints(
    server: ComfyServer, object_info: dict[str, Any], name: str
) -> None:
    expected = run(server, to_api(shipped("tiny_demo"), object_info))
    assert torch.equal(run(server, to_api(shipped(name), object_info)), expected)


@pytest.mark.comfy
def test_tiny_fast_save_paints_both_ways_what_tiny_demo_paints(
    server: ComfyServer, object_info: dict[str, Any]
) -> None:
    expected = run(server, to_api(shipped("tiny_demo"), object_info))
    found = run(server, to_api(shipped("tiny_fast_save"), object_info))
    assert found.shape == (8, 3, 64, 64)
    steps = (found - torch.cat((expected, expected))).abs() * 127.5
    assert steps.max() < 1.5, "more than the rounding of the decoder"


def run(server: ComfyServer, prompt: dict[str, Any]) -> torch.Tensor:
    """Images of a prompt, [B, 3, H, W] in [-1, 1]."""
    files = server.images(server.queue(prompt))
    arrays = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
