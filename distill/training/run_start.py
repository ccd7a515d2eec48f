"""Opening a run folder: a run that is continued goes on from a state that its recipe can use, and
nobody else writes there.
"""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from ..config import Config, ConfigError, load_config, save_config
from ..models.dino import check_dino
from ..models.family import family_of
from ..models.load import check_vae
from ..stages import GANSection
from ..utils.files import replace_file
from ..utils.lock import single_writer
from .checkpoint import saved_steps
from .continuation import BASE, differences, refusals, rejudged
from .engine import Engine
from .identity import (
    Identity,
    other_content,
    read_identity,
    same_content,
    write_identity,
)
from .run_dir import RunDir

log = logging.getLogger(__name__)


@contextmanager
def open_run_dir(
    config: Config, resume: bool, engine: Engine, identity: Identity | None = None
) -> Iterator[None]:
    """`prepare_run_dir`; while entered, no other run writes there. Called by all ranks.

    Raises ConfigError, FolderInUse.
    """
    with ExitStack() as held:

        def enter() -> None:
            check_run_dir(config, resume, identity)  # no folder is made for what cannot begin
            check_judges(config)
            held.enter_context(single_writer(config.run_dir))
            prepare_run_dir(config, resume, identity)

        engine.on_main(enter)
        check_shared(config.run_dir, engine)
        yield


def check_shared(folder: Path, engine: Engine) -> None:
    """All ranks write a checkpoint's files, so the run folder has to be one and the same on all
    machines. Raises ConfigError, on all ranks.
    """
    if engine.world_size == 1:
        return

    def make() -> Path:
        mark = folder / f".shared-{uuid4().hex}.tmp"  # a name that no machine has looked for yet
        mark.touch()
        return mark

    mark = engine.on_main(make)
    found = engine.on_all(lambda: (platform.node(), mark.exists()))
    engine.on_main(mark.unlink)
    if strangers := sorted({host for host, there in found if not there}):
        raise ConfigError(
            f"run_dir: {folder} of {found[0][0]} is another folder on {', '.join(strangers)}. "
            "Expected a folder on a file system that all machines share, under the same path; all "
            "ranks write checkpoints there."
        )


def check_judges(config: Config) -> None:
    """What the discriminators of later stages will load is there, and what they will look at is
    not smaller than they can see. Raises ConfigError.
    """
    pixels = family_of(config.model.path).vae.pixels
    for i, stage in enumerate(config.stages):
        gan = getattr(stage, "gan", None)
        if not isinstance(gan, GANSection) or gan.features == "latent":
            continue
        check_vae(config.model.path)
        if gan.features == "pixels":
            continue
        patch, seen = check_dino(gan.features), gan.crop - 2 * gan.halo
        if seen * pixels < patch:
            raise ConfigError(
                f"stages.{i}.gan.crop, halo: expected {-(-patch // pixels)} latents or more that "
                f"are judged, crop - 2 * halo (found {seen}), for the patches of {gan.features} "
                f"have {patch} pixels per side"
            )


def check_run_dir(config: Config, resume: bool, identity: Identity | None = None) -> None:
    """On resume checks that the recipe can go on from what is there. Raises ConfigError."""
    run = RunDir(config.run_dir)
    if resume:
        if not run.config.is_file():
            raise ConfigError(
                f"{run.config}: nothing to resume. Leave out --resume to start this run."
            )
        old, done = load_config(run.config), steps_done(config.run_dir)
        saved = read_identity(config.run_dir)
        lines = refusals(old, config, done, same_content(saved, identity or {}))
        if not any("another base" in line for line in lines):
            lines += other_content(saved, identity or {}, BASE if done else ())
        if lines:
            raise ConfigError(
                f"{run.config}: the run has made {done} steps, and cannot go on from them with:\n"
                + "\n".join(lines)
                + "\nResume with the old values, or start a new run in another run_dir "
                f"(init_from={config.run_dir} begins with its student)."
            )
        return
    if run.config.exists():
        raise ConfigError(
            f"{config.run_dir} already holds a run. Continue it with --resume, or name another "
            "folder with run_dir=..."
        )
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ConfigError(f"run_dir: {config.run_dir} is a file; expected a folder or a new name.")


def steps_done(run_dir: Path) -> int:
    """Of the newest checkpoint; 0 without one."""
    return max(saved_steps(run_dir), default=0)


def prepare_run_dir(config: Config, resume: bool, identity: Identity | None = None) -> None:
    """Makes the run folder and writes `config.yaml` and `identity.json`; on resume tells what
    changed, keeps the recipe up to here, and clears what an interrupted save left.

    Raises ConfigError.
    """
    check_run_dir(config, resume, identity)
    run = RunDir(config.run_dir)
    if resume:
        _tell_changes(config, identity or {})
        for leftover in run.checkpoints.glob(".step-*.tmp"):
            log.info("removing %s, a checkpoint that was never finished", leftover)
            shutil.rmtree(leftover)
        identity = read_identity(config.run_dir) | (identity or {})
    save_config(config, run.config)
    write_identity(config.run_dir, identity or {})


def _tell_changes(config: Config, identity: Identity) -> None:
    run, done = RunDir(config.run_dir), steps_done(config.run_dir)
    old = load_config(run.config)
    same = same_content(read_identity(config.run_dir), identity)
    lines = [
        line + " (moved, the same content)" * line.strip().startswith(tuple(same))
        for line in differences(old, config)
    ]
    if not lines:
        return
    log.warning(
        "%s goes on from step %d with another recipe:\n%s", config.run_dir, done, "\n".join(lines)
    )
    replace_file(run.config_until(done), lambda path: shutil.copyfile(run.config, path))
    if rejudged(old, config, same) and run.best.is_file():
        log.warning("candidates of before were judged by other images: they no longer count")
        run.best.unlink()
