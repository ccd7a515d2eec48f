"""Options that several commands share."""

from __future__ import annotations

import argparse
import re

from ..contract.spec import SAMPLERS, parse_sigmas
from ..models.sizes import Size


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sample` and `eval` say about the base model."""
    group = parser.add_argument_group("base model and teacher")
    group.add_argument(
        "--model",
        metavar="PATH",
        help="base model in diffusers layout, a folder or a hub id (default: the one that the "
        "LoRA's header names)",
    )
    group.add_argument(
        "--size",
        type=parse_size,
        metavar="WxH",
        help="pixels (default: the first size in the LoRA's header)",
    )
    group.add_argument(
        "--teacher-steps", type=int, default=50, metavar="N", help="of the teacher (default: 50)"
    )
    group.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="of the teacher (default: what the LoRA was distilled from, else the base's usual)",
    )
    group.add_argument(
        "--quantize",
        choices=("none", "fp8", "int8"),
        default="none",
        help="hold the base's blocks in 8 bits, for GPUs that the base does not fit into",
    )


def parse_size(text: str) -> Size:
    match = re.fullmatch(r"(\d+)\s*[xX*]\s*(\d+)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"expected WxH such as 1328x1328, found {text!r}")
    return int(match[1]), int(match[2])


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("schedule, for files that do not carry theirs")
    group.add_argument(
        "--sigmas",
        type=sigmas_argument,
        metavar="'1, 0.7155, 0'",
        help="the noise levels the LoRA was trained for, falling to 0; only needed for a file that "
        "does not carry them (`turbo-distill inspect FILE` tells)",
    )
    group.add_argument(
        "--sampler", choices=SAMPLERS, help="euler (the ODE) or renoise (fresh noise per step)"
    )


def sigmas_argument(text: str) -> tuple[float, ...] | None:
    """`parse_sigmas`, with the error that argparse shows; None for an unset shell variable."""
    try:
        return parse_sigmas(text) or None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
