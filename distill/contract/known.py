"""Schedules of public few-step LoRAs whose files say nothing about them: the rows of known.json.

docs/known_files.md has the table for people, and how to add a row.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hints import closest
from .spec import TurboSpec

TABLE = Path(__file__).with_name("known.json")
CERTAINTY = {  # how sure a row is -> in words
    "stated": "stated by the author",
    "integrator": "as another program runs it",
    "inferred": "inferred",
}
Size = tuple[int, int]


@dataclass(frozen=True)
class KnownFile:
    """One public file, or several that differ only in version or precision.

    name: as the author writes it, without version and precision; pattern: regular expression for
    the whole name as `normalised_name` gives it; certainty: a key of CERTAINTY; source: where the
    schedule comes from, for people; sha256: of whole files, lower-case hex, where known.
    """

    name: str
    pattern: str
    spec: TurboSpec
    certainty: str
    source: str
    sha256: tuple[str, ...] = ()

    def matches(self, filename: str) -> bool:
        """Whether the name, with or without folders and extension, is one of this row's."""
        return re.fullmatch(self.pattern, normalised_name(filename)) is not None


@dataclass(frozen=True)
class Refused:
    """A public file that no LoRA loader can run, and why."""

    name: str
    pattern: str
    reason: str
    sha256: tuple[str, ...] = ()


def normalised_name(filename: str) -> str:
    """'Qwen/Qwen_Image-Lightning-4steps (1).safetensors' -> 'qwen-image-lightning-4steps'."""
    name = re.split(r"[/\\]", filename)[-1].lower()
    name = re.sub(r"\.(safetensors|sft)$", "", name)
    name = re.sub(r"\s*\(\d+\)$", "", name)  # a browser's second download
    return re.sub(r"[-_\s]+", "-", name)


def find(filename: str, sha256: str | None = None) -> KnownFile | None:
    """The row for a file, by hash first and then by name; None if it is not known."""
    if sha256 is not None:
        for row in KNOWN:
            if sha256.lower() in row.sha256:
                return row
    return next((row for row in KNOWN if row.matches(filename)), None)


def refused(filename: str, sha256: str | None = None) -> Refused | None:
    """The row of a public file that no LoRA loader can run."""
    name, digest = normalised_name(filename), (sha256 or "").lower()
    return next(
        (row for row in REFUSED if digest in row.sha256 or re.fullmatch(row.pattern, name)), None
    )


def family_of(base: str) -> str | None:
    """The model family of a base that the table knows."""
    return next((row.spec.family for row in KNOWN if row.spec.base == base), None)


def nearest(filename: str) -> KnownFile | None:
    """The row of as many steps that a changed name nearly fits; None if none is close."""
    name = normalised_name(filename)
    steps = re.search(r"(\d+)-?steps?(?![a-z])", name)
    if steps is None:
        return None
    name = _without_extras(name)
    said = _words(name) & {word for row in KNOWN for word in _words(row.name)}
    rows = {
        normalised_name(row.name): row
        for row in KNOWN
        if row.spec.steps == int(steps[1]) and said <= _words(row.name)
    }
    near = closest(name, rows)
    return rows[near] if near else None


def _words(name: str) -> set[str]:
    """'Qwen-Image-Lightning-4steps' -> {'qwen', 'image', 'lightning', '4step'}"""
    name = re.sub(r"(\d)-?steps?(?![a-z])", r"\1step", normalised_name(name))
    return set(name.split("-"))


def _without_extras(name: str) -> str:
    """Version and precision, which tell no row from another."""
    return re.sub(r"-(v\d+(\.\d+)*|bf16|fp16|fp32|comfyui)(?=-|$)", "", name)


def _pattern(name: str, versions: str | None) -> str:
    stem = re.sub(r"(\d)\\?-?steps?$", r"\1-?steps?", re.escape(normalised_name(name)))
    version = f"(-v{versions})?" if versions else ""
    return rf"{stem}{version}(-(bf16|fp16|fp32))?(-comfyui)?"


def _table() -> dict[str, Any]:
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


def _row(values: dict[str, Any]) -> KnownFile:
    spec = dict(values["spec"])
    if isinstance(sizes := spec.get("resolutions"), str):
        spec["resolutions"] = SIZES[sizes]
    return KnownFile(
        values["name"],
        values.get("pattern") or _pattern(values["name"], values.get("versions")),
        TurboSpec.from_values(spec),
        values["certainty"],
        values["source"],
        tuple(values.get("sha256", ())),
    )


def _refused(values: dict[str, Any]) -> Refused:
    pattern = values.get("pattern") or _pattern(values["name"], None)
    return Refused(values["name"], pattern, values["reason"], tuple(values.get("sha256", ())))


_TABLE = _table()
# family -> the sizes (width, height in pixels) of its makers' example code, which rows refer to
SIZES: dict[str, tuple[Size, ...]] = {
    family: tuple((width, height) for width, height in sizes)
    for family, sizes in _TABLE["sizes"].items()
}
QWEN_SIZES = SIZES["qwen-image"]
KNOWN = tuple(_row(values) for values in _TABLE["rows"])
REFUSED = tuple(_refused(values) for values in _TABLE["refused"])
