"""Valid files and documents, damaged: strategies for hypothesis, and the files themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# Numbers at which arithmetic, formats and parsers change their minds
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**400, 5e-324, 1e308, float("nan"), float("inf"), -0.0)
TEXTS = ("", " ", "\0", "\n", "\x1b[31m", "\u202e", "\ud800", "../x", "nan", "1e999", "a" * 5000)

leaves = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], {"a": {}}]) | st.text(
    max_size=8
)


@st.composite
def json_like(draw: st.DrawFn, value: Any) -> Any:
    """A document with one of its values replaced, left out or given another name."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        changed = value.copy()
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        how = draw(st.integers(0, 7))
        if how == 0:
            del changed[key]
        elif how == 1 and isinstance(changed, dict):
            changed[draw(st.sampled_from(TEXTS))] = changed.pop(key)
        elif how == 2 and isinstance(changed, list):
            changed.insert(key, draw(leaves))
        else:
            changed[key] = draw(json_like(value[key]))
        return changed
    return draw(leaves)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, head: int = 0) -> bytes:
    """Bytes with a few replaced, some cut out, doubled or put in; more often among the first
    `head`, where a format's header is.
    """
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        end = head if head and draw(st.integers(0, 3)) else len(data)
        start = draw(st.integers(0, max(0, min(end, len(data)) - 1)))
        length = draw(st.sampled_from((1, 2, 4, 8, 64, 4096)))
        how = draw(st.integers(0, 5))
        if how == 0:
            del data[start:]
        elif how == 1:
            del data[start : start + length]
        elif how == 2:
            data[start:start] = data[start : start + length]
        elif how == 3:
            data[start:start] = draw(st.binary(max_size=16))
        else:
            new = draw(
                st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0" * 8, b"\xff" * 8])
            )
            data[start : start + len(new)] = new
    return bytes(data)


def safetensors_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A file whose lengths are right whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data
