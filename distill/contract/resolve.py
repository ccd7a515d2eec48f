"""How a LoRA wants to be sampled: override > header > table of known files, by name and then by
hash. The loader node, the command line and bake all ask here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .known import KNOWN, find, nearest
from .spec import HEADER_KEY, UNKNOWN_BASE, SpecError, TurboSpec, parse_sigmas


class UnknownSchedule(SpecError):
    """Neither a person, nor the header, nor the table says how a file is sampled."""


@dataclass(frozen=True)
class Override:
    """What a person sets by hand; None leaves it to the file."""

    sigmas: tuple[float, ...] | None = None
    sampler: str | None = None

    @classmethod
    def parse(cls, sigmas: str = "", sampler: str = "auto") -> Override:
        """From a node's widgets: "1, 0.7155, 0" or "", and "auto", "euler" or "renoise".

        Raises ValueError where `parse_sigmas` does; whether the numbers are a schedule is for
        TurboSpec to say.
        """
        try:
            values = parse_sigmas(sigmas)
        except ValueError as error:
            raise ValueError(f"sigmas_override: {error}") from None
        return cls(values or None, None if sampler == "auto" else sampler)

    def applied_to(self, spec: TurboSpec, source: str) -> tuple[TurboSpec, str]:
        """The spec with what is set here, and where it is from, in words."""
        changes = {name: value for name, value in vars(self).items() if value is not None}
        if not changes:
            return spec, source
        return replace(spec, **changes), f"override of {' and '.join(changes)}; the rest: {source}"


@dataclass(frozen=True)
class Resolved:
    spec: TurboSpec
    source: str  # in words
    known: bool  # header or table name the base; else it and the family are guesses


def resolve(path: Path, metadata: Mapping[str, str], override: Override | None = None) -> Resolved:
    """The spec of a LoRA file, which may be a known one under another name.

    A partial override keeps the rest. With sigmas by hand neither header nor table is needed; then
    the base is what the header's `modelspec.base_model` says. Hashing reads the whole file, so that
    is done only where header and name say nothing.
    Raises UnknownSchedule, SpecError for a damaged header without sigmas by hand, OSError.
    """
    override = override or Override()
    try:
        spec, source = override.applied_to(*_of_file(path, metadata))
        return Resolved(spec, source, known=spec.base != UNKNOWN_BASE)
    except SpecError:
        if override.sigmas is None:
            raise
        base = metadata.get("modelspec.base_model", "").strip() or UNKNOWN_BASE
        spec = TurboSpec(override.sigmas, base=base, sampler=override.sampler or "euler")
        return Resolved(spec, "override", known=False)


def resolve_spec(
    path_or_name: str | os.PathLike[str],
    metadata: Mapping[str, str] | None,
    *,
    sha256: str | None = None,
) -> tuple[TurboSpec, str]:
    """What header or table say, without a look at the file, and where it is from.

    Raises SpecError if a spec in the header is malformed, UnknownSchedule if nothing is known.
    """
    name = os.fspath(path_or_name)
    if metadata and HEADER_KEY in metadata:
        return TurboSpec.from_json(metadata[HEADER_KEY], source=name), "header of the file"
    row = find(name, sha256)
    if row is not None:
        return row.spec, f"table of known files: {row.source}"
    near = nearest(name)
    hint = (
        ""
        if near is None
        else (
            f" It nearly fits {near.name!r}: if it is that file, its sigmas are "
            f"{', '.join(f'{sigma:.4g}' for sigma in near.spec.sigmas)}."
        )
    )
    raise UnknownSchedule(
        f"{name}: expected a sampling schedule; found no {HEADER_KEY!r} in the header, and the "
        f"name fits none of the {len(KNOWN)} rows of known public files.{hint} A few-step LoRA is "
        "right only at the sigmas it was trained for: look them up where you got the file and give "
        "them as an override, for example '1, 0.7155, 0', or restore the name if you changed it."
    )


def _of_file(path: Path, metadata: Mapping[str, str]) -> tuple[TurboSpec, str]:
    try:
        return resolve_spec(path.name, metadata)
    except UnknownSchedule:
        return resolve_spec(path.name, metadata, sha256=_file_sha256(path))


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
