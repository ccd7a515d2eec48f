"""Hints for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_WORD = 200  # characters; the comparison takes their square


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a word was probably meant to be."""
    if len(word) > MAX_WORD:
        return None
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with a leading blank; empty where nothing is close."""
    near = closest(word, known)
    return f" Did you mean {near!r}?" if near else ""
