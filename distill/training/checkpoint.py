"""Run folders and their checkpoints.

checkpoints/step-000100/   .metadata  __0_0.distcp ...   tensors, by torch.distributed.checkpoint
                           state.json                    the rest, readable

A checkpoint is written under a temporary name and renamed, so a folder named step-* is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config import Config, ConfigError, GatesSection, load_config, save_config
from ..models.roles import Roles
from .engine import Engine, load_tensors
from .run_dir import RunDir

log = logging.getLogger(__name__)

VERSION = 1
STATE = "state.json"
# JSON has no tensors and only text as keys; an object with one of these keys stands for them
TENSOR, MAPPING = "$tensor", "$mapping"
# Keys that may differ between a run and its continuation. The ranks of `engine` may: what counts is
# the number of samples per step, which `differences` compares.
FREE_ON_RESUME = frozenset(
    {
        "run_dir",
        "preview.every",
        "preview.side",
        "select",
        *(f"gates.{key}" for key in GatesSection.model_fields if key != "clip"),
        "save_every",
        "log_every",
        "keep_checkpoints",
        "nan_limit",
        "engine.shard",
        "engine.world",
        "engine.timeout_s",
    }
)


class Stateful(Protocol):
    """A method in training, as far as a checkpoint is concerned."""

    def state_dict(self) -> dict[str, Any]: ...


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message names the file and the way out."""


def prepare_run_dir(config: Config, resume: bool) -> None:
    """Makes the run folder and writes `config.yaml`; on resume checks that it is the same run, and
    clears what an interrupted save left.

    Raises ConfigError.
    """
    saved = RunDir(config.run_dir).config
    if resume:
        if not saved.is_file():
            raise ConfigError(f"{saved}: nothing to resume. Leave out --resume to start this run.")
        changed = differences(load_config(saved), config)
        if changed:
            raise ConfigError(
                f"{saved}: the configuration changed since this run began:\n"
                + "\n".join(changed)
                + "\nResume with "
                "the old values, or start a new run in another run_dir."
            )
        for leftover in RunDir(config.run_dir).checkpoints.glob(".step-*.tmp"):
            log.info("removing %s, a checkpoint that was never finished", leftover)
            shutil.rmtree(leftover)
        return
    if saved.exists():
        raise ConfigError(
            f"{config.run_dir} already holds a run. Continue it with --resume, or name another "
            "folder with run_dir=..."
        )
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ConfigError(f"run_dir: {config.run_dir} is a file; expected a folder or a new name.")
    save_config(config, saved)


def differences(old: Config, new: Config) -> list[str]:
    """Keys whose values differ, one line each."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            items = enumerate(value)
        else:
            return {prefix: value}
        return {
            k: v
            for key, sub in items
            for k, v in flat(sub, f"{prefix}.{key}" if prefix else str(key)).items()
        }

    def values(config: Config) -> dict[str, Any]:
        """`batch` becomes the samples of one step on all ranks."""
        dumped = config.model_dump(mode="json")
        for stage in dumped["stages"]:
            stage["batch x ranks"] = stage.pop("batch") * (config.engine.world or 1)
        return flat(dumped)

    a, b = values(old), values(new)
    return [
        f"  {key}: {a.get(key, '(absent)')} -> {b.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if key not in FREE_ON_RESUME and a.get(key) != b.get(key)
    ]


@dataclass(frozen=True)
class Checkpoint:
    """What the next step depends on. Randomness is no part of it: it is a function of the step."""

    step: int  # updates done
    stage: int  # index of the stage that made the last of them
    skipped: int  # steps without a finite update so far
    adapters: dict[str, dict[str, torch.Tensor]]  # weights by role and PEFT name
    method: dict[str, Any]  # the stage's `Method.state_dict()`


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
    try:
        engine.on_main(lambda: _empty_folder(temporary))
        engine.save_tensors(tensors, temporary)
        engine.on_main(lambda: _finish(temporary, path, tree, engine.world_size, keep))
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
    return path


def _empty_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _finish(temporary: Path, path: Path, tree: Any, world: int, keep: int) -> None:
    with (temporary / STATE).open("w", encoding="utf-8") as file:
        json.dump({"version": VERSION, "ranks": world, "checkpoint": tree}, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():  # damaged, else the run would have continued from it
        shutil.rmtree(path)
    os.replace(temporary, path)
    for old in whole_checkpoints(path.parent.parent)[:-keep] if keep else ():
        shutil.rmtree(old)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = sorted(RunDir(run_dir).checkpoints.glob("step-*"))
    return [path for path in found if (path / STATE).is_file() and (path / ".metadata").is_file()]


def saved_steps(run_dir: Path) -> list[int]:
    """The steps that a run can be continued from."""
    return [int(path.name.removeprefix("step-")) for path in whole_checkpoints(run_dir)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    found = whole_checkpoints(run_dir)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: expected a checkpoint of version {VERSION}, found "
                f"{state.get('version')}. Continue with the release that wrote it."
            )
        return Checkpoint(**_put_tensors(state["checkpoint"], load_tensors(path)))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes of its readers
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Delete that folder to "
            "continue from the checkpoint before it."
        ) from error


@torch.no_grad()
def load_adapters(roles: Roles, saved: dict[str, dict[str, torch.Tensor]]) -> None:
    for role, weights in saved.items():
        for name, parameter in roles.named_parameters(role).items():
            parameter.copy_(weights[name])


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
