"""The shipped workflows as files: sound links, nothing on top of another, notes, addresses."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image
from workflow_files import FILES, Workflow, read

from distill.contract.known import find

NOTES = ("MarkdownNote", "Note")
TITLE_HEIGHT = 30  # LiteGraph draws a node's title above its `pos`
# Made by the user, so without an address
MADE_HERE = {"tiny_turbo_2_steps.safetensors", "qwen_image_turbo_baked.safetensors"}
EXPECTED = {
    "tiny_demo",
    "tiny_compare",
    "tiny_fast_save",
    "tiny_sampler_custom_advanced",
    "tiny_your_own_lora",
    "qwen_image_2512_turbo_2_steps",
    "qwen_image_2512_turbo_four_2k_images",
    "qwen_image_2512_turbo_image_to_image",
    "qwen_image_2512_turbo_style_lora",
    "qwen_image_2512_turbo_fp8_gguf",
    "qwen_image_2512_turbo_baked_16gb",
    "qwen_image_2512_lightning_4_steps",
    "qwen_image_lightning_8_steps",
    "qwen_image_2512_teacher_vs_turbo",
    "qwen_image_2_1_few_steps",
    "z_image_few_steps",
    "flux2_turbo_8_steps",
}

Node = dict[str, Any]


def test_they_are_all_there() -> None:
    assert EXPECTED - {file.stem for file in FILES} == set()


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
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES]
    english = "".join(note for note in notes if not has_chinese(note))
    chinese = "".join(note for note in notes if has_chinese(note))
    for node in workflow["nodes"]:
        files = [str(value) for value in node["widgets_values"] if is_model(value)]
        models = node["properties"].get("models", [])
        public = [file for file in files if file not in MADE_HERE]
        assert [model["name"] for model in models] == public
        for model in models:
            name, url = model["name"], model["url"]
            assert url.startswith("https://huggingface.co/")
            assert url.endswith((f"/resolve/main/{name}", f"/{model['directory']}/{name}"))
            assert f"[{name}]({url})" in english
            assert f"[{name}]({url})" in chinese
        for made in MADE_HERE.intersection(files):
            assert made in english
            assert made in chinese


def is_model(value: Any) -> bool:
    return str(value).endswith(".safetensors")


def test_one_file_has_one_address() -> None:
    nodes = [node for file in FILES for node in read(file)["nodes"]]
    models = [model for node in nodes for model in node["properties"].get("models", ())]
    assert len({model["name"] for model in models}) == len({tuple(m.values()) for m in models})


def test_the_schedule_of_every_public_lora_is_known(workflow: Workflow) -> None:
    for node in workflow["nodes"]:
        if node["type"] not in ("TurboDistillLoraLoader", "TurboDistillCompare"):
            continue
        for model in node["properties"].get("models", ()):
            assert find(model["name"]) is not None


def test_thumbnail(file: Path) -> None:
    with Image.open(file.with_suffix(".jpg")) as image:
        assert image.format == "JPEG"
        assert image.width == image.height >= 400
    assert file.with_suffix(".jpg").stat().st_size < 150_000
