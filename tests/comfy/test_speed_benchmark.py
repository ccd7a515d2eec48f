"""The speed benchmark's ComfyUI half at toy size, in the process of its own that it asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.usefixtures("comfyui_path")
def test_nodes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed.nodes", "--small", "--rounds", "1"]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, timeout=280)
    found = json.loads((tmp_path / "speed_cpu.json").read_text())
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
    (drawn,) = (section for name, section in found.items() if "Prompt to files" in name)
    for stages in drawn["table"].values():  # of four, one after another
        assert 0 < stages["first image"]["median"] < stages["total"]["median"]
    assert (tmp_path / "speed_cpu.md").read_text().count("## ") == len(found) - 1


@pytest.mark.slow
@pytest.mark.usefixtures("comfyui_path")
def test_memory_of_decoding(tmp_path: Path) -> None:
    """At toy size; nothing is computed, so ours has to be smaller for its order of work alone."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", "--small", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    found = json.loads((tmp_path / "speed_memory.json").read_text())["Decoding one image"]
    row = found["64 x 64"]
    assert 8 * 64 * 64 * 2 < row["ours: live"] < row["core: live"]  # at least one full-size tensor
    assert row["core: reserved"] == 2200 * 8 * 8 * 64 * 2  # core's own formula
    assert row["ours: live"] < row["ours: reserved"] < row["core: reserved"]
