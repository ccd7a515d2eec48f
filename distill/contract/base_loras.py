"""The LoRAs in the base that a LoRA was distilled from, as its header names them:
`turbo.base_loras`, a JSON list of records with name, strength and content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .checks import SpecError, number
from .shown import shown

HEADER_KEY = "turbo.base_loras"


def base_records(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a header says of LoRAs in its base: the file's name, its strength, its content (a
    SHA-256). Raises SpecError.
    """
    try:
        found = json.loads(metadata.get(HEADER_KEY, "[]"))
        return [
            {
                "name": _name(record["name"]),
                "strength": _strength(record["strength"]),
                "content": str(record["content"]),
            }
            for record in found
        ]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise SpecError(
            f"header {HEADER_KEY!r}: expected a list of LoRAs with name, strength and content "
            f"({shown(str(error))}); export the LoRA again from its run folder."
        ) from error


def base_hint(metadata: Mapping[str, str]) -> str | None:
    """What a user of the LoRA has to know of its base, or why its header does not tell; None where
    that is a model as published.
    """
    try:
        records = base_records(metadata)
    except SpecError as error:
        return str(error)
    if not records:
        return None
    named = " and ".join(f"{shown(one['name'])} at strength {one['strength']:g}" for one in records)
    return f"distilled with {named} in the base; apply that too"


def _strength(value: object) -> float:
    found = number("strength", value)
    if found == 0:
        raise SpecError("strength: expected another than 0")
    return found


def _name(text: str) -> str:
    """Of a file or folder in some folder. Raises ValueError."""
    if not text or text in (".", "..") or re.search(r"[/\\\0]", text):
        raise ValueError(f"expected the name of a file, found {shown(text)}")
    return text
