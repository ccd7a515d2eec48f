"""The two central effects of the recipe, on the exact teacher of T0.

Over seeds 0 to 4 (docs/evidence/t0.json): nll 1.48 to 1.61 without the warm start, .86 to .98 with
it; spread behind a blurred teacher 1.54 to 1.65 without GAN, 1.53 to 1.62 with the teacher's images
as real ones, .95 to 1.06 with real ones. The margins are about half of the smallest difference.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow

COLD, WARM = "main/dmd2", "main/pcm -> dmd2"
PLAIN = "blurred/pcm -> dmd2"
TEACHERS, REAL = "blurred/gan, real 0, ratio .3", "blurred/gan, real 1, ratio 3"


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures of the arms at seed 0 and the full budget."""
    out = tmp_path_factory.mktemp("t0")
    command = [sys.executable, "-m", "benchmarks.recipe.t0", "--seeds", "1", "--jobs", "1"]
    chosen = ["--only", COLD, WARM, PLAIN, TEACHERS, REAL, "--out", str(out)]
    subprocess.run([*command, *chosen], cwd=ROOT, check=True)
    (run,) = json.loads((out / "t0.json").read_text(encoding="utf-8"))["runs"]
    return run["arms"]


def test_the_warm_start_helps_at_equal_compute(arms: dict[str, Any]) -> None:
    assert arms[WARM]["nll"] < arms[COLD]["nll"] - 0.25
    assert arms[WARM]["high_quality"] > arms[COLD]["high_quality"] + 0.025
    passes = {name: sum(arms[name]["passes"].values()) for name in (COLD, WARM)}
    assert passes[WARM] == pytest.approx(passes[COLD], rel=0.01)


def test_real_data_lifts_the_ceiling_of_a_blurred_teacher(arms: dict[str, Any]) -> None:
    assert arms[PLAIN]["spread"] > 1.4  # the teacher's blur is there
    assert arms[REAL]["spread"] < arms[PLAIN]["spread"] - 0.25
    assert arms[REAL]["nll"] < arms[PLAIN]["nll"] - 0.7


def test_without_real_data_the_gain_vanishes(arms: dict[str, Any]) -> None:
    assert abs(arms[TEACHERS]["spread"] - arms[PLAIN]["spread"]) < 0.15
