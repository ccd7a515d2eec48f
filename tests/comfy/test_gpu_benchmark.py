"""The GPU benchmark as it is run, at toy size, in the process of its own that it asks for."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 180  # of processor time, whatever else the machine is doing


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# With kernels that run on the CPU, so that using one and refusing one is the real code.
COMMAND = """
import sys, torch
from pathlib import Path
from benchmarks.gpu import __main__ as command
from benchmarks.speed.core import start
folder, out = map(Path, sys.argv[1:])
attention = start(folder, cpu=True).pack("nodes.attention")
def exact(q, k, v, mask, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
def black(q, k, v, mask, scale):
    return torch.zeros_like(q)
for name, run in (("exact", exact), ("black", black)):
    attention.register(attention.Kernel(name, run, devices=("cpu",), dtypes=(torch.float32,)))
command.main(["--small", "--rounds", "1", "--out", str(out)])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("comfyui_path")
def test_every_section_at_toy_size(tmp_path: Path) -> None:
    before = processor_s()
    folders = [str(tmp_path / name) for name in ("models", "out")]
    command = [sys.executable, "-c", COMMAND, *folders]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3 * LIMIT_S)
    assert processor_s() - before < LIMIT_S
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["sections"]
    skipped = {"compiled", "t2"}
    assert {key for key, section in found.items() if section["status"] == "skipped"} == skipped
    for key in found.keys() - skipped:
        assert found[key]["status"] == "measured", key
        assert found[key]["notes"] == [], key

    (kernels,) = found["attention"]["values"].values()
    assert {name: row["passes"] for name, row in kernels.items()} == {
        "core": True,
        "exact": True,
        "black": False,
    }
    assert "- black: differs from exact attention" in found["attention"]["text"]

    bf16, eight, beside = (found[f"{name} 2048"]["values"] for name in ("bf16", "8 bits", "beside"))
    assert [name[0] for name in bf16["table"]] == ["A", "B", "C", "C"]
    assert len(eight["table"]) == 4
    for stages in (bf16["table"] | eight["table"] | beside["table"]).values():
        assert 0 < stages["first image"]["median"] < 1.05 * stages["total"]["median"] + 0.05
    weights = bf16["bytes"]["weights"] | eight["bytes"]["weights"]
    assert weights["B core nodes"] > weights["C baked int8"]  # most is the text encoder's
    for row in bf16["latents"].values():
        assert row["latents"] < 1e-4
    for name, row in eight["latents"].items():
        assert 1e-4 < row["latents"] < 0.1, name  # rounded weights, not the shared ones
    products = found["machine"]["values"]["products"]
    for rows in products.values():
        assert rows["bf16"]["error"] < 3e-3
        for name in ("fp8, one scale", "fp8, scale per row", "fp8 by core"):
            assert 3e-3 < rows[name]["error"] < 0.05
    verdicts = found["targets"]["values"]["targets"]
    assert {target["verdict"] for target in verdicts} == {"not measured"}
