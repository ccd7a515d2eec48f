"""A ready ComfyUI workflow for a LoRA: one of the shipped graphs with that LoRA in it."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path, PurePath
from typing import Any

from ..contract.latent_grid import sigmas_text
from ..contract.spec import TurboSpec
from ..models.family import family_of_spec

WORKFLOWS = Path(__file__).parents[2] / "workflows"  # beside the package in the repository

LOADER, INSPECT = "TurboDistillLoraLoader", "TurboDistillInspect"  # take the name of a LoRA first

Workflow = dict[str, Any]
Node = dict[str, Any]


NOTES = {  # title of the shipped note -> its text here
    "Read me": """# {stem}

**Run it:** copy `{lora}` to `ComfyUI/models/loras`, press `R` to refresh the lists, press Run.

The Turbo LoRA Loader reads from the file how the LoRA was trained (sigmas {sigmas}; sampler \
{sampler}; CFG {cfg}), and the Turbo Sampler does exactly that. There are no steps, scheduler, \
shift or CFG to set.

## Models

{models}
{licence}
[turbo-distill](https://github.com/turbo-distill/turbo-distill)
""",
    "说明": """# {stem}

**运行:** 将 `{lora}` 复制到 `ComfyUI/models/loras`,按 `R` 刷新列表,点击“运行”。

Turbo LoRA Loader 从文件中读出该 LoRA 的训练方式(sigma 为 {sigmas};采样器 {sampler};CFG {cfg}),\
Turbo Sampler 按此采样。无需设置步数、调度器、shift 或 CFG。

## 模型

{models}
{licence_zh}
[turbo-distill](https://github.com/turbo-distill/turbo-distill)
""",
}


def workflow_for(spec: TurboSpec, lora_name: str) -> Workflow | None:
    """The graph that samples `lora_name`, a file in models/loras, in the format that ComfyUI saves.

    None where no shipped graph fits the base, or where the package was installed without them.
    """
    name = family_of_spec(spec).workflows.get(PurePath(spec.base).name)
    if name is None or not (WORKFLOWS / name).is_file():
        return None
    graph = dict(json.loads((WORKFLOWS / name).read_text(encoding="utf-8")))
    _fill(graph, spec, lora_name)
    return graph


def _nodes(graph: Workflow, *kinds: str) -> list[Node]:
    return [node for node in graph["nodes"] if node["type"] in kinds]


def _fill(graph: Workflow, spec: TurboSpec, lora_name: str) -> None:
    """Sets LoRA, size and file prefix, and writes titles and notes anew."""
    stem = PurePath(lora_name).stem
    graph["id"] = str(uuid.uuid5(uuid.UUID(graph["id"]), lora_name))
    for node in _nodes(graph, LOADER, INSPECT):
        node["widgets_values"][0] = lora_name
        node["properties"].pop("models", None)  # no address to download it from
    for node in _nodes(graph, "SaveImage"):
        node["widgets_values"] = [f"turbo-distill/{stem}"]
    if spec.resolutions:
        for node in _nodes(graph, "EmptySD3LatentImage", "EmptyLatentImage"):
            node["widgets_values"][:2] = spec.resolutions[0]
    steps = f"{spec.steps} step{'s' * (spec.steps > 1)} / {spec.steps} 步采样"
    for group in graph["groups"]:
        group["title"] = re.sub(r"\w+ steps / .*", steps, group["title"])
    facts = _facts(graph, spec, lora_name)
    for node in _nodes(graph, "MarkdownNote"):
        if node.get("title") in NOTES:
            node["widgets_values"] = [NOTES[node["title"]].format(**facts)]


def _facts(graph: Workflow, spec: TurboSpec, lora_name: str) -> dict[str, str]:
    models = [m for node in graph["nodes"] for m in node["properties"].get("models", ())]
    lines = [f"- models/{m['directory']}: [{m['name']}]({m['url']})" for m in models]
    licence, said = family_of_spec(spec).licence, {"licence": "", "licence_zh": ""}
    if licence:
        line = f"[{licence.name}]({licence.link})"
        said["licence"] = f"\n## Licence\n\nThat of the base: {line}, {licence.terms}.\n"
        said["licence_zh"] = f"\n## 许可\n\n与基础模型相同:{line}。\n"
    return {
        **said,
        "lora": lora_name,
        "stem": PurePath(lora_name).stem,
        "sigmas": sigmas_text(spec),
        "sampler": spec.sampler,
        "cfg": f"{spec.cfg:g}",
        "models": "\n".join([f"- models/loras: `{lora_name}`", *lines]),
    }
