"""What a person has before the first command: pictures with captions, prompts, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from distill.cli import main

PROMPTS = ["a cat", "a dog in the rain, seen from afar", "the sea at night"]
SHAPES = ((128, 64), (64, 64))  # of the pictures in turn; width and height


def write_photos(folder: Path) -> Path:
    """Six captioned pictures of two shapes."""
    folder.mkdir()
    for i in range(6):
        width, height = SHAPES[i % 2]
        pixels = np.random.default_rng(i).integers(0, 255, (height // 8, width // 8, 3))
        Image.fromarray(pixels.astype(np.uint8)).resize((width, height)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}" + ", of rain" * i)
    return folder


def stages() -> list[dict[str, Any]]:
    """PCM, DMD2, and DMD2 with a discriminator, two updates of two micro-batches each."""
    common = {"batch": 1, "accumulate": 2, "lr": 1e-2, "ema": 0, "steps": 2}
    dmd2 = {**common, "method": "dmd2", "fake_updates": 2, "fake_warmup": 0}
    gan = {"features": "latent", "real_ratio": 0.5, "layers": [0.5, 1.0], "width": 8}
    return [
        {**common, "method": "pcm", "points": 2},
        dmd2,
        {**dmd2, "fake_init": "keep", "gan": gan},
    ]


def write_recipe(folder: Path, **keys: Any) -> Path:
    """A recipe of `stages` for the model, the pictures and the prompts in `folder`; keys replace
    others.
    """
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    values = {
        "run_dir": str(folder / "run"),
        "name": "turbo",
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "cache": str(folder / "cache"),
            "prompts": str(folder / "prompts.txt"),
            "images": str(folder / "photos"),
            "buckets": [list(shape) for shape in sorted(SHAPES)],
            "dtype": "float32",
            "teacher_images": 4,
            "teacher_steps": 2,
        },
        "adapter": {"rank": 2},
        "stages": stages(),
        "preview": {"every": 2, "prompts": 2, "images": 2, "teacher_steps": 2},
        "save_every": 2,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **keys}))
    return path


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What a command prints with --json; it has to succeed."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))
