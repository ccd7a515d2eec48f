"""The checkpoints of a run.

checkpoints/step-000100/   00000.safetensors ...   tensors
                           state.json              the rest, readable
                           SHA256SUMS              of both; compared whenever they are read

A checkpoint is written under a temporary name and renamed, so a folder named step-* is whole. It
holds no code: nothing of it is unpickled. Those of version 1 (old_checkpoint.py) are read too.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from ..models.roles import STUDENT, Roles
from .engine import Engine
from .guard import is_out_of_memory
from .old_checkpoint import UnsafePickle, read_old_tensors
from .run_dir import RunDir, by_step
from .tensor_files import (
    SUMS,
    divided,
    read_checked,
    read_sums,
    read_tensors,
    write_bytes,
    write_sums,
    write_tensors,
)

log = logging.getLogger(__name__)

VERSION = 2
STATE = "state.json"
# JSON has no tensors and only text as keys; an object with one of these keys stands for them
TENSOR, MAPPING = "$tensor", "$mapping"
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Stateful(Protocol):
    """A method in training, as far as a checkpoint is concerned."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message names the file and the way out."""


class DamagedCheckpoint(CheckpointError):
    """One that is not what was written; an earlier one may do."""


@dataclass(frozen=True)
class Checkpoint:
    """What the next step depends on. Randomness is no part of it: it is a function of the step."""

    step: int  # updates done
    stage: int  # index of the stage that made the last of them
    skipped: int  # steps without a finite update so far
    adapters: dict[str, dict[str, torch.Tensor]]  # weights by role and PEFT name
    method: dict[str, Any]  # the stage's `Method.state_dict()`

    @property
    def ended(self) -> dict[str, dict[str, torch.Tensor]]:
        """The adapters as a stage that ends here hands them to the next: the student's moving
        average, where it has one, for its weights. Raises CheckpointError.
        """
        with _fitting("method"):
            weights, average = self.adapters[STUDENT], self.method[STUDENT]["average"]
            if not average:
                return self.adapters
            return {**self.adapters, STUDENT: dict(zip(weights, average, strict=True))}


def take_checkpoint(
    step: int, stage: int, skipped: int, roles: Roles, method: Stateful
) -> Checkpoint:
    adapters = {role: dict(roles.named_parameters(role)) for role in roles.adapters}
    return Checkpoint(step, stage, skipped, adapters, method.state_dict())


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, engine: Engine, keep: int = 0) -> Path:
    """Writes `checkpoint` and removes all but the newest `keep` (0: removes none). Called by all
    ranks, with one file system.

    Raises OSError, the earlier checkpoints being untouched.
    """
    path = RunDir(run_dir).checkpoint(checkpoint.step)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors: dict[str, torch.Tensor] = {}
    tree = _take_tensors(vars(checkpoint), tensors)

    def write_share() -> dict[str, str]:
        files = list(divided(tensors).items())[engine.rank :: engine.world_size]
        return {name: write_tensors(temporary / name, held) for name, held in files}

    try:
        engine.on_main(lambda: _empty_folder(temporary))
        sums = {k: v for share in engine.on_all(write_share) for k, v in share.items()}
        engine.on_main(lambda: _finish(temporary, path, tree, sums, engine.world_size))
    except OSError as error:
        if engine.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        earlier = latest_checkpoint(run_dir)
        raise OSError(
            f"{path}: the checkpoint of step {checkpoint.step} could not be written "
            f"({error.strerror or error}); nothing of it is left. "
            + (f"{earlier.name} is intact: f" if earlier else "F")
            + "ree some space (or set keep_checkpoints), then continue with --resume."
        ) from error
    if keep:
        engine.on_main(lambda: _remove_older(run_dir, keep))
    return path


