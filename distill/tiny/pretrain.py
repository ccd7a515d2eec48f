"""Trains the embedded tiny Qwen-Image from nothing: images -> VAE -> latents -> teacher.

    turbo-distill tiny --out FOLDER [--stages vae classifier teacher quality] [--seed 0]

Run once; the result is shipped in `distill/tiny/model`. Budgets are counted in steps, so a seed
means the same run.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

from ..contract.tiny import TEXT_WIDTH
from ..models import flow
from ..models.qwen_image import velocity
from ..models.text import Text
from ..models.vae import fold_single_frame
from ..utils.files import replace_file
from ..utils.images import to_unit
from ..utils.progress import progress
from ..utils.rng import Rng
from . import classifier
from .data import TinyData
from .images import ImageSet, digits, join, letters

log = logging.getLogger(__name__)

# Depth and block count are the ones ComfyUI's loader assumes for a VAE of this type; only the width
# is ours.
VAE_CONFIG = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
TRANSFORMER_CONFIG = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 4,
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (8, 12, 12),
}
TRAIN_LETTERS = 24_000


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def vae_loss(
    vae: AutoencoderKLQwenImage, images: torch.Tensor, noise: torch.Tensor, kl_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative ELBO with squared and absolute error; also the mean squared error alone.

    images: [B, 3, H, W] in [-1, 1]; noise: [B, 16, 1, H/8, W/8]
    """
    mean, log_var = vae.quant_conv(vae.encoder(images[:, :, None])).chunk(2, dim=1)
    log_var = log_var.clamp(-30, 20)
    z = mean + (0.5 * log_var).exp() * noise
    decoded = vae.decoder(vae.post_quant_conv(z))[:, :, 0]
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    mse = F.mse_loss(decoded, images)
    return mse + 0.2 * F.l1_loss(decoded, images) + kl_weight * kl, mse


@torch.no_grad()
def adopt_latent_statistics(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> None:
    """Folds an affine map into the 1x1 convolutions beside the latent, so that the latents of
    `images` have the mean and standard deviation of the stock VAE. Then every program's built-in
    constants hold for this VAE too.
    """
    means = torch.cat([vae.encode(x[:, :, None]).latent_dist.mean for x in images.split(64)])[
        :, :, 0
    ]
    m, s = means.mean((0, 2, 3)), means.std((0, 2, 3))
    mean, std = means.new_tensor(vae.config.latents_mean), means.new_tensor(vae.config.latents_std)
    gain = std / s

    before, after = vae.quant_conv, vae.post_quant_conv
    n = len(gain)
    # z' = (z - m) gain + mean, hence log var' = log var + 2 log gain, and z = (z' - mean) / gain +
    # m
    before.weight[:n] *= gain.view(-1, 1, 1, 1, 1)
    before.bias[:n] = (before.bias[:n] - m) * gain + mean
    before.bias[n:] += 2 * gain.log()
    after.bias += torch.einsum("oi,i->o", after.weight[:, :, 0, 0, 0], m - mean / gain)
    after.weight /= gain.view(1, -1, 1, 1, 1)


def train_vae(
    images: torch.Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    kl_weight: float,
    seed: int,
    compile: bool = False,
    config: dict[str, Any] = VAE_CONFIG,
    device: str | torch.device = "cpu",
) -> AutoencoderKLQwenImage:
    """A VAE of the stock class whose latents have the stock mean and standard deviation.

    images: [N, 3, H, W] uint8
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vae = fold_single_frame(AutoencoderKLQwenImage(**config))
    with (
        torch.no_grad()
    ):  # start almost deterministic: at standard deviation 1 the decoder would see mostly noise
        vae.quant_conv.bias[config["z_dim"] :] -= 6
    vae.to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    loss_of: Callable[..., tuple[torch.Tensor, torch.Tensor]] = (
        torch.compile(vae_loss) if compile else vae_loss
    )
    shape = (batch, config["z_dim"], 1, *(side // 8 for side in images.shape[-2:]))

    bar = progress(range(steps), what="VAE")
    average = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps)
        x = to_unit(images[torch.randint(len(images), (batch,), generator=generator)].to(device))
        noise = torch.randn(shape, generator=generator).to(device)
        loss, mse = loss_of(vae, x, noise, kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average = mse.item() if average is None else 0.98 * average + 0.02 * mse.item()
        if step % 20 == 0:
            bar.set_postfix(psnr=f"{10 * math.log10(4 / average):.2f} dB")
    vae.requires_grad_(False)
    adopt_latent_statistics(vae, to_unit(images[:: max(1, len(images) // 4000)].to(device)))
    return vae


def training_images(seed: int) -> ImageSet:
    """Letters and the training digits, the digits repeated to a fifth of the whole."""
    return join(letters(TRAIN_LETTERS, seed), *[digits("train")] * 4)


@torch.no_grad()
def psnr(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstruction in dB."""
    x = to_unit(images)
    decoded = torch.cat(
        [
            vae.decode(vae.encode(b[:, :, None]).latent_dist.mean).sample[:, :, 0]
            for b in x.split(64)
        ]
    )
    return 10 * math.log10(4 / F.mse_loss(decoded.clamp(-1, 1), x).item())


def save_rounded(model: torch.nn.Module, folder: Path) -> None:
    """Writes the weights in bfloat16, the precision in which they are shipped."""
    model.to(torch.bfloat16).save_pretrained(folder)


def run_vae(out: Path, *, steps: int, seed: int, compile: bool) -> None:
    data = training_images(seed)
    log.info("%d training images", len(data))
    started = time.monotonic()
    vae = train_vae(
        data.images, steps=steps, batch=16, lr=2e-3, kl_weight=1e-4, seed=seed, compile=compile
    )
    log.info(
        "VAE: %.0f s, held-out letters %.2f dB, held-out digits %.2f dB",
        time.monotonic() - started,
        psnr(vae, letters(500, seed + 1).images),
        psnr(vae, digits("held_out").images),
    )
    save_rounded(vae, out / "vae")


def hold_then_decay(step: int, steps: int, warmup: int = 200, decay: float = 0.25) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear to zero over the last `decay`
    of the steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / (decay * steps))


