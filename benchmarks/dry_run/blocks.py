"""How many hidden tensors a family's block keeps and makes, counted where nothing is extrapolated:

    python -m benchmarks.dry_run.blocks qwen-image-2.1

Real tensors on the CPU at a smaller width, for a model that asks its masks for their values, which
meta tensors do not have. What counts is `BlockTensors` of distill/models/family.py.
"""

from __future__ import annotations

import sys
from pkgutil import resolve_name
from typing import Any

import torch

from benchmarks.live import Live
from distill.config import AdapterSection, GuidanceSection
from distill.models.family import BlockTensors, Family, family
from distill.models.roles import STUDENT, TEACHER, Roles
from distill.models.text import Text

HEADS, IMAGE_TOKENS = 8, 1024
RANK = 1  # hidden tensors are counted, not the LoRA's inner products


def make_roles(kind: Family, blocks: int) -> Roles:
    """The published transformer, narrower, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = resolve_name(kind.transformer)(num_layers=blocks, num_attention_heads=HEADS)
    finally:
        torch.set_default_dtype(before)
    negative = Text(torch.zeros(1, 1, kind.text_width(transformer), dtype=torch.bfloat16))
    return Roles(transformer, AdapterSection(rank=RANK), GuidanceSection(), negative, 0)


def inputs(kind: Family, transformer: Any) -> tuple[torch.Tensor, torch.Tensor, Text]:
    """Noise of IMAGE_TOKENS tokens, its time, and a prompt."""
    side = int(IMAGE_TOKENS**0.5) * kind.token
    x = torch.randn(1, *kind.latent_shape(transformer, (side, side)), dtype=torch.bfloat16)
    embeds = torch.randn(1, kind.text_tokens, kind.text_width(transformer), dtype=torch.bfloat16)
    return x, torch.tensor([0.7]), Text(embeds)


def count(kind: Family) -> BlockTensors:
    """Kept: what a second block adds. The others: peaks of a model with two blocks."""
    kept, backward, forward = [], 0.0, 0.0
    for blocks in (1, 2):
        roles = make_roles(kind, blocks)
        given = inputs(kind, roles.transformer)
        hidden = (IMAGE_TOKENS + kind.text_tokens) * roles.width * 2
        with Live("cpu") as live, torch.no_grad():
            roles.velocity(TEACHER, *given)
            forward = live.peak / hidden
        with Live("cpu") as live, roles.use_role(STUDENT):
            loss = roles.velocity(STUDENT, *given).float().square().mean()
            kept.append(live.now / hidden)
            live.peak = live.now
            loss.backward()
            backward = live.peak / hidden - kept[-1]
    return BlockTensors(kept=kept[1] - kept[0], backward=backward, forward=forward)


def main() -> None:
    for name in sys.argv[1:]:
        found, stated = count(family(name)), family(name).block_tensors
        sys.stdout.write(f"{name}: counted {found}, --dry-run takes {stated}\n")


if __name__ == "__main__":
    main()
