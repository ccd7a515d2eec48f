"""The training loop: walks through the stages of a recipe (PCM, DMD2, GAN) with EMA, previews,
checkpoints and logs, and leaves a run folder (training/run_dir.py) with the finished LoRA.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from .config import Config
from .contract.metadata import read_header
from .data.batch import Data
from .data.load import load_data, with_trained_sizes
from .evaluation.gates import failures
from .lora.header import header_fields
from .lora.inputs import inputs_of
from .lora.model_card import write_release
from .lora.source import open_weights
from .lora.student import export_lora, init_student, load_student
from .lora.thumbnail import thumbnail_fields, thumbnail_of
from .methods import Method, build_method
from .models.family import spec_of
from .models.load import load_transformer
from .models.mixed_precision import tf32
from .models.roles import STUDENT, Roles
from .stages import Stage, stage_ranges
from .training.checkpoint import (
    Checkpoint,
    load_adapters,
    load_method,
    resume_checkpoint,
    save_checkpoint,
    saved_steps,
    take_checkpoint,
)
from .training.engine import Engine
from .training.environment import write_machine
from .training.guard import (
    NanGuard,
    OutOfMemory,
    forbid_global_rng,
    is_out_of_memory,
    memory_advice,
)
from .training.held_out import split
from .training.identity import Identity, read_identity
from .training.previews import Previewer
from .training.report import Reporter
from .training.run_dir import RunDir
from .training.run_log import RunLog, Window
from .training.run_start import open_run_dir, steps_done
from .training.selection import Candidate, Selection
from .training.signals import Stopped, StopSignals
from .training.tensor_files import is_intact
from .utils.progress import progress

log = logging.getLogger(__name__)


def train(config: Config, *, resume: bool | None = False, data: Data | None = None) -> Path:
    """Runs all stages of `config`; returns the path of the finished LoRA. `data` replaces what
    `config.data` names. resume: None continues a run, or starts one where the folder holds none.

    Raises ConfigError where the folder holds a run and `resume` is off, or the recipe cannot go on
    from what is there, LoraFormatError for a LoRA to begin with, FolderInUse, CheckpointError,
    Diverged, OutOfMemory, OSError (a full disk), Stopped (a SystemExit) after SIGTERM or Ctrl-C.
    """
    engine = Engine.start(config.engine)
    # The run folder and the LoRA's header record how many ranks shared a step's samples.
    ranks = config.engine.model_copy(update={"world": engine.world_size})
    run = Run(config.model_copy(update={"engine": ranks}), engine)
    try:
        if resume is None:
            resume = engine.on_main(RunDir(config.run_dir).config.is_file)
        begun = resume and steps_done(config.run_dir) > 0
        inputs = engine.on_main(lambda: inputs_of(run.config, begun))
        quick = engine.device.type == "cuda" and config.model.dtype == "bfloat16"  # VAE and judge
        with open_run_dir(run.config, resume, engine, inputs), tf32(quick):
            run.inputs = engine.on_main(lambda: read_identity(config.run_dir))
            path = run.train(resume, data)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise OutOfMemory(memory_advice(run.config, run.stage, error)) from error
        raise
    except Stopped as stopped:
        if engine.is_main:
            log.warning("%s", stopped.reason)
        engine.stop()
        raise
    engine.stop()
    return path


class Run:
    """One call of `train`: what its parts share."""

    inputs: Identity  # what it begins with, by content
    roles: Roles
    guard: NanGuard
    run_log: RunLog

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.run_dir, self.spec = config.run_dir, spec_of(config)
        self.lora = RunDir(config.run_dir).lora(config.name)
        self.selection = Selection(config.run_dir, config.gates)
        self.reporter = Reporter(config.run_dir, engine.is_main)
        self.previewer: Previewer | None = None
        self.stage: Stage | None = None  # the present one
        self.thumbnail: dict[str, str] = {}  # of the newest preview, as header entries

    def train(self, resume: bool, data: Data | None) -> Path:
        config, engine = self.config, self.engine

        # Where to start
        checkpoint = resume_checkpoint(self.run_dir, engine) if resume else None
        first = checkpoint.step if checkpoint else 0
        finished = first == config.total_steps and self.lora.is_file()
        if finished and is_intact(self.lora, "it is written again"):
            if engine.is_main:
                log.warning("%s is a finished run; nothing is left to do", self.run_dir)
            return self.lora

        engine.on_main(lambda: write_machine(self.run_dir, engine.world_size, engine.device))

        # Data, base, adapters
        parts = split(config, data or load_data(config), engine)
        data = parts.data
        begin = config.total_steps - config.stages[-1].steps
        engine.on_main(lambda: self.selection.restore(first, begin))
        self.spec = with_trained_sizes(self.spec, config, data)
        if config.preview.every and parts.examples:
            self.previewer = Previewer(config, engine, parts.examples)
        dtype = getattr(torch, config.model.dtype)
        self.roles = self._load_roles(data, dtype)
        if checkpoint:
            self._load_trained(checkpoint)
        elif config.init_from:
            init_student(self.roles, open_weights(config.init_from))
        if self.previewer:
            self.previewer.draw_teacher(self.roles)

        # Main loop
        self.guard = NanGuard(config.nan_limit, checkpoint.skipped if checkpoint else 0)
        window = Window()
        with (
            StopSignals() as signals,
            RunLog(self.run_dir, engine, first) as self.run_log,
            progress(total=config.total_steps, done=first, hidden=not engine.is_main) as bar,
            logging_redirect_tqdm(),
        ):
            for index, (stage, begin, end) in enumerate(stage_ranges(config.stages)):
                if end <= first:
                    continue
                self.stage = stage
                method = self._build(stage, index)
                if checkpoint and begin < first:
                    load_method(method, checkpoint.method, engine.device)
                checkpoint = None  # its memory is free again
                bar.set_description(stage.method)
                for step in range(max(begin, first), end):
                    # One update
                    started = time.perf_counter()
                    rng = engine.rng(config.seed, step)
                    with forbid_global_rng(engine.device):
                        batch = data.batch(rng, stage.samples).to(engine.device, dtype)
                        values = method.step(batch, rng)
                    done = step + 1
                    self.guard.check(done, stage, values, method.optimizers.values())
                    seconds = time.perf_counter() - started
                    window.add(values, seconds, len(batch.x0) * engine.world_size)
                    bar.update()

                    # Log
                    if done % config.log_every == 0 or done == end:
                        values = {"stage": stage.method, **window.take(engine)}
                        self.run_log.write(done, {**values, "skipped": self.guard.skipped})
                        losses = {k: v for k, v in values.items() if k.startswith("loss")}
                        bar.set_postfix({key: f"{value:.4f}" for key, value in losses.items()})

                    # Preview and save
                    last = done == config.total_steps
                    if due(done, config.preview.every, config.total_steps):
                        self._preview(method, stage, done)
                    stop = int(engine.max(signals.received))  # one rank's signal stops all
                    if last or stop or due(done, config.save_every, config.total_steps):
                        self._save(method, index, done)
                        self.reporter.keep(now=bool(stop))
                    if stop and not last:
                        raise Stopped(stop, done)
                # A stage hands the moving average of its weights to the next. What was saved has
                # both, so that a run can make more steps of it.
                method.adopt_ema()

        # Export
        engine.on_main(self._export)
        return self.lora

    def _load_roles(self, data: Data, dtype: torch.dtype) -> Roles:
        """The base with all adapters that the recipe needs, on this rank's device."""
        config, model = self.config, self.config.model
        transformer = load_transformer(
            model.path, dtype, model.quantize, model.offload_modulation, model.loras
        )
        if model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        roles = Roles(
            transformer,
            config.adapter,
            config.guidance,
            data.negative.to(self.engine.device, dtype),
            config.seed,
            adapters_of(config.stages),
        )
        whole = [p for role in roles.adapters for p in roles.parameters(role)]
        self.engine.shard(transformer, roles.family.blocks_of(transformer), whole)
        return roles

    def _load_trained(self, checkpoint: Checkpoint) -> None:
        """The adapters that stages up to there have trained."""
        ranges, step = list(stage_ranges(self.config.stages)), checkpoint.step
        ended = step in [end for _, _, end in ranges]
        saved = checkpoint.ended if ended else checkpoint.adapters
        trained = adapters_of(tuple(stage for stage, begin, _ in ranges if begin < step))
        load_adapters(self.roles, {role: saved[role] for role in trained if role in saved})

    def _build(self, stage: Stage, index: int) -> Method:
        """A stage's method; what it initialises is a function of the seed and the stage."""
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed + index)
            return build_method(stage, self.roles, self.spec, self.engine, self.config.model.path)

    def _preview(self, method: Method, stage: Stage, step: int) -> None:
        """Draws and judges the student with averaged weights; the ranks share the drawing."""
        assert self.previewer
        with method.use_ema():
            latents = self.previewer.draw(self.roles)
            self.engine.on_main(lambda: self._judge(latents, stage, step))

    def _judge(self, latents: torch.Tensor | None, stage: Stage, step: int) -> None:
        """Logs figures and failed gates. A student of the last stage may become the run's LoRA;
        those of earlier ones lack what it adds.
        """
        assert self.previewer
        assert latents is not None
        config, preview = self.config, self.previewer.judged(latents, step)
        self.thumbnail = thumbnail_fields(preview.images)
        for failure in failures(preview.ratios, config.gates):
            log.warning("step %d: gate failed: %s", step, failure)
        if config.select == "best" and stage is config.stages[-1]:
            candidate = Candidate(step, preview.ratios)
            self.selection.offer(
                candidate, lambda path: self._write(path, candidate), saved_steps(self.run_dir)
            )
        self.run_log.write(step, {"stage": stage.method, **preview.values(config.gates)})
        self.run_log.image(step, "preview", preview.picture)
        self.reporter.keep()

    def _save(self, method: Method, index: int, step: int) -> None:
        checkpoint = take_checkpoint(step, index, self.guard.skipped, self.roles, method)
        save_checkpoint(self.run_dir, checkpoint, self.engine, self.config.keep_checkpoints)

    def _write(self, path: Path, candidate: Candidate | None) -> None:
        chosen = candidate.record(self.config.gates) if candidate else None
        export_lora(
            self.roles,
            self.spec,
            path,
            title=self.config.name,
            extra=header_fields(self.config, chosen, self.inputs) | self.thumbnail,
        )
        log.info("wrote %s", path)

    def _export(self) -> None:
        """The finished LoRA: the best student that the last stage's previews saw, or the last."""
        best = self.selection.best if self.config.select == "best" else None
        if best:
            load_student(self.roles, self.selection.lora(best))
            self.thumbnail = thumbnail_of(read_header(self.selection.lora(best)))
            log.info("of step %d, the best of the last stage's previews", best.step)
            if failures(best.ratios, self.config.gates):
                log.warning("no preview passed all gates; step %d comes closest", best.step)
        self._write(self.lora, best)
        write_release(self.lora, self.run_dir)
        self.reporter.keep(now=True)


def adapters_of(stages: tuple[Stage, ...]) -> tuple[str, ...]:
    """The adapters that a recipe needs, the student first."""
    names = [STUDENT, *(name for stage in stages for name in stage.adapters)]
    return tuple(dict.fromkeys(names))


def due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
