"""What is in a LoRA file, for people and for programs; no model is loaded."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .base_loras import base_hint
from .checks import SpecError
from .latent_grid import GRIDS, USUAL_SIZE, sigmas_at, sigmas_text
from .lora_keys import NormalisedLora, normalise
from .metadata import read_shapes, usage_hint
from .module_names import unflatten
from .peft_folder import lora_file
from .resolve import of_file
from .shown import plain, printable
from .spec import HEADER_KEY, TurboSpec
from .tensor_file import NOT_FINITE, count_not_finite, is_finite


def describe(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Format, size, ranks, alpha, spec and header of a LoRA file, ready for `json.dumps`.

    path: a file, or a folder that PEFT saved. size: of the image (width, height in pixels) whose
    `sigmas` are told. A file without a known schedule is described as well: then `spec` and
    `sigmas` are None and `spec_source` says why; so is one with NaN or infinity: `not_finite`
    counts them by tensor. Raises OSError, and LoraFormatError if it is otherwise no LoRA that can
    be applied.
    """
    path = lora_file(path)
    tensors, metadata = read_shapes(path, finite=False)
    # Without an alpha that is no number, which `normalise` would refuse.
    known = {k: t for k, t in tensors.items() if not k.endswith(".alpha") or is_finite(t)}
    lora = normalise_alone(known, metadata, path.name)
    not_finite = count_not_finite(path)
    spec, spec_source = _spec(path, metadata, size)
    told = spec if spec and (spec.family in GRIDS or not spec.by_size) else None
    return {
        "file": path.name,
        "file_size_bytes": path.stat().st_size,
        "formats": list(lora.formats),
        "adapters": list(lora.adapters),
        "modules": len(lora.modules),
        "ranks": {str(rank): count for rank, count in lora.ranks.items()},
        "alpha_source": lora.alpha_source,
        "alpha_from": lora.alpha_words,
        "scales": _histogram(f"{module.scale:.6g}" for module in lora.modules.values()),
        "dtypes": _histogram(_dtypes(lora)),
        "parameters": sum(m.down.numel() + m.up.numel() for m in lora.modules.values()),
        "other_keys": list(lora.other_keys),
        "not_finite": not_finite,
        "warnings": [*lora.warnings, *_not_finite_warning(not_finite)],
        "spec": json.loads(spec.to_json()) if spec else None,
        "sigmas": list(sigmas_at(told, size)) if told else None,
        "sigmas_at": list(size or USUAL_SIZE) if told and told.by_size else None,
        "spec_source": spec_source,
        "metadata": metadata,
    }


def normalise_alone(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str
) -> NormalisedLora:
    """`normalise` with no model at hand: what it cannot spell out, flattened names of other models
    than Qwen-Image, keeps its flattened name. Raises LoraFormatError.
    """
    return normalise(tensors, metadata, source=source, known_modules=set(_flat_names(tensors)))


def _flat_names(keys: Iterable[str]) -> Iterator[str]:
    """lora_unet_blocks_0_ffn_0.lora_down.weight -> blocks_0_ffn_0"""
    for head in {key.partition(".")[0] for key in keys}:
        # The prefix is of one word or of two: lycoris_, lora_unet_. A name too many does no harm.
        names = {head.split("_", words)[-1] for words in (1, 2)}
        if not any(unflatten(name) for name in names):
            yield from names


def to_text(description: Mapping[str, Any]) -> str:
    """`describe`'s result as aligned lines; headers come from strangers."""
    rows = list(_rows(description))
    width = max(len(label) for label, _ in rows)
    return "".join(f"{label:<{width}}  {printable(text)}\n" for label, text in rows)


def _rows(d: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "file", f"{d['file']} ({d['file_size_bytes'] / 1e6:,.1f} MB)"
    yield "format", ", ".join(d["formats"])
    if d["adapters"]:
        yield "adapter", ", ".join(d["adapters"])
    yield "modules", f"{d['modules']} ({d['parameters']:,} parameters, {_counts(d['dtypes'])})"
    yield "rank", _counts(d["ranks"])
    yield "alpha", f"{d['alpha_from']}; scale {_counts(d['scales'])}"
    if d["other_keys"]:
        yield "not applied", f"{len(d['other_keys'])} keys, such as {plain(d['other_keys'][0])}"
    for warning in d["warnings"]:
        yield "warning", warning
    if d["spec"]:
        spec = TurboSpec.from_values(d["spec"])
        yield "sampling", usage_hint(spec, d["sigmas_at"])
        if spec.method:
            yield "method", spec.method
        yield "spec from", d["spec_source"]
    else:
        yield "sampling", f"unknown: {d['spec_source']}"
    if hint := base_hint(d["metadata"]):
        yield "base", hint
    for key, value in sorted(d["metadata"].items()):
        if key != HEADER_KEY:
            yield plain(key), plain(value)  # JSON has them whole


def _spec(
    path: Path, metadata: Mapping[str, str], size: tuple[int, int] | None
) -> tuple[TurboSpec | None, str]:
    try:
        spec, source = of_file(path, metadata)
        sigmas_text(spec, size)  # levels may run into each other at one size alone
    except SpecError as error:
        return None, str(error)
    return spec, source


def _not_finite_warning(counts: Mapping[str, int]) -> Iterator[str]:
    if counts:
        yield (
            f"found {sum(counts.values()):,} numbers in {len(counts)} tensors, such as "
            f"{plain(next(iter(counts)))}, {NOT_FINITE}"
        )


def _dtypes(lora: NormalisedLora) -> Iterator[str]:
    for module in lora.modules.values():
        for tensor in (module.down, module.up):
            yield str(tensor.dtype).removeprefix("torch.")


def _histogram(items: Iterator[str]) -> dict[str, int]:
    return dict(Counter(items).most_common())


def _counts(histogram: Mapping[str, int]) -> str:
    if len(histogram) == 1:
        return next(iter(histogram))
    return ", ".join(f"{value} ({count}x)" for value, count in histogram.items())
