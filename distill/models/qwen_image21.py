"""Qwen-Image-2.1, the model family: how diffusers' QwenImage21Transformer2DModel is called, the
names of its layers, its sizes, its teacher and its licence.

One stream of tokens: prompt, then image. Where the checkpoint says `causal_condition`, prompts are
modulated as at time 0 and see only what comes before them, so that their keys and values are the
same in every step; a `Text` that remembers keeps them.

An image's place in the sequence, which its rotary embedding tells it, is the length of its prompt
*with* padding. Padded prompts would thus draw other images than alone, and never those that the
LoRA draws in use. So no prompt is padded here: where lengths differ, samples are computed one by
one, the same number of times on all ranks, for a batch has a mask on all of them or on none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import GuidanceSection
from ..contract.known import SIZES
from ..contract.schedule import schedule
from ..contract.shift import LinearShift
from . import flow
from .family import BlockTensors, Family, Licence
from .qwen_image import exact_time, precision, scheduler_sigmas
from .sizes import Size
from .text import Text
from .text_encoder import Qwen3TextEncoder
from .vae import QWEN_VAE_21

if TYPE_CHECKING:
    from diffusers import QwenImage21Transformer2DModel

TOKEN = QWEN_VAE_21.pixels  # pixels per token and side: latents are not patched
SLOT = 4  # image tokens that `img_mask` has one place for: 2 x 2, so sides are even
PLAIN_SHIFT = LinearShift((256, 8192), (0.5, 0.9))  # where no scheduler file tells

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out")
# One for all blocks, and what brings prompts to the width of the stream
SHARED = ("modulation.1", "txt_in.in_layer", "txt_in.out_layer")
CACHE = "keys and values"  # what a Text remembers of itself


def predict_tokens(
    transformer: QwenImage21Transformer2DModel, x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> torch.Tensor:
    """The transformer's velocity as tokens.  x_t [B, C, h, w], t [B] -> [B, h w, C]

    The transformer computes in its own precision; latents and velocities keep that of x_t, times
    float32.
    """
    return torch.cat([_forward(transformer, *part) for part in _parts(x_t, t, text)])


def _parts(
    x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Text]]:
    """The samples that are computed together: all, or one by one where prompts are padded."""
    if text.mask is None:
        yield x_t, t, text
        return
    yield from zip(x_t.split(1), t.split(1), text.alone(), strict=True)


def _forward(
    transformer: QwenImage21Transformer2DModel, x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> torch.Tensor:
    """Of prompts without padding."""
    batch_size, _, height, width = x_t.shape
    tokens, dtype = height * width, precision(transformer)
    shape = (batch_size, text.embeds.shape[1] + tokens // SLOT)
    image = torch.zeros(shape, dtype=torch.bool, device=x_t.device)
    image[:, text.embeds.shape[1] :] = True
    with exact_time(transformer, t):
        joint = transformer(
            hidden_states=x_t.flatten(2).mT.to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            timestep=t,
            img_shapes=[[(1, height, width)]] * batch_size,
            img_mask=image,
            return_dict=False,
            **_remembered(transformer, text),
        )[0]
    return joint[:, -tokens:].to(x_t.dtype)


def _remembered(transformer: QwenImage21Transformer2DModel, text: Text) -> dict[str, Any]:
    """The transformer's own cache of what it computes of prompts, where the text remembers: filled
    by the first call, read by all others. Never with gradients, which have to reach the prompts.
    """
    if text.memory is None or torch.is_grad_enabled() or not transformer.config.causal_condition:
        return {}
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    mode = "cached" if CACHE in text.memory else "extract"
    if mode == "extract":
        text.memory[CACHE] = QwenImage21KVCache(len(transformer.transformer_blocks))
    return {"kv_cache": text.memory[CACHE], "kv_cache_mode": mode}


def velocity(
    transformer: QwenImage21Transformer2DModel, x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> torch.Tensor:
    """v(x_t, t | text): [B, C, h, w] -> [B, C, h, w]"""
    return _maps(predict_tokens(transformer, x_t, t, text), x_t)


def _maps(tokens: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """[B, h w, D] -> [B, D, h, w]"""
    return tokens.mT.unflatten(2, x_t.shape[-2:])


def velocity_pair(
    transformer: QwenImage21Transformer2DModel,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Text,
    negative: Text,
    scale: float,
    rescale: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and guided velocity; without guidance (scale 1) from one pass. The negative
    prompt has a length of its own, so it gets a pass of its own, as in diffusers' pipeline.
    """
    cond = predict_tokens(transformer, x_t, t, text)
    if scale == 1:
        v = _maps(cond, x_t)
        return v, v
    if len(negative) == 1:
        negative = negative.repeat(len(x_t))
    if text.memory is not None:
        negative = text.memory.setdefault("negative", negative.remembering())
    uncond = predict_tokens(transformer, x_t, t, negative)
    return _maps(cond, x_t), _maps(flow.guide(cond, uncond, scale, rescale), x_t)


