"""The exported LoRA is the student: for us, for diffusers and for ComfyUI's core."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file

from distill import models
from distill.config import AdapterSection, GuidanceSection
from distill.contract.lora_keys import LoraFormatError, delta, normalise
from distill.contract.metadata import read_lora, resolve_spec
from distill.contract.spec import TurboSpec
from distill.export import export_lora, load_student
from distill.models import Text
from distill.roles import STUDENT, TEACHER, Roles

SPEC = TurboSpec((1.0, 0.7155, 0.0), method="pcm")


@pytest.fixture
def roles(transformer: QwenImageTransformer2DModel) -> Roles:
    """A student that differs from its teacher, with alpha unlike its rank."""
    adapter = AdapterSection(rank=2, alpha=3.0, modulation=True)
    roles = Roles(transformer, adapter, GuidanceSection(), Text(torch.zeros(1, 2, 24)), 0)
    for i, parameter in enumerate(roles.parameters(STUDENT)):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data.copy_(0.2 * noise)
    return roles


@pytest.fixture
def lora(roles: Roles, tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    return export_lora(
        roles, SPEC, path, title="student", extra={"ss_steps": "3"}, dtype=torch.float32
    )


def student_velocity(roles: Roles) -> tuple[tuple[torch.Tensor, torch.Tensor, Text], torch.Tensor]:
    torch.manual_seed(3)
    inputs = torch.randn(2, 16, 4, 4), torch.rand(2), Text(torch.randn(2, 3, 24))
    with torch.no_grad():
        return inputs, roles.velocity(STUDENT, *inputs)


def test_it_carries_its_spec_and_names(lora: Path) -> None:
    tensors, metadata = read_lora(lora)
    assert resolve_spec(lora, metadata)[0] == SPEC
    assert metadata["ss_steps"] == "3"
    assert metadata["ss_network_dim"] == "2"
    assert float(tensors["diffusion_model.transformer_blocks.0.attn.to_q.alpha"]) == 3.0
    assert {key.split(".")[0] for key in tensors} == {"diffusion_model"}


def test_diffusers_loads_it(
    lora: Path, roles: Roles, new_transformer: Callable[[], QwenImageTransformer2DModel]
) -> None:
    inputs, expected = student_velocity(roles)
    transformer = new_transformer()
    # What load_lora_weights of diffusers' pipeline does with such a file
    from diffusers import QwenImagePipeline

    state, metadata = QwenImagePipeline.lora_state_dict(str(lora), return_lora_metadata=True)
    QwenImagePipeline.load_lora_into_transformer(state, transformer, metadata=metadata)
    with torch.no_grad():
        assert torch.allclose(models.velocity(transformer, *inputs), expected, atol=1e-5)


def test_our_own_loading_restores_the_student(
    lora: Path, roles: Roles, new_transformer: Callable[[], QwenImageTransformer2DModel]
) -> None:
    inputs, expected = student_velocity(roles)
    adapter = AdapterSection(rank=2, modulation=True)  # another alpha: the scale is adopted
    other = Roles(new_transformer(), adapter, GuidanceSection(), Text(torch.zeros(1, 2, 24)), 9)
    load_student(other, lora)
    with torch.no_grad():
        assert torch.allclose(other.velocity(STUDENT, *inputs), expected, atol=1e-5)
        assert not torch.allclose(other.velocity(TEACHER, *inputs), expected, atol=1e-3)


def test_a_file_of_another_rank_or_kind_is_refused(
    lora: Path, tmp_path: Path, new_transformer: Callable[[], QwenImageTransformer2DModel]
) -> None:
    negative = Text(torch.zeros(1, 2, 24))
    wide = AdapterSection(rank=4, modulation=True)
    with pytest.raises(ValueError, match="expected rank 4, found 2"):
        load_student(Roles(new_transformer(), wide, GuidanceSection(), negative, 0), lora)
    narrow = AdapterSection(rank=2)
    with pytest.raises(ValueError, match="modules differ"):
        load_student(Roles(new_transformer(), narrow, GuidanceSection(), negative, 0), lora)
    (tmp_path / "no.safetensors").write_bytes(b"<html>")
    with pytest.raises(LoraFormatError, match=r"no\.safetensors"):
        load_student(
            Roles(new_transformer(), narrow, GuidanceSection(), negative, 0),
            tmp_path / "no.safetensors",
        )


@pytest.mark.comfy
def test_core_loads_every_key(lora: Path, comfyui: object) -> None:
    """`comfy.lora` finds all modules and computes the same delta."""
    import comfy.lora
    import comfy.supported_models

    tensors, metadata = read_lora(lora)
    modules = normalise(tensors, metadata, source=lora.name).modules
    key_map = {f"diffusion_model.{name}": f"diffusion_model.{name}.weight" for name in modules}
    loaded = comfy.lora.load_lora(load_file(lora), key_map)
    assert set(loaded) == set(key_map.values())
    for name, module in modules.items():
        key = f"diffusion_model.{name}.weight"
        zero = torch.zeros(module.up.shape[0], module.down.shape[1])
        patched = comfy.lora.calculate_weight([(1.0, loaded[key], 1.0, None, None)], zero, key)
        assert torch.allclose(patched, delta(module), atol=1e-5)


def test_the_header_is_json_where_it_says_so(lora: Path) -> None:
    _, metadata = read_lora(lora)
    assert json.loads(metadata["turbo.spec"])["sigmas"] == [1.0, 0.7155, 0.0]
