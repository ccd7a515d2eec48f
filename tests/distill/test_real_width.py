"""Qwen-Image at its real width, two of its sixty blocks: trained, then loaded in ComfyUI."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from distill.config import parse_config
from distill.contract.lora_keys import normalise
from distill.contract.metadata import read_lora
from distill.contract.tiny import TINY_DIR
from distill.data.batch import Batch
from distill.lora.student import load_student
from distill.models.load import load_transformer
from distill.models.qwen_image import FAMILY
from distill.models.roles import STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.trainer import train
from distill.utils.rng import Rng

WIDTH, TEXT_WIDTH, BLOCKS = 3072, 3584, 2
SIDE = 8  # latents


@dataclass(frozen=True)
class WideData:
    """Random latents, teacher latents and prompts of Qwen2.5-VL's width."""

    @property
    def negative(self) -> Text:
        return Text(torch.randn(1, 4, TEXT_WIDTH, generator=torch.Generator().manual_seed(1)))

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        shape = (batch_size, 16, SIDE, SIDE)
        text = Text(rng.normal("text", (batch_size, 6, TEXT_WIDTH)))
        return Batch(rng.normal("x0", shape), text, rng.normal("teacher_x0", shape))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in diffusers layout: the published shape with two blocks, and the tiny VAE."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = QwenImageTransformer2DModel(num_layers=BLOCKS)
    finally:
        torch.set_default_dtype(before)
    assert transformer.inner_dim == WIDTH
    for name, parameter in transformer.named_parameters():
        if name.endswith(".weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    transformer.save_pretrained(folder / "transformer")
    shutil.copytree(TINY_DIR / "vae", folder / "vae")
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(wide_model: Path, dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two DMD2 + GAN steps in bf16; returns the configuration and the LoRA's path."""
    gan = {"features": str(dino), "width": 16, "crop": 8, "halo": 1, "ramp": 1}
    stage = {"method": "dmd2", "steps": 2, "lr": 1e-3, "fake_lr": 1e-3, "fake_updates": 1}
    values = {
        "run_dir": str(tmp_path_factory.mktemp("run") / "run"),
        "model": {"path": str(wide_model)},
        "data": {"cache": "handed_over"},
        "adapter": {"rank": 4},
        "stages": [{**stage, "fake_warmup": 0, "gradient_step": "last", "gan": gan}],
        "preview": {"every": 0},
        "log_every": 1,
    }
    config = parse_config(values, "wide")
    return config, train(config, data=WideData())


@pytest.mark.slow
def test_a_dmd2_gan_step_trains_every_layer(run: Any) -> None:
    config, path = run
    lora = normalise(*read_lora(path), source=path.name)
    assert len(lora.modules) == BLOCKS * len(FAMILY.targets(config.adapter.modulation))
    idle = [name for name, module in lora.modules.items() if not module.up.any()]
    # what the text stream does after the last attention reaches no output
    last = f"transformer_blocks.{BLOCKS - 1}"
    text = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert sorted(idle) == sorted(f"{last}.{name}" for name in text)
    log = (config.run_dir / "log.jsonl").read_text()
    assert "gan/accuracy_real" in log
    assert "gan/weight" in log


@pytest.mark.slow
@pytest.mark.comfy
def test_its_lora_loads_in_the_model_that_comfyui_detects(
    run: Any, wide_model: Path, pack: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Core's own loader takes every key; ours gives the velocity that training saw."""
    import comfy.sd
    from comfy.model_management import load_models_gpu

    config, path = run
    batch, t = WideData().batch(Rng(0, 9), 1), torch.tensor([0.7155])
    roles = Roles(
        load_transformer(str(wide_model), torch.float32),
        config.adapter,
        config.guidance,
        WideData().negative,
        config.seed,
    )
    load_student(roles, path)
    with torch.no_grad():
        teacher, student = (
            roles.velocity(role, batch.x0, t, batch.text) for role in (TEACHER, STUDENT)
        )
    del roles

    file = wide_model / "transformer" / "diffusion_pytorch_model.safetensors"
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        model = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float32})
        assert type(model.model).__name__ == "QwenImage"
        caplog.clear()
        comfy.sd.load_lora_for_models(model, None, load_file(path), 1.0, 0.0)
        assert caplog.text == ""
        patched, report = pack("nodes.apply_lora").apply_lora(model, path)
        assert len(report.lora.modules) == BLOCKS * len(FAMILY.targets(config.adapter.modulation))
        load_models_gpu([patched])
        velocity = patched.model.diffusion_model(batch.x0[:, :, None], t, batch.text.embeds)
    update = (student - teacher).norm()
    assert update > 1e-3 * teacher.norm()
    assert (velocity[:, :, 0] - student).norm() < 1e-2 * update
