"""On what a run was made: hardware and versions, in RUN/machine.json.

Written when training starts, for a report that is made later may be made elsewhere.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..utils.files import replace_text
from .run_dir import RunDir

PACKAGES = ("turbo-distill", "torch", "diffusers", "peft", "transformers", "torchao")


def describe_machine(ranks: int, device: torch.device) -> dict[str, str]:
    """Name and value of what speed and results may depend on; no name of a person or a host."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        hardware = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"
    else:
        hardware = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    facts = {
        "device": f"{ranks} x {hardware}" if ranks > 1 else hardware,
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts["CUDA"] = str(torch.version.cuda)
    return facts | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_machine(run_dir: Path, ranks: int, device: torch.device) -> None:
    text = json.dumps(describe_machine(ranks, device), indent=2) + "\n"
    replace_text(RunDir(run_dir).machine, text)