def _remove_older(run_dir: Path, keep: int) -> None:
    """All checkpoints but the newest `keep`; one that stays does no harm."""
    for old in whole_checkpoints(run_dir)[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            log.warning("%s: could not be removed (%s); delete it at will", old, error)


def _empty_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _finish(temporary: Path, path: Path, tree: Any, sums: dict[str, str], world: int) -> None:
    state = json.dumps({"version": VERSION, "ranks": world, "checkpoint": tree})
    write_sums(temporary, sums | {STATE: write_bytes(temporary / STATE, state.encode())})
    if path.exists():  # damaged, else the run would have continued from it
        shutil.rmtree(path)
    os.replace(temporary, path)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are intact shows when they are read."""
    found = by_step(RunDir(run_dir).checkpoints).values()
    return [path for path in found if (path / STATE).is_file()]


def saved_steps(run_dir: Path) -> list[int]:
    """The steps that a run can be continued from."""
    return [int(path.name.removeprefix("step-")) for path in whole_checkpoints(run_dir)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    found = whole_checkpoints(run_dir)
    return found[-1] if found else None


def resume_checkpoint(run_dir: Path, engine: Engine) -> Checkpoint | None:
    """What a run continues from, on all ranks; newer, damaged checkpoints are renamed, so that
    they neither count nor stand in the way. Raises CheckpointError.

    Its tensors stay in their files until they are copied: eight ranks would else hold eight copies
    in main memory, beside what is on their devices.
    """
    found: list[Checkpoint] = []

    def find() -> Path | None:
        newest = newest_checkpoint(run_dir, mapped=True)
        if newest is None:
            return None
        path, checkpoint = newest
        found.append(checkpoint)
        later = whole_checkpoints(run_dir)
        for damaged in later[later.index(path) + 1 :]:
            aside = damaged.with_name(f"{damaged.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            damaged.rename(aside)
            log.warning("%s is kept as %s; delete it at will", damaged, aside.name)
        return path

    path = engine.on_main(find)
    return found[0] if found else load_checkpoint(path, mapped=True) if path else None


def newest_checkpoint(run_dir: Path, mapped: bool = False) -> tuple[Path, Checkpoint] | None:
    """The newest one that is intact; those that are not are told.

    Raises CheckpointError where none is intact, or the newest is of another release.
    """
    damaged: list[DamagedCheckpoint] = []
    for path in reversed(whole_checkpoints(run_dir)):
        try:
            checkpoint = load_checkpoint(path, mapped)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        for error in damaged:
            log.warning("%s The one before it is taken: %s.", error, path.name)
        return path, checkpoint
    if damaged:
        raise CheckpointError(
            f"{damaged[0]} No other checkpoint is intact: copy one from a backup, or start anew "
            "in another run_dir."
        )
    return None


def load_checkpoint(path: Path, mapped: bool = False) -> Checkpoint:
    """mapped: as `read_tensors` has it.

    Raises CheckpointError; DamagedCheckpoint where an earlier one may do.
    """
    try:
        state, tensors = _read(path, mapped)
        return _checked(Checkpoint(**_put_tensors(state["checkpoint"], tensors)))
    except (CheckpointError, MemoryError):
        raise
    except UnsafePickle as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        gone = isinstance(error, MISSING) or error.errno == errno.EIO
        kind = DamagedCheckpoint if gone else CheckpointError  # else the disk may be back soon
        raise kind(f"{path}: cannot be read ({error}).") from error
    except Exception as error:  # whatever a damaged file makes of its readers
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({type(error).__name__}: {error})."
        ) from error


def _read(path: Path, mapped: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`state.json` and the tensors. What has checksums is compared with them first."""
    if (path / SUMS).is_file():
        sums = read_sums(path)
        state = json.loads(read_checked(path, STATE, sums))
        _require_version(path, state, VERSION)
        return state, read_tensors(path, sums, mapped)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["version"] == VERSION:
        raise FileNotFoundError(f"{SUMS} is missing")
    _require_version(path, state, 1)
    log.warning("%s is of version 1, without checksums: it is read unchecked", path)
    return state, read_old_tensors(path)


def _require_version(path: Path, state: dict[str, Any], version: int) -> None:
    if state.get("version") != version:
        raise CheckpointError(
            f"{path}: expected a checkpoint of version {VERSION}, found "
            f"{state.get('version')}. Continue with the release that wrote it."
        )


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    numbers = (checkpoint.step, checkpoint.stage, checkpoint.skipped)
    if any(not isinstance(number, int) or number < 0 for number in numbers):
        raise ValueError(f"expected counts of steps, found {numbers}")
    return checkpoint


@torch.no_grad()
def load_adapters(roles: Roles, saved: dict[str, dict[str, torch.Tensor]]) -> None:
    """Raises CheckpointError where the adapters are others."""
    with _fitting("adapters"):
        for role, weights in saved.items():
            for name, parameter in roles.named_parameters(role).items():
                parameter.copy_(weights[name])


def load_method(method: Stateful, saved: dict[str, Any], device: torch.device) -> None:
    """Raises CheckpointError where the state is another method's."""
    # Files are to be let go. Optimisers adopt what is on their device, and counts of steps as is
    saved = tree_map_only(
        torch.Tensor, lambda x: x.clone() if device.type == "cpu" or not x.ndim else x, saved
    )
    with _fitting("method"):
        method.load_state_dict(saved)


@contextmanager
def _fitting(part: str) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"the checkpoint's {part!r} does not fit this recipe ({type(error).__name__}: "
            f"{error}). It is of another run: start anew in another run_dir."
        ) from error


def _take_tensors(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """Moves the tensors of a nested state to `tensors`; what is left is JSON that names them."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach()
        return {TENSOR: path}
    if isinstance(value, dict):
        items = [(key, _take_tensors(v, tensors, f"{path}/{key}")) for key, v in value.items()]
        return dict(items) if all(isinstance(key, str) for key in value) else {MAPPING: items}
    if isinstance(value, list | tuple):
        return [_take_tensors(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{path}: a checkpoint holds tensors, numbers and text, found {type(value).__name__}."
    )


def _put_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of `_take_tensors`; tuples come back as lists."""
    if isinstance(value, list):
        return [_put_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    items = value[MAPPING] if MAPPING in value else value.items()
    return {key: _put_tensors(v, tensors) for key, v in items}
