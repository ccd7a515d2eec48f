"""A LoRA to work on: a file of any spelling, or a run folder."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ConfigError, load_config
from ..contract.checks import SpecError
from ..contract.lora_keys import LoraFormatError, NormalisedLora, normalise
from ..contract.metadata import read_lora
from ..contract.peft_folder import lora_file
from ..contract.resolve import Override, UnknownSchedule, resolve
from ..contract.shown import shown
from ..contract.spec import TurboSpec
from ..models.family import spec_of
from ..training.run_dir import RunDir
from ..training.tensor_files import DamagedFile, check_lora
from ..utils.hub_names import public_name
from .header import header_fields

if TYPE_CHECKING:
    from ..training.checkpoint import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What is known about a LoRA before any model is loaded."""

    name: str  # short, for file names
    lora: NormalisedLora
    metadata: dict[str, str]  # its header, or what the trainer would write there
    spec: TurboSpec
    spec_source: str  # in words
    origin: str  # in words
    run_dir: Path | None = None  # the run that it is from, if it was given as one
    model: str | None = None  # where the base lies, if the run's recipe is at hand


def open_source(path: Path, override: Override | None = None) -> Source:
    """Reads a LoRA file, a folder as PEFT writes it, or a run folder: its finished LoRA if there is
    one, else the averaged student of its newest checkpoint. Logs what had to be assumed.

    Raises OSError, LoraFormatError, ConfigError for a folder that holds none, CheckpointError or
    DamagedFile for what a run left, and SpecError where no schedule is known.
    """
    override = override or Override()
    if not path.is_dir():
        return _open_file(path, path.stem, override)
    if RunDir(path).config.is_file():
        return _open_run(path, override)
    try:
        file = lora_file(path)
    except LoraFormatError as error:
        saved = RunDir(path).config.name
        raise ConfigError(f"{error} It is no run folder either: {saved} is missing.") from None
    return _open_file(file, path.absolute().name, override)


def _open_file(path: Path, name: str, override: Override) -> Source:
    tensors, metadata = read_lora(path)
    lora = normalise(tensors, metadata, source=path.name)
    for warning in lora.warnings:
        log.warning("%s: %s", path.name, warning)
    try:
        resolved = resolve(path, metadata, override)
    except UnknownSchedule as error:
        raise SpecError(
            f"{error} On the command line: --sigmas '1, 0.7155, 0' (and --sampler)."
        ) from None
    model = model_of_run(path.absolute().parent.parent, metadata)
    return Source(name, lora, metadata, resolved.spec, resolved.source, str(path), model=model)


def model_of_run(folder: Path, metadata: dict[str, str]) -> str | None:
    """Where the base lies by the recipe of a run folder, for a LoRA in its lora/: the header has
    the base's name only. None where header or recipe do not tell.
    """
    saved = RunDir(folder).config
    if "turbo.config" not in metadata or not saved.is_file():
        return None
    try:
        config = load_config(saved)
        base = json.loads(metadata["turbo.config"])["model"]["path"]
    except (ValueError, TypeError, LookupError, RecursionError):  # of another program or release
        return None
    return config.model.path if public_name(config.model.path) == base else None


def _open_run(folder: Path, override: Override) -> Source:
    from ..training.checkpoint import newest_checkpoint
    from .student import student_lora  # the training packages, which a file does not need

    saved = RunDir(folder).config
    config = load_config(saved)
    finished = RunDir(folder).lora(config.name)
    if finished.is_file():
        try:
            check_lora(finished)
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}. Delete the file; `turbo-distill train {saved} --resume` writes it again."
            ) from None
        return replace(_open_file(finished, finished.stem, override), run_dir=folder)
    found = newest_checkpoint(folder)
    if found is None:
        raise ConfigError(
            f"{folder} holds neither {finished.relative_to(folder)} nor a checkpoint yet; wait for "
            "the first one (save_every), or finish the run."
        )
    newest, checkpoint = found
    weights = ema_student(newest, checkpoint)
    alpha = float(config.adapter.alpha or config.adapter.rank)
    spec, spec_source = override.applied_to(spec_of(config), str(saved))
    fields = header_fields(config) | {
        "modelspec.title": config.name,
        "ss_steps": str(checkpoint.step),
    }
    return Source(
        f"{config.name}-{newest.name}",
        student_lora(weights, alpha, str(newest)),
        fields,
        spec,
        spec_source,
        f"{newest} ({checkpoint.step} of {config.total_steps} steps, averaged weights)",
        folder,
        config.model.path,
    )


def ema_student(path: Path, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The student of a checkpoint with its moving average as weights, where the stage keeps one.

    Raises CheckpointError, with the file and the key, where the state has no such student.
    """
    from ..training.checkpoint import STATE, CheckpointError

    def expect(key: str, value: Any, what: str, fits: bool) -> None:
        if not fits:
            raise CheckpointError(
                f"{path / STATE}: {key}: expected {what}; found {shown(value)}. The checkpoint is "
                "damaged or of another program: export another one, or the finished LoRA."
            )

    weights = _at(checkpoint.adapters, "student")
    named = isinstance(weights, dict) and weights and _tensors(list(weights.values()))
    expect("adapters.student", weights, "weights by name", bool(named))
    state = _at(checkpoint.method, "student")
    average = _at(state, "average")
    fits = _tensors(average) and len(average) in (0, len(weights))
    expect("method.student.average", average, f"{len(weights)} weights, or none", fits)
    return dict(zip(weights, average, strict=True)) if average else weights


def _at(value: Any, key: str) -> Any:
    """What lies under a key; None where that is no mapping or has no such key."""
    return value.get(key) if isinstance(value, dict) else None


def _tensors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, torch.Tensor) for item in value)
