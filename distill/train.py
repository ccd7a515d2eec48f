"""`turbo-distill train CONFIG [key=value ...] [--resume | --dry-run]`.

Under torchrun: `torchrun --nproc-per-node 8 -m distill train CONFIG`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .config import TINY, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML recipe; presets lie in configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. run_dir=runs/mine stages.0.steps=100",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in run_dir"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe, show plan and estimates, and stop"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        help="real throughput that --dry-run assumes; default 500 (one H100 or H200 in bf16), for "
        "the tiny model 0.05 (two CPU cores)",
    )


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from .plan import describe_plan

        tflops = args.tflops or (0.05 if config.model.path == TINY else 500)
        sys.stdout.write(describe_plan(config, tflops))
        return 0
    from .trainer import train

    path = train(config, resume=args.resume)
    sys.stdout.write(f"{path}\n")
    return 0
