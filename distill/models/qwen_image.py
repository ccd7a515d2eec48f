"""Qwen-Image as the methods see it: one frozen base whose adapters play teacher, student and fake
score.

The only file that knows how diffusers' QwenImageTransformer2DModel is called. Another model family
is another such file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import QwenImageTransformer2DModel

from . import flow

PATCH = 2  # latents per token and side


@dataclass(frozen=True)
class Text:
    """Embedded prompts, padded to one length."""

    embeds: torch.Tensor  # [B, L, D]
    mask: torch.Tensor | None = None  # [B, L] bool, True = token; None = all are tokens

    def __len__(self) -> int:
        return len(self.embeds)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Text:
        mask = None if self.mask is None else self.mask.to(device)
        return Text(self.embeds.to(device, dtype), mask)

    def repeat(self, batch_size: int) -> Text:
        """One prompt -> `rows` copies of it."""
        mask = None if self.mask is None else self.mask.expand(batch_size, -1)
        return Text(self.embeds.expand(batch_size, -1, -1), mask)


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


def concatenate(a: Text, b: Text) -> Text:
    """Joins two batches of prompts, padding the shorter one."""
    if a.mask is None and b.mask is None and a.embeds.shape[1] == b.embeds.shape[1]:
        return Text(torch.cat([a.embeds, b.embeds]))
    length = max(a.embeds.shape[1], b.embeds.shape[1])

    def padded(text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        missing = length - text.embeds.shape[1]
        mask = text.mask
        if mask is None:
            mask = torch.ones(text.embeds.shape[:2], dtype=torch.bool, device=text.embeds.device)
        return (
            torch.nn.functional.pad(text.embeds, (0, 0, 0, missing)),
            torch.nn.functional.pad(mask, (0, missing)),
        )

    (ea, ma), (eb, mb) = padded(a), padded(b)
    return Text(torch.cat([ea, eb]), torch.cat([ma, mb]))


def predict_tokens(
    transformer: QwenImageTransformer2DModel, x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> torch.Tensor:
    """The transformer's velocity as tokens.  x_t [B, C, h, w], t [B] -> [B, tokens, 4 C]

    The transformer computes in its own precision; latents and velocities keep that of x_t.
    """
    height, width = x_t.shape[-2:]
    dtype = precision(transformer)
    return transformer(
        hidden_states=pack(x_t).to(dtype),
        encoder_hidden_states=text.embeds.to(dtype),
        encoder_hidden_states_mask=text.mask,
        timestep=t,
        img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
        return_dict=False,
    )[0].to(x_t.dtype)


def velocity(
    transformer: QwenImageTransformer2DModel, x_t: torch.Tensor, t: torch.Tensor, text: Text
) -> torch.Tensor:
    """v(x_t, t | text): [B, C, h, w] -> [B, C, h, w]"""
    return unpack(predict_tokens(transformer, x_t, t, text), *x_t.shape[-2:])


def guided_velocity(
    transformer: QwenImageTransformer2DModel,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Text,
    negative: Text,
    scale: float,
    rescale: bool,
) -> torch.Tensor:
    """Velocity under classifier-free guidance; both passes in one batch. Without guidance (scale 1)
    one pass.
    """
    return velocity_pair(transformer, x_t, t, text, negative, scale, rescale)[1]


def velocity_pair(
    transformer: QwenImageTransformer2DModel,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Text,
    negative: Text,
    scale: float,
    rescale: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and guided velocity from the one batch that guidance takes."""
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


def depth(transformer: QwenImageTransformer2DModel) -> int:
    """Number of blocks."""
    return len(transformer.transformer_blocks)


def precision(transformer: QwenImageTransformer2DModel) -> torch.dtype:
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
