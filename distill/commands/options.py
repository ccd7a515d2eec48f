"""Options that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..contract.shown import shown
from ..contract.spec import SAMPLERS, parse_sigmas
from ..models.sizes import Size
from ..utils.values import readable, user_path, with_home

NOISE_SEED_MAX = 2**64 - 1  # of images, as in ComfyUI


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sample` and `eval` say about the base model."""
    group = parser.add_argument_group("base model and teacher")
    group.add_argument(
        "--model",
        type=model_argument,
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
        "--teacher-steps",
        type=whole(1),
        default=50,
        metavar="N",
        help="of the teacher (default: 50)",
    )
    group.add_argument(
        "--guidance",
        type=finite,
        metavar="SCALE",
        help="of the teacher (default: what the LoRA was distilled from, else the base's usual)",
    )
    group.add_argument(
        "--quantize",
        choices=("none", "fp8", "int8"),
        default="none",
        help="hold the base's blocks in 8 bits, for GPUs that the base does not fit into",
    )


def text_argument(text: str) -> str:
    """Text that headers and pictures can hold."""
    with _told():
        return readable(text)


def path_argument(text: str) -> Path:
    """A file or a folder, `~` being home."""
    with _told():
        return user_path(text)


def model_argument(text: str) -> str:
    """A folder or a hub id."""
    with _told():
        return with_home(text)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reads integers from `low` to `high`."""

    def number(text: str) -> int:
        value = int(text) if re.fullmatch(r"[-+]?\d{1,30}", text) else None
        if value is None or value < low or (high is not None and value > high):
            limits = f"{low} or more" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {limits}, found {text}")
        return value

    return number


def finite(text: str) -> float:
    """A number; neither infinite nor nan."""
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise argparse.ArgumentTypeError(f"expected a finite number, found {shown(text)}")


def positive(text: str) -> float:
    """A number above 0."""
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def check_seeds(first: int, count: int) -> None:
    """Raises ValueError unless torch takes the last one of `count` seeds too."""
    if first + count - 1 > NOISE_SEED_MAX:
        raise ValueError(
            f"--seed: expected at most {NOISE_SEED_MAX - count + 1} for {count} images, found "
            f"{first}."
        )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Lets argparse show what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_size(text: str) -> Size:
    match = re.fullmatch(r"([1-9]\d{,4})\s*[xX*]\s*([1-9]\d{,4})", text.strip(), re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"expected WxH such as 1328x1328, found {shown(text)}")
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
