"""TurboSpec: how a few-step LoRA has to be sampled. It travels in the LoRA's safetensors header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, SupportsFloat

from .hints import closest
from .schedule import MAX_STEPS
from .shown import plain, shown

UNKNOWN_BASE = "unknown"


HEADER_KEY = "turbo.spec"
VERSION = 1
SAMPLERS = ("euler", "renoise")
MAX_TEXT = 1000  # characters of a name or a text for people
MAX_RESOLUTIONS = 1024


class SpecError(ValueError):
    """A spec is missing or malformed; the message names field, expected, found and the way out."""


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Numbers as people type them, "1, 0.7155, 0", in brackets or not; none in an empty text.

    Raises ValueError where a piece is not a number, or there are too many; whether they are a
    schedule is for TurboSpec to say.
    """
    words = [word for word in re.split(r"[\s,;]+", text.strip(" ,;[]()")) if word]
    try:
        check_steps(len(words) - 1)
        numbers = tuple(float(word) for word in words)
        split = "." not in text and re.search(r"\d,\d", text)  # 0,7155 as 0 and 7155
        if split and (";" in text or numbers[0] <= 1 < max(numbers)):
            raise ValueError("a comma separates numbers; write decimals with a point: 0.7155")
    except ValueError as error:
        raise ValueError(
            f"expected numbers such as 1, 0.7155, 0; found {shown(text)} ({plain(str(error))})"
        ) from None
    return numbers


def check_steps(steps: int) -> None:
    """Raises SpecError where a schedule has more steps than MAX_STEPS."""
    if steps > MAX_STEPS:
        raise SpecError(f"sigmas: expected at most {MAX_STEPS} steps; found {steps:,}")


