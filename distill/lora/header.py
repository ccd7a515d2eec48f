"""What a LoRA's header says about its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..config import Config
from ..contract import base_loras
from ..models.family import spec_of
from ..utils.hub_names import public_name

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
    for key, name in (("model.loras", base_loras.HEADER_KEY), ("init_from", INIT_FROM)):
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
