"""The shipped workflows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
Workflow = dict[str, Any]


def read(file: Path) -> Workflow:
    return json.loads(file.read_text(encoding="utf-8"))


def shipped(name: str) -> Workflow:
    return read(FOLDER / f"{name}.json")


def models_of(files: list[Path]) -> list[dict[str, str]]:
    """name, url and directory of every model that the workflows link to."""
    nodes = [node for file in files for node in read(file)["nodes"]]
    return [model for node in nodes for model in node["properties"].get("models", ())]
