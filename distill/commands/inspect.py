"""`turbo-distill inspect FILE`: what is in a LoRA file and how it wants to be sampled."""

from __future__ import annotations

import argparse
import shlex

from ..contract.describe import describe, to_text
from .options import parse_size, path_argument
from .result import Result

ABOUT = """\
Shows what a LoRA file of any trainer holds: spelling of its keys, ranks, alpha,
precision, header, and the schedule it wants to be sampled with or why that is not
known. No model is loaded. The weights are read once, a few MB at a time: where NaN
or infinity is among them, a warning tells and the exit code is 1."""
EXAMPLES = """\
turbo-distill inspect runs/mine/lora/tiny_turbo_2_steps.safetensors
turbo-distill inspect turbo.safetensors --json | jq .sigmas
turbo-distill inspect turbo.safetensors --size 2048x2048"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=path_argument,
        help="a LoRA in safetensors format, or the folder of one that PEFT saved",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="WxH",
        help="of the image whose sigmas are shown, where they depend on it (default: 1024x1024)",
    )


def run(args: argparse.Namespace) -> Result:
    """Raises LoraFormatError if it is no LoRA, OSError if it cannot be read."""
    description = describe(args.file, args.size)
    finite = not description["not_finite"]
    usable = finite and description["spec"] is not None
    return Result(
        text=to_text(description),
        values=description,
        done=f"read {args.file.name}",
        next=f'turbo-distill sample {shlex.quote(str(args.file))} --prompt "..." --out pictures'
        if usable
        else "",
        code=0 if finite else 1,
    )
