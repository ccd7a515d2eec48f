"""Previews of a run on the tiny model: student beside teacher, same noise."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from ..config import TINY
from ..contract.spec import TurboSpec
from ..contract.tiny import embed_prompt
from ..figures import labelled_grid, save_png
from ..load import load_vae
from ..models import Text
from ..roles import Roles
from ..sample import sample_student, sample_teacher, teacher_sigmas
from ..vae import decode
from .quality import SHIFT, STEPS, noise_of

PROMPTS = (
    "a red letter K",
    "a yellow letter R",
    "a white letter S",
    "a blue letter X",
    "a handwritten seven",
    "an even number",
)


@lru_cache(maxsize=1)
def _vae():
    return load_vae(TINY)


def preview(roles: Roles, spec: TurboSpec, path: Path) -> None:
    text = Text(torch.stack([embed_prompt(p) for p in PROMPTS]))
    noise = noise_of(len(PROMPTS), 1)
    with torch.no_grad():
        rows = [
            (
                f"student\n{spec.steps} steps",
                decode(_vae(), sample_student(roles, spec, noise, text)),
            ),
            (
                "teacher\n50 steps",
                decode(_vae(), sample_teacher(roles, teacher_sigmas(STEPS, SHIFT), noise, text)),
            ),
        ]
    save_png(labelled_grid(rows, PROMPTS, scale=2), path)
