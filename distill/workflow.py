"""A ready ComfyUI workflow for a LoRA: one of the shipped graphs with that LoRA in it."""

from __future__ import annotations

import copy
import json
import uuid
from pathlib import Path, PurePath
from typing import Any

from .contract.spec import TurboSpec
from .contract.tiny import BASE_NAME

WORKFLOWS = Path(__file__).parent.parent / "workflows"  # beside the package in the repository
QWEN, TINY = "qwen_image_2512_turbo_2_steps.json", "tiny_demo.json"
SHIPPED = {"Qwen-Image-2512": QWEN}  # last part of the base's name -> graph

LOADER, TINY_LOADER, SAVE = "TurboDistillLoraLoader", "TurboDistillTinyLoader", "SaveImage"
NO_LORA = "teacher (no LoRA)"  # the tiny loader's choice

Workflow = dict[str, Any]
Node = dict[str, Any]


def workflow_for(spec: TurboSpec, lora_name: str) -> Workflow | None:
    """The graph that samples `lora_name`, a file in models/loras, in the format that ComfyUI saves.

    None where no shipped graph fits the base, or where the package was installed without them.
    """
    name = TINY if spec.base == BASE_NAME else SHIPPED.get(PurePath(spec.base).name)
    if name is None or not (WORKFLOWS / name).is_file():
        return None
    graph = _read(name)
    if name == TINY:
        _insert_loader(graph, _node(_read(QWEN), LOADER))
    _fill(graph, spec, lora_name)
    return graph


def _read(name: str) -> Workflow:
    return dict(json.loads((WORKFLOWS / name).read_text(encoding="utf-8")))


def _node(graph: Workflow, kind: str) -> Node:
    return next(node for node in graph["nodes"] if node["type"] == kind)


def _insert_loader(graph: Workflow, loader: Node) -> None:
    """Puts a Turbo LoRA Loader between the tiny model and whatever took its MODEL."""
    source = _node(graph, TINY_LOADER)
    source["widgets_values"] = [NO_LORA]
    (old,) = (link for link in graph["links"] if link[1] == source["id"] and link[5] == "MODEL")
    graph["last_node_id"] += 1
    graph["last_link_id"] += 1
    new = [graph["last_link_id"], graph["last_node_id"], 0, *old[3:]]  # loader -> sampler
    target = next(node for node in graph["nodes"] if node["id"] == old[3])
    target["inputs"][old[4]]["link"] = new[0]
    old[3:5] = graph["last_node_id"], 0  # tiny model -> loader
    graph["links"].append(new)

    loader = copy.deepcopy(loader)
    x, y = source["pos"]
    width, height = source["size"]
    loader |= {"id": graph["last_node_id"], "pos": [x, y + height + 100], "size": [width, 520]}
    loader["inputs"][0]["link"], loader["outputs"][0]["links"] = old[0], [new[0]]
    for node in graph["nodes"]:
        node["order"] += node["order"] > source["order"]
    loader["order"] = source["order"] + 1
    graph["nodes"].append(loader)
    below = [x - 20, y + height + 30, width + 40, 620]
    group = {"title": "Turbo LoRA", "bounding": below, "id": len(graph["groups"]) + 1}
    graph["groups"].append({**graph["groups"][0], **group})


def _fill(graph: Workflow, spec: TurboSpec, lora_name: str) -> None:
    """Sets LoRA, size and file prefix, and writes the notes anew."""
    stem = PurePath(lora_name).stem
    graph["id"] = str(uuid.uuid5(uuid.UUID(graph["id"]), lora_name))
    loader = _node(graph, LOADER)
    loader["widgets_values"] = [lora_name, *loader["widgets_values"][1:]]
    del loader["properties"]["models"]  # no address to download it from
    _node(graph, SAVE)["widgets_values"] = [f"turbo-distill/{stem}"]
    if spec.resolutions:
        latent = _node(graph, "EmptySD3LatentImage")
        latent["widgets_values"][:2] = spec.resolutions[0]
    plural = "s" * (spec.steps > 1)
    for group in graph["groups"]:
        group["title"] = group["title"].replace(
            "Two steps / 两步采样", f"{spec.steps} step{plural} / {spec.steps} 步采样"
        )
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote" and node.get("title") in NOTES:
            template = NOTES[node["title"]]
            node["widgets_values"] = [template.format(**_facts(graph, spec, lora_name))]


def _facts(graph: Workflow, spec: TurboSpec, lora_name: str) -> dict[str, str]:
    models = [m for node in graph["nodes"] for m in node["properties"].get("models", ())]
    lines = [f"- models/{m['directory']}: [{m['name']}]({m['url']})" for m in models]
    return {
        "lora": lora_name,
        "stem": PurePath(lora_name).stem,
        "sigmas": ", ".join(f"{sigma:.6g}" for sigma in spec.sigmas),
        "sampler": spec.sampler,
        "cfg": f"{spec.cfg:g}",
        "models": "\n".join([f"- models/loras: `{lora_name}`", *lines]),
    }


NOTES = {  # title of the shipped note -> its text here
    "Read me": """# {stem}

**Run it:** copy `{lora}` to `ComfyUI/models/loras`, press `R` to refresh the lists, press Run.

The Turbo LoRA Loader reads from the file how the LoRA was trained (sigmas {sigmas}; sampler \
{sampler}; CFG {cfg}), and the Turbo Sampler does exactly that. There are no steps, scheduler, \
shift or CFG to set.

## Models

{models}

[turbo-distill](https://github.com/turbo-distill/turbo-distill)
""",
    "说明": """# {stem}

**运行:** 将 `{lora}` 复制到 `ComfyUI/models/loras`,按 `R` 刷新列表,点击“运行”。

Turbo LoRA Loader 从文件中读出该 LoRA 的训练方式(sigma 为 {sigmas};采样器 {sampler};CFG {cfg}),\
Turbo Sampler 按此采样。无需设置步数、调度器、shift 或 CFG。

## 模型

{models}

[turbo-distill](https://github.com/turbo-distill/turbo-distill)
""",
}
