"""The page on more GPUs and machines: its scripts are shell, and start what there is."""

from __future__ import annotations

import re
import subprocess
from argparse import ArgumentParser
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from distill.config import load_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "scale_out.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_shell_reads_it(block: str) -> None:
    ended = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr


def launches() -> list[str]:
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [line for line in lines if "torchrun" in line and not line.startswith("#")]


def test_torchrun_knows_its_options() -> None:
    parser: ArgumentParser = get_args_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    found = launches()
    assert len(found) > 4
    for line in found:
        words = line.partition("torchrun")[2].partition("-m distill")[0].split()
        named = {word for word in words if word.startswith("-")}
        assert "--nproc-per-node" in named
        assert named <= known, named - known


def test_recipes_take_its_overrides() -> None:
    """Options of `train` itself are those of tests/test_docs.py."""
    for line in launches():
        words = line.partition("-m distill")[2].replace("||", "").split()
        overrides = [word for word in words[2:] if re.match(r"[a-z.]+=", word)]
        config = load_config(ROOT / words[1], overrides)
        assert config.engine.world in (8, 16)


def test_the_job_asks_for_what_it_starts() -> None:
    (job,) = (block for block in BLOCKS if "#SBATCH" in block)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", job, re.MULTILINE))
    processes = int(re.search(r"--nproc-per-node (\d+)", job)[1])
    world = int(re.search(r"engine\.world=(\d+)", job)[1])
    assert asked["gpus-per-node"] == str(processes)
    assert int(asked["nodes"]) * processes == world
    assert asked["ntasks-per-node"] == "1"
