"""Schedules that others write into a LoRA's header, or beside the file.

`inference_sigmas` is PrunaAI's, `sample_sigmas` diffusers' (there in model_index.json) and
`base_schedule` FlashGen's, whose levels are not shifted yet; NAME.turbo.json is a spec that anybody
may put beside NAME.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checks import SpecError
from .known import family_of
from .shift import StaticShift
from .shown import plain
from .spec import UNKNOWN_BASE, TurboSpec, parse_sigmas

HEADER_KEYS = ("inference_sigmas", "sample_sigmas", "base_schedule")
MODEL_INDEX = "model_index.json"
SIDECAR = ".turbo.json"
SUFFIXES = (".safetensors", ".sft")
SHIFTS = {"minimax-h3-native": 12.0}  # key_format beside a base_schedule -> its video shift
TRAIN_STEPS = 1000  # timesteps of a flow model, where levels are written as such
MAX_SIGMA = 100  # of other models than flow models: 14.6 of SD 1.5 and SDXL, 80 of EDM
MAX_BYTES = 1_000_000  # of a file beside a LoRA


def sidecar(lora: Path) -> Path:
    """Where the spec of a LoRA file may lie: NAME.turbo.json."""
    return lora.with_name(lora.stem + SIDECAR)


def of_sidecar(lora: Path) -> tuple[TurboSpec, str] | None:
    """The spec in the file beside a LoRA. Raises SpecError where that holds none, OSError."""
    path = sidecar(lora)
    if not path.is_file():
        return None
    return TurboSpec.from_json(_text(path), source=path.name), f"{path.name} beside the file"


def of_header(metadata: Mapping[str, str], source: str) -> tuple[TurboSpec, str] | None:
    """The spec in another program's header keys; what is no list of numbers counts for nothing.

    Raises SpecError for numbers that are no schedule, and for two keys that say different things.
    """
    found = {key: levels(metadata[key]) for key in HEADER_KEYS if key in metadata}
    schedules = {key: sigmas for key, sigmas in found.items() if sigmas}
    if not schedules:
        return None
    if len(set(schedules.values())) > 1:
        said = "; ".join(f"{key} says {plain(metadata[key])}" for key in schedules)
        raise SpecError(f"{source}: expected one schedule in the header; found {said}")
    key, sigmas = next(iter(schedules.items()))
    spec = _spec(sigmas, metadata, f"{source}: header key {key}")
    if key == "base_schedule" and (shift := SHIFTS.get(metadata.get("key_format", ""))):
        spec = replace(spec, shift=StaticShift(shift))
    return spec, f"header key {key} of the file"


def of_model_index(lora: Path, metadata: Mapping[str, str]) -> tuple[TurboSpec, str] | None:
    """The spec in a model_index.json beside the only LoRA of a folder; raises as `of_header`."""
    path = lora.with_name(MODEL_INDEX)
    files = (each for each in lora.parent.iterdir() if each.suffix.lower() in SUFFIXES)
    if not path.is_file() or any(each.name != lora.name for each in files):
        return None
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError):
        return None
    sigmas = levels(values.get("sample_sigmas")) if isinstance(values, dict) else None
    if not sigmas:
        return None
    where = f"{MODEL_INDEX}: sample_sigmas"
    return _spec(sigmas, metadata, where), f"sample_sigmas in {MODEL_INDEX} beside the file"


def levels(value: Any) -> tuple[float, ...] | None:
    """Noise levels as others write them, as JSON or as text, with the final 0 or without it, from 1
    or as timesteps from 1000; None for anything but numbers. What is between the two, sigmas of a
    model that is no flow model, stays as it is, for TurboSpec to refuse.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = parse_sigmas(value)
            except ValueError:
                return None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in value):
        return None
    scale = TRAIN_STEPS if value[0] > MAX_SIGMA else 1
    try:
        sigmas = tuple(item / scale for item in value)
    except OverflowError:  # an int of hundreds of digits; TurboSpec says what is wrong with it
        sigmas = tuple(float("inf") if abs(item) > TRAIN_STEPS else item for item in value)
    return sigmas if sigmas[-1] == 0 else (*sigmas, 0.0)


def bare(sigmas: tuple[float, ...], metadata: Mapping[str, str]) -> TurboSpec:
    """A spec of nothing but sigmas and the base that the header names in ModelSpec's key, whose
    family the table may know; a name that is none counts for nothing. Raises SpecError.
    """
    spec = TurboSpec(sigmas, base=UNKNOWN_BASE)
    base = metadata.get("modelspec.base_model", "").strip() or UNKNOWN_BASE
    try:
        return replace(spec, base=base, family=family_of(base) or spec.family)
    except SpecError:
        return spec


def _spec(sigmas: tuple[float, ...], metadata: Mapping[str, str], where: str) -> TurboSpec:
    try:
        return bare(sigmas, metadata)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise SpecError(
            f"{path.name}: expected a few lines of JSON; found over {MAX_BYTES:,} bytes"
        )
    return content.decode("utf-8-sig", "replace")
