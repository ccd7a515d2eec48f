"""`turbo-distill tiny --out FOLDER`: trains the embedded model anew and measures it."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from typing import Any

from ..utils.files import replace_text
from ..utils.values import SEED_MAX
from .options import path_argument, whole
from .result import Result

log = logging.getLogger(__name__)

STAGES = ("vae", "classifier", "teacher", "quality")

ABOUT = """\
Makes the toy Qwen-Image that comes with this package from nothing: VAE, classifier,
teacher, and the measurement of all three. Hours on a CPU; only needed to change the
toy itself. Parts that lie in --out already are continued or kept."""
EXAMPLES = """\
turbo-distill tiny --out runs/tiny
turbo-distill tiny --out runs/tiny --stages quality           # only measure what is there
turbo-distill tiny --out runs/quick --vae-steps 20 --teacher-steps 20"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_argument_group("what to make")
    parts.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="FOLDER",
        help="folder to write; parts already there are kept",
    )
    parts.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="parts to make (default: all)"
    )
    how = parser.add_argument_group("how to train it")
    how.add_argument(
        "--seed", type=whole(0, SEED_MAX), default=0, help="of weights and data (default: 0)"
    )
    how.add_argument("--vae-steps", type=whole(1), default=3600, help="(default: 3600)")
    how.add_argument("--teacher-steps", type=whole(1), default=12_000, help="(default: 12000)")
    how.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile: minutes to start, a third faster after",
    )


def run(args: argparse.Namespace) -> Result:
    from ..tiny import pretrain
    from ..tiny.quality import measure

    measured: dict[str, Any] = {}
    for stage in args.stages:
        log.info("%s", stage)
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
            text = json.dumps(measured, indent=2) + "\n"
            replace_text(args.out / "quality.json", text)
    return Result(
        text=json.dumps(measured, indent=2) + "\n" if measured else "",
        values={"out": str(args.out), "stages": list(args.stages), "quality": measured or None},
        done=f"made {', '.join(args.stages)}",
        wrote=(args.out,),
        next=""
        if measured
        else f"turbo-distill tiny --out {shlex.quote(str(args.out))} --stages quality",
    )
