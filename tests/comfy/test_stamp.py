"""A stamped LoRA in core's own loader, which reads alpha from tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.contract.stamp import Wanted, stamp

SPELLINGS = {  # down, up, whether the module's name is flattened
    "diffusion_model": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", 0),
    "transformer": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", 0),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", 1),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", 0),
    "oldest": ("transformer.{}_lora.down.weight", "transformer.{}_lora.up.weight", 0),
    "linear layer": (
        "transformer.{}.lora_linear_layer.down.weight",
        "transformer.{}.lora_linear_layer.up.weight",
        0,
    ),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["header", "--alpha"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_core_applies_the_alpha_that_was_stamped(
    spelling: str,
    by_hand: bool,
    model: Any,
    tmp_path: Path,
    make_updates: Callable[..., Any],
    forward: Callable[[Any], torch.Tensor],
    forward_with: Callable[..., torch.Tensor],
) -> None:
    import comfy.sd

    down, up, flat = SPELLINGS[spelling]
    updates, tensors = make_updates(alpha=9.0), {}
    for name, update in updates.items():
        module = name.replace(".", "_") if flat else name
        tensors |= {down.format(module): update.down, up.format(module): update.up}
    save_file(tensors, tmp_path / "a.safetensors", None if by_hand else {"lora_alpha": "9"})
    alpha = 9.0 if by_hand else None
    wanted = Wanted((1.0, 0.5, 0.0), alpha=alpha)
    report = stamp(tmp_path / "a.safetensors", tmp_path / "b.safetensors", wanted)
    assert report["alpha_added"] == len(updates)

    def by_core(name: str) -> torch.Tensor:
        state = load_file(tmp_path / name)
        return forward(comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)[0])

    expected = forward_with({name: update.delta() for name, update in updates.items()})
    torch.testing.assert_close(by_core("b.safetensors"), expected, rtol=1e-5, atol=1e-5)
    assert (by_core("a.safetensors") - expected).abs().max() > 0.1  # without it core took alpha 4
