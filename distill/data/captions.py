"""How the caption of an image is found and read: a text file beside it, or a text column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_KEYS = ("prompt", "caption", "text")


def caption_of(record: Any, key: str | None) -> str | None:
    """The prompt of a JSON object or table row; None if it has none under the expected keys."""
    if not isinstance(record, dict):
        return None
    for name in (key,) if key else CAPTION_KEYS:
        text = record.get(name)
        if isinstance(text, str):
            return text
    return None


def caption_file(image: Path) -> Path:
    """The text file beside an image; the usual one where there is none."""
    files = [image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def usable_caption(text: str | None, where: str) -> dict[str, str]:
    """The caption or the problem of a Sample."""
    if text is None or not text.strip():
        return {"problem": f"no caption: {where} is {'missing' if text is None else 'empty'}"}
    return {"caption": text.strip()}
