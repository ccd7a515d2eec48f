"""Text of strangers in messages: short, and nothing in it that a terminal would obey."""

from __future__ import annotations

import reprlib

SHOWN_CHARACTERS = 120
_REPR = reprlib.Repr()  # cuts every part first: a repr of a megabyte takes long
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = SHOWN_CHARACTERS + 2  # with quotes


def shown(value: object) -> str:
    """`repr` of whatever was found, controls and halves of surrogate pairs escaped."""
    return _cut(_REPR.repr(value), SHOWN_CHARACTERS + 2)


def plain(text: str) -> str:
    """The same of a text without quotes, cut at its end."""
    return printable(_cut(text, SHOWN_CHARACTERS))


def first_line(error: BaseException) -> str:
    """What an error of any library says first; its type where it says nothing."""
    text = str(error).strip()
    return plain(text.splitlines()[0] if text else type(error).__name__)


def printable(text: str) -> str:
    """The whole text, line breaks and terminal escapes written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
