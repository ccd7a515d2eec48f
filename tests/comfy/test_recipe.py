"""One command runs the whole recipe; its LoRA drops into a ComfyUI server."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.config import TINY, load_config
from distill.contract.tiny import embed_prompt
from distill.lora.student import load_student
from distill.models.family import spec_of
from distill.models.load import load_transformer, load_vae
from distill.models.roles import Roles
from distill.models.sample import sample_student
from distill.models.text import Text
from distill.models.vae import decode
from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "configs" / "tiny_cpu.yaml"
PROMPT, SEED, COUNT = "a red letter K", 5, 2


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PCM, DMD2 and DMD2 with a GAN, a few steps each."""
    run_dir = tmp_path_factory.mktemp("recipe") / "run"
    steps = [f"stages.{i}.steps={n}" for i, n in enumerate((12, 3, 3))]
    words = [*steps, "stages.1.fake_warmup=0", "stages.2.gan.ramp=1", "log_every=1"]
    command = [sys.executable, "-m", "distill", "train", str(RECIPE), f"run_dir={run_dir}", *words]
    subprocess.run(command, check=True, cwd=ROOT)
    (file,) = (run_dir / "lora").glob("tiny_turbo_2_steps.safetensors")
    return file


@pytest.fixture(scope="module")
def server(comfyui_path: Path, lora: Path) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        shutil.copy(lora, server.folder("loras"))
        yield server


@pytest.mark.slow
def test_the_server_paints_what_the_trainer_sees(
    server: ComfyServer, lora: Path, tiny_prompt: Callable[..., dict[str, Any]]
) -> None:
    nodes = {
        "1": {"class_type": "TurboDistillTinyLoader", "inputs": {"lora": "teacher (no LoRA)"}},
        "2": {"class_type": "TurboDistillTinyText", "inputs": {"text": PROMPT}},
        "lora": {
            "class_type": "TurboDistillLoraLoader",
            "inputs": {
                "model": ["1", 0],
                "lora_name": lora.name,
                "strength": 1.0,
                "mode": "auto",
                "sigmas_override": "",
                "sampler_override": "auto",
            },
        },
    }
    prompt = tiny_prompt(nodes, model="lora", count=COUNT, seed=SEED)
    files = server.images(server.queue(prompt))
    painted = np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in files])

    config = load_config(RECIPE)
    text = Text(embed_prompt(PROMPT)[None]).repeat(COUNT)
    transformer = load_transformer(TINY, torch.float32)
    roles = Roles(transformer, config.adapter, config.guidance, text, config.seed)
    noise = torch.randn(COUNT, 16, 8, 8, generator=torch.Generator().manual_seed(SEED))

    def image() -> torch.Tensor:
        latents = sample_student(roles, spec_of(config), noise, text)
        pixels = decode(load_vae(TINY), latents).clamp(-1, 1)
        return ((pixels + 1) * 127.5).permute(0, 2, 3, 1)

    untrained = image()
    load_student(roles, lora)
    expected = image()
    assert (untrained - expected).abs().max() > 25
    assert np.abs(painted - expected.numpy()).max() < 2  # of 255
