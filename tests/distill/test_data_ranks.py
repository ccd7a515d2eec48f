"""`prepare` under torchrun: ranks share the work, and what one of them leaves is done by the next
start.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from distill import cli
from distill.config import parse_config, save_config
from distill.contract.tiny import COLOURS, LETTERS, letter_prompt

PROMPTS = [letter_prompt(colour, letter) for letter, colour in product(LETTERS, COLOURS)]
MORTAL = """
import os, signal, sys
from distill import cli
from distill.data import builder

write, written = builder.write_shard, []

def write_and_die(path, *content):
    write(path, *content)
    written.append(path)
    if os.environ["RANK"] == "1" and len(written) == int(os.environ.get("DIES_AFTER", "0")):
        os.kill(os.getpid(), signal.SIGKILL)

builder.write_shard = write_and_die
code = cli.main(["prepare", *sys.argv[1:]])
sys.stdout.write(f"rank {os.environ['RANK']} wrote {len(written)}\\n")
sys.exit(code)
"""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "images").mkdir()
    for i, prompt in enumerate(PROMPTS[:10]):
        Image.new("RGB", (64, 64), (20 * i, 90, 200)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"{prompt}.")
    (tmp_path / "mortal.py").write_text(MORTAL)
    return tmp_path


def recipe(inputs: Path, cache: str) -> Path:
    """Five chunks of images and thirteen of prompts, on the tiny model."""
    data = {"cache": inputs / cache, "prompts": inputs / "prompts.txt", "dtype": "float32",
            "images": inputs / "images", "resolution": 64, "buckets": [[64, 64]], "negative": "",
            "shard": 4, "teacher_images": 20, "teacher_steps": 2}  # fmt: skip
    model = {"path": "tiny", "dtype": "float32", "gradient_checkpointing": False}
    values = {"model": model, "data": data, "stages": [{"method": "dmd2", "steps": 1}]}
    path = inputs / f"{cache}.yaml"
    save_config(parse_config(values, "recipe"), path)
    return path


def torchrun(inputs: Path, config: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launcher, str(inputs / "mortal.py"), str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=580,
    )


def files(cache: Path) -> dict[str, bytes]:
    kept = {".json", ".jsonl", ".safetensors"}
    found = (path for path in cache.rglob("*") if path.suffix in kept and path.is_file())
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in found}


@pytest.mark.slow
def test_two_ranks_one_of_which_is_killed(inputs: Path) -> None:
    """What it had written is not written again, and the cache has the bytes of one process's."""
    assert cli.main(["prepare", str(recipe(inputs, "alone"))]) == 0
    alone = files(inputs / "alone")
    config, cache = recipe(inputs, "two"), inputs / "two"
    cut = torchrun(inputs, config, DIES_AFTER="3")
    assert cut.returncode != 0
    assert not (cache / "index.json").exists()
    shards = {path: path.stat() for path in cache.rglob("*.safetensors")}
    assert len(shards) >= 3
    again = torchrun(inputs, config)
    assert again.returncode == 0, again.stderr
    for path, before in shards.items():
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert path.stat().st_ino == before.st_ino
    assert files(cache) == alone
    wrote = dict(re.findall(r"rank (\d) wrote (\d+)", again.stdout))
    assert len(wrote) == 2
    assert all(0 < int(count) < len(alone) / 2 for count in wrote.values())
