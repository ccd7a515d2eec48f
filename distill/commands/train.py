"""`turbo-distill train CONFIG [key=value ...] [--resume | --dry-run]`.

Under torchrun: `torchrun --nproc-per-node 8 -m distill train CONFIG`.
"""

from __future__ import annotations

import argparse
import shlex

from ..config import Config, load_config
from .options import path_argument, positive
from .result import Result, is_rank_zero

ABOUT = """\
Runs a recipe, stage by stage (PCM, then DMD2, then DMD2 with a GAN), and writes a
LoRA whose header says how it wants to be sampled. Any key of the recipe can be
changed on the command line. --dry-run checks everything and estimates memory and
time without reading a weight. The run folder has a report.html to watch it with;
Ctrl-C saves a checkpoint, --resume goes on from it exactly, or with more steps,
further stages and other rates."""
EXAMPLES = """\
turbo-distill train configs/tiny_cpu.yaml --dry-run           # the plan, in seconds
turbo-distill train configs/tiny_cpu.yaml run_dir=runs/mine   # half an hour on 2 CPU cores
turbo-distill train configs/tiny_cpu.yaml run_dir=runs/mine --resume
turbo-distill train configs/qwen_image_2512_2step.yaml stages.0.batch=2 adapter.rank=32
torchrun --nproc-per-node 8 -m distill train configs/qwen_image_2512_2step_8gpu.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "config", type=path_argument, metavar="CONFIG", help="YAML recipe; presets lie in configs/"
    )
    recipe.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. run_dir=runs/mine stages.0.steps=100",
    )
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in run_dir"
    )
    how.add_argument(
        "--resume-if-begun",
        action="store_true",
        help="the same, or start where run_dir holds no run; for jobs that are started again",
    )
    how.add_argument(
        "--dry-run", action="store_true", help="check the recipe, show plan and estimates, and stop"
    )
    how.add_argument(
        "--tflops",
        type=positive,
        help="what --dry-run assumes that the base's own products reach; other precisions and the "
        "LoRAs in proportion. Default 336 (measured on one H100 in bf16), for the tiny model 0.05 "
        "(two CPU cores)",
    )


def run(args: argparse.Namespace) -> Result:
    from ..models.family import for_base, tell_licence

    config = for_base(load_config(args.config, args.overrides))
    if args.dry_run:
        return dry_run(args, config)
    from ..trainer import train
    from ..training.run_dir import RunDir
    from ..training.run_reader import read_run, summary

    if is_rank_zero():
        tell_licence(config)
    path = train(config, resume=None if args.resume_if_begun else args.resume)
    if not is_rank_zero():
        return Result(quiet=True)
    report = RunDir(config.run_dir).report
    values = {**summary(read_run(config.run_dir)), "lora": str(path)}
    if report.is_file():
        values["report"] = str(report)
    return Result(
        text=f"{path}\n",
        values=values,
        done=f"trained {config.total_steps:,} steps",
        wrote=(path, *([report] if report.is_file() else [])),
        next=shlex.join(["turbo-distill", "eval", str(path)]),
    )


def dry_run(args: argparse.Namespace, config: Config) -> Result:
    from ..models.family import family_of
    from ..training.estimate import plan_text, plan_values

    tflops = args.tflops or family_of(config.model.path).tflops
    values = plan_values(config, tflops)
    problems = len(values["to_look_at"])
    return Result(
        text=plan_text(values),
        values=values,
        done=f"planned, with {problems} to look at" if problems else "planned",
        next=shlex.join(["turbo-distill", "train", str(args.config), *args.overrides]),
    )
