"""`turbo-distill bake BASE LORA --out FILE [--dtype bf16|fp8|int8]`: base + LoRA as one small file.

turbo-distill bake Qwen-Image-2512 turbo.safetensors --out turbo_fp8.safetensors --dtype fp8

The file is for ComfyUI's models/diffusion_models and the node Turbo Baked Loader. Less than 4 GB of
memory, no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from .contract.bake import bake
from .contract.bake_plan import plan_bake
from .contract.rounding import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "base",
        metavar="BASE",
        type=Path,
        help="the bf16 base model: a .safetensors file, a diffusers folder, or its index of shards",
    )
    parser.add_argument("lora", metavar="LORA", type=Path, help="a few-step LoRA for that model")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the new .safetensors file"
    )
    parser.add_argument(
        "--dtype",
        choices=FORMATS,
        default="bf16",
        help="how the large layers are stored; rounded once, after the merge (default: bf16)",
    )
    parser.add_argument(
        "--sigmas",
        metavar="LIST",
        type=_sigmas,
        help="noise levels such as 1,0.7155,0 instead of those that the LoRA was trained for",
    )


def run(args: argparse.Namespace) -> int:
    """Bakes and prints the report."""
    plan = plan_bake(args.base, args.lora, args.out, args.dtype, args.sigmas)
    with tqdm(total=len(plan.tensors), unit="tensor", mininterval=1) as bar:
        report = bake(plan, lambda done, total: bar.update(done - bar.n))
    sys.stdout.write(report.to_text() + "\n")
    return 0


def _sigmas(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers such as 1,0.7155,0; found {text!r}"
        ) from None
