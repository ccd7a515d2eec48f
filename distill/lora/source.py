"""A LoRA to work on: a file of any spelling, or a run folder."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import Config, ConfigError, ModelSection, load_config
from ..contract.checks import SpecError
from ..contract.lora_keys import LoraFormatError, NormalisedLora, normalise
from ..contract.metadata import read_lora
from ..contract.peft_folder import lora_file
from ..contract.resolve import Override, UnknownSchedule, resolve
from ..contract.shown import shown
from ..contract.spec import TurboSpec
from ..models.family import spec_of
from ..training.run_dir import RunDir, read_json
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
    near: tuple[Path, ...] = ()  # folders and files where the LoRAs in its base may lie


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
    _tell(lora)
    try:
        resolved = resolve(path, metadata, override)
    except UnknownSchedule as error:
        raise SpecError(
            f"{error} On the command line: --sigmas '1, 0.7155, 0' (and --sampler)."
        ) from None
    model = model_of_run(path.absolute().parent.parent, metadata)
    return Source(
        name,
        lora,
        metadata,
        resolved.spec,
        resolved.source,
        str(path),
        model=model.path if model else None,
        near=(path.absolute().parent, *(lora.path for lora in (model.loras if model else ()))),
    )


def _tell(lora: NormalisedLora) -> None:
    """Logs what had to be assumed of a file."""
    for warning in lora.warnings:
        log.warning("%s: %s", lora.source, warning)


def model_of_run(folder: Path, metadata: dict[str, str]) -> ModelSection | None:
    """The base by the recipe of a run folder, for a LoRA in its lora/: the header has names only.
    None where header or recipe do not tell.
    """
    saved = RunDir(folder).config
    if "turbo.config" not in metadata or not saved.is_file():
        return None
    try:
        config = load_config(saved)
        base = json.loads(metadata["turbo.config"])["model"]["path"]
    except (ValueError, TypeError, LookupError, RecursionError):  # of another program or release
        return None
    return config.model if public_name(config.model.path) == base else None


def _open_run(folder: Path, override: Override) -> Source:
    from ..training.checkpoint import newest_checkpoint

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
    spec, spec_source = override.applied_to(spec_of(config), str(saved))
    fields = header_fields(config, inputs=read_json(RunDir(folder).identity)) | {
        "modelspec.title": config.name,
        "ss_steps": str(checkpoint.step),
    }
    return Source(
        f"{config.name}-{newest.name}",
        checkpoint_lora(newest, checkpoint, config),
        fields,
        spec,
        spec_source,
        f"{newest} ({checkpoint.step} of {config.total_steps} steps, averaged weights)",
        folder,
        config.model.path,
        tuple(lora.path for lora in config.model.loras),
    )


def checkpoint_lora(path: Path, checkpoint: Checkpoint, config: Config) -> NormalisedLora:
    """The averaged student of a checkpoint; config: its run's."""
    from .student import student_lora

    alpha = float(config.adapter.alpha or config.adapter.rank)
    return student_lora(ema_student(path, checkpoint), alpha, str(path))


def open_weights(path: Path) -> NormalisedLora:
    """A LoRA whatever its schedule: file, PEFT folder, run folder, or a checkpoint of a run. Logs
    what had to be assumed.

    Raises OSError, LoraFormatError, ConfigError, CheckpointError or DamagedFile as `open_source`.
    """
    from ..training.checkpoint import STATE, load_checkpoint

    if (path / STATE).is_file():
        run = path.absolute().parent.parent
        return checkpoint_lora(path, load_checkpoint(path), load_config(RunDir(run).config))
    if path.is_dir() and RunDir(path).config.is_file():
        return open_source(path).lora
    lora = normalise(*read_lora(lora_file(path)), source=path.name)
    _tell(lora)
    return lora


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
