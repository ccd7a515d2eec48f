"""Qwen-Image-2.1 from prompts and photos to a LoRA in diffusers' pipeline: `prepare`, `train`,
`inspect`, `sample`, `export`, `eval` on a random model of the published classes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline
from PIL import Image
from random_pipelines import write_pipeline
from whole_runs import PROMPTS, run_json, stages, write_photos, write_recipe

from distill.contract.metadata import read_header, read_lora
from distill.contract.shift import LinearShift
from distill.contract.spec import TurboSpec
from distill.data.dataset import PreparedData
from distill.lora.source import open_source
from distill.models.family import family
from distill.models.pipeline import Pipeline, embed, find_base
from distill.models.sample import noise_of_seeds, sample_student
from distill.models.text import Text
from distill.utils.rng import Rng

NODES = [1.0, 0.5, 0.0]
SHIFT = {"rule": "linear", "tokens": [256, 8192], "mu": [0.5, 0.9]}
CPU = torch.device("cpu")


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


@pytest.mark.slow
def test_from_prompts_to_diffusers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = write_pipeline(tmp_path / "model", "qwen-image-2.1")
    write_photos(tmp_path / "photos")
    learnt = [{**stage, "lr": 5e-2} for stage in stages()]  # the LoRA has to matter
    spec = {"nodes": NODES, "shift": SHIFT}
    recipe = write_recipe(tmp_path, name="turbo21", spec=spec, stages=learnt)

    # prepare: latents of 64 channels at a sixteenth of the size, prompts of different length
    report = run_json(capsys, "prepare", recipe)
    assert (report["real_images"], report["teacher_images"], report["set_aside"]) == (6, 4, 0)
    assert report["buckets"] == {"64x64": 3, "128x64": 3}
    batch = PreparedData(tmp_path / "cache", vae=family("qwen-image-2.1").vae).batch(Rng(0, 1), 4)
    assert batch.x0.shape[1] == 64
    assert batch.x0.shape[2:] in {(4, 4), (4, 8)}
    assert caplog.text.count("Qwen Research License") == 1

    # train
    plan = run_json(capsys, "train", recipe, "--dry-run")
    assert plan["adapted_layers"] == 2 * 7
    assert [stage["accumulate"] for stage in plan["stages"]] == [2, 2, 2]
    run_json(capsys, "train", recipe)
    assert caplog.text.count("Qwen Research License") == 2
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss/pcm", "loss/dmd", "loss/fake", "loss/discriminator"} <= set().union(*log)
    assert all(np.isfinite(v) for x in log for k, v in x.items() if k.startswith("loss"))
    lora = tmp_path / "run" / "lora" / "turbo21.safetensors"
    spec = TurboSpec.from_json(read_header(lora)["turbo.spec"])
    assert spec.version == 2
    assert (spec.family, spec.nodes) == ("qwen-image-2.1", tuple(NODES))
    assert spec.shift == LinearShift((256, 8192), (0.5, 0.9))
    assert json.loads(read_header(lora)["turbo.config"])["guidance"] == {
        "scale": 1.0,
        "rescale": False,
    }
    card = lora.with_suffix(".md").read_text()
    assert "license_name: qwen-research" in card
    assert "QwenImage21Pipeline" in card

    # inspect, sample, eval
    described = run_json(capsys, "inspect", lora, "--size", "128x64")
    assert described["spec"]["shift"] == SHIFT
    out = tmp_path / "pictures"
    words = ["--model", model, "--size", "128x64", "--teacher-steps", 2]
    prompt = ["--prompt", PROMPTS[1], "--teacher", "--out", out]
    run_json(capsys, "sample", lora, *prompt, *words)
    with Image.open(out / "turbo21_001_seed0.png") as picture:
        assert (picture.size, picture.mode) == ((128, 64), "RGB")
    prompts = ["--prompts", tmp_path / "prompts.txt", "--count", 2]
    figures = run_json(capsys, "eval", lora, *prompts, *words, "--batch", 3)
    assert figures["teacher"]["scale"] == 1
    assert figures["images"] == 6

    # export, and what diffusers makes of it
    exported = tmp_path / "exported.safetensors"
    keys = ["--keys", "diffusers", "--dtype", "fp32"]
    run_json(capsys, "export", tmp_path / "run", "--out", exported, *keys)
    tensors, _ = read_lora(exported)
    assert len(tensors) == 2 * 2 * 7
    assert all(k.startswith("transformer.transformer_blocks.") for k in tensors)
    assert_draws_the_same(model, exported)


def assert_draws_the_same(model: Path, lora: Path) -> None:
    """Our sampler, and the pipeline as the model card says, at sizes that it was not trained at."""
    source = open_source(lora)
    base = find_base(source.spec, str(model))
    texts = embed(base, PROMPTS, CPU)
    ours = Pipeline(base, {"l": source.lora}, base.family.guidance, texts, CPU)
    pipeline = QwenImage21Pipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    code = snippet(lora.with_suffix(".md").read_text())
    scheduler = re.search(r"FlowMatchEulerDiscreteScheduler\(.*?\)", code, re.DOTALL)
    assert scheduler
    found = {"FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler}
    pipeline.scheduler = eval(scheduler[0], found)
    assert "sigmas=[1.0, 0.5]," in code
    with_lora = []
    for loaded in (False, True):
        if loaded:
            pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
        for width, height in ((96, 128), (64, 64)):
            noise = noise_of_seeds([5], (64, height // 16, width // 16))
            latents = pipeline(
                PROMPTS[1],
                sigmas=[1.0, 0.5],
                width=width,
                height=height,
                latents=noise.flatten(2).mT,
                output_type="latent",
            ).images
            theirs = latents.mT.unflatten(2, noise.shape[-2:])
            role = ours._role["l"] if loaded else "teacher"
            text = Text(texts[PROMPTS[1]][None])
            with torch.no_grad():
                mine = sample_student(ours.roles, source.spec, noise, text, role=role)
            assert (mine - theirs).norm() < 1e-5 * theirs.norm()
            with_lora.append(theirs)
    assert (with_lora[0] - with_lora[2]).norm() > 1e-4 * with_lora[0].norm()
