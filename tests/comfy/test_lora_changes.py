"""What a LoRA file holds beside low-rank pairs: norms, biases, and core's other adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import HEADER, close, family_forward, linears, load_family, random_lora
from torch import Tensor

BLOCK = "transformer_blocks.0"


@pytest.fixture
def apply(pack: Any) -> Callable[..., Any]:
    return pack("nodes.apply_lora").apply_lora


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "a.safetensors"
    save_file(tensors, path, HEADER)
    return path


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


# -------------------------------------------------------------------------------- norms and biases


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_norms_and_biases(mode: str, apply: Any, tmp_path: Path, comfyui: Path) -> None:
    """In diffusers' names on FLUX: rows of a fused bias, a norm, and swapped halves."""
    name, width = "flux", 24
    linear = {"transformer_blocks.0.attn.to_out.0": linears(name)[f"{BLOCK}.attn.to_out.0"]}
    update = random_lora(linear)[f"{BLOCK}.attn.to_out.0"]
    changes = {
        f"transformer.{BLOCK}.attn.to_k.diff_b": random(width),
        f"transformer.{BLOCK}.attn.norm_q.diff": random(12),
        f"transformer.{BLOCK}.ff.net.2.diff": random(width, 4 * width),
        "transformer.norm_out.linear.diff_b": random(2 * width),
    }
    pair = {
        f"transformer.{BLOCK}.attn.to_out.0.lora_A.weight": update.down,
        f"transformer.{BLOCK}.attn.to_out.0.lora_B.weight": update.up,
        f"transformer.{BLOCK}.attn.to_out.0.alpha": torch.tensor(update.alpha),
    }
    model = load_family(name)
    patched, report = apply(model, written(tmp_path, pair | changes), 0.5, mode)

    expected = load_family(name)
    net, half = expected.model.diffusion_model, [0.5 * change for change in changes.values()]
    block = net.double_blocks[0]
    block.img_attn.proj.weight.data += 0.5 * update.delta()
    block.img_attn.qkv.bias.data[width : 2 * width] += half[0]
    block.img_attn.norm.query_norm.weight.data += half[1]
    block.img_mlp[2].weight.data += half[2]
    scale, shift = half[3].chunk(2)
    net.final_layer.adaLN_modulation[1].bias.data += torch.cat([shift, scale])

    close(family_forward(name, patched), family_forward(name, expected), 1e-5)
    close(family_forward(name, model), family_forward(name, load_family(name)), 0)
    assert "and 4 norms or biases" in report.to_text()


@pytest.mark.parametrize(
    ("key", "size", "message"),
    [
        ("attn.to_k.diff_b", 25, r"to_k's bias does not fit .*LoRA \[25\], model \[24\]"),
        ("attn.to_x.diff_b", 24, "to_x's bias does not fit .*no such parameter"),
        ("attn.norm_q.diff_b", 12, "norm_q's bias does not fit .*no such parameter"),
    ],
)
def test_changes_that_do_not_fit(
    key: str, size: int, message: str, apply: Any, tmp_path: Path, comfyui: Path
) -> None:
    pair = {f"{BLOCK}.ff.net.2.lora_A.weight": random(2, 96)}
    pair[f"{BLOCK}.ff.net.2.lora_B.weight"] = random(24, 2)
    with pytest.raises(ValueError, match=message):
        apply(load_family("flux"), written(tmp_path, {**pair, f"{BLOCK}.{key}": random(size)}))


def test_a_weight_that_is_replaced_is_refused(apply: Any, tmp_path: Path, comfyui: Path) -> None:
    with pytest.raises(ValueError, match=r"set_weight' is a full change of a weight"):
        apply(load_family("flux"), written(tmp_path, {f"{BLOCK}.norm.set_weight": random(12)}))


# ------------------------------------------------------------------------------ core's adapters


def lokr(stem: str) -> dict[str, Tensor]:
    return {f"{stem}.lokr_w1": random(4, 4), f"{stem}.lokr_w2": random(6, 6)}


def loha(stem: str) -> dict[str, Tensor]:
    sides = {"w1_a": (24, 2), "w1_b": (2, 24), "w2_a": (24, 2), "w2_b": (2, 24)}
    return {
        f"{stem}.hada_{side}": random(*shape, seed=i)
        for i, (side, shape) in enumerate(sides.items())
    }


def kron(tensors: list[Tensor]) -> Tensor:
    return torch.kron(*tensors)


def hadamard(tensors: list[Tensor]) -> Tensor:
    a, b, c, d = tensors
    return (a @ b) * (c @ d)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "lycoris_"])
@pytest.mark.parametrize(("write", "delta"), [(lokr, kron), (loha, hadamard)])
def test_core_merges_lokr_and_loha(
    write: Any, delta: Any, prefix: str, apply: Any, tmp_path: Path, comfyui: Path
) -> None:
    """On rows of a fused weight too."""
    stem = f"{BLOCK}.attn.to_v"
    tensors = write(f"{prefix}{stem.replace('.', '_') if prefix == 'lycoris_' else stem}")
    model, expected = load_family("flux"), load_family("flux")
    patched, report = apply(model, written(tmp_path, tensors), 0.5)
    weight = expected.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    weight.data[48:72] += 0.5 * delta(list(tensors.values()))
    close(family_forward("flux", patched), family_forward("flux", expected), 1e-6)
    assert "matched: 1 of 1 weights" in report.to_text()
    assert "can only be merged, which core does" in report.to_text()
    with pytest.raises(ValueError, match="cannot stay beside the weights"):
        apply(model, written(tmp_path, tensors), mode="bypass")


def test_core_merges_dora_and_oft(apply: Any, tmp_path: Path, comfyui: Path) -> None:
    """As core's own loader does."""
    import comfy.sd

    stem = f"transformer.{BLOCK}.attn.to_out.0"
    dora = {
        f"{stem}.lora_A.weight": random(2, 24),
        f"{stem}.lora_B.weight": random(24, 2),
        f"{stem}.dora_scale": random(24, 1).abs(),
    }
    oft = {f"transformer.{BLOCK}.ff.net.2.oft_blocks": random(4, 6, 6)}
    for tensors in (dora, oft):
        model = load_family("flux")
        base = family_forward("flux", model)
        expected, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)
        patched, _ = apply(model, written(tmp_path, tensors))
        found = family_forward("flux", patched)
        close(found, family_forward("flux", expected), 0)
        assert not torch.allclose(found, base, atol=1e-2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"transformer.nowhere.lokr_w1": random(4, 4)}, r"has no use for 1 of its 3 keys.*nowhere"),
        ({f"{BLOCK}.norm1.linear.lora_magnitude_vector": random(24)}, "has no use for 1 of its 3"),
        (
            lokr(f"transformer.{BLOCK}.ff.net.2"),
            r"is \[24, 96\]; .* is \[24, 24",
        ),
    ],
)
def test_every_key_must_be_of_use_to_core(
    extra: dict[str, Tensor], message: str, apply: Any, tmp_path: Path, comfyui: Path
) -> None:
    tensors = lokr(f"transformer.{BLOCK}.attn.to_v") | extra
    with pytest.raises(ValueError, match=message):
        apply(load_family("flux"), written(tmp_path, tensors))


def test_keys_of_a_text_encoder_are_left_alone(apply: Any, tmp_path: Path, comfyui: Path) -> None:
    tensors = lokr(f"transformer.{BLOCK}.attn.to_v") | lokr("lora_te1_text_model_x")
    _, report = apply(load_family("flux"), written(tmp_path, tensors))
    assert "2 keys of the file belong to no layer" in report.to_text()
