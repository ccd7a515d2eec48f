"""How a LoRA wants to be sampled: override > header > table of known files, decided once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .known import KNOWN, find
from .spec import HEADER_KEY, SpecError, TurboSpec


def resolve_spec(
    path_or_name: str | os.PathLike[str],
    metadata: Mapping[str, str] | None,
    *,
    override: TurboSpec | None = None,
    sha256: str | None = None,
) -> tuple[TurboSpec, str]:
    """The spec of a LoRA and, in words, where it is from: override > header > table of known files.

    Raises SpecError if a spec in the header is malformed, or if nothing is known.
    """
    name = os.fspath(path_or_name)
    if override is not None:
        return override, "override"
    if metadata and HEADER_KEY in metadata:
        return TurboSpec.from_json(metadata[HEADER_KEY], source=name), "header of the file"
    row = find(name, sha256)
    if row is not None:
        return row.spec, f"table of known files: {row.source}"
    raise SpecError(
        f"{name}: expected a sampling schedule; found no {HEADER_KEY!r} in the header, and the "
        f"name fits none of the {len(KNOWN)} rows of known public files. A few-step LoRA is right "
        "only at the sigmas it was trained for: look them up where you got the file and give them "
        "as an override, for example '1, 0.7155, 0', or restore the name if you changed it."
    )


def resolve_file(path: Path, metadata: Mapping[str, str]) -> tuple[TurboSpec, str]:
    """`resolve_spec` of a file on disk, which may be a known one under another name.

    Hashing reads the whole file, so that is done only where header and name say nothing. Raises
    SpecError, OSError.
    """
    try:
        return resolve_spec(path.name, metadata)
    except SpecError:
        if HEADER_KEY in metadata:
            raise
        return resolve_spec(path.name, metadata, sha256=_file_sha256(path))


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Override:
    """What the command line says about a LoRA's schedule; None leaves it to the file."""

    sigmas: tuple[float, ...] | None = None
    sampler: str | None = None
