"""`turbo-distill tiny --out FOLDER`: trains the embedded model anew and measures it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..files import replace_file

STAGES = ("vae", "classifier", "teacher", "quality")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; parts already there are kept"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="parts to make (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=3600)
    parser.add_argument("--teacher-steps", type=int, default=12_000)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile: minutes to start, a third faster after",
    )


def run(args: argparse.Namespace) -> int:
    from . import pretrain
    from .quality import measure

    for stage in args.stages:
        sys.stderr.write(f"{stage}\n")
        if stage == "vae":
            pretrain.run_vae(args.out, steps=args.vae_steps, seed=args.seed, compile=args.compile)
        elif stage == "classifier":
            pretrain.run_classifier(args.out, seed=args.seed + 1000)
        elif stage == "teacher":
            pretrain.run_teacher(
                args.out, steps=args.teacher_steps, seed=args.seed, compile=args.compile
            )
        else:
            measured = measure(args.out)
            text = json.dumps(measured, indent=2)
            replace_file(
                args.out / "quality.json",
                lambda p, text=text: p.write_text(text + "\n", encoding="utf-8"),
            )
            sys.stdout.write(text + "\n")
    return 0
