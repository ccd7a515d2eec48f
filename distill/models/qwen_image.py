"""Qwen-Image, the model family: how diffusers' QwenImageTransformer2DModel is called, the names of
its layers, how its latents are packed, its sizes and its teacher's schedule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..contract.known import QWEN_SIZES
from ..contract.schedule import schedule
from . import flow
from .family import Family
from .sizes import Size
from .text import Text, concatenate
from .text_encoder import QwenTextEncoder
from .vae import QWEN_VAE

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

PATCH = 2  # latents per token and side
TOKEN = PATCH * QWEN_VAE.pixels  # pixels per token and side
PLAIN_SHIFT = 2.0  # of the teacher's schedule where no scheduler file tells

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
TEXT = (
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)
MODULATION = ("img_mod.1", "txt_mod.1")


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> tokens of 2x2 latents [B, h/2 * w/2, 4 C]."""
    b, c, h, w = latents.shape
    x = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverse of `pack` for latents of `height` x `width`."""
    b, _, c = tokens.shape
    x = tokens.view(b, height // PATCH, width // PATCH, c // PATCH**2, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, height, width)


def predict_tokens(
    transformer: QwenImageTransformer2DModel, x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> torch.Tensor:
    """The transformer's velocity as tokens.  x_t [B, C, h, w], t [B] -> [B, tokens, 4 C]

    The transformer computes in its own precision; latents and velocities keep that of x_t, times
    float32.
    """
    height, width = x_t.shape[-2:]
    dtype = precision(transformer)
    with exact_time(transformer, t):
        return transformer(
            hidden_states=pack(x_t).to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            encoder_hidden_states_mask=text.mask,
            timestep=t,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
            return_dict=False,
        )[0].to(x_t.dtype)


@contextmanager
def exact_time(transformer: torch.nn.Module, t: torch.Tensor) -> Iterator[None]:
    """Has the time embedding see t [B] in float32, as in ComfyUI; diffusers rounds it to the
    model's precision, and bfloat16 knows .7148 and .7188 but nothing between.
    """

    def hand_over(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        exact = t.float()
        # Further times, of reference images (zero_cond_t) or prompts (causal_condition), are 0
        return (torch.cat([exact, exact.new_zeros(len(args[0]) - len(t))]), *args[1:])

    hook = transformer.time_text_embed.register_forward_pre_hook(hand_over)
    try:
        yield
    finally:
        hook.remove()


def velocity(
    transformer: QwenImageTransformer2DModel, x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> torch.Tensor:
    """v(x_t, t | text): [B, C, h, w] -> [B, C, h, w]"""
    return unpack(predict_tokens(transformer, x_t, t, text), *x_t.shape[-2:])


def velocity_pair(
    transformer: QwenImageTransformer2DModel,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Text,
    negative: Text,
    scale: float,
    rescale: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and guided velocity from the one batch that guidance takes; without guidance
    (scale 1) one pass.
    """
    if scale == 1:
        v = velocity(transformer, x_t, t, text)
        return v, v
    cond, uncond = predict_tokens(
        transformer,
        torch.cat([x_t, x_t]),
        torch.cat([t, t]),
        concatenate(text, negative.repeat(len(x_t)) if len(negative) == 1 else negative),
    ).chunk(2)
    size = x_t.shape[-2:]
    return unpack(cond, *size), unpack(flow.guide(cond, uncond, scale, rescale), *size)


def precision(transformer: torch.nn.Module) -> torch.dtype:
    """In which the base computes; asked of a layer that has no adapters."""
    return transformer.img_in.weight.dtype


def hidden_maps(
    transformer: QwenImageTransformer2DModel,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Text,
    blocks: list[int],
) -> list[torch.Tensor]:
    """The image tokens that leave each of `blocks` (ascending) in a forward pass, as maps.  # [B,
    D, h/2, w/2]
    """
    caught: list[torch.Tensor] = []
    hooks = [
        transformer.transformer_blocks[i].register_forward_hook(
            lambda module, args, output: caught.append(output[1])
        )
        for i in blocks
    ]
    try:
        predict_tokens(transformer, x_t, t, text)
    finally:  # before any backward: checkpointed blocks run again there
        for hook in hooks:
            hook.remove()
    size = (x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH)
    return [tokens.to(x_t.dtype).transpose(1, 2).unflatten(2, size) for tokens in caught]


def pipeline_sigmas(folder: Path, steps: int, size: Size) -> tuple[float, ...]:
    """The sigmas that diffusers' pipeline takes for images of `size`, by the model's scheduler
    file; without one a static shift.
    """
    tokens = (size[0] // TOKEN) * (size[1] // TOKEN)
    return scheduler_sigmas(folder, steps, tokens) or schedule(steps, shift=PLAIN_SHIFT)


def scheduler_sigmas(folder: Path, steps: int, tokens: int) -> tuple[float, ...] | None:
    """What a model's scheduler file makes of evenly spaced levels for images of `tokens`, as the
    pipelines of Qwen-Image ask it; None without one.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    values = json.loads(path.read_text(encoding="utf-8"))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(values)
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return tuple(scheduler.sigmas.tolist())


FAMILY = Family(
    architecture="qwen-image",
    transformer="diffusers:QwenImageTransformer2DModel",
    pipeline="QwenImagePipeline",
    hub_ids=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
    blocks="transformer_blocks",
    lora_targets=(*ATTENTION, *MLP),
    modulation=MODULATION,
    width=lambda transformer: transformer.inner_dim,
    text_width=lambda transformer: transformer.config.joint_attention_dim,
    latent_channels=lambda transformer: transformer.config.in_channels // PATCH**2,
    precision=precision,
    velocity=velocity,
    velocity_pair=velocity_pair,
    hidden_maps=hidden_maps,
    vae=QWEN_VAE,
    text_encoder=QwenTextEncoder,
    negative=" ",  # diffusers' pipeline wants a blank
    token=TOKEN,
    sizes=QWEN_SIZES,
    size=QWEN_SIZES[0],
    sigmas=pipeline_sigmas,
    text_layers=TEXT,
    workflows={
        "Qwen-Image-2512": "qwen_image_2512_turbo_2_steps.json",
        "Qwen-Image": "qwen_image_lightning_8_steps.json",
    },
)
