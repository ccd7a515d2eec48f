"""How a LoRA wants to be sampled: override > turbo.spec in the header > other programs' header or
model_index.json > sidecar > table of known files by hash, then by name. The loader node, the
command line and bake all ask here.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import others
from .checks import SpecError
from .known import CERTAINTY, KNOWN, find, nearest, refused
from .latent_grid import sigmas_text
from .spec import HEADER_KEY, UNKNOWN_BASE, TurboSpec, parse_sigmas


class UnknownSchedule(SpecError):
    """Nobody says how a file is sampled: no person, no header, no file beside it, no table."""


@dataclass(frozen=True)
class Override:
    """What a person sets by hand; None leaves it to the file.

    steps: one of the numbers that a spec offers; sigmas make it needless.
    """

    sigmas: tuple[float, ...] | None = None
    sampler: str | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, sigmas: str = "", sampler: str = "auto", steps: int = 0) -> Override:
        """From a node's widgets: "1, 0.7155, 0" or "", "auto", "euler" or "renoise", and 0 for the
        usual number of steps.

        Raises ValueError where `parse_sigmas` does, and for sigmas and steps that disagree; whether
        the numbers are a schedule is for TurboSpec to say.
        """
        try:
            values = parse_sigmas(sigmas)
        except ValueError as error:
            raise ValueError(f"sigmas_override: {error}") from None
        if values and steps not in (0, len(values) - 1):
            raise ValueError(
                f"steps: expected 0 or {len(values) - 1}, as many as sigmas_override has; found "
                f"{steps}"
            )
        return cls(
            values or None,
            None if sampler == "auto" else sampler,
            None if values else steps or None,
        )

    def applied_to(self, spec: TurboSpec, source: str) -> tuple[TurboSpec, str]:
        """The spec with what is set here, and where it is from, in words."""
        changed = [name for name, value in vars(self).items() if value is not None]
        if self.steps is not None:
            spec = spec.in_steps(self.steps)
        if self.sigmas is not None:
            spec = spec.with_sigmas(self.sigmas)
        if self.sampler is not None:
            spec = replace(spec, sampler=self.sampler)
        return (
            spec,
            f"override of {' and '.join(changed)}; the rest: {source}" if changed else source,
        )


@dataclass(frozen=True)
class Resolved:
    spec: TurboSpec
    source: str  # in words
    known: bool  # header or table name the base; else it and the family are guesses


def resolve(path: Path, metadata: Mapping[str, str], override: Override | None = None) -> Resolved:
    """The spec of a LoRA file, which may be a known one under another name.

    A partial override keeps the rest. With sigmas by hand nothing else is needed; then the base is
    what the header's `modelspec.base_model` says.
    Raises UnknownSchedule; without sigmas by hand SpecError for a damaged header or sidecar and for
    a public file that is no plain LoRA; OSError.
    """
    override = override or Override()
    try:
        spec, source = override.applied_to(*of_file(path, metadata))
        return Resolved(spec, source, known=spec.base != UNKNOWN_BASE)
    except SpecError:
        if override.sigmas is None:
            raise
        spec = others.bare((1.0, 0.0), metadata).with_sigmas(override.sigmas)
        return Resolved(replace(spec, sampler=override.sampler or spec.sampler), "override", False)


def of_file(path: Path, metadata: Mapping[str, str]) -> tuple[TurboSpec, str]:
    """What the header, the files beside it or the table say of a file, and which of them it was.

    The file is hashed where only the table is left. Raises as `resolve`.
    """
    found = _of_header(path.name, metadata)
    found = found or others.of_model_index(path, metadata) or others.of_sidecar(path)
    return found or _of_table(path.name, _sha256(path))


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
    return _of_header(name, metadata or {}) or _of_table(name, sha256)


def _of_header(name: str, metadata: Mapping[str, str]) -> tuple[TurboSpec, str] | None:
    if HEADER_KEY in metadata:
        return TurboSpec.from_json(metadata[HEADER_KEY], source=name), "header of the file"
    return others.of_header(metadata, name)


def _of_table(name: str, sha256: str | None) -> tuple[TurboSpec, str]:
    if other := refused(name, sha256):
        raise SpecError(f"{name} is {other.name}: {other.reason}")
    if row := find(name, sha256):
        how = "hash" if sha256 in row.sha256 else "name"
        sure = CERTAINTY[row.certainty]
        return row.spec, f"table of known files: {row.source} (found by {how}; {sure})"
    near = nearest(name)
    hint = (
        ""
        if near is None
        else f" It nearly fits {near.name!r}: if it is that file, its sigmas are "
        f"{sigmas_text(near.spec)}."
    )
    raise UnknownSchedule(
        f"{name}: expected a sampling schedule; found no {HEADER_KEY!r} in the header, no "
        f"{others.sidecar(Path(name)).name} beside it, and the name fits none of the {len(KNOWN)} "
        f"rows of known public files.{hint} A few-step LoRA is right only at the sigmas it was "
        "trained for: look them up where you got the file and give them as an override, for "
        "example '1, 0.7155, 0', write them into a copy with `turbo-distill stamp`, or restore the "
        "name if you changed it."
    )


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of_version(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _sha256_of_version(path: Path, mtime_ns: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
