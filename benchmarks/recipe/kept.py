"""Results that outlive an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.utils.files import replace_file


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, or what it returned before: JSON or tensors, by the file's suffix."""
    as_json = path.suffix == ".json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        value = make()
        if as_json:
            text = json.dumps(value)
            replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))
        else:
            replace_file(path, lambda p: torch.save(value, p))
    if as_json:
        return json.loads(path.read_text(encoding="utf-8"))
    return torch.load(path, map_location="cpu", weights_only=True)
