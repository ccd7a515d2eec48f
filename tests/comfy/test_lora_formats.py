"""Every spelling of a LoRA changes the model exactly as its own delta does, merged or bypassed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

# name -> (down key, up key, alpha key or None, whether the module's name is flattened)
SPELLINGS = {
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight", None, False),
    "transformer": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None, False),
    "diffusion_model": (
        "diffusion_model.{}.lora_A.weight",
        "diffusion_model.{}.lora_B.weight",
        "diffusion_model.{}.alpha",
        False,
    ),
    "peft": (
        "base_model.model.{}.lora_A.weight",
        "base_model.model.{}.lora_B.weight",
        None,
        False,
    ),
    "peft adapter": (
        "base_model.model.{}.lora_A.student.weight",
        "base_model.model.{}.lora_B.student.weight",
        None,
        False,
    ),
    "default adapter": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None, False),
    "kohya": (
        "lora_unet_{}.lora_down.weight",
        "lora_unet_{}.lora_up.weight",
        "lora_unet_{}.alpha",
        True,
    ),
    "onetrainer": (
        "lora_transformer_{}.lora_down.weight",
        "lora_transformer_{}.lora_up.weight",
        "lora_transformer_{}.alpha",
        True,
    ),
    "lycoris": (
        "lycoris_{}.lora_down.weight",
        "lycoris_{}.lora_up.weight",
        "lycoris_{}.alpha",
        True,
    ),
    "diffsynth": ("pipe.dit.{}.lora_A.weight", "pipe.dit.{}.lora_B.weight", None, False),
    "diffsynth adapter": (
        "pipe.dit.{}.lora_A.default.weight",
        "pipe.dit.{}.lora_B.default.weight",
        None,
        False,
    ),
    "up and down": (
        "transformer.{}.lora_down.weight",
        "transformer.{}.lora_up.weight",
        "transformer.{}.alpha",
        False,
    ),
    "old diffusers": (
        "transformer.{}.lora.down.weight",
        "transformer.{}.lora.up.weight",
        None,
        False,
    ),
}


def write(path: Path, spelling: str, updates: dict[str, Any], metadata: dict[str, str]) -> Path:
    down, up, alpha, flat = SPELLINGS[spelling]
    tensors = {}
    for name, update in updates.items():
        module = name.replace(".", "_") if flat else name
        tensors[down.format(module)] = update.down
        tensors[up.format(module)] = update.up
        if alpha is not None:
            tensors[alpha.format(module)] = torch.tensor(float(update.alpha))
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def spec_header(pack: Any) -> dict[str, str]:
    return {"turbo.spec": pack("distill.contract.spec").TurboSpec((1.0, 0.7155, 0.0)).to_json()}


@pytest.mark.parametrize("mode", ["merge", "bypass"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_its_own_delta(
    spelling: str,
    mode: str,
    pack: Any,
    model: Any,
    tmp_path: Path,
    make_updates: Callable[..., Any],
    spec_header: dict[str, str],
    forward: Callable[[Any], torch.Tensor],
    forward_with: Callable[..., torch.Tensor],
) -> None:
    has_alpha = SPELLINGS[spelling][2] is not None
    updates = make_updates(ranks=(4, 2, 7), alpha=3.0 if has_alpha else None)
    path = write(tmp_path / "lora.safetensors", spelling, updates, spec_header)

    patched, report = pack("nodes.apply_lora").apply_lora(model, path, 0.7, mode)

    expected = forward_with({name: 0.7 * update.delta() for name, update in updates.items()})
    torch.testing.assert_close(forward(patched), expected, rtol=1e-5, atol=1e-5)
    assert (forward(model) - expected).abs().max() > 0.1  # the LoRA matters, and is gone again
    assert f"matched: {len(updates)} of {len(updates)}" in report.to_text()
    assert report.lora.alpha_source == ("tensor" if has_alpha else "rank")


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_alpha_from_the_header(
    mode: str,
    pack: Any,
    model: Any,
    tmp_path: Path,
    make_updates: Callable[..., Any],
    spec_header: dict[str, str],
    forward: Callable[[Any], torch.Tensor],
    forward_with: Callable[..., torch.Tensor],
) -> None:
    """diffusers and PEFT keep alpha in the header only, where core's loaders do not look."""
    updates = make_updates(alpha=9.0)
    config = {"transformer.lora_alpha": 9, "transformer.r": 4}
    header = {**spec_header, "lora_adapter_metadata": json.dumps(config)}
    path = write(tmp_path / "lora.safetensors", "transformer", updates, header)

    patched, report = pack("nodes.apply_lora").apply_lora(model, path, mode=mode)

    expected = forward_with({name: update.delta() for name, update in updates.items()})
    torch.testing.assert_close(forward(patched), expected, rtol=1e-5, atol=1e-5)
    assert report.lora.alpha_source == "metadata"
    assert "header" in report.to_text()


def test_merged_weights_are_exact(
    pack: Any,
    model: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
    base_weights: dict[str, torch.Tensor],
) -> None:
    updates = make_updates()
    patched, _ = pack("nodes.apply_lora").apply_lora(model, write_lora(updates), mode="merge")
    for name, update in updates.items():
        key = f"diffusion_model.{name}.weight"
        merged = patched.patch_weight_to_device(key, return_weight=True)
        torch.testing.assert_close(merged, base_weights[name] + update.delta(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ('[{"name": "style.safetensors", "strength": 0.7, "content": "a"}]',
         "base: distilled with 'style.safetensors' at strength 0.7 in the base; apply that too"),
        ("no JSON", "base: header 'turbo.base_loras': expected a list of LoRAs"),
    ],
)  # fmt: skip
def test_what_was_in_its_base_is_told(
    header: str,
    told: str,
    pack: Any,
    model: Any,
    tmp_path: Path,
    make_updates: Callable[..., Any],
    spec_header: dict[str, str],
) -> None:
    metadata = {**spec_header, "turbo.base_loras": header}
    path = write(tmp_path / "lora.safetensors", "transformer", make_updates(), metadata)
    _, report = pack("nodes.apply_lora").apply_lora(model, path)
    assert told in report.to_text()
