"""What goes with a finished LoRA: NAME.md, a model card in Hugging Face's form; NAME.workflow.json
for ComfyUI; NAME.preview.png where there is a picture.

All is taken from the LoRA's own header, so it says what the file says.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from ..contract.base_loras import base_records
from ..contract.checks import SpecError
from ..contract.latent_grid import GRIDS, sigmas_at, sigmas_text
from ..contract.metadata import read_header
from ..contract.resolve import resolve_spec
from ..contract.shift import LinearShift
from ..contract.shown import shown
from ..contract.spec import TurboSpec
from ..models.family import family_of_spec
from ..models.sizes import Size
from ..training.run_dir import RunDir, by_step
from ..utils.files import replace_file, replace_text
from ..utils.terminal import table
from .workflow import workflow_for

log = logging.getLogger(__name__)

CONFIG_KEY = "turbo.config"
# what a recipe of another program or release makes of those who read it
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
REPOSITORY = "https://github.com/turbo-distill/turbo-distill"


def companions(lora: Path) -> tuple[Path, Path, Path]:
    """Card, workflow and picture of a LoRA file."""
    return (
        lora.with_suffix(".md"),
        lora.with_suffix(".workflow.json"),
        lora.with_suffix(".preview.png"),
    )


def write_release(lora: Path, run_dir: Path | None = None) -> None:
    """Writes the companions of a LoRA file that carries its spec; the picture is a preview of the
    run that it is from.
    """
    card, workflow, preview = companions(lora)
    metadata = read_header(lora)
    spec, _ = resolve_spec(lora.name, metadata)
    picture = preview_of(run_dir, metadata.get("ss_steps", "")) if run_dir else None
    if picture is not None:
        replace_file(preview, lambda p: shutil.copyfile(picture, p))
    merged = _merged(lora.name, metadata)
    graph = None if merged else workflow_for(spec, lora.name)
    if merged:
        log.info("no workflow for %s: those in workflows/ know no LoRAs in the base", lora)
    elif graph is None:
        log.info("no workflow for %s: none of those in workflows/ is for %s", lora, spec.base)
    else:
        text = json.dumps(graph, indent=2, ensure_ascii=False)
        replace_text(workflow, text)
    names = [path.name if path.is_file() else None for path in (workflow, preview)]
    text = model_card(lora.name, spec, metadata, workflow=names[0], preview=names[1])
    replace_text(card, text)


def preview_of(run_dir: Path, step: str) -> Path | None:
    """A run's picture of a step, else its newest one."""
    pictures = by_step(RunDir(run_dir).previews, ".png")
    newest = next(reversed(pictures.values()), None)
    return pictures.get(int(step), newest) if step.isdecimal() else newest


def model_card(
    lora_name: str,
    spec: TurboSpec,
    metadata: Mapping[str, str],
    *,
    workflow: str | None = None,
    preview: str | None = None,
) -> str:
    """Markdown with a YAML head; `workflow` and `preview` are files beside the LoRA."""
    stem = PurePath(lora_name).stem
    base = base_name(spec)
    lead = (
        f"A LoRA that makes {base} draw in {spec.steps} step{'s' * (spec.steps > 1)}, distilled "
        f"with [Turbo Distill]({REPOSITORY})."
    )
    parts = [_head(spec), f"# {metadata.get('modelspec.title') or stem}", lead]
    if preview:
        parts.append(f"![Student and teacher on the same noise]({preview})")
    merged = _merged(lora_name, metadata)
    parts += [
        "## How to sample it",
        "A few-step LoRA is right only at the schedule it was trained for. The file carries it "
        "(header `turbo.spec`).",
        _sampling(spec, merged),
        _comfyui(lora_name, spec, workflow, merged),
        _diffusers(lora_name, spec, merged),
        *_licence(spec),
    ]
    if CONFIG_KEY in metadata:
        try:
            parts.append(_recipe(json.loads(metadata[CONFIG_KEY]), metadata))
        except UNREADABLE as error:
            log.warning(
                "%s: header %r is no recipe (%s); the model card goes without it",
                lora_name,
                CONFIG_KEY,
                shown(str(error)),
            )
    return "\n\n".join(parts) + "\n"


