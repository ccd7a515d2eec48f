"""Where things lie in a run folder.

RUN/config.yaml  log.jsonl  tb/  previews/step-000100.png  checkpoints/step-000100/
best.json  lora/step-000100.safetensors  lora/NAME.safetensors  machine.json  report.html
"""

from __future__ import annotations

from pathlib import Path


class RunDir:
    """The paths of one run folder; nothing is made."""

    def __init__(self, root: Path) -> None:
        self.config = root / "config.yaml"
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

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)


def step_name(step: int) -> str:
    return f"step-{step:06d}"
