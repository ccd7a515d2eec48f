"""Values of a spec, checked one by one; strangers write them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, SupportsFloat

from .shown import shown


class SpecError(ValueError):
    """A spec is missing or malformed; the message names field, expected, found and the way out."""


def number(name: str, value: object) -> float:
    """A finite float, also of a 0-d tensor. Raises SpecError."""
    if isinstance(value, (bool, str)) or not isinstance(value, SupportsFloat):
        raise SpecError(f"{name}: expected a number; found {shown(value)}")
    try:
        found = float(value)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # RuntimeError: a tensor of several
        raise SpecError(f"{name}: expected a number; found {shown(value)}") from None
    if not math.isfinite(found):
        raise SpecError(f"{name}: expected a finite number; found {found}")
    return found


def whole(name: str, value: object, low: int = 0) -> int:
    """An int of at least `low`. Raises SpecError."""
    found = number(name, value)
    if found != int(found) or found < low:
        raise SpecError(f"{name}: expected a whole number from {low} on; found {shown(value)}")
    return int(found)


def items(name: str, value: object, of: str) -> tuple[Any, ...]:
    """What a list holds. Raises SpecError for anything else."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise SpecError(f"{name}: expected a list of {of}; found {shown(value)}")
    return tuple(value)


def numbers(name: str, value: object) -> tuple[float, ...]:
    """A list of finite numbers. Raises SpecError."""
    found = items(name, value, "numbers")
    return tuple(number(f"{name}[{i}]", item) for i, item in enumerate(found))


def text(name: str, value: object, longest: int, *, allow_empty: bool = False) -> str:
    """Text of at most `longest` characters that Unicode can write. Raises SpecError."""
    if not isinstance(value, str):
        raise SpecError(f"{name}: expected text; found {shown(value)}")
    if not value.strip() and not allow_empty:
        raise SpecError(f"{name}: expected a name; found empty text")
    if len(value) > longest:
        raise SpecError(
            f"{name}: expected at most {longest:,} characters; found {len(value):,}: {shown(value)}"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise SpecError(f"{name}: expected text in Unicode; found {shown(value)}")
    return value
