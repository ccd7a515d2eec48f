"""How the caption of an image is found and read: a text file beside it, or a text column."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # the first that is there
CAPTION_KEYS = ("prompt", "caption", "text")
MARKS = (  # UTF-32 first: its mark begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LINE = 16 << 20  # letters of a line of a file of prompts
SURROGATE = re.compile("[\ud800-\udfff]")


def caption_of(record: Any, key: str | None) -> str | None:
    """The prompt of a JSON object or table row; None if it has none under the expected keys."""
    if not isinstance(record, dict):
        return None
    for name in caption_keys(key):
        text = record.get(name)
        if isinstance(text, str):
            return text
    return None


def caption_keys(key: str | None) -> tuple[str, ...]:
    return (key,) if key else CAPTION_KEYS


def no_key(key: str | None) -> str:
    return f"has no text under {', '.join(caption_keys(key))}"


def encoding_of(head: bytes) -> str:
    """What the mark at the beginning of a text says; UTF-8 without one."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")


def decode_text(data: bytes, file: str) -> str:
    """With line ends as \\n. Raises ValueError with the cure where it is not UTF-8."""
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise ValueError(f"expected UTF-8, found {found}; save {file} as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"expected UTF-8, found NUL as in UTF-16; save {file} as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_lines(path: Path) -> Iterator[str | ValueError]:
    """The lines of a file, or why one cannot be used. Raises ValueError for damaged UTF-16."""
    with path.open("rb") as head:
        encoding = encoding_of(head.read(4))
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with path.open(encoding=encoding, errors=errors) as file:
        while line := file.readline(LINE):
            if len(line) == LINE:
                while not line.endswith("\n") and (line := file.readline(LINE)):
                    pass
                yield ValueError(f"has over {LINE:,} letters")
            elif bad := SURROGATE.search(line):
                byte = ord(bad[0]) - 0xDC00
                yield ValueError(f"expected UTF-8, found byte {byte:#04x}; save the file as UTF-8")
            elif "\0" in line:
                yield ValueError("expected UTF-8, found NUL as in UTF-16; save the file as UTF-8")
            else:
                yield line


def parse_json(text: str) -> Any:
    """Raises ValueError, also where json would raise RecursionError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def read_caption(data: bytes | None, file: str, key: str | None) -> dict[str, str]:
    """The caption or the problem of a Sample from a caption file; None: there is no file.

    Raises ValueError, which names the file, where its content cannot be read.
    """
    try:
        text = None if data is None else decode_text(data, file)
        if text is not None and file.lower().endswith(".json"):
            text = caption_of(parse_json(text), key)
            if text is None:
                return {"problem": f"no caption: {file} {no_key(key)}"}
    except ValueError as error:
        raise ValueError(f"the caption {file} cannot be read: {error}") from error
    return usable_caption(text, file)


def usable_caption(text: object, where: str) -> dict[str, str]:
    """The caption or the problem of a Sample."""
    if problem := unusable(text):
        return {"problem": f"no caption: {where} {problem}"}
    return {"caption": str(text).strip()}


def unusable(text: object) -> str:
    """Why a value is no prompt; empty if it is one."""
    if text is None:
        return "is missing"
    if not isinstance(text, str):
        return f"is no text but {type(text).__name__}"
    if not text.strip():
        return "is empty"
    if SURROGATE.search(text):
        return "holds half a letter (a lone surrogate)"
    return ""
