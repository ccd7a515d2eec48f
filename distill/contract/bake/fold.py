"""The timestep modulation of Qwen-Image as a small table.

A third of the model's parameters (img_mod.1 and txt_mod.1 of every block) sees nothing but the
timestep. A few-step LoRA visits a handful of sigmas, so for it these layers are constants: one row
per sigma. Gone with them are the timestep embedding and norm_out.linear, which see nothing else
either.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..shown import shown

HEADER_KEY = "turbo.folded"
VERSION = 1

# A layer as a function: name, input [rows, in] -> output [rows, out].
Linear = Callable[[str, Tensor], Tensor]

TIME_EMBEDDER = "time_text_embed.timestep_embedder."
TIME_CHANNELS = 256
NORM_OUT = "norm_out.linear"
_MODULATION = re.compile(r"transformer_blocks\.\d+\.(img|txt)_mod\.1")

# How a sigma may have been stored on its way to the model.
_ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)
_ARITHMETIC = 1e-6  # relative; a few float32 operations


@dataclass(frozen=True)
class Folded:
    """What the header of a folded model says: the sigma of each row, and the model's own numbers.

    shape: arguments of ComfyUI's and diffusers' QwenImageTransformer2DModel, by their names there.
    """

    sigmas: tuple[float, ...]
    shape: Mapping[str, Any]
    version: int = VERSION

    def to_json(self) -> str:
        """One line of JSON, the value of the header key `turbo.folded`."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, source: str) -> Folded:
        """The reverse of `to_json`; source: a file name. Raises ValueError: no such model."""
        if not metadata or HEADER_KEY not in metadata:
            raise ValueError(
                f"{source}: expected a model made by Turbo Bake or `turbo-distill bake`; found no "
                f"{HEADER_KEY!r} in its header. Load an ordinary model with Load Diffusion Model."
            )
        try:
            values = json.loads(metadata[HEADER_KEY])
            folded = cls(tuple(map(float, values["sigmas"])), dict(values["shape"]))
            version = int(values["version"])
        except (ValueError, TypeError, LookupError):
            raise ValueError(
                f"{source}: header key {HEADER_KEY!r}: expected sigmas, shape and version; found "
                f"{shown(metadata[HEADER_KEY])}. Bake the model again."
            ) from None
        if version > VERSION:
            raise ValueError(
                f"{source}: baked by a newer Turbo Distill (version {version} of its format, this "
                f"copy reads {VERSION}). Update the Turbo Distill node pack."
            )
        return folded


def is_modulation(module: str) -> bool:
    """Whether a layer, by its name, modulates one block of a Qwen-Image."""
    return _MODULATION.fullmatch(module) is not None


def becomes_table(module: str) -> bool:
    """Whether a layer, by its name, is replaced by rows of a table."""
    return module == NORM_OUT or is_modulation(module)


def is_folded(module: str) -> bool:
    """Whether a layer, by its name, is gone from a folded model: a function of the timestep."""
    return becomes_table(module) or module.startswith("time_text_embed.")


def embed_timesteps(sigmas: Sequence[float]) -> Tensor:
    """Sinusoidal features of 1000 sigma, cosines first.  # [rows, 256] float32

    In float32 and in the order of operations of diffusers' and ComfyUI's `get_timestep_embedding`:
    at arguments near 1000 another order would change the fifth digit.
    """
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = 1000 * (torch.tensor(sigmas, dtype=torch.float32)[:, None] * frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embed_sigmas(sigmas: Sequence[float], linear: Linear) -> Tensor:
    """silu(temb), what every modulation layer reads.  # [rows, width] float32"""
    hidden = silu(linear(f"{TIME_EMBEDDER}linear_1", embed_timesteps(sigmas)))
    return silu(linear(f"{TIME_EMBEDDER}linear_2", hidden))


def row_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The row of a table for `sigmas` that holds `sigma`, as is or rounded to bf16 or fp16.

    Raises ValueError for any other sigma: the nearest row would be a wrong image without a word.
    """
    for dtype in _ROUNDINGS:
        for row, known in enumerate(sigmas):
            if math.isclose(sigma, _rounded(known, dtype), rel_tol=_ARITHMETIC):
                return row
    shown = ", ".join(f"{known:g}" for known in sigmas)
    raise ValueError(
        f"sigma {sigma:.6g} is not in the table of this baked model, which was folded for "
        f"{shown}. Sample it with Turbo Sampler and nothing in `sigmas`, or use the model that it "
        f"was baked from, which takes every sigma."
    )


@functools.lru_cache(maxsize=256)
def _rounded(sigma: float, dtype: torch.dtype) -> float:
    return torch.tensor(sigma, dtype=dtype).item()
