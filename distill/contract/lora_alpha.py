"""alpha of a LoRA as the file's header tells it. The scale of a LoRA is alpha / rank.

ComfyUI reads alpha from `.alpha` tensors only; files by PEFT and diffusers keep it in the header.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

PEFT_KEY = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
_COMPONENTS = ("transformer.", "diffusion_model.", "unet.", "")


@dataclass(frozen=True)
class HeaderAlpha:
    """What a header says about alpha.

    alpha: for all modules; per_module: exceptions, keyed by the end of a module's name (PEFT's
    `alpha_pattern`); dim: the rank that alpha refers to, if not each module's own; rslora: scale is
    alpha / sqrt(rank) instead of alpha / rank; kohya: from `ss_*`, holds for kohya's own keys only.
    """

    alpha: float
    per_module: Mapping[str, float] = field(default_factory=dict)
    dim: float | None = None
    rslora: bool = False
    kohya: bool = False

    def of(self, name: str, rank: int) -> float:
        """alpha for one module, in the convention scale = alpha / rank."""
        ends = (end for end in self.per_module if name == end or name.endswith(f".{end}"))
        end = next(ends, None)
        alpha = self.alpha if end is None else self.per_module[end]
        if self.rslora:
            return alpha * math.sqrt(rank)
        return alpha if self.dim is None else alpha / self.dim * rank


def header_alpha(metadata: Mapping[str, str] | None) -> HeaderAlpha | None:
    """alpha from diffusers' or kohya's metadata, None if absent. Raises ValueError if malformed."""
    if not metadata:
        return None
    if PEFT_KEY in metadata:
        return _peft_alpha(metadata[PEFT_KEY])
    return _kohya_alpha(metadata)


def tensor_alpha(key: str, tensor: Tensor) -> float:
    """The number in an `.alpha` tensor. Raises ValueError if it is not one finite number."""
    if tensor.numel() != 1:
        raise ValueError(f"key {key!r}: expected one number; found shape {list(tensor.shape)}")
    alpha = float(tensor.item())
    if not math.isfinite(alpha):
        raise ValueError(f"key {key!r}: expected a finite number; found {alpha}")
    return alpha


def _peft_alpha(text: str) -> HeaderAlpha | None:
    """PEFT's LoraConfig as diffusers saves it: flat, the component's name before each key."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"metadata {PEFT_KEY!r}: expected JSON; found text that is not ({error})"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(
            f"metadata {PEFT_KEY!r}: expected an object; found {type(config).__name__}"
        )
    component = next((name for name in _COMPONENTS if f"{name}lora_alpha" in config), None)
    if component is None:
        return None
    if config.get(f"{component}use_dora"):
        raise ValueError(
            f"metadata {PEFT_KEY!r}: 'use_dora' is set, and DoRA cannot be applied as a low-rank "
            "side branch. Merge it into the base model, or train without DoRA."
        )
    pattern = config.get(f"{component}alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise ValueError(
            f"metadata {PEFT_KEY!r}: expected 'alpha_pattern' to be an object; found {pattern!r}"
        )
    return HeaderAlpha(
        alpha=_finite(f"{component}lora_alpha", config[f"{component}lora_alpha"]),
        per_module={
            _literal(key): _finite(f"alpha_pattern[{key!r}]", a) for key, a in pattern.items()
        },
        rslora=bool(config.get(f"{component}use_rslora")),
    )


def _kohya_alpha(metadata: Mapping[str, str]) -> HeaderAlpha | None:
    """sd-scripts' `ss_network_alpha` over `ss_network_dim`; 'None' and 'Dynamic' say nothing.

    Not for lora_A / lora_B keys: musubi-tuner's `convert_lora.py` multiplies the scale into those
    and keeps the header as it was, so that alpha would be applied twice.
    """
    alpha, dim = (
        _maybe_number(metadata.get(key)) for key in ("ss_network_alpha", "ss_network_dim")
    )
    if alpha is None or ("ss_network_dim" in metadata and not dim):
        return None
    return HeaderAlpha(alpha=alpha, dim=dim, kohya=True)


def _literal(pattern: str) -> str:
    """A PEFT pattern is a regular expression; accept those that are a plain name.

    Refusing the rest is safe, whereas running an expression out of a downloaded file is not: a few
    characters can make the matcher run for years.
    """
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(
            f"metadata {PEFT_KEY!r}: alpha_pattern {pattern!r} is a regular expression, expected "
            "module names. Save the LoRA again with `.alpha` tensors."
        )
    return name.removeprefix("transformer.")


def _finite(name: str, value: object) -> float:
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    raise ValueError(f"metadata {PEFT_KEY!r}: expected {name} to be a number; found {value!r}")


def _maybe_number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
