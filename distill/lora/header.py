"""What a LoRA's header says about its training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..config import BaseLora, Config, ConfigError
from ..contract.shown import shown
from ..models.family import spec_of
from ..utils.hub_names import public_name

BASE_LORAS = "turbo.base_loras"  # of the base that was distilled: name, strength, content
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "adamw8bit": "torchao.optim.AdamW8bit"}
INIT_FROM = "turbo.init_from"  # the LoRA that the student began as: name, content


def header_fields(
    config: Config,
    chosen: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What the LoRA's header says about its training.

    chosen: the record of the preview that it was chosen by, which names its step; inputs: what the
    run began with (inputs.py).
    """
    spec, last = spec_of(config), config.stages[-1]
    fields = {
        "turbo.config": json.dumps(public_config(config)),
        "modelspec.description": f"Makes {spec.base} draw in {spec.steps} steps without guidance. "
        f"Distilled with Turbo Distill: {spec.method}.",
        "ss_steps": str(chosen["step"] if chosen else config.total_steps),
        "ss_max_train_steps": str(config.total_steps),
        "ss_seed": str(config.seed),
        "ss_learning_rate": str(last.lr),
        "ss_optimizer": OPTIMIZERS[last.optimizer],
        "ss_total_batch_size": str(last.samples * (config.engine.world or 1)),
        "ss_mixed_precision": {"bfloat16": "bf16", "float32": "no"}[config.model.dtype],
    }
    if chosen:
        fields["turbo.selection"] = json.dumps(chosen)
    for key, name in (("model.loras", BASE_LORAS), ("init_from", INIT_FROM)):
        if inputs and inputs.get(key):
            fields[name] = json.dumps(inputs[key])
    return fields


def public_config(config: Config) -> dict[str, Any]:
    """A recipe as others may see it: without this user's folders, and models by name."""
    folders = {"run_dir": True, "data": True, "gates": {"clip"}}
    values = config.model_dump(mode="json", exclude=folders)
    values["model"]["path"] = public_name(config.model.path)
    for lora, section in zip(values["model"]["loras"], config.model.loras, strict=True):
        lora["path"] = section.path.name
    values["init_from"] = config.init_from and config.init_from.name
    for stage in values["stages"]:
        gan = stage.get("gan") or {}
        if "features" in gan:  # PCM's discriminator is always on the teacher's
            gan["features"] = public_name(gan["features"])
    return values


def base_records(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a header says of LoRAs in its base: name, strength, content. Raises ConfigError."""
    try:
        found = json.loads(metadata.get(BASE_LORAS, "[]"))
        return [
            {
                "name": _name(record["name"]),
                "strength": BaseLora(path=record["name"], strength=record["strength"]).strength,
                "content": str(record["content"]),
            }
            for record in found
        ]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"header {BASE_LORAS!r}: expected a list of LoRAs with name, strength and content "
            f"({shown(str(error))}); export the LoRA again from its run folder."
        ) from error


def _name(text: str) -> str:
    """Of a file or folder in some folder. Raises ValueError."""
    if not text or text in (".", "..") or re.search(r"[/\\\0]", text):
        raise ValueError(f"expected the name of a file, found {shown(text)}")
    return text
