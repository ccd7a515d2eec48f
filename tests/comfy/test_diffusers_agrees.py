"""The same weights, LoRA, noise and sigmas give the same latents and images as diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIGMAS = [1.0, 0.7155]
SEED = 5
HEIGHT, WIDTH = 64, 96  # pixels


@pytest.fixture
def pipeline(tiny_folder: Path) -> Any:
    """diffusers' own QwenImagePipeline around the toy model; prompts come in as embeddings."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(tiny_folder / "vae"),
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel.from_pretrained(tiny_folder / "transformer"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_latents_equal_the_diffusers_pipeline(
    mode: str,
    pack: Any,
    model: Any,
    pipeline: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
    prompt: Any,
    sample: Any,
) -> None:
    import comfy.sample

    path = write_lora(make_updates(ranks=(4, 2)))
    patched, _ = pack("nodes.apply_lora").apply_lora(model, path, mode=mode)
    empty = {"samples": torch.zeros(2, 16, HEIGHT // 8, WIDTH // 8)}
    ours, _ = sample(patched, prompt, empty, SEED)
    ours = patched.model.process_latent_in(ours["samples"])

    keys = pack("distill.contract.lora_keys")
    lora = keys.normalise(*pack("distill.contract.metadata").read_lora(path), source=path.name)
    pipeline.load_lora_weights(keys.to_diffusers(lora))
    noise = comfy.sample.prepare_noise(torch.zeros(2, 16, 1, HEIGHT // 8, WIDTH // 8), SEED)
    embeds = prompt[0][0].repeat(2, 1, 1)
    with torch.no_grad():
        packed = pipeline(
            prompt_embeds=embeds,
            prompt_embeds_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            latents=pipeline._pack_latents(noise, 2, 16, HEIGHT // 8, WIDTH // 8),
            sigmas=SIGMAS,
            true_cfg_scale=1.0,
            height=HEIGHT,
            width=WIDTH,
            output_type="latent",
        ).images
    theirs = pipeline._unpack_latents(packed, HEIGHT, WIDTH, 8)

    error = (ours - theirs).norm() / theirs.norm()
    assert error < 1e-5


def test_the_vae_equals_diffusers(pack: Any, tiny_folder: Path, pipeline: Any) -> None:
    vae = pack("nodes.tiny").load_vae(tiny_folder / "vae")
    latent = torch.randn(2, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline.vae.decode(latent).sample[:, :, 0]  # [B, 3, H, W] in about [-1, 1]
    ours = vae.decode(latent)[:, 0]  # [B, H, W, 3] in [0, 1]
    expected = ((theirs + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01

    image = torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    pixels = image.permute(0, 3, 1, 2)[:, :, None] * 2 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(vae.encode(image), mean, rtol=1e-4, atol=1e-5)


def test_every_vae_name_is_mapped_once(pack: Any, pipeline: Any) -> None:
    names = list(pipeline.vae.state_dict())
    mapped = pack("nodes.vae_keys").to_wan_names(dict.fromkeys(names))
    assert len(mapped) == len(names)
    with pytest.raises(ValueError, match="no tensor of AutoencoderKLQwenImage"):
        pack("nodes.vae_keys").wan_name("decoder.up_blocks.0.attentions.0.norm.gamma")


def test_the_trainers_bf16_sees_the_time_that_comfyui_sees(pack: Any, tiny_folder: Path) -> None:
    """bfloat16 has no .7155, and .7148 is another time to a model that counts to 1000."""
    from diffusers import QwenImageTransformer2DModel

    from distill.models.qwen_image import velocity
    from distill.models.text import Text

    x = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    text = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    embedded: list[torch.Tensor] = []
    theirs = pack("nodes.tiny").load_transformer(tiny_folder / "transformer")
    net = theirs.model.diffusion_model.to(torch.bfloat16)
    ours = QwenImageTransformer2DModel.from_pretrained(
        tiny_folder / "transformer", torch_dtype=torch.bfloat16
    )
    for model in (net, ours):
        model.time_text_embed.register_forward_hook(lambda m, args, out: embedded.append(out))

    def trained(t: float) -> torch.Tensor:
        return velocity(ours, x, torch.full((2,), t), Text(text)).float()

    core = net(x[:, :, None], torch.full((2,), 0.7155), text)[:, :, 0].float()
    exact, rounded = trained(0.7155), trained(0.71484375)
    assert torch.equal(embedded[0], embedded[1])
    assert not torch.equal(embedded[0], embedded[2])
    error, without = ((v - core).norm() / core.norm() for v in (exact, rounded))
    assert error < 0.02
    assert error < without / 2
