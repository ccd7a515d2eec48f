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
    (drawn,) = (section for name, section in found.items() if "Prompt to files" in name)
    for stages in drawn["table"].values():  # of four, one after another
        assert 0 < stages["first image"]["median"] < stages["total"]["median"]
    assert {target["verdict"] for target in found["Targets"]["targets"]} == {"not measured"}
    assert (tmp_path / "speed_cpu.md").read_text().count("## ") == len(found) - 1


# Kernels that run on the CPU, so that choosing one, using one and refusing one is the real code.
KERNELS = """
import sys, torch
from pathlib import Path
from benchmarks.speed import nodes
from benchmarks.speed.core import start
from benchmarks.speed.measure import Budget
folder, out = map(Path, sys.argv[1:])
attention = start(folder, cpu=True).pack("nodes.attention")
def exact(q, k, v, mask, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
def black(q, k, v, mask, scale):
    return torch.zeros_like(q)
for name, run, low in (("exact", exact, False), ("black", black, False), ("eight", exact, True)):
    attention.register(attention.Kernel(name, run, devices=("cpu",), dtypes=(torch.float32,),
                                        masks=True, low_precision=low))
nodes.run("gpu", True, 1, Budget(270), out)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("comfyui_path")
def test_gpu_mode_on_toy_size(tmp_path: Path) -> None:
    """All of its code but the device, with kernels of this test beside the real ones."""
    folders = [str(tmp_path / name) for name in ("models", "out")]
    command = [sys.executable, "-c", KERNELS, *folders]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280)
    found = json.loads((tmp_path / "out" / "speed_gpu.json").read_text())
    skipped = [what for what in found["Skipped"] if not what.startswith("8-bit attention, sage")]
    assert skipped == ["compiled blocks: on a GPU, after 4 x 2048 x 2048"]

    (kernels,) = (section for name, section in found.items() if name.startswith("Attention"))
    assert {"core", "exact", "black", "eight"} == set(kernels)
    report = (tmp_path / "out" / "speed_gpu.md").read_text()
    assert "- black: differs from exact attention" in report
    assert "guard passes: black" not in report

    (section,) = (section for name, section in found.items() if "Prompt to files" in name)
    shipped = {"A diffusers", "B core nodes", "C turbo distill", "C with Turbo Images"}
    ours = {"C eight attention", "C baked fp8", "C baked int8"}
    assert shipped | ours <= set(section["table"]) <= shipped | ours | {"C exact attention"}
    for stages in section["table"].values():
        assert 0 < stages["first image"]["median"] < 1.05 * stages["total"]["median"] + 0.05
    weights = section["bytes"]["weights"]
    transformer = weights["B core nodes"] - weights["C baked int8"]
    assert transformer > 0  # a third is folded, the rest in 8 bits
    assert section["bytes"]["beyond"] == {}  # no GPU to ask
    assert "| C baked fp8         |     - |" in report

    (ran,) = (section for name, section in found.items() if name.startswith("What ran"))
    assert ran["C eight attention"][1] == "eight"
    assert ran["C baked fp8"][0] == "fp8, folded"
    for name, (_, kernel, difference) in ran.items():
        assert kernel != "black"
        limit = 0.1 if "baked" in name else 1e-4
        assert name.startswith("A") or float(difference) < limit
    for dtype in ("fp8", "int8"):
        assert float(ran[f"C baked {dtype}"][2]) > 1e-4  # rounded weights, not the shared ones

    verdicts = [target["verdict"] for target in found["Targets"]["targets"]]
    assert verdicts == ["not measured"] * 4


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
