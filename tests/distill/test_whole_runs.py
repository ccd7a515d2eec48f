"""A person's way through the commands, on a random model of a family's published classes:
`prepare`, `train`, one more stage, a run that begins with the result, `sample`, `export`, `eval`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_pipelines import write_pipeline
from whole_runs import PROMPTS, run_json, stages, write_photos, write_recipe

from distill.cli import main
from distill.contract.metadata import read_header, read_lora
from distill.contract.spec import TurboSpec


def losses(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if any(key.startswith("loss/") for key in x)]


FAMILIES = ("qwen-image", "qwen-image-2.1")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pictures, prompts and the cache that `prepare` made of them."""
    folder = tmp_path_factory.mktemp(request.param)
    write_pipeline(folder / "model", request.param)
    write_photos(folder / "photos")
    assert main(["prepare", str(write_recipe(folder))]) == 0
    return folder


def torchrun(*words: object, ranks: int = 2) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", "-m", "distill", *map(str, words)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_from_pictures_to_a_judged_lora(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, family = place / "model", place.name[:-1]  # pytest numbers it
    recipe = write_recipe(place, run_dir=str(tmp_path / "run"))

    # Three stages
    run_json(capsys, "train", recipe)
    run = tmp_path / "run"
    lora = run / "lora" / "turbo.safetensors"
    three, header = read_lora(lora)[0], read_header(lora)
    spec = TurboSpec.from_json(header["turbo.spec"])
    assert (spec.family, spec.method) == (family, "pcm -> dmd2 -> dmd2+gan")
    assert set(spec.resolutions) == {(64, 64), (128, 64)}
    assert header["ss_total_batch_size"] == "2"
    seen = losses(run)
    assert {x["stage"] for x in seen} == {"pcm", "dmd2"}
    assert {"loss/pcm", "loss/dmd", "loss/fake", "loss/discriminator"} <= set().union(*seen)
    numbers = [v for x in seen for k, v in x.items() if k.startswith("loss/")]
    assert np.isfinite(numbers).all()

    # One more stage: the run goes on from its end, and only there
    more = {**stages()[1], "fake_init": "keep"}
    recipe = write_recipe(place, run_dir=str(run), stages=[*stages(), more])
    run_json(capsys, "train", recipe, "--resume")
    four, header = read_lora(lora)[0], read_header(lora)
    assert header["ss_max_train_steps"] == "8"
    assert "dmd2+gan -> dmd2" in header["turbo.spec"]
    assert losses(run)[: len(seen)] == seen
    assert any(not torch.equal(four[key], three[key]) for key in three)

    # Another run that begins with that LoRA
    keys = {"run_dir": str(tmp_path / "second"), "init_from": str(lora), "name": "second"}
    still = {**stages()[1], "steps": 1, "lr": 1e-12}
    recipe = write_recipe(place, **keys, stages=[still])
    run_json(capsys, "train", recipe)
    beside = tmp_path / "second" / "lora" / "second.safetensors"
    second, header = read_lora(beside)
    assert json.loads(header["turbo.init_from"])["name"] == lora.name
    for key in four:  # as good as no update
        torch.testing.assert_close(second[key], four[key], rtol=0, atol=1e-6)

    # Draw, export, judge
    base = ["--model", model, "--size", "128x64", "--teacher-steps", 2]
    drawn = ["--prompt", PROMPTS[1], "--teacher", "--out", tmp_path / "pictures"]
    run_json(capsys, "sample", run, beside, *drawn, *base)
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(pictures) >= 2
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert np.asarray(picture).std() > 0
    small = tmp_path / "small.safetensors"
    run_json(capsys, "export", run, "--out", small, "--rank", 1, "--keys", "diffusers")
    assert run_json(capsys, "inspect", small)["ranks"] == {"1": len(three) // 3}
    prompts = ["--prompts", place / "prompts.txt", "--count", 2]
    figures = run_json(capsys, "eval", small, *prompts, *base)
    assert figures["images"] == 6


def gentle() -> list[dict[str, Any]]:
    """`stages` at a lower rate: where a gradient is near zero, Adam makes a step of size lr of its
    rounding error.
    """
    return [{**stage, "lr": 3e-4} for stage in stages()]


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, torch.Tensor]:
    """The LoRA of one process that nothing interrupts."""
    assert main(["train", str(write_recipe(place, stages=gentle()))]) == 0
    return read_lora(place / "run" / "lora" / "turbo.safetensors")[0]


def test_two_processes_that_share_the_base_train_like_one(
    place: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """On prompts of different length; each process takes one of the two samples."""
    halves = [{**stage, "accumulate": 1} for stage in gentle()]
    engine = {"shard": 2, "timeout_s": 60}
    run = tmp_path / "run"
    torchrun("train", write_recipe(place, run_dir=str(run), stages=halves, engine=engine))
    together = read_lora(run / "lora" / "turbo.safetensors")[0]
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-5)
    assert max(x.abs().max() for k, x in alone.items() if "lora_B" in k) > 1e-4  # both have learnt


def test_a_killed_run_ends_as_one_that_was_not(
    place: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(place, run_dir=str(run), stages=gentle(), save_every=1)
    process = subprocess.Popen([sys.executable, "-m", "distill", "train", str(recipe)])
    while process.poll() is None and not list(run.glob("checkpoints/step-*")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    lora = run / "lora" / "turbo.safetensors"
    assert not lora.exists()
    assert main(["train", str(recipe), "--resume"]) == 0
    resumed = read_lora(lora)[0]
    assert resumed.keys() == alone.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in alone.items())
