"""The speed benchmark's ComfyUI half at toy size, in the process of its own that it asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(mode: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed.nodes", "--small", "--rounds", "1"]
    subprocess.run([*command, "--mode", mode, "--out", str(out)], cwd=ROOT, check=True, timeout=280)
    return json.loads((out / f"speed_{mode}.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("comfyui_path")
def test_cpu_mode(tmp_path: Path) -> None:
    found = run("cpu", tmp_path)
    assert found["Skipped"] == []
    counted = found["Counted"]
    assert counted["encoder forwards for X, Y, X"] == {
        "A diffusers": 3,
        "B core nodes": 3,
        "C turbo distill": 2,
        "C with Turbo Images": 2,
    }
    for forwards in counted["forwards"].values():
        assert forwards["transformer forwards"] == 2
        assert forwards["of them negative"] == 0
    assert counted["patches"]["C baked"] == [0, 0, 0]
    first, second, evicted = counted["patches"]["B LoRA on the MODEL"]
    assert first == evicted > 0 == second
    for name, section in found.items():
        if name.startswith("Node overhead"):
            assert section["relative difference of latents"] < 1e-5  # one and the same job
        if name.startswith("Loading"):
            assert 0.6 < section["C/B resident"] < 0.7
    assert (tmp_path / "speed_cpu.md").read_text().count("## ") == len(found) - 1


@pytest.mark.slow
@pytest.mark.usefixtures("comfyui_path")
def test_gpu_mode_on_toy_size(tmp_path: Path) -> None:
    """All of its code but the device."""
    found = run("gpu", tmp_path)
    assert found["Skipped"] == []
    (images,) = (section for name, section in found.items() if "prompt to files" in name)
    assert len(images) == 4
    assert all(arm["total"]["median"] > 0 for arm in images.values())