@dataclass(frozen=True)
class TurboSpec:
    """The schedule and the settings that a few-step LoRA was trained for.

    sigmas: noise levels of x_t = (1 - sigma) x0 + sigma eps, strictly decreasing from <= 1 to 0.
    family: model architecture; base: the checkpoint that the LoRA was trained on (hub id).
    sampler: "euler" follows the ODE, "renoise" jumps to x0 and adds fresh noise of the next sigma.
    cfg: guidance scale, 1 means a single conditional forward; strength: LoRA multiplier.
    resolutions: trained (width, height) in pixels, empty if not known.
    method, created_by: free text for people; version: of this format.

    Lists, ints and 0-d tensors are accepted and stored as tuples and floats. Raises SpecError.
    """

    sigmas: tuple[float, ...]
    family: str = "qwen-image"
    base: str = "Qwen/Qwen-Image-2512"
    sampler: str = "euler"
    cfg: float = 1.0
    strength: float = 1.0
    resolutions: tuple[tuple[int, int], ...] = ()
    method: str = ""
    created_by: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_version(self.version)
        for name in ("family", "base", "sampler", "method", "created_by"):
            _check_text(name, getattr(self, name), allow_empty=name in ("method", "created_by"))
        if self.sampler not in SAMPLERS:
            raise SpecError(
                f"sampler: expected one of {', '.join(SAMPLERS)}; found {shown(self.sampler)}"
                + near_miss(self.sampler, SAMPLERS)
            )
        normalised = {
            "sigmas": _sigmas(self.sigmas),
            "cfg": _number("cfg", self.cfg),
            "strength": _number("strength", self.strength),
            "resolutions": _resolutions(self.resolutions),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)
        if self.cfg < 1:
            raise SpecError(f"cfg: expected 1 (no guidance) or more; found {self.cfg:g}")
        if self.strength <= 0:
            raise SpecError(f"strength: expected more than 0; found {self.strength:g}")

    @property
    def steps(self) -> int:
        """Number of model evaluations at cfg 1."""
        return len(self.sigmas) - 1

    def with_sigmas(self, sigmas: Iterable[SupportsFloat]) -> TurboSpec:
        """The same spec on another schedule."""
        return replace(self, sigmas=_sigmas(sigmas))

    def to_json(self) -> str:
        """One line of JSON, the value of the header key `turbo.spec`."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "turbo.spec") -> TurboSpec:
        """Parse `to_json` output; `source` (a file name) opens every error message.

        Raises SpecError: not JSON, unknown or missing key, bad value, or a newer version's spec.
        """
        try:
            return cls(**_parse(text))
        except SpecError as error:
            raise SpecError(f"{source}: {error}") from None


def near_miss(name: str, known: Iterable[str]) -> str:
    """A ' (did you mean ...?)' clause, or nothing if no known name is close."""
    near = closest(name, known)
    return f" (did you mean {near!r}?)" if near else ""


def _parse(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"expected a JSON object; found text that is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise SpecError(f"expected a JSON object; found {type(data).__name__}")
    _check_version(data.get("version", VERSION))  # first: a newer format may well have other keys
    known = [field.name for field in fields(TurboSpec)]
    for key in data:
        if key not in known:
            raise SpecError(
                f"unknown key {shown(key)}{near_miss(key, known)}; expected {', '.join(known)}"
            )
    if "sigmas" not in data:
        raise SpecError("key 'sigmas' is missing; a spec without a schedule means nothing")
    return data


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise SpecError(
            f"version: expected a whole number from 1 to {VERSION}; found {shown(version)}"
        )
    if version > VERSION:
        raise SpecError(
            f"version: this spec is of version {shown(version)}, this copy of Turbo Distill "
            f"reads up to version {VERSION}. Update the Turbo Distill node pack (or `pip "
            "install -U` it)."
        )


def _check_text(name: str, value: object, *, allow_empty: bool) -> None:
    if not isinstance(value, str):
        raise SpecError(f"{name}: expected text; found {shown(value)}")
    if not value.strip() and not allow_empty:
        raise SpecError(f"{name}: expected a name; found empty text")
    if len(value) > MAX_TEXT:
        raise SpecError(
            f"{name}: expected at most {MAX_TEXT:,} characters; found {len(value):,}: "
            f"{shown(value)}"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise SpecError(f"{name}: expected text in Unicode; found {shown(value)}")


def _number(name: str, value: object) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, SupportsFloat):
        raise SpecError(f"{name}: expected a number; found {shown(value)}")
    try:
        number = float(value)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # RuntimeError: a tensor of several
        raise SpecError(f"{name}: expected a number; found {shown(value)}") from None
    if not math.isfinite(number):
        raise SpecError(f"{name}: expected a finite number; found {number}")
    return number


def _items(name: str, value: object, of: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise SpecError(f"{name}: expected a list of {of}; found {shown(value)}")
    return tuple(value)


def _sigmas(value: object) -> tuple[float, ...]:
    items = _items("sigmas", value, "numbers")
    check_steps(len(items) - 1)
    sigmas = tuple(_number(f"sigmas[{i}]", item) for i, item in enumerate(items))
    listed = ", ".join(f"{sigma:g}" for sigma in sigmas)
    if len(sigmas) < 2:
        raise SpecError(f"sigmas: expected at least two, such as 1, 0; found [{listed}]")
    if not 0 < sigmas[0] <= 1:
        raise SpecError(f"sigmas: expected the first in (0, 1]; found {sigmas[0]:g} in [{listed}]")
    for i, (high, low) in enumerate(pairwise(sigmas)):
        if low >= high:
            raise SpecError(
                f"sigmas: expected strictly decreasing values; found {low:g} after {high:g} "
                f"at index {i + 1} of [{listed}]"
            )
    if sigmas[-1] != 0:
        raise SpecError(
            f"sigmas: expected 0 as the last (otherwise noise stays in the image); found "
            f"{sigmas[-1]:g} in [{listed}]"
        )
    return (*sigmas[:-1], 0.0)  # -0.0 would not survive a comparison of texts


def _resolutions(value: object) -> tuple[tuple[int, int], ...]:
    pairs = []
    items = _items("resolutions", value, "[width, height] pairs")
    if len(items) > MAX_RESOLUTIONS:
        raise SpecError(f"resolutions: expected at most {MAX_RESOLUTIONS}; found {len(items):,}")
    for i, item in enumerate(items):
        pair = _items(f"resolutions[{i}]", item, "two whole numbers")
        if len(pair) != 2 or any(
            isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair
        ):
            raise SpecError(
                f"resolutions[{i}]: expected [width, height] in pixels; found {shown(item)}"
            )
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)