def _merged(lora_name: str, metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The LoRAs in the base that it was distilled from."""
    try:
        return base_records(metadata)
    except SpecError as error:
        log.warning("%s: %s The model card goes without.", lora_name, error)
        return []


def is_embedded(spec: TurboSpec) -> bool:
    return family_of_spec(spec).embedded is not None


def hub_id(spec: TurboSpec) -> str | None:
    """The base's name on the Hugging Face hub, None for an embedded model and for a folder."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", spec.base) and not Path(spec.base).is_dir()
    return spec.base if named and not is_embedded(spec) else None


def base_name(spec: TurboSpec) -> str:
    """For people; of a local folder only its own name."""
    return hub_id(spec) or family_of_spec(spec).title(spec.base)


def _head(spec: TurboSpec) -> str:
    base = hub_id(spec)
    values: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    values |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", spec.family, "few-step", f"{spec.steps}-step", "comfyui", "turbo-distill"],
    }
    if licence := family_of_spec(spec).licence:
        values |= {
            "license": "other",
            "license_name": licence.hub_name,
            "license_link": licence.link,
        }
    head = yaml.safe_dump(values, sort_keys=False)
    if not licence:
        head += "# license: choose one that the licences of base model and data allow\n"
    return f"---\n{head}---"


def _licence(spec: TurboSpec) -> list[str]:
    """That of the base, where it binds this LoRA."""
    licence = family_of_spec(spec).licence
    if licence is None:
        return []
    return [
        "## Licence",
        f"This LoRA was made from {base_name(spec)} and inherits its licence, the [{licence.name}]"
        f"({licence.link}): {licence.terms}.",
    ]


def _sampling(spec: TurboSpec, merged: Sequence[Mapping[str, Any]]) -> str:
    sizes = ", ".join(f"{width}x{height}" for width, height in spec.resolutions)
    how = {
        "euler": "euler (deterministic)",
        "renoise": "renoise (fresh noise at every step; core ComfyUI calls it lcm)",
    }
    rows = [
        ["sigmas", sigmas_text(spec)],
        ["sampler", how[spec.sampler]],
        ["CFG", "1 (no guidance, no negative prompt)" if spec.cfg == 1 else f"{spec.cfg:g}"],
        ["LoRA strength", spec.strength_text],
        ["base", base_name(spec)],
        *(["in the base", f"`{one['name']}` at strength {one['strength']:g}"] for one in merged),
        ["trained sizes", sizes or "not recorded"],
        ["method", spec.method or "not recorded"],
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"| {label:<{width}} | {value} |" for label, value in rows]
    return "\n".join([f"| {'':<{width}} | |", f"|{'-' * (width + 2)}|---|", *lines])


def _comfyui(
    lora_name: str, spec: TurboSpec, workflow: str | None, merged: Sequence[Mapping[str, Any]]
) -> str:
    steps = [f"Install [Turbo Distill]({REPOSITORY}) from ComfyUI-Manager."]
    steps.append(f"Copy `{lora_name}` to `ComfyUI/models/loras`.")
    for one in merged:
        steps.append(
            f"It was distilled with `{one['name']}` in the base: put that on the model first, with "
            f"*Load LoRA (Model)* at strength {one['strength']:g}."
        )
    if workflow:
        steps.append(f"Drag [`{workflow}`]({workflow}) into ComfyUI and press Run.")
    else:
        steps.append("Wire your model through **Turbo LoRA Loader** into **Turbo Sampler**.")
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    if spec.sampler != "euler" or is_embedded(spec) or spec.by_size:
        return f"### ComfyUI\n\n{numbered}"
    return (
        f"### ComfyUI\n\n{numbered}\n\nWithout those nodes: core's *Load LoRA (Model)*, then "
        f"*SamplerCustomAdvanced* with *BasicGuider*, *KSamplerSelect* (euler) and *ManualSigmas* "
        f"set to `{sigmas_text(spec)}`."
    )


