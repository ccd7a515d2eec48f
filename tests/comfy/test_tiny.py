"""The embedded tiny model's nodes: strict loading, the loader's own code path, prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(
    tiny_folder: Path,
    tmp_path: Path,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
) -> Path:
    """The toy model with a LoRA, laid out as the embedded one is."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "lora").mkdir()
    shutil.copy(write_lora(make_updates()), folder / "lora" / "tiny.safetensors")
    return folder


def test_from_folder_to_image(pack: Any, folder: Path, sample: Any) -> None:
    tiny = pack("nodes.tiny")
    model, vae, report = tiny.load_tiny(folder)
    assert "tiny.safetensors" in report
    prompt = tiny.conditioning("a red letter K")
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    sampled, warnings = sample(model, prompt, latent, 0)
    image = vae.decode(sampled["samples"])
    assert image.shape == (1, 1, 64, 64, 3)
    assert warnings == []


def test_it_is_the_loader_code_path(
    pack: Any, folder: Path, forward: Any, make_updates: Any, forward_with: Any
) -> None:
    model, _, _ = pack("nodes.tiny").load_tiny(folder)
    deltas = {name: update.delta() for name, update in make_updates().items()}
    torch.testing.assert_close(forward(model), forward_with(deltas), rtol=1e-5, atol=1e-5)
    assert pack("nodes.spec_attachment").attached_to(model).spec.steps == 2


def test_the_teacher_has_no_lora_and_no_spec(
    pack: Any, folder: Path, forward: Any, forward_with: Any
) -> None:
    tiny = pack("nodes.tiny")
    model, _, report = tiny.load_tiny(folder, tiny.TEACHER)
    torch.testing.assert_close(forward(model), forward_with({}))
    assert pack("nodes.spec_attachment").attached_to(model) is None
    assert "50 steps" in report


def test_a_missing_tensor_is_an_error(pack: Any, folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("img_in.bias")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"transformer: 1 tensors.*img_in\.bias.*install the pack"):
        pack("nodes.tiny").load_tiny(folder)


def test_a_missing_file_is_an_error(pack: Any, folder: Path) -> None:
    shutil.rmtree(folder / "lora")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file.*turbo-distill tiny"):
        pack("nodes.tiny").load_tiny(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors is missing"):
        pack("nodes.tiny").load_tiny(folder)


def test_prompts(pack: Any, run_node: Any) -> None:
    (cond,) = run_node(pack("nodes.tiny").TurboTinyText, text="a handwritten seven")
    assert cond[0][0].shape == (1, 8, 64)
    with pytest.raises(ValueError, match=r"does not know the word 'purple'.*red"):
        run_node(pack("nodes.tiny").TurboTinyText, text="a purple letter K")


def test_bf16_weights_run_in_float32(pack: Any, folder: Path, forward: Any) -> None:
    """The shipped files are bf16; ComfyUI and diffusers then compute the same in float32."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    model = pack("nodes.tiny").load_transformer(folder / "transformer")
    assert forward(model).dtype == torch.float32
    assert json.loads((folder / "transformer" / "config.json").read_text())["num_layers"] == 2