def hidden_maps(
    transformer: QwenImage21Transformer2DModel,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Text,
    blocks: list[int],
) -> list[torch.Tensor]:
    """The image tokens that leave each of `blocks` (ascending) in a forward pass, as maps.  # [B,
    D, h, w]
    """
    tokens = x_t[0, 0].numel()
    caught: dict[int, list[torch.Tensor]] = {i: [] for i in blocks}
    hooks = [
        transformer.transformer_blocks[i].register_forward_hook(
            lambda module, args, output, i=i: caught[i].append(output[:, -tokens:])
        )
        for i in blocks
    ]
    try:
        predict_tokens(transformer, x_t, t, text)
    finally:  # before any backward: checkpointed blocks run again there
        for hook in hooks:
            hook.remove()
    return [_maps(torch.cat(parts).to(x_t.dtype), x_t) for parts in caught.values()]


def pipeline_sigmas(folder: Path, steps: int, size: Size) -> tuple[float, ...]:
    """The sigmas that diffusers' pipeline takes for images of `size`, by the model's scheduler
    file; without one by PLAIN_SHIFT.
    """
    tokens = (size[0] // TOKEN) * (size[1] // TOKEN)
    plain = schedule(steps, shift=PLAIN_SHIFT.factor(tokens, steps))
    return scheduler_sigmas(folder, steps, tokens) or plain


FAMILY = Family(
    architecture="qwen-image-2.1",
    transformer="diffusers:QwenImage21Transformer2DModel",
    pipeline="QwenImage21Pipeline",
    hub_ids=("Qwen/Qwen-Image-2.1",),
    blocks="transformer_blocks",
    lora_targets=(*ATTENTION, *MLP),
    modulation=SHARED,
    modulated_blocks=False,
    width=lambda transformer: transformer.inner_dim,
    text_width=lambda transformer: transformer.config.context_in_dim,
    latent_channels=lambda transformer: transformer.config.in_channels,
    precision=precision,
    velocity=velocity,
    velocity_pair=velocity_pair,
    hidden_maps=hidden_maps,
    vae=QWEN_VAE_21,
    text_encoder=Qwen3TextEncoder,
    negative=" ",  # as the pipeline reads an empty one
    token=TOKEN,
    multiple=2 * TOKEN,
    sizes=SIZES["qwen-image-2.1"],
    size=(1024, 1024),
    sigmas=pipeline_sigmas,
    block_tensors=BlockTensors(kept=31.1, backward=3.9, forward=18.3),  # benchmarks/dry_run/blocks
    guidance=GuidanceSection(scale=1, rescale=False),  # the model is made to draw without
    workflows={"Qwen-Image-2.1": "qwen_image_2_1_few_steps.json"},
    licence=Licence(
        name="Qwen Research License Agreement",
        hub_name="qwen-research",
        link="https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE",
        terms="research and evaluation only, no commercial use without a licence of its makers",
    ),
)