def _diffusers(lora_name: str, spec: TurboSpec, merged: Sequence[Mapping[str, Any]]) -> str:
    if is_embedded(spec):
        return (
            "### Command line\n\n```bash\n"
            f'turbo-distill sample {lora_name} --prompt "a red letter K" --out pictures\n```'
        )
    if isinstance(spec.strength, tuple):
        return "### diffusers\n\nNot with the stock pipeline: this LoRA has a strength per step."
    if spec.by_size and spec.family not in GRIDS:
        return "### diffusers\n\nNot with the stock pipeline: its schedule depends on the size."
    base = family_of_spec(spec)
    width, height = next(iter(spec.resolutions), base.size)
    scheduler, sigmas = _scheduler(spec, (width, height))
    if sigmas[0] != 1:
        return (
            "### diffusers\n\nNot with the stock pipeline: it always starts at sigma 1, this LoRA "
            f"at {sigmas[0]:g}."
        )
    names = [*(f"base{i}" for i in range(len(merged))), "turbo"]
    strengths = [*(one["strength"] for one in merged), spec.strength]
    load = f'{base.pipeline}.from_pretrained("{base_name(spec)}", torch_dtype=torch.bfloat16)'
    lines = [
        "import torch",
        f"from diffusers import FlowMatchEulerDiscreteScheduler, {base.pipeline}",
        "",
        f"pipe = {load}",
        *(
            f'pipe.load_lora_weights(".", weight_name="{file}", adapter_name="{name}")'
            for file, name in zip([*(one["name"] for one in merged), lora_name], names, strict=True)
        ),
        *([_set_adapters(names, strengths)] if strengths != [1] else []),
        *scheduler,
        'image = pipe.to("cuda")(',
        '    "a cat in the rain",',
        *(['    negative_prompt=" ",'] if spec.cfg > 1 else []),
        f"    sigmas={list(sigmas[:-1])},",
        f"    true_cfg_scale={spec.cfg:g},",
        f"    width={width},",
        f"    height={height},",
        ").images[0]",
    ]
    return "### diffusers\n\n```python\n" + "\n".join(lines) + "\n```"


def _scheduler(spec: TurboSpec, size: Size) -> tuple[list[str], tuple[float, ...]]:
    """Lines that make the pipeline sample as the spec says, and what it is given for sigmas: raw
    nodes where diffusers' scheduler has the same shift by size, else what they become at `size`.
    """
    settings: dict[str, Any] = {}
    if spec.sampler == "renoise":
        settings["stochastic_sampling"] = True
    comment, sigmas = "would shift the sigmas; this one takes them as they are", ()
    if isinstance(spec.shift, LinearShift):
        (low, high), (at_low, at_high) = spec.shift.tokens, spec.shift.mu
        settings |= {
            "use_dynamic_shifting": True,
            "base_image_seq_len": low,
            "max_image_seq_len": high,
            "base_shift": at_low,
            "max_shift": at_high,
            **({} if spec.terminal is None else {"shift_terminal": spec.terminal}),
        }
        comment = "may shift otherwise; this one does as in training, at every size"
        sigmas = spec.nodes
    arguments = [f"{key}={value}" for key, value in settings.items()]
    made = "pipe.scheduler = FlowMatchEulerDiscreteScheduler("
    many = ["", *(f"    {argument}," for argument in arguments), ""]
    line = made + ("\n".join(many) if len(arguments) > 1 else "".join(arguments))
    return [f"# The model's own scheduler {comment}.", f"{line})"], sigmas or sigmas_at(spec, size)


def _set_adapters(names: Sequence[str], strengths: Sequence[float]) -> str:
    listed = [f'"{name}"' for name in names], [f"{strength:g}" for strength in strengths]
    words, numbers = (", ".join(one) for one in listed)
    if len(names) > 1:
        words, numbers = f"[{words}]", f"[{numbers}]"
    return f"pipe.set_adapters({words}, {numbers})"


def _recipe(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """The stages as a table; the header has every key."""
    world = int((config.get("engine") or {}).get("world") or 1)
    rows = [
        [
            str(number),
            f"{stage['method']}{' + GAN' if stage.get('gan') else ''}",
            str(stage["steps"]),
            str(int(stage["batch"]) * int(stage.get("accumulate", 1)) * world),
            f"{stage['lr']:g}",
            f"{stage['ema']:g}",
        ]
        for number, stage in enumerate(config["stages"], 1)
    ]
    stages = table(["stage", "method", "steps", "samples per step", "learning rate", "EMA"], rows)
    adapter, guidance = config["adapter"], config["guidance"]
    facts = [
        f"Teacher: the base model with guidance {guidance['scale']:g}"
        + (", rescaled." if guidance["rescale"] else "."),
        f"LoRA: rank {adapter['rank']}, alpha {adapter['alpha'] or adapter['rank']:g} while "
        f"training; {metadata.get('ss_network_dim', 'unknown')} in this file.",
        f"Weights of step {metadata.get('ss_steps', 'unknown')}; seed {config['seed']}.",
    ]
    listed = "\n".join(f"- {fact}" for fact in facts)
    return (
        f"## Recipe\n\n{stages}\n\n{listed}\n\nThe whole configuration is in the header: "
        "`turbo-distill inspect FILE --json`."
    )
