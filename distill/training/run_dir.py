"""Where things lie in a run folder.

RUN/config.yaml  log.jsonl  tb/  previews/step-000100.png  checkpoints/step-000100/
identity.json  held_out.json  config.until-step-000100.yaml
best.json  lora/step-000100.safetensors  lora/NAME.safetensors  machine.json  report.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..contract.shown import first_line, shown


class RunDir:
    """The paths of one run folder; nothing is made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.identity = root / "identity.json"
        self.held_out = root / "held_out.json"  # prompts that are not trained on
        self.log = root / "log.jsonl"
        self.tensorboard = root / "tb"
        self.machine = root / "machine.json"
        self.report = root / "report.html"
        self.best = root / "best.json"  # the candidates of select: best
        self.previews = root / "previews"
        self.prompts = self.previews / "prompts.txt"  # one per line
        self.checkpoints = root / "checkpoints"
        self.loras = root / "lora"

    def lora(self, name: str) -> Path:
        """The finished LoRA; `name` is the configuration's."""
        return self.loras / f"{name}.safetensors"

    def candidate(self, step: int) -> Path:
        """The student of a step that may become the finished LoRA."""
        return self.lora(step_name(step))

    def preview(self, step: int) -> Path:
        return self.previews / f"{step_name(step)}.png"

    def config_until(self, step: int) -> Path:
        """The recipe that a run had before it went on from that step with another."""
        return self.root / f"config.until-{step_name(step)}.yaml"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """What a folder holds under the names of steps, oldest first. `step-000010.old` and the like
    are no such names.
    """
    found = {}
    for path in folder.glob(f"step-*{suffix}"):
        digits = path.name.removeprefix("step-").removesuffix(suffix)
        if digits.isascii() and digits.isdigit() and path.name == step_name(int(digits)) + suffix:
            found[int(digits)] = path
    return dict(sorted(found.items()))


def read_json(path: Path) -> dict[str, Any]:
    """A small file of a run; empty where there is none. Raises ConfigError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        found = first_line(error)
    else:
        if isinstance(value, dict):
            return value
        found = shown(value)
    raise ConfigError(
        f"{path}: expected a JSON object, found {found}. Delete the file; the run goes on without."
    )
