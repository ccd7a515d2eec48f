"""LoRAs on rows of fused layers where the base is in low precision, and what `auto` measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_lora
from tiny_families import (
    build_family,
    close,
    family_forward,
    linears,
    load_family,
    random_lora,
)

FORMS = ["plain fp8", "fp8", "int8"]
FAMILIES = ["flux", "z-image"]


@pytest.fixture
def apply(pack: Any) -> Callable[..., Any]:
    return pack("nodes.apply_lora").apply_lora


def stored(pack: Any, name: str, form: str) -> tuple[Any, Any]:
    """A base in low precision, and the float32 model of the very numbers that it stands for."""
    import comfy.ops

    same = load_family(name)
    if form == "plain fp8":
        base = load_family(name, torch.float8_e4m3fn)
        for parameter, rounded in zip(
            same.model.diffusion_model.parameters(),
            base.model.diffusion_model.parameters(),
            strict=True,
        ):
            parameter.data = rounded.data.float()
        return base, same
    rounding = pack("distill.contract.bake.rounding")
    kind = rounding.FORMATS[form]
    config = {**kind.config, "full_precision_matrix_mult": True}
    marker = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    weights = same.model.diffusion_model.state_dict()
    for key in [key for key in weights if key.endswith(".weight") and weights[key].ndim == 2]:
        if not any(part in key for part in ("blocks", "layers", "refiner")):
            continue
        values, scale = kind.quantise(weights[key])
        same.model.diffusion_model.get_parameter(key).data = rounding.value((values, scale))
        weights |= {key: values, f"{key}_scale": scale, f"{key[:-7]}.comfy_quant": marker}
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    base = build_family(name, operations=operations)
    base.model.diffusion_model.load_state_dict(weights, strict=True)
    return base, same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_beside_low_precision_weights(
    name: str, form: str, pack: Any, apply: Any, write_lora: Any, comfyui: Path
) -> None:
    """Two stacked LoRAs are as exact as in float32, and gone again; auto chooses so where merging
    adds more noise than bf16 has: these updates are large enough for int8.
    """
    base, same = stored(pack, name, form)
    updates = [random_lora(linears(name), seed) for seed in (1, 2)]
    one, _ = apply(base, write_lora(updates[0], "a.safetensors"), mode="bypass")
    two, _ = apply(one, write_lora(updates[1], "b.safetensors"), mode="bypass")
    before, exact = family_forward(name, base), family_forward(name, same)
    off = (before - exact).norm() / exact.norm()
    assert off < (0.05 if form == "int8" else 1e-5)  # core rounds activations to int8 as well
    tolerance = max(1e-5, 2 * float(off))
    targets, _ = apply(same, write_lora(updates[0], "c.safetensors"), mode="merge")
    both, _ = apply(targets, write_lora(updates[1], "d.safetensors"), mode="merge")
    close(family_forward(name, one), family_forward(name, targets), tolerance)
    close(family_forward(name, two), family_forward(name, both), tolerance)
    close(family_forward(name, base), before, 0)
    assert (family_forward(name, both) - exact).norm() > 0.2 * exact.norm()
    _, report = apply(base, write_lora(updates[0], "a.safetensors"))
    assert report.mode == ("merge" if form == "int8" else "bypass")
    assert "of the update survives merging, with noise of" in report.to_text()


@pytest.mark.parametrize("form", FORMS)
def test_merged_into_low_precision_rows(
    form: str, pack: Any, apply: Any, write_lora: Any, comfyui: Path
) -> None:
    """Rounded, told so, and in the right rows."""
    name = "z-image"
    base, same = stored(pack, name, form)
    key = "layers.0.attention.qkv"
    updates = random_lora({"layers.0.attention.to_k": [264, 264]})
    merged, report = apply(base, write_lora(updates), 8.0, mode="merge")
    patched = merged.patch_weight_to_device(f"diffusion_model.{key}.weight", return_weight=True)
    before = same.model.diffusion_model.get_submodule(key).weight.data
    after = patched.dequantize() if form != "plain fp8" else patched.float()
    change, delta = after.float() - before, 8.0 * updates["layers.0.attention.to_k"].delta()
    assert (change[264:528] - delta).norm() < 0.2 * delta.norm()
    assert change[:264].norm() < 0.05 * before[:264].norm()
    assert "merging rounds the LoRA" in report.to_text()


# ------------------------------------------------------------------------------------ the measure


def scaled_to(updates: dict[str, Any], model: Any, known: Any, ratio: float) -> dict[str, Any]:
    """The same updates, each `ratio` times as large as the weights that it changes."""
    found = {}
    for name, update in updates.items():
        weight = model.get_submodule(known[name].module).weight.float()
        size = ratio * weight.square().mean().sqrt() / update.delta().square().mean().sqrt()
        found[name] = toy_lora.Update(update.down, update.up * size, update.alpha)
    return found


@pytest.mark.parametrize(
    ("dtype", "ratio", "mode"),
    [
        (torch.bfloat16, 0.01, "merge"),
        (torch.bfloat16, 0.002, "bypass"),
        (torch.float16, 0.002, "merge"),
        (torch.float8_e4m3fn, 0.01, "bypass"),
        (torch.float8_e4m3fn, 0.2, "bypass"),
    ],
)
def test_a_few_layers_tell_of_all(
    dtype: torch.dtype,
    ratio: float,
    mode: str,
    pack: Any,
    apply: Any,
    write_lora: Any,
    comfyui: Path,
) -> None:
    """The share that is kept, by six layers and by all of them, and what core's merge does."""
    kept_by_merging, targets = pack("nodes.kept_by_merging"), pack("nodes.lora_targets")
    name = "z-image"
    base = load_family(name, dtype)
    known = targets.targets_of(base.model)
    shapes = {key: shape for key, shape in linears(name).items() if "layers" in key}
    updates = scaled_to(random_lora(shapes), base.model, known, ratio)
    path = write_lora(updates)
    _, report = apply(base, path)
    lora = pack("distill.contract.lora_keys").normalise(
        *pack("distill.contract.metadata").read_lora(path), known_modules=known
    )
    placed = targets.place(lora, base.model, known)
    full = pack("distill.contract.kept").Kept()
    for module in lora.modules:
        kept_by_merging.add_layer(full, placed, module, 1.0)
    assert report.kept.layers == kept_by_merging.LAYERS < full.layers
    assert report.kept.share == pytest.approx(full.share, abs=0.005)
    assert report.kept.noise_of_update == pytest.approx(full.noise_of_update, rel=0.1)
    assert report.mode == mode

    merged, _ = apply(base, path, mode="merge")
    by_core = pack("distill.contract.kept").Kept()
    for module, update in updates.items():
        target = placed.targets[module]
        after = merged.patch_weight_to_device(target.key, return_weight=True).float()
        before = base.model.get_parameter(target.key).float()
        if target.offset is not None:
            before, after = (tensor.narrow(*target.offset) for tensor in (before, after))
        by_core.add(before, after, update.delta())
    assert by_core.share == pytest.approx(full.share, abs=0.005)
    assert by_core.noise_of_update == pytest.approx(full.noise_of_update, rel=0.05)


def test_float32_is_not_measured(apply: Any, write_lora: Any, comfyui: Path) -> None:
    _, report = apply(load_family("flux"), write_lora(random_lora(linears("flux"))))
    assert report.kept is None
    assert report.mode == "merge"


def test_the_sample_has_the_extremes(pack: Any) -> None:
    sizes = {f"layer {i}": i * i for i in range(100)}
    chosen = pack("nodes.kept_by_merging").sample(list(sizes), sizes.__getitem__)
    assert len(chosen) == 6
    assert {"layer 0", "layer 50", "layer 99"} <= set(chosen)
    assert chosen == pack("nodes.kept_by_merging").sample(list(sizes)[::-1], sizes.__getitem__)
