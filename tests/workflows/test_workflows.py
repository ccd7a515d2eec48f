"""The shipped workflows: sound as files, valid for a real server, and the tiny one is executed.

The UI files themselves are checked and run; `to_api` does what the front end does on Run.
"""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.comfyui import ComfyServer
from distill.contract.tiny import DIGITS, LETTERS, TINY_DIR

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "workflows").glob("*.json"))
NOTES = ("MarkdownNote", "Note")  # drawn by the front end, unknown to the server
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TITLE_HEIGHT = 30  # LiteGraph draws a node's title above its `pos`
CONTROL = ("fixed", "increment", "decrement", "randomize")

Workflow = dict[str, Any]
Node = dict[str, Any]


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def workflow(file: Path) -> Workflow:
    return json.loads(file.read_text(encoding="utf-8"))


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
    """`widgets_values` by name, with the extra "control after generate" field left out.

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
    assert values == [], f"{node['type']}: more values than widgets"
    return named


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


# ------------------------------------------------------------------------------- the file by itself


def test_the_two_workflows_are_there() -> None:
    assert [file.stem for file in FILES] == ["qwen_image_2512_turbo_2_steps", "tiny_demo"]


def test_format(workflow: Workflow) -> None:
    assert workflow["version"] == 0.4
    ids = [node["id"] for node in workflow["nodes"]]
    assert len(ids) == len(set(ids))
    assert workflow["last_node_id"] == max(ids)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    assert all(node["mode"] == 0 for node in workflow["nodes"])


def test_links_agree_on_both_ends(workflow: Workflow) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len({link[0] for link in workflow["links"]}) == len(workflow["links"])
    for link_id, source, source_slot, target, target_slot, kind in workflow["links"]:
        output = nodes[source]["outputs"][source_slot]
        slot = nodes[target]["inputs"][target_slot]
        assert link_id in output["links"]
        assert slot["link"] == link_id
        assert output["type"] == slot["type"] == kind
    known = {link[0] for link in workflow["links"]}
    for node in workflow["nodes"]:
        assert {slot["link"] for slot in node["inputs"]} - {None} <= known
        for output in node["outputs"]:
            assert set(output["links"] or ()) <= known


def test_order_follows_the_links(workflow: Workflow) -> None:
    order = {node["id"]: node["order"] for node in workflow["nodes"]}
    assert sorted(order.values()) == list(range(len(order)))
    assert all(order[link[1]] < order[link[3]] for link in workflow["links"])


def test_no_node_covers_another(workflow: Workflow) -> None:
    for one, other in combinations(workflow["nodes"], 2):
        overlap = all(
            low_1 < high_2 and low_2 < high_1
            for (low_1, high_1), (low_2, high_2) in zip(extent(one), extent(other), strict=True)
        )
        assert not overlap, f"{one['type']} {one['id']} covers {other['type']} {other['id']}"


def test_groups_hold_whole_nodes_and_do_not_cross(workflow: Workflow) -> None:
    boxes = [
        ((x, x + width), (y, y + height))
        for x, y, width, height in (group["bounding"] for group in workflow["groups"])
    ]
    for one, other in combinations(boxes, 2):
        assert any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(one, other, strict=True))
    for node in workflow["nodes"]:
        for box in boxes:
            pairs = list(zip(extent(node), box, strict=True))
            inside = all(out[0] <= own[0] and own[1] <= out[1] for own, out in pairs)
            apart = any(own[1] <= out[0] or out[1] <= own[0] for own, out in pairs)
            assert inside or apart, f"{node['type']} sticks out of its group"


def extent(node: Node) -> tuple[tuple[float, float], tuple[float, float]]:
    """Horizontal and vertical span of a node with its title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return (x, x + width), (y - TITLE_HEIGHT, y + height)


def test_notes_in_english_and_chinese(workflow: Workflow) -> None:
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES]
    assert any(not has_chinese(note) for note in notes)
    assert any("运行" in note for note in notes)


def has_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def test_model_links_lead_to_the_chosen_file(workflow: Workflow) -> None:
    """The front end offers the download of a missing file by this entry, and only if it matches."""
    texts = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES]
    for node in workflow["nodes"]:
        for value in node["widgets_values"]:
            if not str(value).endswith(".safetensors"):
                continue
            (model,) = node["properties"]["models"]
            assert model["name"] == value
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/resolve/main/{value}") or model["url"].endswith(
                f"/{model['directory']}/{value}"
            )
            assert f"[{value}]({model['url']})" in "".join(texts)


def test_thumbnail(file: Path) -> None:
    with Image.open(file.with_suffix(".jpg")) as image:
        assert image.format == "JPEG"
        assert image.width == image.height >= 400
    assert file.with_suffix(".jpg").stat().st_size < 150_000


# -------------------------------------------------------------------------- against a real server


@pytest.mark.comfy
def test_nodes_and_sockets_exist(workflow: Workflow, object_info: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["properties"]["Node name for S&R"] == node["type"]
        definition = object_info[node["type"]]
        sockets = [
            (name, kind)
            for name, kind, options in inputs_of(definition)
            if not is_widget(kind, options)
        ]
        plain = [slot for slot in node["inputs"] if "widget" not in slot]
        assert [(slot["name"], slot["type"]) for slot in plain] == sockets
        required = definition["input"].get("required", {})
        for slot in plain:
            assert slot["link"] is not None or slot["name"] not in required
        outputs = zip(definition["output_name"], definition["output"], strict=True)
        saved = [(output["name"], output["type"]) for output in node["outputs"]]
        assert saved == list(outputs)


@pytest.mark.comfy
def test_widget_values_are_allowed(workflow: Workflow, object_info: dict[str, Any]) -> None:
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


# --------------------------------------------------------------------------------------- execution


def tiny_demo() -> Workflow:
    return json.loads((ROOT / "workflows" / "tiny_demo.json").read_text(encoding="utf-8"))


def api_node(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    """Inputs of the one node of that type."""
    (node,) = (node for node in prompt.values() if node["class_type"] == class_type)
    return node["inputs"]


@pytest.mark.comfy
def test_conversion_to_api_form(object_info: dict[str, Any]) -> None:
    expected = json.loads((ROOT / "tests" / "data" / "tiny_demo_api.json").read_text())
    assert to_api(tiny_demo(), object_info) == expected


@pytest.mark.comfy
def test_tiny_demo_runs_as_shipped(server: ComfyServer, object_info: dict[str, Any]) -> None:
    images = run(server, to_api(tiny_demo(), object_info))
    assert images.shape == (4, 3, 64, 64)
    assert images.std() > 0.1
    assert not torch.equal(images[0], images[1])


@pytest.mark.comfy
def test_tiny_demo_paints_a_readable_seven(
    server: ComfyServer, object_info: dict[str, Any]
) -> None:
    from distill.tiny import classifier

    prompt = to_api(tiny_demo(), object_info)
    api_node(prompt, "TurboDistillTinyText")["text"] = "a handwritten seven"
    images = run(server, prompt)
    judge = classifier.load(TINY_DIR / "classifier.safetensors")
    symbol, _ = judge.heads(judge.features(images))
    seven = len(LETTERS) + DIGITS.index("seven")
    read = symbol.argmax(1).tolist()
    assert read.count(seven) >= 3, f"the classifier reads {read}, a seven is {seven}"


def run(server: ComfyServer, prompt: dict[str, Any]) -> torch.Tensor:
    """Images of a prompt, [B, 3, H, W] in [-1, 1]."""
    files = server.images(server.queue(prompt))
    arrays = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
