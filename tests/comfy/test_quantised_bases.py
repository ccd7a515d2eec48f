"""Low-precision base models: `auto` bypasses, and the LoRA keeps its precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture
def transformer_weights(tiny_folder: Path) -> dict[str, Tensor]:
    return load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")


def build(tiny_folder: Path, weights: dict[str, Tensor], dtype: Any, operations: Any = None) -> Any:
    """The toy model as core's loader builds it for a given weight dtype and kind of layers."""
    import comfy.model_patcher
    import comfy.supported_models

    config = json.loads((tiny_folder / "transformer" / "config.json").read_text())
    names = (
        "num_layers",
        "in_channels",
        "out_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "axes_dims_rope",
    )
    shape = {"image_model": "qwen_image"} | {name: config[name] for name in names}
    model_config = comfy.supported_models.QwenImage(shape)
    model_config.set_inference_dtype(dtype, torch.float32)
    model_config.custom_operations = operations
    model = model_config.get_model({}, "")
    model.diffusion_model.load_state_dict(weights, strict=True)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


@pytest.fixture
def plain_fp8(tiny_folder: Path, transformer_weights: dict[str, Tensor]) -> Any:
    """What UNETLoader makes with weight_dtype fp8_e4m3fn."""
    return build(tiny_folder, transformer_weights, torch.float8_e4m3fn)


@pytest.fixture
def scaled_fp8(comfyui: Path, tiny_folder: Path, transformer_weights: dict[str, Tensor]) -> Any:
    """A file with per-tensor scales, as the *_fp8_scaled checkpoints have them."""
    import comfy.ops

    quantised = {}
    marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for key, weight in transformer_weights.items():
        if weight.ndim == 2 and "transformer_blocks" in key:
            name = key.removesuffix(".weight")
            scale = weight.abs().max() / 448
            quantised[key] = (weight / scale).to(torch.float8_e4m3fn)
            quantised[f"{name}.weight_scale"] = scale
            quantised[f"{name}.comfy_quant"] = marker
        else:
            quantised[key] = weight
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    return build(tiny_folder, quantised, torch.float32, operations)


@pytest.fixture(params=["plain_fp8", "scaled_fp8"])
def quantised(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_auto_bypasses_and_keeps_a_small_lora(
    pack: Any,
    quantised: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
    forward: Callable[[Any], Tensor],
) -> None:
    """A delta below the step size of fp8 survives in bypass and mostly does not in merge."""
    apply_lora = pack("nodes.apply_lora").apply_lora
    path = write_lora(make_updates())
    small = 0.02
    base = forward(quantised)
    # The change that the LoRA makes is nearly linear when small: bypassing ten times less tells the
    # direction and size that it should have, with no rounding in it.
    bypassed, report = apply_lora(quantised, path, small)
    expected = (forward(apply_lora(quantised, path, small / 10, "bypass")[0]) - base) * 10
    change = forward(bypassed) - base
    merged = forward(apply_lora(quantised, path, small, "merge")[0]) - base

    assert report.mode == "bypass"
    assert "merging would round the LoRA away" in report.reason
    assert (change - expected).norm() < 0.1 * expected.norm()
    assert (merged - expected).norm() > 0.5 * expected.norm()


def test_reports_warn(
    pack: Any,
    plain_fp8: Any,
    scaled_fp8: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
) -> None:
    apply_lora = pack("nodes.apply_lora").apply_lora
    path = write_lora(make_updates())
    assert "grid pattern" in apply_lora(plain_fp8, path)[1].to_text()
    assert "plain fp8" in apply_lora(plain_fp8, path)[1].reason
    assert "grid pattern" not in apply_lora(scaled_fp8, path)[1].to_text()
    assert "quantised float8_e4m3fn" in apply_lora(scaled_fp8, path)[1].reason
    merged = apply_lora(scaled_fp8, path, mode="merge")[1]
    assert "merging rounds the LoRA" in merged.to_text()


def test_bypass_on_a_quantised_base_stacks(
    pack: Any,
    quantised: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
    forward: Callable[[Any], Tensor],
) -> None:
    apply_lora = pack("nodes.apply_lora").apply_lora
    first, second = make_updates(1), make_updates(2)
    one, _ = apply_lora(quantised, write_lora(first, "a.safetensors"))
    two, _ = apply_lora(one, write_lora(second, "b.safetensors"))
    other, _ = apply_lora(quantised, write_lora(second, "b.safetensors"))
    swapped, _ = apply_lora(other, write_lora(first, "a.safetensors"))
    torch.testing.assert_close(forward(two), forward(swapped), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(forward(two), forward(one), atol=0.1)


def test_what_is_saved_has_the_lora_in_its_precision(
    pack: Any,
    quantised: Any,
    transformer_weights: dict[str, Tensor],
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
    forward: Callable[[Any], Tensor],
    output: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Core's ModelSave behind bypass: the rounded sum, told in the log; sampling stays exact."""
    from comfy_extras.nodes_model_merging import ModelSave

    updates = make_updates()
    bypassed, _ = pack("nodes.apply_lora").apply_lora(quantised, write_lora(updates), 3.0)
    before = forward(bypassed)
    ModelSave().save(bypassed, "m/x")
    assert "turbo.safetensors is in mode bypass" in caplog.text
    assert torch.equal(forward(bypassed), before)
    (file,) = (output / "m").glob("*.safetensors")
    tensors = load_file(file)
    for name, update in updates.items():
        if "transformer_blocks" not in name:
            continue
        stem = f"model.diffusion_model.{name}."
        assert tensors[f"{stem}weight"].dtype == torch.float8_e4m3fn
        found = tensors[f"{stem}weight"].float() * tensors.get(f"{stem}weight_scale", 1.0)
        delta = 3.0 * update.delta()
        change = found - transformer_weights[f"{name}.weight"]
        assert (change - delta).norm() < 0.3 * delta.norm(), name


def test_gguf_merges_without_loss_and_says_nothing_else(
    pack: Any, model: Any, make_updates: Callable[..., Any], write_lora: Callable[..., Path]
) -> None:
    """A weight that GGUF holds takes patches when it is dequantised: nothing is rounded."""
    apply_lora = pack("nodes.apply_lora").apply_lora
    for layer in model.model.diffusion_model.transformer_blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.tensor_type = SimpleNamespace(name="Q8_0")
    path = write_lora(make_updates())
    merged, bypassed = apply_lora(model, path, mode="merge")[1], apply_lora(model, path)[1]
    assert "round" not in merged.to_text()
    assert (bypassed.mode, bypassed.warnings) == ("bypass", [])
    assert "GGUF Q8_0" in bypassed.reason
    assert "merging would be done anew in every forward" in bypassed.reason


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (SimpleNamespace(tensor_type=SimpleNamespace(name="Q8_0")), "GGUF Q8_0"),
        (SimpleNamespace(tensor_type=SimpleNamespace(name="F16")), "full precision"),
        (torch.zeros(1, dtype=torch.bfloat16), "full precision"),
        (torch.zeros(1, dtype=torch.uint8), "quantised uint8"),
    ],
)
def test_kinds_of_weights(weight: Any, kind: str, pack: Any) -> None:
    assert pack("nodes.apply_lora")._weight_kind(SimpleNamespace(weight=weight)) == kind
