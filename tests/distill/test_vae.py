"""The VAE for single images: folded convolutions, normalised latents, adopted statistics."""

from __future__ import annotations

import copy
from pkgutil import resolve_name

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.live import META, Live
from distill.models.vae import (
    QWEN_VAE,
    QWEN_VAE_21,
    Autoencoder,
    decode,
    encode,
    fold_single_frame,
)
from distill.tiny.pretrain import VAE_CONFIG, adopt_latent_statistics


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(**VAE_CONFIG).eval().requires_grad_(False)


def test_folding_changes_nothing(vae: AutoencoderKLQwenImage) -> None:
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    folded = fold_single_frame(copy.deepcopy(vae))
    for plain, fast in zip(encode(vae, images), encode(folded, images), strict=True):
        assert torch.allclose(plain, fast, atol=1e-5)
    latents = torch.randn(2, 16, 4, 6)
    assert torch.allclose(decode(vae, latents), decode(folded, latents), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_over_channels_stays(vae: AutoencoderKLQwenImage, dtype: torch.dtype) -> None:
    plain = copy.deepcopy(vae).to(dtype).encoder.norm_out
    folded = fold_single_frame(copy.deepcopy(vae).to(dtype)).encoder.norm_out
    x = torch.randn(2, len(plain.gamma), 1, 4, 4).to(dtype)
    x[0, :, 0, 0, 0] = 0  # a vector without a length
    assert folded.forward is not plain.forward
    assert torch.allclose(folded(x), plain(x), atol=1e-6)
    assert torch.isfinite(folded(x)).all()


def test_folding_leaves_videos_alone(vae: AutoencoderKLQwenImage) -> None:
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    folded = fold_single_frame(copy.deepcopy(vae))
    expected = vae.encode(video).latent_dist.mean
    assert torch.allclose(folded.encode(video).latent_dist.mean, expected, atol=1e-5)


def test_adopting_statistics_keeps_the_pictures(vae: AutoencoderKLQwenImage) -> None:
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    adopted = copy.deepcopy(vae)
    adopt_latent_statistics(adopted, images)
    mean, std = encode(adopted, images)
    assert torch.allclose(mean.mean((0, 2, 3)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(mean.std((0, 2, 3)), torch.ones(16), atol=1e-3)

    before, after = (v.encode(images[:, :, None]).latent_dist for v in (vae, adopted))
    pictures = [v.decode(d.mean).sample for v, d in ((vae, before), (adopted, after))]
    assert torch.allclose(*pictures, atol=1e-3)
    stock_std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    gain = after.std[:, :, 0] / before.std[:, :, 0]
    assert torch.allclose(std, after.std[:, :, 0] / stock_std, rtol=1e-5)
    assert torch.allclose(gain, gain.mean((0, 2, 3), keepdim=True).expand_as(gain), rtol=1e-3)


@pytest.mark.parametrize("vae", [QWEN_VAE, QWEN_VAE_21], ids=["2512", "2.1"])
def test_the_published_one_costs_what_is_said(vae: Autoencoder) -> None:
    """Parameters, operations and what its gradient keeps, on meta tensors."""
    side, said = 24, vae.published
    with META:
        model = resolve_name(vae.kind)().to(torch.bfloat16).requires_grad_(False)
    model = vae.prepare(model)
    assert model.config[said.width[0]] == said.width[1]
    assert sum(p.numel() for p in model.parameters()) == said.parameters
    with Live() as live:
        shape = (1, vae.channels, side, side)
        latents = torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True)
        vae.decode_with_gradient(model, latents).sum().backward()
    assert said.numbers == pytest.approx(live.peak / 2 / side**2, rel=0.01)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        vae.decode_with_gradient(model, latents)
    assert said.flop == pytest.approx(counter.get_total_flops() / side**2, rel=0.01)