def sample_times(rng: Rng, batch_size: int) -> torch.Tensor:
    """Training times: one half uniform, one half logit-normal, then shifted towards noise by 2.  #
    [B]
    """
    uniform = rng.uniform("t/uniform", batch_size)
    normal = torch.sigmoid(rng.normal("t/normal", (batch_size,)))
    return flow.shift(torch.where(rng.uniform("t/kind", batch_size) < 0.5, uniform, normal), 2.0)


def teacher_loss(
    transformer: QwenImageTransformer2DModel, data: TinyData, rng: Rng, batch_size: int
) -> torch.Tensor:
    """Flow matching, E |v(x_t, t, text) - (eps - x0)|^2, with one prompt in ten left empty."""
    batch, device = data.batch(rng, batch_size), transformer.device
    keep = (rng.uniform("dropout", batch_size) >= 0.1).view(-1, 1, 1)
    text = Text(torch.where(keep, batch.text.embeds, data.negative.embeds)).to(device)
    x0 = batch.x0.to(device)
    eps = rng.normal("eps", tuple(x0.shape)).to(device)
    t = sample_times(rng, batch_size).to(device)
    v = velocity(transformer, flow.add_noise(x0, eps, t), t, text)
    return F.mse_loss(v, eps - x0)


def train_teacher(
    data: TinyData,
    state_file: Path,
    *,
    steps: int,
    batch: int,
    lr: float,
    ema_decay: float,
    seed: int,
    compile: bool = False,
    config: dict[str, Any] = TRANSFORMER_CONFIG,
    device: str | torch.device = "cpu",
) -> QwenImageTransformer2DModel:
    """The exponential moving average of a transformer trained on `data`; continues from
    `state_file` if it exists.
    """
    # Weights, their EMA, optimiser
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(**config).to(device)
    ema = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    # Where to start
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        transformer.load_state_dict(state["transformer"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    # Main loop
    if compile:
        transformer.compile()
    bar = progress(range(first, steps), what="teacher", done=first, total=steps)
    average = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * hold_then_decay(step, steps)
        loss = teacher_loss(transformer, data, Rng(seed, step), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        for average_weight, weight in zip(ema.parameters(), transformer.parameters(), strict=True):
            average_weight.lerp_(weight.detach(), 1 - decay)

        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 1000 == 0:
            state = {
                "transformer": transformer.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            replace_file(state_file, lambda path, state=state: torch.save(state, path))
    return ema


def run_teacher(out: Path, *, steps: int, seed: int, compile: bool) -> None:
    vae = fold_single_frame(
        AutoencoderKLQwenImage.from_pretrained(out / "vae", torch_dtype=torch.float32)
    )
    data = TinyData.from_images(vae, join(letters(TRAIN_LETTERS, seed), digits("train")))
    teacher = train_teacher(
        data,
        out / "teacher_state.pt",
        steps=steps,
        batch=64,
        lr=1e-3,
        ema_decay=0.9995,
        seed=seed,
        compile=compile,
    )
    save_rounded(teacher, out / "transformer")


def run_classifier(out: Path, *, seed: int) -> None:
    net = classifier.train_classifier(1200, seed)
    classifier.save(net, out / "classifier.safetensors")
    log.info(
        "classifier: held-out letters %s, held-out digits %s (symbol, colour)",
        classifier.accuracy(net, letters(1000, seed + 1)),
        classifier.accuracy(net, digits("held_out")),
    )
