"""A LoRA in another spelling (ComfyUI, diffusers), precision or rank (truncated SVD)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contract.lora_alpha import HEADER_KEYS as ALPHA_KEYS
from ..contract.lora_keys import NormalisedLora, normalise, to_comfy, to_diffusers
from ..contract.metadata import usage_hint, write_lora
from ..contract.spec import HEADER_KEY
from ..utils.progress import progress
from .low_rank import Deviation, deviation, truncate
from .source import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEYS: dict[str, Callable[[NormalisedLora, torch.dtype], dict[str, Tensor]]] = {
    "comfyui": to_comfy,
    "diffusers": to_diffusers,
}
# Header entries that follow from the tensors, the spec and the file's name, so are written anew.
DERIVED = ALPHA_KEYS | frozenset(
    {
        "format",
        HEADER_KEY,
        "modelspec.sai_model_spec",
        "modelspec.architecture",
        "modelspec.implementation",
        "modelspec.prediction_type",
        "modelspec.usage_hint",
        "modelspec.tags",
        "modelspec.base_model",
        "ss_base_model_version",
        "ss_sd_model_name",
        "ss_resolution",
        "ss_output_name",
        "ss_network_module",
        "sshs_legacy_hash",
    }
)


def export(
    source: Source,
    out: Path,
    *,
    keys: str = "comfyui",
    dtype: str = "bf16",
    rank: int | None = None,
) -> dict[str, Any]:
    """Writes the LoRA and returns what was written, ready for JSON.

    The error is that of the written weights, hence of truncation and rounding together. Raises
    ValueError where `dtype` cannot hold a weight, FileExistsError where `out` is taken.
    """
    # Rank, spelling, precision
    lora = source.lora
    if rank is not None:
        bar = progress(lora.modules.items(), what="cutting ranks", unit="module")
        lora = replace(lora, modules={n: truncate(m, rank) for n, m in bar})
    tensors = KEYS[keys](lora, DTYPES[dtype])
    check_finite(tensors, dtype)

    # How far the written weights are from the source's
    written = normalise(tensors, source=out.name)
    bar = progress(written.modules.items(), what="comparing", unit="module")
    errors = {n: deviation(m, source.lora.modules[n]) for n, m in bar}
    total = sum(errors.values(), Deviation(0.0, 0.0)).relative

    # File and report
    facts = {"source": source.name, "dtype": dtype, "relative_error": round(total, 8)}
    if rank is not None:
        facts["rank_limit"] = rank
    write_lora(
        out,
        tensors,
        spec=source.spec,
        title=source.metadata.get("modelspec.title") or out.stem,
        extra=kept(source.metadata) | {"turbo.export": json.dumps(facts)},
        replace=False,
    )
    modules = {
        name: {
            "rank_before": source.lora.modules[name].rank,
            "rank": written.modules[name].rank,
            "relative_error": error.relative,
        }
        for name, error in errors.items()
    }
    return {
        "file": str(out),
        "source": source.origin,
        "sampling": usage_hint(source.spec),
        "spec_source": source.spec_source,
        "alpha_from": source.lora.alpha_words,
        "keys": keys,
        "dtype": dtype,
        "rank_limit": rank,
        "file_size_bytes": out.stat().st_size,
        "relative_error": total,
        "modules": modules,
        "not_exported": list(source.lora.other_keys),
    }


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of a header that stays true of the same LoRA in another file."""
    return {key: value for key, value in metadata.items() if key not in DERIVED}


def check_finite(tensors: Mapping[str, Tensor], dtype: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{key}: {dtype} cannot hold its weights; expected finite numbers. Use --dtype "
                "bf16 or fp32, or look at the source: it may hold inf or nan itself."
            )
