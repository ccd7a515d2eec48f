"""What the dry run takes a block for, beside real blocks on the CPU, of both families: hidden
tensors that live, and FLOP by PyTorch's counter.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dry_run.blocks import HEADS, count, inputs, make_roles
from distill.config import load_config
from distill.models.family import BlockTensors, class_name, family
from distill.models.roles import TEACHER
from distill.training.estimate.shape import model_shape
from distill.training.estimate.work import forward_flop

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = {
    "qwen-image": "qwen_image_2512_2step.yaml",
    "qwen-image-2.1": "qwen_image_2_1_2step_48gb.yaml",
}


def sums(block: BlockTensors) -> tuple[float, ...]:
    """What is on the device at a time: without gradient, between blocks, in the backward pass."""
    return block.forward, block.kept, block.kept + block.backward


@pytest.mark.parametrize("name", PRESETS)
def test_hidden_tensors_of_a_block(name: str) -> None:
    kind = family(name)
    assert sums(kind.block_tensors) == pytest.approx(sums(count(kind)), rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_operations_of_a_block(name: str, tmp_path: Path) -> None:
    kind, found = family(name), []
    for blocks in (1, 2):  # the second one's are counted: what stands around the blocks is not
        folder = tmp_path / f"{blocks}" / "transformer"
        folder.mkdir(parents=True)
        values = {"_class_name": class_name(kind.transformer), "num_layers": blocks,
                  "num_attention_heads": HEADS}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(values))
        roles = make_roles(kind, blocks)
        x, t, text = inputs(kind, roles.transformer)
        side = x.shape[-1] * kind.vae.pixels
        overrides = [f"model.path={folder.parent}", f"data.resolution={side}"]
        config = load_config(CONFIGS / PRESETS[name], overrides)
        counter = FlopCounterMode(display=False)
        # Attention written out, for the counter does not know the CPU's own kernel
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            roles.velocity(TEACHER, x, t, text)
        estimated = sum(forward_flop(config, model_shape(config)).values())
        found.append((estimated, counter.get_total_flops()))
    estimated, counted = (b - a for a, b in zip(*found, strict=True))
    # --dry-run has prompts look at images, which those of Qwen-Image-2.1 do not
    assert estimated == pytest.approx(counted, rel=1e-3 if name == "qwen-image" else 0.03)
