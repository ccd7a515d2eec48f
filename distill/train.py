"""`turbo-distill train CONFIG [key=value ...] [--resume]`; under torchrun: `torchrun -m
distill train CONFIG`.
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


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from .trainer import train

    preview = None
    if config.model.path == TINY:
        from .tiny.preview import preview
    path = train(config, resume=args.resume, preview=preview)
    sys.stdout.write(f"{path}\n")
    return 0
