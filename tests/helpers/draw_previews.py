"""Previews of a student with random weights, for tests that need processes of their own.

    python draw_previews.py CONFIG OUT

The main rank writes OUT with the latents of student and teacher. Every rank prints how many forward
passes it made for either.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy_training import RandomData

from distill.config import load_config
from distill.models.load import load_transformer
from distill.models.roles import STUDENT, Roles
from distill.training.engine import Engine
from distill.training.previews import Previewer


def main(config_file: str, out: str) -> None:
    torch.set_num_threads(1)
    config = load_config(Path(config_file))
    engine, data = Engine.start(config.engine), RandomData()
    base = load_transformer(config.model.path, torch.float32)
    roles = Roles(base, config.adapter, config.guidance, data.negative, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in roles.parameters(STUDENT):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    whole = [p for role in roles.adapters for p in roles.parameters(role)]
    engine.shard(base, roles.family.blocks_of(base), whole)
    passes: list[int] = []
    base.register_forward_hook(lambda *_: passes.append(1))
    previewer = Previewer(config, engine, data.examples(config.preview.prompts))
    previewer.draw_teacher(roles)
    teacher = len(passes)
    student = previewer.draw(roles)
    if engine.is_main:
        assert student is not None
        assert previewer._teacher is not None
        save_file({"student": student, "teacher": previewer._teacher}, out)
    sys.stdout.write(f"rank {engine.rank}: {teacher} and {len(passes) - teacher} forwards\n")
    engine.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
