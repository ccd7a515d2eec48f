"""Schedule, model family and alpha written into a copy of a LoRA that does not carry them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import others
from .checks import SpecError
from .describe import normalise_alone
from .hints import did_you_mean
from .known import CERTAINTY, KNOWN, KnownFile, family_of, find, nearest, refused
from .latent_grid import GRIDS
from .lora_alpha import same_alpha
from .lora_keys import LoraFormatError, LoraModule, NormalisedLora
from .metadata import hashes, read_shapes, usage_hint
from .peft_folder import lora_file
from .resolve import UnknownSchedule, of_file
from .rewrite import rewrite
from .shift import Shift
from .shown import plain, shown
from .spec import HEADER_KEY, UNKNOWN_BASE, TurboSpec
from .tensor_file import read_layout

_HALF_END = re.compile(r"[._]lora(_linear_layer)?[._]$")  # what both halves' keys have in common
_HINT = "modelspec.usage_hint"


@dataclass(frozen=True)
class Wanted:
    """What a person says of a LoRA; None leaves it to the file.

    sigmas: levels as they are sampled at; nodes: levels before `shift` and `terminal`; like: the
    name of a known file. At most one of the three. fields: other fields of TurboSpec by name.
    alpha: of every module, for a file that does not say it, in the convention scale = alpha / rank.
    """

    sigmas: tuple[float, ...] | None = None
    nodes: tuple[float, ...] | None = None
    shift: Shift | None = None
    terminal: float | None = None
    like: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    alpha: float | None = None


def stamp(
    source: str | os.PathLike[str], out: str | os.PathLike[str], wanted: Wanted
) -> dict[str, Any]:
    """Writes a LoRA with its spec in the header and alpha in tensors; what was done, for JSON.

    source: a file, or a folder that PEFT saved; out: a new file. No bit of the source's tensors
    changes, and its header stays but for the spec and for hashes of the weights. alpha is added
    where a header or config states it, or `wanted` does. Raises SpecError for a schedule that is
    unknown or none, ValueError for an `out` that no loader would list, LoraFormatError for what is
    no LoRA that can be applied, or where `wanted`'s alpha is not the one that the file states,
    FileExistsError, NoRoomError, OSError.
    """
    path, out = lora_file(source), Path(out)
    if out.exists():
        same = " It is the LoRA itself, which is never written to." if _same(path, out) else ""
        raise FileExistsError(f"{out} exists; delete it, or name another file.{same}")
    if out.suffix.lower() not in others.SUFFIXES:
        raise ValueError(
            f"{out}: expected a name that ends in {' or '.join(others.SUFFIXES)}: loaders list no "
            "others"
        )
    layout = read_layout(path)
    tensors, metadata = read_shapes(path)
    lora = normalise_alone(tensors, metadata, path.name)
    spec, spec_source = spec_for(path, metadata, wanted)
    sampling = usage_hint(spec)
    added = dict(_alphas(lora, tensors, wanted.alpha))

    def header(digest: str) -> dict[str, str]:
        again = {key: new for key, new in hashes(digest).items() if key in layout.metadata}
        if HEADER_KEY in layout.metadata and _HINT in layout.metadata:
            again[_HINT] = sampling  # it was ours, and told of the spec that is replaced
        return layout.metadata | {HEADER_KEY: spec.to_json()} | again

    rewrite(path, out, layout, added, header)
    return {
        "file": out.name,
        "file_size_bytes": out.stat().st_size,
        "source": path.name,
        "spec": json.loads(spec.to_json()),
        "spec_source": spec_source,
        "spec_replaced": HEADER_KEY in layout.metadata,
        "sampling": sampling,
        "family": spec.family,
        "base": spec.base,
        "alpha_added": len(added),
        "alpha_from": "--alpha" if added and wanted.alpha is not None else lora.alpha_words,
        "warnings": list(_warnings(lora, spec, wanted)),
    }


def spec_for(path: Path, metadata: Mapping[str, str], wanted: Wanted) -> tuple[TurboSpec, str]:
    """The spec to write, and where it is from, in words. Raises SpecError, OSError.

    A schedule by hand keeps the rest of what the file, or a file or table beside it, says.
    """
    ways = {"--sigmas": wanted.sigmas, "--nodes": wanted.nodes, "--like": wanted.like}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise SpecError(f"expected one of {', '.join(ways)}; found {' and '.join(given)}")
    if wanted.nodes is None and (wanted.shift, wanted.terminal) != (None, None):
        raise SpecError("--shift and --terminal: expected --nodes beside them, which they move")
    changes: dict[str, Any] = {}
    if wanted.like is not None:
        row = known_file(wanted.like)
        sure = CERTAINTY[row.certainty]
        spec, source = row.spec, f"table of known files: {row.source} ({sure})"
    elif given:
        levels = wanted.nodes or wanted.sigmas or ()
        spec, source = _before(path, metadata, levels), given[0]
        kept = spec.boundary if spec.steps == len(levels) - 1 else None
        changes = {"nodes": levels, "shift": wanted.shift, "terminal": wanted.terminal}
        changes |= {"ladder": (), "boundary": kept}
    else:
        spec, source = _own(path, metadata)
    if family := family_of(wanted.fields.get("base", "")):
        changes["family"] = family
    spec = replace(spec, **changes | dict(wanted.fields))
    names = " and ".join(wanted.fields)
    return spec, f"{source}; {names} by hand" if names else source


def known_file(name: str) -> KnownFile:
    """The row of the table by its name, or by any file name that is one of its. Raises SpecError
    with the nearest name, or with the reason where the file is no LoRA.
    """
    if other := refused(name):
        raise SpecError(f"--like: {shown(name)} is {other.name}: {other.reason}")
    if row := find(name):
        return row
    near = nearest(name)
    hint = f" Did you mean {near.name!r}?" if near else did_you_mean(name, [r.name for r in KNOWN])
    raise SpecError(
        f"--like: expected the name of one of the {len(KNOWN)} known files (docs/known_files.md); "
        f"found {shown(name)}.{hint}"
    )


def _own(path: Path, metadata: Mapping[str, str]) -> tuple[TurboSpec, str]:
    try:
        return of_file(path, metadata)
    except UnknownSchedule as error:
        raise UnknownSchedule(f"{error} Here: --sigmas, --nodes or --like.") from None


def _before(path: Path, metadata: Mapping[str, str], levels: tuple[float, ...]) -> TurboSpec:
    """What is known of a file apart from its schedule; a damaged spec is what a person mends."""
    try:
        return of_file(path, metadata)[0]
    except SpecError:
        return others.bare(levels, metadata)


def _alphas(
    lora: NormalisedLora, tensors: Mapping[str, Tensor], alpha: float | None
) -> Iterator[tuple[str, Tensor]]:
    """alpha of the modules whose alpha is known but not as a tensor, under the file's own names.

    Raises LoraFormatError where a module's alpha is stated and another one.
    """
    keys = {id(tensor): key for key, tensor in tensors.items()}
    for name, module in lora.modules.items():
        stated = module.alpha_source != "rank"
        if alpha is not None and stated and not same_alpha(alpha, module.alpha):
            raise _conflict(lora, module, alpha)
        value = module.alpha if stated else alpha
        if value is None or module.alpha_source == "tensor":
            continue
        down, up = keys.get(id(module.down)), keys.get(id(module.up))
        stem, found = _HALF_END.subn("", os.path.commonprefix([down or "", up or ""]))
        if not found:
            raise LoraFormatError(
                f"{lora.source}: module {shown(name)}: expected one pair of tensors to write alpha "
                "beside; found it put together of several. `turbo-distill export` writes it."
            )
        yield f"{stem}.alpha", torch.tensor(value, dtype=torch.float32)


def _conflict(lora: NormalisedLora, module: LoraModule, alpha: float) -> LoraFormatError:
    where = (
        f"the tensor of module {plain(module.name)}"
        if module.alpha_source == "tensor"
        else lora.alpha_where
    )
    return LoraFormatError(
        f"{lora.source}: alpha is stated twice: --alpha says {alpha:g}, {where} says "
        f"{module.alpha:g} (for rank {module.rank}, scale = alpha / rank). Leave --alpha out."
    )


def _warnings(lora: NormalisedLora, spec: TurboSpec, wanted: Wanted) -> Iterator[str]:
    """What a person should know of the new file."""
    if wanted.alpha is None:
        yield from lora.warnings
    if spec.family not in GRIDS:
        yield (
            f"family: expected one of {', '.join(GRIDS)}; {shown(spec.family)} was written."
            + did_you_mean(spec.family, GRIDS)
        )
    if spec.base == UNKNOWN_BASE:
        yield (
            f"nothing names the model that this LoRA is for; family {spec.family} was written. "
            "--base names it, --family its kind."
        )


def _same(path: Path, out: Path) -> bool:
    return path.exists() and os.path.samefile(path, out)
