"""`key.sub=value`, as it is typed after the name of a recipe."""

from __future__ import annotations

from typing import Any

from ..contract.shown import plain, shown
from .yaml12 import Written, as_typed


class OverrideError(ValueError):
    """An override that names nothing; the message says what was expected."""


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets the key that `key.sub=value` names; its type decides what the value means."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OverrideError(f"{shown(override)}: expected key=value, e.g. stages.0.steps=100.")
    *parents, last = key.split(".")
    node: Any = values
    for i, part in enumerate(parents, 1):
        node = _child(node, part, ".".join(parents[:i]), override)
    node[_place(node, last, key, override)] = as_typed(text)


def _child(node: Any, part: str, key: str, override: str) -> dict[str, Any] | list[Any]:
    """What `key`, whose last part is `part`, holds; a new mapping where it is not there."""
    place = _place(node, part, key, override)
    child = node[place] if isinstance(node, list) else node.setdefault(place, {})
    if isinstance(child, Written):
        child = node[place] = child.value
    if not isinstance(child, dict | list):
        raise OverrideError(
            f"{shown(override)}: {plain(key)} is the value {shown(child)}, it has no keys "
            "of its own."
        )
    return child


def _place(node: Any, part: str, key: str, override: str) -> Any:
    """`part` as a key of a mapping, or as an index of a list."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
        raise OverrideError(
            f"{shown(override)}: {plain(key)}: expected a number from 0 to {len(node) - 1}, "
            f"found {shown(part)}."
        )
    return int(part)
