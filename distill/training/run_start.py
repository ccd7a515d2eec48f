"""Opening a run folder: its recipe is the one that it began with, and nobody else writes there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..config import Config, ConfigError, GatesSection, load_config, save_config
from ..utils.lock import single_writer
from .engine import Engine
from .run_dir import RunDir

log = logging.getLogger(__name__)

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


@contextmanager
def open_run_dir(config: Config, resume: bool, engine: Engine) -> Iterator[None]:
    """`prepare_run_dir`; while entered, no other run writes there. Called by all ranks.

    Raises ConfigError, FolderInUse.
    """
    with ExitStack() as held:

        def enter() -> None:
            check_run_dir(config, resume)  # no folder is made for what cannot begin
            held.enter_context(single_writer(config.run_dir))
            prepare_run_dir(config, resume)

        engine.on_main(enter)
        yield


def check_run_dir(config: Config, resume: bool) -> None:
    """On resume checks that it is the same run. Raises ConfigError."""
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
        return
    if saved.exists():
        raise ConfigError(
            f"{config.run_dir} already holds a run. Continue it with --resume, or name another "
            "folder with run_dir=..."
        )
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ConfigError(f"run_dir: {config.run_dir} is a file; expected a folder or a new name.")


def prepare_run_dir(config: Config, resume: bool) -> None:
    """Makes the run folder and writes `config.yaml`; on resume clears what an interrupted save
    left.

    Raises ConfigError.
    """
    check_run_dir(config, resume)
    if not resume:
        save_config(config, RunDir(config.run_dir).config)
        return
    for leftover in RunDir(config.run_dir).checkpoints.glob(".step-*.tmp"):
        log.info("removing %s, a checkpoint that was never finished", leftover)
        shutil.rmtree(leftover)


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
