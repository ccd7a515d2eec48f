"""The training loop: walks a recipe's stages and leaves a run folder.

RUN/config.yaml  log.jsonl  previews/step-000100.png  checkpoints/step-000100.pt
lora/NAME.safetensors
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint import (
    latest_checkpoint,
    load_adapters,
    load_optimizers,
    prepare_run_dir,
    save_checkpoint,
)
from .config import Config
from .contract.spec import TurboSpec
from .engine import Engine
from .export import export_lora
from .load import load_data, load_transformer
from .methods import build_method
from .roles import Roles

log = logging.getLogger(__name__)

Preview = Callable[[Roles, TurboSpec, Path], None]


class RunLog:
    """One JSON object per line in `log.jsonl`; only the main rank writes."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path, self.engine = path, engine

    def write(self, step: int, values: dict[str, float | str]) -> None:
        if self.engine.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def train(config: Config, *, resume: bool = False, preview: Preview | None = None) -> Path:
    """Runs all stages of `config`; returns the path of the finished LoRA.

    Raises ConfigError where the run folder already holds a run and `resume` is off.
    """
    engine = Engine.start()

    # Run folder
    run_dir = config.run_dir
    if engine.is_main:
        prepare_run_dir(config, resume)
    engine.barrier()
    run_log = RunLog(run_dir / "log.jsonl", engine)

    # Base, adapters, data
    spec = config.turbo_spec()
    data = load_data(config)
    dtype = getattr(torch, config.model.dtype)
    transformer = load_transformer(config.model.path, dtype).to(engine.device)
    if config.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    negative = data.negative.to(engine.device, dtype)
    roles = Roles(transformer, config.adapter, config.guidance, negative, config.seed)

    # Where to start
    checkpoint = latest_checkpoint(run_dir) if resume else None
    state = (
        torch.load(checkpoint, map_location=engine.device, weights_only=True)
        if checkpoint
        else None
    )
    first = state["step"] if state else 0
    if state:
        load_adapters(roles, state["adapters"])

    # Main loop
    bar = tqdm(
        total=config.total_steps,
        initial=first,
        disable=not engine.is_main,
        mininterval=1,
        unit="step",
    )
    begin = 0
    for stage in config.stages:
        end = begin + stage.steps
        if end <= first:
            begin = end
            continue
        method = build_method(stage, roles, spec, engine)
        if state and begin < first:
            load_optimizers(method, state["optimizers"])
        bar.set_description(stage.method)
        for step in range(max(begin, first), end):
            # One update
            started = time.perf_counter()
            draws = engine.draws(config.seed, step)
            values = method.step(data.batch(draws, stage.batch).to(engine.device, dtype), draws)
            done = step + 1
            bar.update()

            # Log
            if done % config.log_every == 0 or done == end:
                values = engine.mean(values)
                run_log.write(
                    done,
                    {"stage": stage.method, **values, "seconds": time.perf_counter() - started},
                )
                bar.set_postfix(
                    {key: f"{value:.4f}" for key, value in values.items() if key.startswith("loss")}
                )

            # Preview and save; a stage hands the moving average of its weights to the next
            if done == end:
                method.adopt_average()
            if preview and engine.is_main and due(done, config.preview_every, config.total_steps):
                with method.averaged():
                    preview(roles, spec, run_dir / "previews" / f"step-{done:06d}.png")
            if engine.is_main and due(done, config.save_every, config.total_steps):
                save_checkpoint(run_dir, done, roles, method)
        begin = end
    bar.close()

    # Export
    path = run_dir / "lora" / f"{config.name}.safetensors"
    if engine.is_main:
        export_lora(roles, spec, path, title=config.name, extra=header_fields(config))
        log.info("wrote %s", path)
    engine.barrier()
    return path


def due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def header_fields(config: Config) -> dict[str, str]:
    """What the LoRA's header says about its training."""
    return {
        "turbo.config": config.model_dump_json(exclude={"run_dir"}),
        "ss_steps": str(config.total_steps),
        "ss_seed": str(config.seed),
        "ss_learning_rate": str(config.stages[-1].lr),
    }
