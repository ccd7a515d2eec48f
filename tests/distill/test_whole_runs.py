"""A person's way through the commands, on a random model of a family's published classes:
`prepare`, `train`, one more stage, a run that begins with the result, `sample`, `export`, `eval`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_pipelines import write_pipeline
from whole_runs import PROMPTS, run_json, stages, write_photos, write_recipe

from distill.contract.metadata import read_header, read_lora
from distill.contract.spec import TurboSpec


def losses(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if any(key.startswith("loss/") for key in x)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen-image", "qwen-image-2.1"])
def test_from_pictures_to_a_judged_lora(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_pipeline(tmp_path / "model", family)
    write_photos(tmp_path / "photos")
    recipe = write_recipe(tmp_path)

    report = run_json(capsys, "prepare", recipe)
    assert (report["real_images"], report["teacher_images"], report["set_aside"]) == (6, 4, 0)

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
    recipe = write_recipe(tmp_path, stages=[*stages(), {**stages()[1], "fake_init": "keep"}])
    run_json(capsys, "train", recipe, "--resume")
    four, header = read_lora(lora)[0], read_header(lora)
    assert header["ss_max_train_steps"] == "8"
    assert "dmd2+gan -> dmd2" in header["turbo.spec"]
    assert losses(run)[: len(seen)] == seen
    assert any(not torch.equal(four[key], three[key]) for key in three)

    # Another run that begins with that LoRA
    keys = {"run_dir": str(tmp_path / "second"), "init_from": str(lora), "name": "second"}
    still = {**stages()[1], "steps": 1, "lr": 1e-12}
    recipe = write_recipe(tmp_path, **keys, stages=[still])
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
    prompts = ["--prompts", tmp_path / "prompts.txt", "--count", 2]
    figures = run_json(capsys, "eval", small, *prompts, *base)
    assert figures["images"] == 6
